"""What a .gguf file says of itself, read with bounds, and whether the model that it holds can be converted faithfully.

The libraries that read such files believe their counts, drop what they have no use for and make up what is missing. So
the header is read here first: every count is held against the bytes that are there, and every key and every tensor has
to be one that the conversion knows. What it does not know is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teegpu.units import printable

ARCHITECTURES: Final[Mapping[str, str]] = {
    **{name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3")},
    "gemma3": "gemma3_text",
}
"""Those of files that are converted, and of what they become."""

MOST_HEADER_BYTES: Final = 64 << 20  # a vocabulary of 262,144 tokens with its merges has some 20 MB
MOST_ITEMS: Final = 1 << 22  # of all arrays together
MOST_TENSORS: Final = 1 << 16
_KEPT_ITEMS: Final = 64

_LAYER: Final = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_HEAD_NORMS: Final = ("attn_q_norm.weight", "attn_k_norm.weight")
_OUTPUT_NORMS: Final = ("post_attention_norm.weight", "post_ffw_norm.weight")
_EXTRA: Final[Mapping[str, tuple[str, ...]]] = {
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": _HEAD_NORMS,
    "gemma2": _OUTPUT_NORMS,
    "gemma3": (*_OUTPUT_NORMS, *_HEAD_NORMS),
    "olmo2": (*_OUTPUT_NORMS, *_HEAD_NORMS),
    "phi3": ("attn_qkv.weight",),  # and gate lies in "ffn_up", before up
}
_LACKED: Final[Mapping[str, tuple[str, ...]]] = {
    "olmo2": ("attn_norm.weight", "ffn_norm.weight"),
    "phi3": ("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"),
}
_FACTORS: Final = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
_OPTIONAL: Final = frozenset({"output.weight", "rope_freqs.weight"})
_OWN_OPTIONAL: Final[Mapping[str, frozenset[str]]] = {"phi3": frozenset({"output.weight", *_FACTORS.values()})}

_TRAINED: Final = "original_max_position_embeddings"

_KEYS: Final = frozenset(
    {
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "attention.sliding_window"),
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count", "expert_used_count"),
    }
)
"""Of the keys that begin with the architecture's name: those that are used, or held against what is."""
_OWN_KEYS: Final[Mapping[str, frozenset[str]]] = {
    "gemma2": frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    "gemma3": frozenset({"rope.freq_base_swa"}),
    "phi3": frozenset({"rope.scaling.attn_factor"}),
}
_WINDOWED: Final = ("gemma2", "gemma3")
"""Some layers have the window, and which it is does not stand in the file."""

