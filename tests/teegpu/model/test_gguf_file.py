from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import catalog, gguf_file
from teegpu.model.gguf_file import GgufError, GgufHeader
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import SINGLE, WeightStore
from tests.teegpu.model.conftest import write_gguf

SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def read(path: Path) -> GgufHeader:
    return gguf_file.read_header(path, SIZES)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(body: bytes, keys: int, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def test_the_header_of_a_file(tiny_gguf) -> None:
    found = read(tiny_gguf)
    assert found.architecture == "llama"
    assert (found.get("block_count"), found.lengths["tokenizer.ggml.tokens"]) == (2, 259)
    assert found.tensors["token_embd.weight"] == (259, 64)
    gguf_file.check(found, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin"),
        (b"GGUF", "ends inside"),
        (header(b"", 1 << 40), "claims 0 tensors and 1099511627776 keys"),
        (header(b"", 0, 1 << 62), "claims 4611686018427387904 tensors"),
        (header(ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 0, 1 << 40) + bytes(100), 2), "items, more than"),
        (header(ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(100), 2), "ends inside"),
        (header(ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 6, 1 << 20) + bytes(100), 2), "claims 4194304 bytes"),
        (header(ARCHITECTURE + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000, 2), "of arrays"),
        (header(struct.pack("<Q", 1 << 60), 1), "claims 1152921504606846976 bytes"),
        (header(ARCHITECTURE + text("a") + struct.pack("<I", 77), 2), "kind 77"),
        (header(ARCHITECTURE + text("t") + struct.pack("<I", 99), 1, 1), "99 dimensions"),
        (header(ARCHITECTURE + text("t") + struct.pack("<IQIQ", 1, 1 << 40, 0, 0), 1, 1), "truncated"),
        (header(ARCHITECTURE + text("t") + struct.pack("<IQIQ", 1, 1, 999, 0), 1, 1), "kind 999"),
        (header(ARCHITECTURE, 1), "holds no tensor"),
    ],
)
def test_counts_are_held_against_what_is_there(tmp_path, content, message) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(GgufError, match=message):
        read(path)
    assert time.monotonic() - began < 5


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused_in_one_line(tiny_gguf, tmp_path, data) -> None:
    content = bytearray(tiny_gguf.read_bytes()[:9000])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    told = ""
    try:
        gguf_file.check(read(path), ())
    except GgufError as error:
        told = str(error)
    assert told
    assert "\n" not in told


# ---- faithful, or refused

