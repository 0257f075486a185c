from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import reader
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_config, read_spec, rotary_config, suggested_sampling, unapplied
from tests.conftest import TinyModel
from tests.teegpu import families


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
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, "")
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (True, True, False, "heads")


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

    spec = read_spec(folder)
    again, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](rotary_config(spec), "cpu")
    assert spec.rope.items() >= (rope | {"rope_theta": 5000.0}).items()
    assert again.equal(frequencies)
    assert frequencies.shape == (4,)


def test_rope_in_the_older_form_reads_the_same(copied_model) -> None:
    folder = copied_model("llama")
    change(folder, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})

    assert read_spec(folder).rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}


LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "older", "rope", "window_rope"),
    [
        ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}, LOCAL | {"rope_theta": 1e6}, LOCAL),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            LOCAL,
        ),
        ("olmo3", {"rope_theta": 5e5}, LOCAL | {"rope_theta": 5e5}, LOCAL | {"rope_theta": 5e5}),
        (
            "olmo3",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0}},
            {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "beta_fast": 32.0},
            LOCAL | {"rope_theta": 5e5},
        ),
    ],
)
def test_angles_of_layers_with_a_window_are_read_in_the_older_form(
    copied_model, architecture, older, rope, window_rope
) -> None:
    folder = copied_model(architecture, **families.WINDOWS)
    change(folder, rope_parameters=None, **older)
    spec = read_spec(folder)
    assert spec.rope.items() >= rope.items()
    assert spec.window_rope == window_rope
    assert spec.layer_windows == (7, None)


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

    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox', which is not supported; .*llama, .*qwen3.*granite"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("qwen3_next", "keep a state"),
        ("falcon_h1", "keep a state"),
        ("qwen3_5_moe", "mixture of experts"),
        ("granitemoe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("qwen3_5", "keep a state"),
        ("olmo_hybrid", "keep a state"),
        ("gemma3n", "images or sounds"),
        ("qwen2_5_vl", "images or sounds"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(copied_model, name, reason) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{name}', which is not supported: .*{reason}"):
        read_spec(configured(copied_model("llama"), model_type=name))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_local_experts": 8}, "it is a mixture of experts"),
        ({"num_local_experts": 8, "layer_types": ["attention", "mamba"]}, "it is a mixture of experts"),
        ({"layer_types": ["attention", "mamba"]}, "some of its layers keep a state"),
        ({"layer_types": None}, "some of its layers keep a state"),
    ],
)
def test_of_granite_4_dense_models_are_read_alone(copied_model, values, reason) -> None:
    folder = copied_model("granitemoehybrid", **families.GRANITE_4)
    assert read_spec(folder).intermediate_size == 48
    change(folder, **values)

    with pytest.raises(UnsupportedModelError, match=rf"of which dense models are supported alone: {reason}"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'.*silu"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("olmo2", {"attention_bias": True}, "with a bias in it"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "'dynamic' in some of its layers",
        ),
        ("llama", {"quantization_config": {"quant_method": "hqq", "bits": 4}}, "quantised.*hqq"),
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
        ({"num_attention_heads": 0, "head_dim": None}, "config.json can't be used"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 3}, "can't share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ({"model_type": "olmo3", "sliding_window": None}, "sliding_window is missing"),
        ({"model_type": "ministral3", "rope_parameters": {"rope_theta": 1e4}}, "llama_4_scaling_beta of its rotary"),
    ],
)
def test_dimensions_that_can_not_be_are_refused(copied_model, values, message) -> None:
    folder = copied_model("llama")
    change(folder, **{"sliding_window": 7, "rope_parameters": None} | values)

    with pytest.raises(ModelError, match=message):
        read_spec(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff", "\ufeff{}", "[" * 100_000], ids=range(8))
def test_a_corrupt_file_of_what_need_not_be_there_is_one_clear_line(copied_model, text) -> None:
    folder = copied_model("llama")
    (folder.path / "generation_config.json").write_text(text, "utf-8", errors="surrogateescape")
    for read in (read_spec, suggested_sampling, unapplied):
        with pytest.raises(ModelError, match=r"generation_config\.json (is not valid JSON|holds no JSON)") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "\x1b[2J"},
        {"hidden_act": "\x1b]52;c;eA\x07"},
        {"rope_scaling": {"rope_type": "\x9b31m", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": "\x1b"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": "\u202e"}},
        {"layer_types": ["\x1b[2J"]},
        {"hidden_size": "\x1b[2J"},
        {"quantization_config": {"quant_method": "\x1b[2J"}},
    ],
)
def test_what_a_config_says_is_no_escape_sequence(copied_model, values) -> None:
    folder = copied_model("llama")
    change(folder, **values)
    with pytest.raises((ModelError, UnsupportedModelError)) as caught:
        read_spec(folder)
    assert str(caught.value).isprintable()


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


def configured(folder: ModelFolder, file: str = "config.json", **changes: object) -> ModelFolder:
    path = folder.path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 256),
    ],
)
def test_scaling_extends_the_context(copied_model, rope, tokens) -> None:
    folder = configured(copied_model("llama"), rope_parameters=rope | {"rope_theta": 1e4})
    assert read_spec(folder).max_positions == tokens


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": "2.0"}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": None}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": -2.0}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": True}},
        {"rope_theta": None},
        {"rope_theta": 0},
        {"rope_theta": "1e4"},
        {"rope_theta": float("inf")},
    ],
)
def test_rope_values_of_a_wrong_kind_name_the_file(copied_model, changes) -> None:
    folder = configured(copied_model("llama"), rope_parameters=None, **changes)
    with pytest.raises(ModelError, match=r"config\.json'? can't be") as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_every_way_to_say_quantised_is_understood(copied_model, key) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(hqq"):
        read_spec(configured(copied_model("llama"), **{key: {"quant_method": "hqq"}}))


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # transformers draws where do_sample says so alone
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
         {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1}),
        ({"do_sample": True, "temperature": "hot", "top_k": -1, "top_p": 7, "min_p": None}, {}),
        ({"do_sample": 1, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
    ],
)  # fmt: skip
def test_what_a_model_would_have_tokens_drawn_by(
    copied_model, given: dict[str, Any], suggested: dict[str, Any]
) -> None:
    folder = configured(copied_model("llama"), "generation_config.json", **given)
    assert suggested_sampling(folder) == suggested
    (folder.path / "generation_config.json").unlink()
    assert suggested_sampling(folder) == {}


def test_what_is_not_applied_of_generation_settings_is_known(copied_model) -> None:
    folder = copied_model("llama")
    assert unapplied(folder) == []
    configured(folder, "generation_config.json", repetition_penalty=1.3, temperature=0.6, no_repeat_ngram_size=0)
    assert unapplied(folder) == ["repetition_penalty=1.3"]
    (folder.path / "generation_config.json").unlink()
    assert unapplied(folder) == []
