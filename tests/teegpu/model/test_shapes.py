from __future__ import annotations

import pytest

from teegpu.errors import UsageError
from teegpu.model.reader import read_spec
from teegpu.model.shapes import SHAPES, parse, spec_of

PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4-350m": 352_379_904,
    "granite-4-1b": 1_631_750_144,
    "granite-4-micro": 3_402_836_480,
    "olmo-2-1b": 1_484_916_736,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "mistral-7b": 7_248_023_552,
}
"""As their makers count them, a tied head once."""


def test_named_shapes_are_those_of_the_real_models() -> None:
    spec = spec_of(parse("tinyllama-1.1b"), "x")
    assert (spec.layers, spec.hidden_size, spec.intermediate_size) == (22, 2048, 5632)
    assert (spec.heads, spec.kv_heads, spec.vocab_size, spec.max_positions) == (32, 4, 32000, 2048)
    assert {name: spec_of(shape, name).parameters for name, shape in SHAPES.items()} == PARAMETERS


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-270m", "gemma-3-1b"])
def test_windows_are_in_the_layers_that_transformers_gives_them(name) -> None:
    from transformers import AutoConfig

    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.architecture, num_hidden_layers=shape.layers)
    expected = tuple(shape.window if kind == "sliding_attention" else None for kind in config.layer_types)
    assert spec_of(shape, name).layer_windows == expected


def test_smollm2s_shape_is_smollm2s(smollm2) -> None:
    made, real = spec_of(parse("smollm2-135m"), "x"), read_spec(smollm2)

    assert made.weights == real.weights
    assert made.rope == real.rope


def test_a_named_shape_can_be_changed() -> None:
    shape = parse("tinyllama-1.1b,layers=4, vocab=1000")

    assert (shape.layers, shape.vocab, shape.hidden) == (4, 1000, 2048)


def test_an_unknown_architecture_is_told_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"unknown architecture 'gpt'.*llama"):
        spec_of(parse("layers=1,hidden=64,architecture=gpt"), "x")