REFUSED = [
    ({"tensors": {"blk.0.ffn_up.weight": None}}, "lacks the tensor 'blk.0.ffn_up.weight'"),
    ({"tensors": {"output_norm.weight": None}}, "lacks the tensor 'output_norm.weight'"),
    ({"keys": {"split.count": 2}}, "one of 2 parts"),
    ({"keys": {"llama.expert_count": 8}}, "mixture of 8 experts"),
    ({"tensors": {"blk.0.ffn_gate_inp.weight": (8, 64)}}, "tensor 'blk.0.ffn_gate_inp.weight' is for"),
    ({"tensors": {"blk.1.attn_q.bias": (64,)}}, "tensor 'blk.1.attn_q.bias' is for"),
    ({"tensors": {"rope_freqs.weight": (8,)}}, "'rope_freqs.weight' is not as Llama 3.x has it"),
    ({"tensors": {"rope_factors_long.weight": (8,)}}, "tensor 'rope_factors_long.weight' is for"),
    ({"keys": {"llama.rope.scaling.type": "longrope"}}, "scaled by 'longrope'"),
    ({"keys": {"llama.attention.sliding_window": 16}}, "sliding window of 16"),
    ({"keys": {"llama.logit_scale": 2.0}}, "key 'llama.logit_scale' means"),
    ({"keys": {"llama.residual_scale": 2.0}}, "key 'llama.residual_scale' means"),
    ({"keys": {"tokenizer.ggml.new_thing": 1}}, "key 'tokenizer.ggml.new_thing' means"),
    ({"keys": {"llama.attention.value_length": 8}}, "differ in length"),
    ({"pre": "a-way-of-tomorrow"}, "cuts text ('a-way-of-tomorrow')"),
    ({"architecture": "qwen2"}, "lacks the tensor 'blk.0.attn_k.bias'"),
    ({"architecture": "qwen3"}, "lacks the tensor 'blk.0.attn_k_norm.weight'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_a_conversion_would_drop_or_make_up_is_refused(tmp_path, changes, message) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, **changes)
    found = read(path)

    def convertible() -> None:
        gguf_file.check(found, ("llama-bpe",))
        gguf_file.rope_parameters(found, path)

    with pytest.raises(GgufError) as caught:
        convertible()
    assert caught.value.unfaithful
    assert message in str(caught.value)


def test_a_refusal_reaches_the_user_and_leaves_nothing(tmp_path) -> None:
    path = tmp_path / "part.gguf"
    write_gguf(path, keys={"split.count": 2})
    with pytest.raises(UnsupportedModelError, match=r"part\.gguf can't be converted to what it describes: .* 2 parts"):
        catalog.resolve(str(path), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(ModelError, match="is a Git LFS pointer"):
        catalog.resolve(str(path), cache_dir=tmp_path / "cache")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"keys": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
        (
            {
                "keys": {
                    "llama.rope.scaling.type": "yarn",
                    "llama.rope.scaling.factor": 4.0,
                    "llama.rope.scaling.original_context_length": 64,
                }
            },
            {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"tensors": {"rope_freqs.weight": np.array(gguf_file.llama3_factors(10000.0, 16, 32.0))}}, LLAMA3),
        ({"keys": {"llama.attention.sliding_window": 256}}, None),
    ],
)
def test_how_positions_are_rotated_is_read(tmp_path, changes, expected) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, **changes)
    found = read(path)
    gguf_file.check(found, ())
    assert gguf_file.rope_parameters(found, path) == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_are_those_of_transformers(factor) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=LLAMA3 | {"factor": factor})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / torch.tensor(gguf_file.llama3_factors(10000.0, 128, factor)), scaled, rtol=1e-5)


def test_all_that_a_file_says_is_in_the_folder_that_it_becomes(converted_once) -> None:
    """One conversion, which takes seconds, of a file with everything that transformers would drop."""
    folder = converted_once(
        pre="smollm",
        merges=["h e", "\u010a \u010a", "1 2"],
        keys={
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 4.0,
            "tokenizer.ggml.eot_token_id": 65,
        },
    )
    spec = read_spec(folder)
    assert spec.rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert spec.eos_token_ids == (260, 65)
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode_raw("\n\n12")) == 3  # each digit by itself, before anything else
    assert json.loads((folder.path / "teegpu.json").read_text())["conversion"] == 2
    assert (folder.path / SINGLE).is_file()