_TOKENIZER_KEYS: Final = frozenset(
    {
        *("model", "pre", "tokens", "scores", "token_type", "merges", "add_space_prefix"),
        *("add_bos_token", "add_eos_token", "add_sep_token", "token_type_count"),
        *(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator")),
        *(f"{name}_token_id" for name in ("mask", "cls", "prefix", "suffix", "middle")),
        *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    }
)
"""Of the keys that begin with ``tokenizer.ggml``."""

GPT2_SPLITS: Final = ("default", "gpt-2", "gpt2")
SMOLLM_SPLITS: Final = ("smollm",)
"""How text is cut before its pairs are merged: as GPT-2 does, and the same with each digit by itself."""

_FIXED: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufError(Exception):
    """The file is damaged, or no model that can be converted faithfully (``unfaithful``). The message says why."""

    def __init__(self, reason: str, *, unfaithful: bool = False) -> None:
        super().__init__(printable(reason))  # names in it are the file's
        self.unfaithful = unfaithful


@dataclass(frozen=True)
class GgufHeader:
    """``keys``: values by their names; of a long array its first items. ``lengths``: how many items each array has.
    ``tensors``: name → shape, the first dimension first. ``offsets``: name → (first byte, kind) of its content, from
    the beginning of the file. ``values``: how many all tensors have."""

    keys: Mapping[str, Any]
    lengths: Mapping[str, int]
    tensors: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, tuple[int, int]]
    values: int

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.keys.get(f"{self.architecture}.{name}", default)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0
        self.items = 0

    def take(self, form: str) -> Any:
        try:
            values = struct.unpack_from("<" + form, self.content, self.at)
        except struct.error:
            raise GgufError("it ends inside of its header") from None
        self.at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def string(self) -> str:
        size = self.take("Q")
        if size > len(self.content) - self.at:
            raise GgufError(f"a text in its header claims {size} bytes")
        self.at += size
        return self.content[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> tuple[Any, int | None]:
        """A value, and how many items an array has."""
        if kind == _STRING:
            return self.string(), None
        if kind in _FIXED:
            return self.take(_FIXED[kind]), None
        if kind != _ARRAY:
            raise GgufError(f"its header has a value of kind {kind}, which there is not")
        item, count = self.take("IQ")
        self.items += count
        if self.items > MOST_ITEMS:
            raise GgufError(f"the arrays in its header claim {self.items} items, more than {MOST_ITEMS}")
        if item == _STRING:
            kept = [self.string() for _ in range(min(count, _KEPT_ITEMS))]
            for _ in range(count - len(kept)):
                self.skip(self.take("Q"))
            return kept, count
        if item not in _FIXED:
            raise GgufError("its header has an array of arrays")
        size = struct.calcsize("<" + _FIXED[item])
        start = self.at
        self.skip(size * count)
        kept = list(struct.unpack_from(f"<{min(count, _KEPT_ITEMS)}{_FIXED[item]}", self.content, start))
        return kept, count

    def skip(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise GgufError(f"something in its header claims {size} bytes")
        self.at += size


Sizes = Mapping[int, tuple[int, int]]
"""Kind of a tensor's content → how many values a block of it has, and how many bytes."""


def read_header(path: Path, sizes: Sizes) -> GgufHeader:
    """The header of the file ``path``. Raises ``GgufError`` and ``OSError``."""
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(MOST_HEADER_BYTES)
    reader = _Reader(content)
    if content[:4] != b"GGUF":
        raise GgufError("it does not begin with the bytes 'GGUF'")
    reader.at = 4
    version, tensor_count, key_count = reader.take("IQQ")
    if version not in (2, 3):
        raise GgufError(f"it is of version {version} of the format; 2 and 3 are read")
    if tensor_count > MOST_TENSORS or key_count > MOST_TENSORS:
        raise GgufError(f"its header claims {tensor_count} tensors and {key_count} keys, more than {MOST_TENSORS}")
    keys: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        name = reader.string()
        keys[name], length = reader.value(reader.take("I"))
        if length is not None:
            lengths[name] = length
    tensors: dict[str, tuple[int, ...]] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for _ in range(tensor_count):
        name = reader.string()
        dimensions = reader.take("I")
        if dimensions > 4 or name in tensors:
            raise GgufError(f"its tensor {name[:100]!r} has {dimensions} dimensions, or is there twice")
        tensors[name] = tuple(reader.take("Q") for _ in range(dimensions))[::-1]
        kind, offset = reader.take("IQ")
        offsets[name] = (offset, kind)
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise GgufError(f"its alignment is {alignment}")
    start = -(-reader.at // alignment) * alignment
    offsets = {name: (start + offset, kind) for name, (offset, kind) in offsets.items()}
    if not tensors:
        raise GgufError("it holds no tensor")
    for name, (offset, kind) in offsets.items():
        if kind not in sizes:
            raise GgufError(f"its tensor {name[:100]!r} is of kind {kind}, which is not known here")
        values, block_bytes = sizes[kind]
        if offset + -(-math.prod(tensors[name]) // values) * block_bytes > size:
            raise GgufError(f"it is truncated: its tensor {name[:100]!r} does not fit into {size} bytes")
    return GgufHeader(keys, lengths, tensors, offsets, sum(map(math.prod, tensors.values())))


def check(header: GgufHeader, splits: Sequence[str]) -> None:
    """Raises ``GgufError`` where the model can't be converted to what the file describes. ``splits``: the names of ways
    to cut text that the conversion knows beside our own."""
    for reason in _reasons(header, splits):
        raise GgufError(reason, unfaithful=True)


def _reasons(header: GgufHeader, splits: Sequence[str]) -> Iterator[str]:
    if (parts := header.keys.get("split.count", 0)) not in (0, 1):
        yield f"it is one of {parts} parts: join them with 'llama-gguf-split --merge'"
    if experts := header.get("expert_count", 0):
        yield f"it is a mixture of {experts} experts, which is not supported"
    if header.architecture == "olmo2" and (window := header.get("attention.sliding_window")):
        yield f"it is OLMo 3, with a window of {window} positions in some layers, which is read from a folder alone"
    own = _OWN_KEYS.get(header.architecture, frozenset())
    prefixes = {f"{header.architecture}.": _KEYS | own, "tokenizer.ggml.": _TOKENIZER_KEYS}
    for prefix, known in prefixes.items():
        for key in header.keys:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                yield f"what its key {key[:100]!r} means is not known here"
    numbers = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    for name in numbers:
        if not isinstance(header.get(name), int) or not 1 <= header.get(name) < 1 << 31:
            yield f"its key '{header.architecture}.{name}' is {header.get(name)!r}, not one positive number"
            return
    if not isinstance(header.get("attention.head_count_kv", 1), int):
        yield "its layers have different numbers of key-value heads"
    width = _width(header)
    rotated = header.get("rope.dimension_count", width)
    partial = header.architecture == "phi3" and isinstance(rotated, int) and 0 < rotated <= width
    if not (rotated == width or partial) or header.get("attention.value_length", width) != width:
        yield "it rotates a part of each head only, or its keys and values differ in length"
    window = header.get("attention.sliding_window", 0)
    if header.architecture == "phi3":
        if not isinstance(header.get("attention.sliding_window"), int) or window < 0:
            yield "its key 'phi3.attention.sliding_window' is missing, or no number: an early conversion left it out"
    elif header.architecture in _WINDOWED:
        if not isinstance(window, int) or window < 1:
            yield f"its key '{header.architecture}.attention.sliding_window' is {window!r}, not one positive number"
    elif 0 < window < header.get("context_length"):
        yield f"it has a sliding window of {header.get('attention.sliding_window')} positions"
    kinds = ("none", "longrope") if header.architecture == "phi3" else ("none", "linear", "yarn")
    if (kind := header.get("rope.scaling.type", "none")) not in kinds:
        yield f"its rotary embedding is scaled by {kind!r}"
    yield from _tensor_reasons(header)
    pre = header.keys.get("tokenizer.ggml.pre", "default")
    if header.keys.get("tokenizer.ggml.model") == "gpt2" and pre not in (*GPT2_SPLITS, *SMOLLM_SPLITS, *splits):
        yield f"how its tokenizer cuts text ({str(pre)[:60]!r}) is not known here"


def _tensor_reasons(header: GgufHeader) -> Iterator[str]:
    lacked = _LACKED.get(header.architecture, ())
    per_layer = [name for name in (f"{name}.weight" for name in _LAYER) if name not in lacked]
    per_layer += _EXTRA.get(header.architecture, ())
    expected = {"token_embd.weight", "output_norm.weight"}
    layers = header.get("block_count")
    if layers <= MOST_TENSORS:
        expected |= {f"blk.{layer}.{name}" for layer in range(layers) for name in per_layer}
    missing = sorted(expected - header.tensors.keys())
    if missing:
        yield f"it lacks the tensor '{missing[0]}'{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
    unknown = sorted(header.tensors.keys() - expected - _OWN_OPTIONAL.get(header.architecture, _OPTIONAL))
    if unknown:
        yield f"what its tensor {unknown[0][:100]!r} is for is not known here"


def rope_parameters(header: GgufHeader, path: Path) -> dict[str, Any] | None:
    """transformers' ``rope_parameters`` where the file scales its rotary embedding; None where it does not. Raises
    ``GgufError`` for factors that no formula of ours gives."""
    theta = float(header.get("rope.freq_base", 10000.0))
    if header.architecture == "gemma3":
        whole = _scaled(header, path, theta) or {"rope_type": "default", "rope_theta": theta}
        local = {"rope_type": "default", "rope_theta": float(header.get("rope.freq_base_swa", 10000.0))}
        return {"full_attention": whole, "sliding_attention": local}
    if header.architecture == "phi3":
        return _phi3(header, path, theta)
    return _scaled(header, path, theta)


def settings(header: GgufHeader) -> dict[str, Any]:
    """What of transformers' configuration its own reading of the file leaves out, as llama.cpp has it."""
    if header.architecture == "phi3":
        trained = header.get("rope.scaling.original_context_length", header.get("context_length"))
        window = header.get("attention.sliding_window")
        return {"sliding_window": window or None, _TRAINED: trained}
    if header.architecture not in _WINDOWED:
        return {}
    # What queries are divided by is the width of a head, but in the models of 27 B, which are known by their layers.
    largest = {"gemma2": 46, "gemma3": 62}[header.architecture]
    by_heads = header.get("embedding_length") // header.get("attention.head_count")
    scalar = by_heads if header.get("block_count") == largest else _width(header)
    found: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    if header.architecture == "gemma2":
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        found |= {name: float(header.get(name, usual)) for name, usual in caps.items()}
    return found


def _scaled(header: GgufHeader, path: Path, theta: float) -> dict[str, Any] | None:
    kind = header.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        if kind != "none":
            raise GgufError("its rotary embedding is scaled in two ways", unfaithful=True)
        return _llama3(header, path, theta)
    if kind == "none":
        return None
    found = {"rope_type": kind, "rope_theta": theta, "factor": float(header.get("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        found[_TRAINED] = header.get("rope.scaling.original_context_length", header.get("context_length"))
    return found


def _width(header: GgufHeader) -> Any:
    """How many values a head has."""
    return header.get("attention.key_length", header.get("embedding_length") // header.get("attention.head_count"))


def _numbers(header: GgufHeader, path: Path, tensor: str, count: int) -> list[float] | None:
    """The content of ``tensor``; None where it is not ``count`` numbers in fp32."""
    offset, kind = header.offsets[tensor]
    if kind != 0 or math.prod(header.tensors[tensor]) != count:
        return None
    with path.open("rb") as file:
        file.seek(offset)
        return list(struct.unpack(f"<{count}f", file.read(4 * count)))


def _phi3(header: GgufHeader, path: Path, theta: float) -> dict[str, Any]:
    rotated = header.get("rope.dimension_count", _width(header))
    found = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotated / _width(header)}
    if not header.tensors.keys() & set(_FACTORS.values()):
        return found
    for name, tensor in _FACTORS.items():
        numbers = _numbers(header, path, tensor, rotated // 2) if tensor in header.tensors else None
        if numbers is None:
            raise GgufError(f"its tensor '{tensor}' is not as Phi-3 has it", unfaithful=True)
        found[name] = numbers
    found |= {"rope_type": "longrope", _TRAINED: settings(header)[_TRAINED]}
    if attention := header.get("rope.scaling.attn_factor"):
        found["attention_factor"] = float(attention)
    return found


def _llama3(header: GgufHeader, path: Path, theta: float) -> dict[str, Any]:
    """Llama 3.x stores what its frequencies are divided by, not how that was computed: it is found again."""
    width = _width(header)
    if stored := _numbers(header, path, "rope_freqs.weight", width // 2):
        for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
            if all(
                math.isclose(one, other, rel_tol=1e-4)
                for one, other in zip(stored, llama3_factors(theta, width, factor), strict=True)
            ):
                return {
                    "rope_type": "llama3",
                    "rope_theta": theta,
                    "factor": factor,
                    "low_freq_factor": _LOW,
                    "high_freq_factor": _HIGH,
                    _TRAINED: _ORIGINAL,
                }
    raise GgufError("its tensor 'rope_freqs.weight' is not as Llama 3.x has it", unfaithful=True)


_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192  # of every Llama 3.x


def llama3_factors(theta: float, width: int, factor: float) -> list[float]:
    """What the frequency of each pair of values of a head of ``width`` is divided by."""
    found = []
    for pair in range(width // 2):
        length = 2 * math.pi * theta ** (2 * pair / width)
        smooth = (_ORIGINAL / length - _LOW) / (_HIGH - _LOW)
        found.append(1.0 / (min(1.0, max(0.0, smooth)) * (1 - 1 / factor) + 1 / factor))
    return found
