"""Models with random weights: the exact shape of a real one, for benchmarks where that one can't be had.

Written block by block, so the memory needed does not grow with the model. Equal arguments give equal files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teegpu.errors import ModelError, UsageError
from teegpu.model.byte_tokenizer import BOS_ID, EOS_ID, byte_tokenizer
from teegpu.model.folder import ModelFolder
from teegpu.model.shapes import Shape, parse, spec_of
from teegpu.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30
_BLOCK_VALUES = 4 << 20
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""The architectures whose configuration is written, and how transformers' classes of them begin. The others have more
than dimensions to say."""
_DTYPES = {"bf16": ("BF16", 2), "fp16": ("F16", 2), "fp32": ("F32", 4)}


def write(
    shape: str | Shape,
    out: Path,
    seed: int = 0,
    dtype: str = "bf16",
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, float | None], None] | None = None,
) -> ModelFolder:
    """Make a model of ``shape`` in the new folder ``out``: weights, config, tokenizer, chat template.

    ``shape`` is a name of ``shapes.SHAPES``, ``key=value,…`` over the fields of ``Shape``, or both, as in
    ``tinyllama-1.1b,layers=4``. ``dtype`` is bf16, fp16 or fp32. Raises ``UsageError`` for a shape that can't be and
    for a folder that is not empty, ``ModelError`` when the folder can't be written; then nothing is left of it.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}' for random weights: choose one of {', '.join(_DTYPES)}")
    spec = spec_of(parse(shape) if isinstance(shape, str) else shape, out.name)
    if spec.architecture not in _CLASSES:
        raise UsageError(
            f"a random model can't be of the architecture '{spec.architecture}': choose one of {', '.join(_CLASSES)}"
        )
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is not empty: give a new folder with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}~", dir=out.parent))
        try:
            _write_weights(spec, work, seed, dtype, shard_bytes, progress)
            _write_config(spec, work, dtype)
            byte_tokenizer(spec.vocab_size).save_pretrained(work)
            work.chmod(0o755)
            work.replace(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        what = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ModelError(f"the model can't be written to {out} ({what}): give another folder with --out") from error
    return ModelFolder(out.resolve().name, out.resolve())


def _shards(spec: ModelSpec, item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """The weights' names, cut where a shard would become too large. A tied lm_head is not written."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in spec.weights.items():
        if name == "lm_head" and spec.tied_embeddings:
            continue
        size = math.prod(shape) * item_bytes
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_weights(
    spec: ModelSpec,
    folder: Path,
    seed: int,
    dtype: str,
    shard_bytes: int,
    progress: Callable[[str, float | None], None] | None,
) -> None:
    from teegpu.model.weights import INDEX, SINGLE, checkpoint_name

    type_name, item_bytes = _DTYPES[dtype]
    shards = _shards(spec, item_bytes, shard_bytes)
    done, total = 0, spec.parameters
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + math.prod(spec.weights[name]) * item_bytes
            tensor = checkpoint_name(name)
            header[tensor] = {"dtype": type_name, "shape": spec.weights[name], "data_offsets": [offset, end]}
            places[tensor] = file_name
            offset = end
        with (folder / file_name).open("wb") as file:
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for block in _values(spec, name, seed, dtype):
                    file.write(block)
                    done += len(block) // item_bytes
                    if progress is not None:
                        progress("writing random weights", done / total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total * item_bytes}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _values(spec: ModelSpec, name: str, seed: int, dtype: str) -> Iterator[memoryview]:
    """The bytes of a weight, in blocks. Its generator depends on the seed and its name alone, not on its place.

    Uniform values of such a spread that activations neither grow nor vanish from layer to layer, so that all stay far
    from fp16's limits; norms lie around one.
    """
    import torch

    from teegpu.model.weights import bytes_of

    torch_dtype: torch.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    low, high = _range(spec, name)
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    left = math.prod(spec.weights[name])
    block = torch.empty(min(left, _BLOCK_VALUES))
    while left > 0:
        part = block[: min(left, _BLOCK_VALUES)]
        part.uniform_(low, high, generator=generator)
        yield bytes_of(part.to(torch_dtype))
        left -= part.numel()


def _range(spec: ModelSpec, name: str) -> tuple[float, float]:
    if name.endswith("norm"):
        return 0.9, 1.1
    if name.endswith(".bias"):
        return -0.1, 0.1
    spread = 1.0 if name == "embed_tokens" and not spec.tied_embeddings else 1.0 / math.sqrt(spec.weights[name][-1])
    if name.endswith(("o_proj", "down_proj")):
        spread /= math.sqrt(2 * spec.layers)  # they add to the residual, twice a layer
    limit = spread * math.sqrt(3)  # a uniform distribution's deviation is its half-width over the root of 3
    return -limit, limit


def _write_config(spec: ModelSpec, folder: Path, dtype: str) -> None:
    config: dict[str, Any] = {
        "architectures": [f"{_CLASSES[spec.architecture]}ForCausalLM"],
        "model_type": spec.architecture,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_eps,
        "rope_parameters": spec.rope,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
    }
    window = spec.layer_windows[0]
    if spec.architecture == "mistral":
        config["sliding_window"] = window
    elif spec.architecture in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    if spec.architecture in ("llama", "qwen3"):
        config["attention_bias"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
