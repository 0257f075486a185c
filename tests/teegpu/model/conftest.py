"""Small model files to read, damage and convert."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teegpu.model.folder import ModelFolder

CopiedModel = Callable[..., ModelFolder]


@pytest.fixture
def copied_model(tmp_path: Path, tiny_model: Callable[..., ModelFolder]) -> CopiedModel:
    """Like ``tiny_model``, but a copy that the test may damage."""

    def make(architecture: str = "llama", **overrides: object) -> ModelFolder:
        source = tiny_model(architecture, **overrides)
        target = tmp_path / "copied"
        shutil.copytree(source.path, target)
        return replace(source, path=target)

    return make


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file of a random llama with 2 layers and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "Tiny Model.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="session")
def foreign_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file of an architecture that is not supported."""
    path = tmp_path_factory.mktemp("gguf") / "foreign.gguf"
    write_gguf(path, architecture="gpt2")
    return path


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    keys: Mapping[str, object] | None = None,
    tensors: Mapping[str, tuple[int, ...] | np.ndarray | None] | None = None,
    pre: str = "default",
    merges: Sequence[str] = ("h e",),
) -> None:
    """``keys``: further ones, or others. ``tensors``: further ones by shape or content; None: without this one.
    ``merges``: pairs of tokens, each of which makes one more token."""
    import gguf
    from tokenizers import pre_tokenizers

    hidden, inner, layers, heads, kv_heads = 64, 128, 2, 4, 2
    made = [merge.replace(" ", "") for merge in merges]
    gemma = architecture.startswith("gemma")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *made, "<s>", "</s>"]
    if gemma:
        words = ["\u2581", *"abcdefghij", "ab", "\u2581ab", "  "]
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    if gemma:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * len(words))
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(list(merges))
        writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_eos_token_id(len(tokens) - 1)
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)  # type: ignore[operator]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
        "output": (len(tokens), hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_q": (hidden, hidden),
            f"blk.{layer}.attn_k": (kv, hidden),
            f"blk.{layer}.attn_v": (kv, hidden),
            f"blk.{layer}.attn_output": (hidden, hidden),
            f"blk.{layer}.ffn_gate": (inner, hidden),
            f"blk.{layer}.ffn_up": (inner, hidden),
            f"blk.{layer}.ffn_down": (hidden, inner),
        }
        if architecture == "phi3":
            for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
                del shapes[f"blk.{layer}.{name}"]
            shapes |= {f"blk.{layer}.attn_qkv": (hidden + 2 * kv, hidden), f"blk.{layer}.ffn_up": (2 * inner, hidden)}
        if architecture != "olmo2":
            shapes |= {f"blk.{layer}.attn_norm": (hidden,), f"blk.{layer}.ffn_norm": (hidden,)}
        if gemma or architecture == "olmo2":
            shapes |= {f"blk.{layer}.post_attention_norm": (hidden,), f"blk.{layer}.post_ffw_norm": (hidden,)}
        if architecture in ("gemma3", "olmo2"):
            width = hidden // heads
            whole = (hidden, kv) if architecture == "olmo2" else (width, width)
            shapes |= {f"blk.{layer}.attn_q_norm": (whole[0],), f"blk.{layer}.attn_k_norm": (whole[1],)}
    random = np.random.default_rng(0)
    contents: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        spread = 0.2 if "attn" in name and len(shape) > 1 else 0.05  # so that positions matter
        contents[f"{name}.weight"] = random.normal(0.0, spread, shape).astype(np.float32)
    for name, given in (tensors or {}).items():
        contents.pop(name, None)
        if given is not None:
            content = random.normal(0.0, 0.05, given) if isinstance(given, tuple) else given
            contents[name] = content.astype(np.float32)
    for name, content in contents.items():
        writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def converted_once(tmp_path: Path) -> Callable[..., ModelFolder]:
    """``converted_once(**changes)`` → the folder that a .gguf file of ``write_gguf(**changes)`` becomes."""
    from teegpu.model import catalog

    def make(**changes: Any) -> ModelFolder:
        write_gguf(tmp_path / "made.gguf", **changes)
        return catalog.resolve(str(tmp_path / "made.gguf"), cache_dir=tmp_path / "cache")

    return make
