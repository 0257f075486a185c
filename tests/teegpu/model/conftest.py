"""Small model files to read, damage and convert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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


def write_gguf(path: Path, architecture: str = "llama") -> None:
    import gguf
    from tokenizers import pre_tokenizers

    hidden, inner, layers, heads, kv_heads = 64, 128, 2, 4, 2
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<s>", "</s>"]
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h e"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
        "output": (len(tokens), hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (hidden,),
            f"blk.{layer}.ffn_norm": (hidden,),
            f"blk.{layer}.attn_q": (hidden, hidden),
            f"blk.{layer}.attn_k": (kv, hidden),
            f"blk.{layer}.attn_v": (kv, hidden),
            f"blk.{layer}.attn_output": (hidden, hidden),
            f"blk.{layer}.ffn_gate": (inner, hidden),
            f"blk.{layer}.ffn_up": (inner, hidden),
            f"blk.{layer}.ffn_down": (hidden, inner),
        }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0.0, 0.05, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