GEMMA = {"attention.sliding_window": 16, "attention.key_length": 16, "attention.value_length": 16}


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("gemma3", {**GEMMA, "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 40.0}),
        ("olmo2", {}),
    ],
)
@pytest.mark.extra
def test_a_file_of_a_family_with_norms_after_products(converted_once, tmp_path, architecture, keys) -> None:
    """What is in the folder is what the file says, and computes what transformers makes of the folder."""
    given = {
        "architecture": architecture,
        "keys": {f"{architecture}.{name}": value for name, value in keys.items()},
        "pre": "dbrx",
    }
    path = tmp_path / "x.gguf"
    write_gguf(path, **given)
    folder = converted_once(**given)
    spec = read_spec(folder)
    assert spec.architecture == gguf_file.ARCHITECTURES[architecture]
    stored = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    with WeightStore(folder, spec) as store:
        for ours, theirs in (
            ("layers.1.attention_output_norm", "blk.1.post_attention_norm"),
            ("layers.1.mlp_output_norm", "blk.1.post_ffw_norm"),
            ("layers.0.q_proj", "blk.0.attn_q"),
            ("norm", "output_norm"),
        ):
            assert np.allclose(store.load(ours).numpy(), stored[f"{theirs}.weight"], atol=1e-6), ours
    if architecture == "olmo2":
        assert (spec.qk_norm, spec.norms, spec.layer_windows) == ("whole", "after", (None, None))
        return
    assert spec.layer_windows[0] == 16
    assert (spec.attention_scale, spec.embedding_scale) == (0.25, 8.0)
    if architecture == "gemma2":
        assert (spec.scores_cap, spec.logits_cap) == (40.0, 30.0)
    else:
        assert spec.rope == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
        assert spec.window_rope == {"rope_type": "default", "rope_theta": 10000.0}
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_raw("ab  ab j\u00e9")) == "ab  ab j\u00e9"


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("gemma3", {}, "sliding_window' is 0, not one positive number"),
        ("gemma3", {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping' means"),
        ("gemma2", {"attention.sliding_window": 16, "rope.freq_base_swa": 10000.0}, "freq_base_swa' means"),
        ("olmo2", {"attention.sliding_window": 16}, "it is OLMo 3, with a window of 16"),
        ("phi3", {}, "phi3.attention.sliding_window' is missing"),
        ("phi3", {"attention.sliding_window": 16, "rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ("phi3", {"attention.sliding_window": 16, "rope.dimension_count": 20}, "rotates a part of each head only"),
        ("phi3", {"attention.sliding_window": 16, "logit_scale": 2.0}, "logit_scale' means"),
    ],
)
def test_what_such_a_file_does_not_say_is_not_guessed(tmp_path, architecture, keys, message) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, architecture, keys={f"{architecture}.{name}": value for name, value in keys.items()})
    with pytest.raises(GgufError, match=message):
        gguf_file.check(read(path), ())


LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def phi3(**tensors: np.ndarray | tuple[int, ...] | None) -> dict[str, Any]:
    """A file with two sets of rotary factors for three quarters of each head."""
    keys = {
        "attention.sliding_window": 9,
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.25,
    }
    factors = {LONG: np.linspace(2.0, 9.0, 6), SHORT: np.linspace(1.0, 1.5, 6)} | tensors
    return {
        "architecture": "phi3",
        "keys": {f"phi3.{name}": value for name, value in keys.items()} | {"tokenizer.ggml.padding_token_id": 0},
        "pre": "dbrx",
        "tensors": factors,
    }


@pytest.mark.parametrize("tensors", [{LONG: None}, {SHORT: None}, {LONG: (5,)}, {SHORT: (8,)}, {LONG: (2, 6)}], ids=str)
def test_factors_of_phi_3_that_can_not_be_are_refused(tmp_path, tensors) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, **phi3(**tensors))
    with pytest.raises(GgufError, match="is not as Phi-3 has it"):
        gguf_file.rope_parameters(read(path), path)


@pytest.mark.extra
def test_a_file_of_phi_3_computes_what_transformers_does(converted_once, tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

    path = tmp_path / "x.gguf"
    write_gguf(path, **phi3())
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}
    factors = {"long_factor": stored.pop(LONG).tolist(), "short_factor": stored.pop(SHORT).tolist()}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.25, **factors}
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        sliding_window=9,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_parameters=rope | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16},
    )
    names = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
    model = Phi3ForCausalLM(config)
    for name, content in stored.items():
        *block, kind, _ = name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        model.get_parameter(f"{prefix}{names[kind]}.weight").data = content
    folder = converted_once(**phi3())
    assert read_spec(folder).layer_windows == (9, 9)
    converted = AutoModelForCausalLM.from_pretrained(str(folder.path), dtype=torch.float32)
    with torch.inference_mode():
        for tokens in (12, 40):  # before and after its context in training, where the other factors begin
            ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))
            assert torch.equal(converted(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("layers", "scalar"), [(2, 16), (62, 24)])
def test_the_largest_gemma_divides_its_queries_by_another_width(layers, scalar) -> None:
    keys = {"block_count": layers, "embedding_length": 96, "attention.head_count": 4, "attention.key_length": 16}
    named = {f"gemma3.{name}": value for name, value in keys.items()} | {"general.architecture": "gemma3"}
    assert gguf_file.settings(GgufHeader(named, {}, {}, {}, 0)) == {"query_pre_attn_scalar": scalar}


def test_a_conversion_has_limits() -> None:
    code = (
        "import resource; from teegpu.model.worker import _limit; _limit(1000); "
        "print(*(resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)))"
    )
    memory, seconds = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 4 << 30 < memory < 8 << 30
    assert 300 <= seconds < 400
