"""Weights that a model's files hold in fewer bits: how each format lays them out, and which values they stand for.

Whatever the format, a weight is whole numbers (or FP8 values) ``q``, scales and often zeros, which several columns of a
row, or several rows, share: ``(q - zero) · scale``, computed in fp32. What differs is how these are packed:

| layout | tensors of a matrix (out, in), ``n`` values in a word of 32 bits |
|---|---|
| SCALED | ``weight`` int8 or FP8 (out, in); ``weight_scale`` or ``weight_scale_inv``: one, one a row, or one a block |
| PACKED | ``weight_packed`` (out, in/n); ``weight_scale`` (out, groups); ``weight_zero_point`` (out/n, groups) |
| GPTQ | ``qweight`` (in/n, out); ``qzeros`` (groups, out/n); ``scales`` (groups, out); ``g_idx`` (in): group of each |
| AWQ | ``qweight`` (in, out/n); ``qzeros`` (groups, out/n); ``scales`` (groups, out); n = 8 in the order of ``_AWQ`` |

A word holds its first value in its lowest bits. PACKED is compressed-tensors', which packs ``q + 2**(bits - 1)``. GPTQ
of version 1 stores zeros less one. Activations are not quantised here, whatever the format says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from teegpu.units import one_line

SCALED, PACKED, GPTQ, AWQ = "scaled", "packed", "gptq", "awq"

INTEGER, FLOAT = "integer", "float"

_AWQ: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ's gemm kernel has the value of each of eight columns."""
_WORD: Final = 32
_WHOLE: Final = 0
"""A block that reaches to the end."""

