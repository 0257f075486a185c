from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from teegpu.errors import UnsupportedModelError
from teegpu.tee.rotary import RotaryTable


def config(**rope: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope}
    )


def table(of: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = RotaryTable(of)
    rotary.prepare(length)
    return rotary.at(0, length)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
@pytest.mark.parametrize("length", [1, 40, 100])
def test_angles_are_those_of_transformers(rope: dict[str, object], length: int) -> None:
    settings = config(**rope)
    cos, sin = LlamaRotaryEmbedding(settings)(torch.zeros(1), torch.arange(length)[None])
    got_cos, got_sin = table(settings, length)
    torch.testing.assert_close(got_cos[:, 0], cos[0, :, :4], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got_sin[:, 0], sin[0, :, :4], atol=1e-6, rtol=1e-6)


def test_the_table_is_kept_between_passes() -> None:
    rotary = RotaryTable(config(rope_type="default"))
    rotary.prepare(10)
    before = rotary.at(0, 10)[0].data_ptr()
    rotary.prepare(11)
    assert rotary.at(0, 10)[0].data_ptr() == before


@pytest.mark.parametrize("length", [20, 60])
def test_dynamic_angles_are_the_same_after_a_longer_sequence(length: int) -> None:
    rotary = RotaryTable(config(rope_type="dynamic", factor=2.0))
    rotary.prepare(length)
    before = rotary.at(0, length)[0].clone()
    rotary.prepare(100)
    assert not torch.equal(rotary.at(0, length)[0], before)
    rotary.prepare(length)
    assert torch.equal(rotary.at(0, length)[0], before)


def test_an_unknown_kind_is_named() -> None:
    settings = config(rope_type="default")
    settings.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(UnsupportedModelError, match="'spiral' is not supported; supported are default"):
        RotaryTable(settings)
