from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import reader
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_config, read_spec
from tests.conftest import TinyModel


def change(folder: ModelFolder, file: str = "config.json", **values: Any) -> None:
    path = folder.path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_llama(tiny_model) -> None:
    spec = read_spec(tiny_model("llama", num_hidden_layers=3))

    assert (spec.architecture, spec.layers, spec.hidden_size, spec.intermediate_size) == ("llama", 3, 32, 64)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab_size, spec.max_positions) == (4, 2, 8, 272, 256)
    assert spec.layer_windows == (None, None, None)
    assert spec.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert spec.eos_token_ids == (257,)
    extras = (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm, spec.tied_embeddings)
    assert not any(extras)


def test_biases_and_norms_of_each_architecture(tiny_model) -> None:
    biased = read_spec(tiny_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    qwen2, qwen3 = read_spec(tiny_model("qwen2")), read_spec(tiny_model("qwen3", attention_bias=True))

    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias, biased.tied_embeddings) == (True, True, True, True)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (True, True, False, True)


def test_sliding_windows(tiny_model) -> None:
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}

    assert read_spec(tiny_model("mistral", sliding_window=16)).layer_windows == (16, 16)
    assert read_spec(tiny_model("mistral")).layer_windows == (None, None)
    assert read_spec(tiny_model("qwen2", **window)).layer_windows == (None, 16)
    assert read_spec(tiny_model("qwen3", **window)).layer_windows == (None, 16)
    assert read_spec(tiny_model("qwen3", **window | {"use_sliding_window": False})).layer_windows == (None, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_is_kept_and_transformers_computes_frequencies_from_the_config(tiny_model, rope) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = tiny_model("llama", rope_parameters=rope | {"rope_theta": 5000.0})
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](read_config(folder), "cpu")

    assert read_spec(folder).rope == rope | {"rope_theta": 5000.0}
    assert frequencies.shape == (4,)


def test_rope_in_the_older_form_reads_the_same(copied_model) -> None:
    folder = copied_model("llama")
    change(folder, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})

    assert read_spec(folder).rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}


def test_eos_ids_of_both_files_come_once_each(copied_model) -> None:
    folder = copied_model("llama")
    change(folder, eos_token_id=[257, 7])
    change(folder, "generation_config.json", eos_token_id=[9, 257])

    assert read_spec(folder).eos_token_ids == (9, 257, 7)


def test_a_model_without_eos_has_none(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / "generation_config.json").unlink()
    change(folder, eos_token_id=None)

    assert read_spec(folder).eos_token_ids == ()


def test_unknown_keys_of_a_config_are_ignored(copied_model) -> None:
    folder = copied_model("llama")
    change(folder, written_by="someone else", pretraining_tp=4, use_cache=False)

    assert read_spec(folder).layers == 2


def test_an_unsupported_architecture_is_named_with_the_supported_ones(copied_model) -> None:
    folder = copied_model("llama")
    change(folder, model_type="gpt_neox")

    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox'.*llama, mistral, qwen2, qwen3"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'.*silu"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised.*awq"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'.*llama3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'.*sliding_attention"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(copied_model, architecture, values, message) -> None:
    folder = copied_model(architecture)
    change(folder, **values)

    with pytest.raises(UnsupportedModelError, match=message):
        read_spec(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "{}", '{"model_type": 3}', "\udcff", "[" * 100_000])
def test_a_corrupt_config_is_one_clear_line(copied_model, text) -> None:
    folder = copied_model("llama")
    (folder.path / "config.json").write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "large"}, "config.json can't be used"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 3}, "can't share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_dimensions_that_can_not_be_are_refused(copied_model, values, message) -> None:
    folder = copied_model("llama")
    change(folder, **values)

    with pytest.raises(ModelError, match=message):
        read_spec(folder)


def test_a_missing_config_says_how_to_repair(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing: restore the file"):
        read_spec(ModelFolder("mine", tmp_path))
    with pytest.raises(ModelError, match="'teegpu model pull theirs --force'"):
        read_spec(ModelFolder("theirs", tmp_path, "theirs"))


def test_a_config_that_was_read_before_is_not_read_again(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for architecture in ("llama", "mistral", "qwen2", "qwen3"):
        folder = tiny_model(architecture, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
        first = read_spec(folder)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "read_config", None)  # it would be called in vain
            assert read_spec(folder) == first


def test_another_config_in_the_same_place_is_read(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model"
    shutil.copytree(tiny_model("llama").path, path)
    folder = ModelFolder("copy", path)
    assert read_spec(folder).rms_eps == 1e-6
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(text | {"rms_norm_eps": 0.5}))
    assert read_spec(folder).rms_eps == 0.5


@pytest.mark.parametrize("content", ["", "[]", '{"read": [], "values": {}}', '{"read": 1'])
def test_a_damaged_cache_is_no_error(
    content: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny_model("llama")
    first = read_spec(folder)
    (kept,) = (tmp_path / "teegpu" / "configs").iterdir()
    kept.write_text(content)
    assert read_spec(folder) == first
    assert json.loads(kept.read_text())["values"]["model_type"] == "llama"