FLOAT8: Final = ("F8_E4M3", "F8_E5M2")
CODES: Final[Mapping[str, torch.dtype]] = {
    "I8": torch.int8,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What there is of these in files, beside floats."""
_FLOATS: Final = ("F32", "F16", "BF16")

NEVER_PLAIN: Final = (
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv"),
    *("weight_zero_point", "weight_g_idx"),
)
"""The tensors that a matrix which is stored in full never has, after its name."""


class NotReadError(Exception):
    """Why a quantised model can't be read, as a part of a sentence."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way in which matrices are quantised. ``block``: how many rows and columns share a scale, 0: all of them.

    ``of``: INTEGER or FLOAT, what SCALED holds. ``zeros``: there are zeros beside the scales. ``ordered``: columns may
    belong to any group, as ``g_idx`` says. ``stored_less_one``: so are zeros."""

    layout: str
    bits: int
    block: tuple[int, int]
    of: str = INTEGER
    zeros: bool = False
    ordered: bool = False
    stored_less_one: bool = False

    @property
    def about(self) -> str:
        rows, columns = self.block
        share = {(0, 0): "one scale a matrix", (1, 0): "one scale a row", (1, columns): f"groups of {columns}"}
        held = f"{self.bits} bits" if self.of == INTEGER else "FP8"
        return f"{held}, {share.get(self.block, f'blocks of {rows} × {columns}')}"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a model is quantised: its ``method``, as config.json has it, and the schemes of its matrices, each of which
    is of one of them. A matrix that is stored in full is not quantised."""

    method: str
    schemes: tuple[Scheme, ...]

    @property
    def about(self) -> str:
        """In words."""
        return f"{self.method}, {' or '.join(dict.fromkeys(scheme.about for scheme in self.schemes))}"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a scheme asks for: under one of ``names``, in one of ``dtypes`` and ``shapes``."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


# What config.json says


def declared(config: Mapping[str, Any]) -> Quantisation | None:
    """What a model's configuration says of how its weights are quantised; None: they are not.

    Raises ``NotReadError`` for what is not read here."""
    settings = next(filter(None, (config.get(f"{name}_config", config.get(name)) for name in _KEYS)), None)
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise NotReadError("unknown method")
    method = settings.get("quant_method")
    if method is None and {"bits", "group_size"} <= settings.keys():
        method = "mlx"
    name = _word(method or "unknown method")
    if name not in _METHODS:
        raise NotReadError(name + _WHY.get(name, ""))
    try:
        schemes = tuple(dict.fromkeys(_METHODS[name](settings)))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise NotReadError(f"{name}, with settings that can't be: {_word(error)}") from error
    return Quantisation(name, schemes) if schemes else None


_KEYS: Final = ("quantization", "compression")
_WHY: Final = {
    "bitsandbytes": ", whose code books only its own kernels read",
    "mlx": ", which lays weights out for Apple's GPUs",
    "hqq": ", whose zeros and scales are themselves quantised",
    "exl2": ", which mixes widths within a matrix for its own kernels",
    "exl3": ", which only its own kernels decode",
    "mxfp4": ", whose blocks of 4-bit floats are not read yet",
}
_COMPRESSED: Final = ("int-quantized", "naive-quantized", "float-quantized", "pack-quantized", "mixed-precision")


def _word(value: object) -> str:
    return one_line(value, 60)


def _compressed(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    usual = settings.get("format", "")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise NotReadError(f"compressed-tensors, sparse ({_word(settings['sparsity_config']['format'])})")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise NotReadError("compressed-tensors, with transforms")
    for group in settings["config_groups"].values():
        found = group.get("format") or usual
        args = group.get("weights")
        if found not in _COMPRESSED or (found == "mixed-precision" and group.get("format") is None):
            raise NotReadError(f"compressed-tensors, format {_word(found or 'unknown')}")
        if args is None:
            continue
        bits, of = _count(args.get("num_bits", 8), "num_bits"), args.get("type", "int")
        packed = found == "pack-quantized"
        if of not in ("int", "float") or (of == "float" and (packed or bits != 8)) or bits > 8:
            raise NotReadError(f"compressed-tensors, {bits}-bit {_word(of)}")
        if packed and _WORD % bits:
            raise NotReadError(f"compressed-tensors, {bits} bits packed")
        yield Scheme(
            PACKED if packed else SCALED,
            bits,
            _block_of(args),
            INTEGER if of == "int" else FLOAT,
            zeros=not args.get("symmetric", True),
            ordered=args.get("actorder") == "group",
        )


def _block_of(args: Mapping[str, Any]) -> tuple[int, int]:
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "block":
        rows, columns = args["block_structure"]
        return _count(rows, "block_structure"), _count(columns, "block_structure")
    if strategy == "group":
        return 1, _count(size, "group_size")
    if strategy not in ("tensor", "channel"):
        raise NotReadError(f"compressed-tensors, strategy {_word(strategy)}")
    return (1, _WHOLE) if strategy == "channel" else (_WHOLE, _WHOLE)


def _fp8(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    if settings.get("fmt", "e4m3") not in ("e4m3", "e5m2"):
        raise NotReadError(f"fp8, of the format {_word(settings['fmt'])}")
    if block := settings.get("weight_block_size"):
        rows, columns = block
        yield Scheme(SCALED, 8, (_count(rows, "weight_block_size"), _count(columns, "weight_block_size")), FLOAT)
    else:
        yield Scheme(SCALED, 8, (_WHOLE, _WHOLE), FLOAT)
        yield Scheme(SCALED, 8, (1, _WHOLE), FLOAT)


def _fbgemm(settings: Mapping[str, Any]) -> Iterator[Scheme]:  # noqa: ARG001
    yield Scheme(SCALED, 8, (1, _WHOLE), FLOAT)


def _gptq(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    bits = _count(settings["bits"], "bits")
    kind = settings.get("checkpoint_format") or "gptq"
    if settings.get("is_marlin_format") or kind not in ("gptq", "gptq_v2"):
        raise NotReadError(f"gptq, packed for {_word('marlin' if settings.get('is_marlin_format') else kind)}")
    if bits not in (2, 4, 8):
        raise NotReadError(f"gptq, {bits} bits")
    for pattern, changes in (settings.get("dynamic") or {}).items():
        if not pattern.startswith("-") and changes:
            raise NotReadError("gptq, with settings of their own for some layers")
    yield Scheme(
        GPTQ,
        bits,
        (1, _group(settings["group_size"])),
        zeros=True,
        ordered=bool(settings.get("desc_act", False)),
        stored_less_one=kind == "gptq",
    )


def _awq(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    bits = _count(settings.get("bits", settings.get("w_bit")), "bits")
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise NotReadError(f"awq, packed for {_word(version)}")
    if bits != 4:
        raise NotReadError(f"awq, {bits} bits")
    yield Scheme(AWQ, bits, (1, _group(settings.get("group_size", settings.get("q_group_size")))), zeros=True)


def _group(size: object) -> int:
    return _WHOLE if size == -1 else _count(size, "group_size")


def _count(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"{key} is {_word(value)}")
    return value


_METHODS: Final[Mapping[str, Callable[[Mapping[str, Any]], Iterator[Scheme]]]] = {
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "gptq": _gptq,
    "awq": _awq,
}
READ: Final = "compressed-tensors, FP8, GPTQ or AWQ"


# What the files hold


def parts(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a matrix of ``shape``, (out, in), by what they are: codes, scale, zeros, order."""
    out, columns = shape
    rows = _steps(out, scheme.block[0])
    groups = _steps(columns, scheme.block[1])
    packed = -(-columns * scheme.bits // _WORD)
    packed_out = -(-out * scheme.bits // _WORD)
    order = Part(("g_idx", "weight_g_idx"), ("I32",), ((columns,),), optional=not scheme.ordered)
    if scheme.layout in (GPTQ, AWQ):
        codes = (packed, out) if scheme.layout == GPTQ else (columns, packed_out)
        return {
            "codes": Part(("qweight",), ("I32",), (codes,)),
            "scale": Part(("scales",), _FLOATS, ((groups, out),)),
            "zeros": Part(("qzeros",), ("I32",), ((groups, packed_out),)),
        } | ({"order": order} if scheme.layout == GPTQ else {})
    scales = _scale_shapes(rows, groups)
    found = {"scale": Part(("weight_scale", "weight_scale_inv"), _FLOATS, scales)}
    if scheme.layout == SCALED:
        found["codes"] = Part(("weight",), ("I8",) if scheme.of == INTEGER else FLOAT8, (shape,))
        zeros = Part(("weight_zero_point",), ("I8",), scales)
    else:
        found["codes"] = Part(("weight_packed",), ("I32",), ((out, packed),))
        zeros = Part(("weight_zero_point",), ("I32",), ((packed_out, groups),))
    return found | ({"zeros": zeros} if scheme.zeros else {}) | ({"order": order} if scheme.ordered else {})


def _scale_shapes(rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """How scales of so many rows and groups may be shaped: without dimensions of one at their end too."""
    shapes: list[tuple[int, ...]] = [(rows, groups)]
    if groups == 1:
        shapes.append((rows,))
        if rows == 1:
            shapes.append(())
    return tuple(shapes)


def _steps(count: int, step: int) -> int:
    return -(-count // step) if step else 1


class Packed:
    """One quantised matrix of ``shape``, (out, in): which values its tensors stand for."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        self.scheme = scheme
        self.shape = shape
        self.groups = _steps(shape[1], scheme.block[1])

    @property
    def whole_numbers(self) -> bool:
        """Whether it is int8 with one scale for each row, at most: what products of whole numbers take."""
        scheme = self.scheme
        return scheme.layout == SCALED and scheme.of == INTEGER and self.groups == 1 and not scheme.zeros

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ``NotReadError`` where columns belong to groups that there are not, or to others than is said."""
        order = tensors.get("order")
        if order is None:
            return
        if not self.scheme.ordered and not torch.equal(order.long(), self._in_order()):
            raise NotReadError("its columns are in another order, and config.json has desc_act = false")
        if bool((order < 0).any()) or bool((order >= self.groups).any()):
            raise NotReadError(f"its columns belong to groups that there are not: it has {self.groups}")

    def integers(self, tensors: Mapping[str, torch.Tensor], first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where they are ``whole_numbers``: int8 (stop - first, in), and the scale of each row in fp32."""
        return tensors["codes"][first:stop], self._scale(tensors, first, stop).expand(stop - first, 1)[:, 0]

    def values(self, tensors: Mapping[str, torch.Tensor], first: int, stop: int) -> torch.Tensor:
        """Rows ``first`` to ``stop``, (stop - first, in) in fp32. ``tensors``: what ``parts`` asks for."""
        codes, zeros = self._codes(tensors, first, stop), self._zeros(tensors, first, stop)
        scale = self._scale(tensors, first, stop)
        if self.groups > 1:
            order = tensors.get("order")
            order = self._in_order() if order is None else order.long()
            scale = scale[:, order]
            zeros = None if zeros is None else zeros[:, order]
        values = codes.float() if zeros is None else (codes - zeros).float()
        return values.mul_(scale)

    def _in_order(self) -> torch.Tensor:
        return torch.arange(self.shape[1]) // (self.scheme.block[1] or self.shape[1])

    def _codes(self, tensors: Mapping[str, torch.Tensor], first: int, stop: int) -> torch.Tensor:
        found, bits, columns = tensors["codes"], self.scheme.bits, self.shape[1]
        if self.scheme.layout == AWQ:
            return _columns(found, bits, first, stop, _AWQ).t()
        if self.scheme.layout == SCALED:
            return found[first:stop]
        rows = found[:, first:stop].t() if self.scheme.layout == GPTQ else found[first:stop]
        return _unpacked(rows, bits)[:, :columns]

    def _zeros(self, tensors: Mapping[str, torch.Tensor], first: int, stop: int) -> torch.Tensor | None:
        """(rows, groups)."""
        scheme, found = self.scheme, tensors.get("zeros")
        if scheme.layout in (GPTQ, AWQ):
            zeros = _columns(tensors["zeros"], scheme.bits, first, stop, _AWQ if scheme.layout == AWQ else ())
            # As the packer wrote them: one below zero is all bits.
            return (zeros.t() + scheme.stored_less_one) & (2**scheme.bits - 1)
        if scheme.layout == PACKED:
            if found is None:
                return torch.tensor([[2 ** (scheme.bits - 1)]]).expand(stop - first, self.groups)
            return _columns(found.t(), scheme.bits, first, stop).t()
        return None if found is None else self._by_row(found, first, stop).to(torch.int32)

    def _scale(self, tensors: Mapping[str, torch.Tensor], first: int, stop: int) -> torch.Tensor:
        """(rows, groups) in fp32, or of one row where all have the same."""
        found = tensors["scale"]
        if self.scheme.layout in (GPTQ, AWQ):
            return found[:, first:stop].t().float()
        return self._by_row(found, first, stop).float()

    def _by_row(self, found: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        whole = found.reshape(-1, self.groups)
        rows = self.scheme.block[0]
        return whole[torch.arange(first, stop) // rows] if rows else whole


def _unpacked(words: torch.Tensor, bits: int, places: Sequence[int] = ()) -> torch.Tensor:
    """int32 (rows, words) → the values of each word in a row, int32 (rows, words · 32 / bits)."""
    shifts = torch.tensor(places or range(_WORD // bits), dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def _columns(words: torch.Tensor, bits: int, first: int, stop: int, places: Sequence[int] = ()) -> torch.Tensor:
    """The values ``first`` to ``stop`` of each row."""
    count = _WORD // bits
    start = first // count
    return _unpacked(words[:, start : _steps(stop, count)], bits, places)[
        :, first - start * count : stop - start * count
    ]
