"""The dimensions of models that are known by name, and of those that are spelled out: one table for the catalogue, for
models with random weights and for predictions of what is not here. Nothing here needs torch, nor a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from teegpu.errors import UsageError, nearest
from teegpu.model.arch import ALWAYS, ARCHITECTURES, FULL, Architecture
from teegpu.model.byte_tokenizer import EOS_ID, SMALLEST_VOCABULARY
from teegpu.model.spec import ModelSpec


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model to make. Field names are the keys of a shape given inline.

    Zeros stand for what is usual: 64 values per head, as many KV heads as heads, an inner size of 8/3 of the hidden, no
    window. ``full_every``: of so many layers the last one has no window; 0: each has it.
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
    full_every: int = 0


SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5, tied=True),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 64, 49152, 8192, 1e5, tied=True),
    "smollm2-1.7b": Shape(24, 2048, 8192, 32, 32, 64, 49152, 8192, 130000.0, tied=True),
    "smollm3-3b": Shape(36, 2048, 11008, 16, 4, 128, 128256, 65536, 5e6, 1e-6, "smollm3", tied=True),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 64, 32000, 2048),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, tied=True),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, 131072, 5e5, tied=True),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, 8192, 5e5),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, 8192, 5e5),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6, 1e-6, "qwen2", tied=True),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, 32768, 1e6, 1e-6, "qwen2", tied=True),
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e6, 1e-6, "qwen2"),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6, "qwen3", tied=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151936, 40960, 1e6, 1e-6, "qwen3", tied=True),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, 262144, 5e6, 1e-6, "qwen3", tied=True),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151936, 40960, 1e6, 1e-6, "qwen3"),
    "granite-3.3-2b": Shape(40, 2048, 8192, 32, 8, 64, 49159, 131072, 1e7, 1e-5, "granite", tied=True),
    "granite-3.3-8b": Shape(40, 4096, 12800, 32, 8, 128, 49159, 131072, 1e7, 1e-5, "granite", tied=True),
    "granite-4-350m": Shape(28, 1024, 2048, 16, 4, 64, 100352, 32768, 1e7, 1e-5, "granitemoehybrid", tied=True),
    "granite-4-1b": Shape(40, 2048, 4096, 16, 4, 128, 100352, 131072, 1e7, 1e-5, "granitemoehybrid", tied=True),
    "granite-4-micro": Shape(40, 2560, 8192, 40, 8, 64, 100352, 131072, 1e7, 1e-5, "granitemoehybrid", tied=True),
    "olmo-2-1b": Shape(16, 2048, 8192, 16, 16, 128, 100352, 4096, 5e5, 1e-6, "olmo2"),
    "gemma-2-2b": Shape(26, 2304, 9216, 8, 4, 256, 256000, 8192, 1e4, 1e-6, "gemma2", True, 4096, 2),
    "gemma-3-270m": Shape(18, 640, 2048, 4, 1, 256, 262144, 32768, 1e6, 1e-6, "gemma3_text", True, 512, 6),
    "gemma-3-1b": Shape(26, 1152, 6912, 4, 1, 256, 262144, 32768, 1e6, 1e-6, "gemma3_text", True, 512, 6),
    "phi-3.5-mini": Shape(32, 3072, 8192, 32, 32, 96, 32064, 131072, 1e4, 1e-5, "phi3", window=262144),
    "phi-4-mini": Shape(32, 3072, 8192, 24, 8, 128, 200064, 131072, 1e4, 1e-5, "phi3", True, 262144),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 128, 32768, 32768, 1e6, architecture="mistral"),
}
"""As the models' own configurations have them; what rotary angles are scaled by is left out."""


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
    row = ARCHITECTURES.get(shape.architecture)
    if row is None:
        raise UsageError(f"unknown architecture '{shape.architecture}': choose one of {', '.join(ARCHITECTURES)}")
    least = {"layers": 1, "hidden": 1, "context": 1, "rope_theta": 1, "rms_eps": 1e-12, "vocab": SMALLEST_VOCABULARY}
    default = asdict(Shape())
    for key, value in asdict(shape).items():
        if not isinstance(value, str) and value < least.get(key, 0):
            wrong = f"the shape says no {key}" if value == default[key] else f"{key}={value} in the shape is too small"
            raise UsageError(f"{wrong}: {key}={least.get(key, 0)} is the least")
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
        layer_windows=tuple(_windows(shape, row)),
        qkv_bias=row.qkv_bias == ALWAYS,
        qk_norm=row.qk_norm,
        norms=row.norms,
        tied_embeddings=shape.tied,
        eos_token_ids=(EOS_ID,),
    )


def _windows(shape: Shape, row: Architecture) -> Iterator[int | None]:
    for layer in range(1, shape.layers + 1):
        full = row.windows == FULL or (shape.full_every and layer % shape.full_every == 0)
        yield None if full else shape.window or None


def _value(kind: type, key: str, value: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"'{key}={value}': the value must be {expected}") from None
