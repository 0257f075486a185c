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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teegpu.errors import ModelError, UsageError, nearest
from teegpu.model.byte_tokenizer import BOS_ID, EOS_ID, SMALLEST_VOCABULARY, byte_tokenizer
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30
_BLOCK_VALUES = 4 << 20
_DTYPES = {"bf16": ("BF16", 2), "fp16": ("F16", 2), "fp32": ("F32", 4)}


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model to make. Field names are the keys of a shape given inline.

    Zeros stand for what is usual: 64 values per head, as many KV heads as heads, an inner size of 8/3 of the hidden.
    """

    layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 32000
    context: int = 4096
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    architecture: str = "llama"
    tied: bool = False
    window: int = 0


SHAPES: dict[str, Shape] = {
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 64, 32000, 2048),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, 8192, rope_theta=100000.0, tied=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, 131072, rope_theta=500000.0, tied=True),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, 8192, rope_theta=500000.0),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6, 1e-6, "qwen2", tied=True),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6, "qwen3", tied=True),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 128, 32768, 32768, 1e6, architecture="mistral"),
}


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

    ``shape`` is a name of ``SHAPES``, ``key=value,…`` over the fields of ``Shape``, or both, as in
    ``tinyllama-1.1b,layers=4``. ``dtype`` is bf16, fp16 or fp32. Raises ``UsageError`` for a shape that can't be and
    for a folder that is not empty, ``ModelError`` when the folder can't be written; then nothing is left of it.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}' for random weights: choose one of {', '.join(_DTYPES)}")
    spec = spec_of(parse(shape) if isinstance(shape, str) else shape, out.name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: give a new folder with --out")
    try:
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


def parse(text: str) -> Shape:
    """The shape that ``text`` names or spells out. Raises ``UsageError``."""
    head, *rest = text.split(",")
    settings = rest if "=" not in head else [head, *rest]
    if "=" not in head and head not in SHAPES:
        raise UsageError(
            f"unknown shape '{head}'{nearest(head, list(SHAPES))} (known are: {', '.join(SHAPES)}; "
            "or spell it out: layers=4,hidden=256)"
        )
    shape = SHAPES.get(head, Shape())
    kinds = {field.name: type(field.default) for field in fields(Shape)}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in kinds:
            raise UsageError(
                f"unknown key '{key}' in shape '{text}'{nearest(key, list(kinds))} (known are: {', '.join(kinds)})"
            )
        changes[key] = _value(kinds[key], key, value)
    return replace(shape, **changes)


def spec_of(shape: Shape, name: str) -> ModelSpec:
    """The complete dimensions of ``shape``. Raises ``UsageError`` where they can't be."""
    from teegpu.model.reader import ARCHITECTURES

    if shape.architecture not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{shape.architecture}': choose one of {', '.join(ARCHITECTURES)}")
    least = {"layers": 1, "hidden": 1, "context": 1, "rope_theta": 1, "rms_eps": 1e-12, "vocab": SMALLEST_VOCABULARY}
    for key, value in asdict(shape).items():
        if not isinstance(value, str) and value < least.get(key, 0):
            raise UsageError(f"{key}={value} in the shape is too small: {least.get(key, 0)} is the least")
    head_dim = shape.head_dim or (shape.hidden // shape.heads if shape.heads else min(64, shape.hidden))
    heads = shape.heads or max(1, shape.hidden // max(1, head_dim))
    kv_heads = shape.kv_heads or heads
    if head_dim < 2 or head_dim % 2 or heads % kv_heads:
        raise UsageError(
            f"{heads} heads, {kv_heads} KV heads and {head_dim} values per head don't fit: "
            "heads must be a multiple of KV heads, and head_dim even"
        )
    return ModelSpec(
        name=name,
        architecture=shape.architecture,
        layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 8 * math.ceil(shape.hidden / 3),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=shape.vocab,
        max_positions=shape.context,
        rms_eps=shape.rms_eps,
        rope={"rope_theta": shape.rope_theta, "rope_type": "default"},
        layer_windows=((shape.window or None) if shape.architecture != "llama" else None,) * shape.layers,
        qkv_bias=shape.architecture == "qwen2",
        qk_norm=shape.architecture == "qwen3",
        tied_embeddings=shape.tied,
        eos_token_ids=(EOS_ID,),
    )


def _value(kind: type, key: str, value: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"'{key}={value}': the value must be {expected}") from None


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
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config: dict[str, Any] = {
        "architectures": [f"{classes[spec.architecture]}ForCausalLM"],
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
