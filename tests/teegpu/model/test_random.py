from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from teegpu.errors import ModelError, UsageError
from teegpu.model import random
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore

SMALL = "layers=2,hidden=64,heads=4,kv_heads=2,vocab=300,context=128"


def digest(path: Path, name: str = "x") -> str:
    folder = random.ModelFolder(name, path)
    with WeightStore(folder, read_spec(folder)) as store:
        return store.digest()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_random_model_loads_in_transformers_and_stays_finite(tmp_path, architecture, tied) -> None:
    from transformers import AutoModelForCausalLM

    folder = random.write(f"{SMALL},architecture={architecture},tied={tied},layers=8", tmp_path / "made")
    model, report = AutoModelForCausalLM.from_pretrained(
        str(folder.path), dtype=torch.bfloat16, output_loading_info=True
    )
    with torch.no_grad():
        output = model(torch.arange(64)[None], output_hidden_states=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 0.05 < output.logits.float().std() < 20
    assert all(state.abs().max() < 100 for state in output.hidden_states)


def test_the_shape_is_what_was_asked_for(tmp_path) -> None:
    folder = random.write(f"{SMALL},architecture=mistral,window=16,rope_theta=5000,intermediate=96", tmp_path / "made")
    spec = read_spec(folder)

    assert (spec.layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size) == (2, 64, 96, 300)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.max_positions) == (4, 2, 16, 128)
    assert (spec.layer_windows, spec.rope["rope_theta"]) == ((16, 16), 5000.0)
    with WeightStore(folder, spec) as store:
        assert store.stored_dtype("layers.0.q_proj") == torch.bfloat16


def test_equal_arguments_give_equal_weights_however_they_are_cut(tmp_path) -> None:
    one = random.write(SMALL, tmp_path / "one", seed=3)
    cut = random.write(SMALL, tmp_path / "cut", seed=3, shard_bytes=50_000)
    other = random.write(SMALL, tmp_path / "other", seed=4)

    assert len(list(cut.path.glob("*.safetensors"))) > 2
    assert digest(one.path) == digest(cut.path) != digest(other.path)


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_dtypes(tmp_path, dtype, stored) -> None:
    folder = random.write(SMALL, tmp_path / "made", dtype=dtype)
    with WeightStore(folder, read_spec(folder)) as store:
        assert store.stored_dtype("lm_head") == stored


def test_any_text_can_be_encoded_and_any_token_decoded(tmp_path) -> None:
    tokenizer = Tokenizer(random.write(SMALL, tmp_path / "made"))
    text = "Is it é or 日本 😀?"

    assert tokenizer.decode(tokenizer.encode_raw(text)) == text
    assert tokenizer.decode(tokenizer.encode_chat(text)).endswith(text)
    assert tokenizer.vocab_size == 300
    words = [tokenizer.decode([token]) for token in range(261, 300)]
    assert all(words)
    assert len(set(words)) == len(words)
    assert tokenizer.eos_token_ids == (257,)


def test_progress_ends_at_one(tmp_path) -> None:
    shares = []
    random.write(SMALL, tmp_path / "made", progress=lambda _, share: shares.append(share))

    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("tinylama-1.1b", r"unknown shape 'tinylama-1\.1b', did you mean 'tinyllama-1\.1b'.*smollm2-135m"),
        ("layer=2", r"unknown key 'layer'.*did you mean 'layers'"),
        ("layers=two,hidden=64", r"'layers=two': the value must be a whole number"),
        ("layers=2,hidden=64,tied=1", r"'tied=1': the value must be true or false"),
        ("layers=2,hidden=64,rope_theta=x", r"must be a number"),
        ("layers=2", r"the shape says no hidden: hidden=1 is the least"),
        ("layers=2,hidden=64,vocab=100", r"vocab=100 in the shape is too small: vocab=261"),
        ("layers=2,hidden=64,heads=3,kv_heads=2", r"3 heads, 2 KV heads and 21 values per head don't fit"),
        ("layers=2,hidden=64,architecture=gpt2", r"unknown architecture 'gpt2'.*qwen3"),
        ("", r"unknown shape ''"),
    ],
)
def test_a_shape_that_can_not_be_is_refused(tmp_path, shape, message) -> None:
    with pytest.raises(UsageError, match=message):
        random.write(shape, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"'int4'.*bf16, fp16, fp32"):
        random.write(SMALL, tmp_path / "made", dtype="int4")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty.*--out"):
        random.write(SMALL, tmp_path)
    with pytest.raises(UsageError, match="is not empty"):
        random.write(SMALL, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path) -> None:
    (tmp_path / "made").mkdir()

    assert json.loads((random.write(SMALL, tmp_path / "made").path / "config.json").read_text())["vocab_size"] == 300


def test_a_folder_that_can_not_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"can't be written to .*file/made.*--out"):
        random.write(SMALL, tmp_path / "file" / "made")


def test_a_folder_that_can_not_be_looked_at_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"can't be written to .* \(File name too long\)"):
        random.write(SMALL, tmp_path / ("a" * 300))


def test_an_interrupt_leaves_nothing(tmp_path) -> None:
    def interrupt(text: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random.write(SMALL, tmp_path / "made", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
