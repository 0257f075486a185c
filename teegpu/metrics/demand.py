"""What a forward pass asks of both sides: its work by place and unit (see ``metrics.rates``). Pure counting.

It follows ``tee.decoder`` and the programs of ``tee.plans``, as ``metrics.traffic`` does for what crosses the link.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from teegpu.metrics import traffic
from teegpu.metrics.rates import Units
from teegpu.metrics.traffic import SCORES_ON_LINK, Request, Shape, Tensor, Want

LOCAL = "local"
LOCAL_PRODUCTS = "tee/LINEAR"
"""The place of its products."""
NARROW = ("fp16", "int8")
"""Wire dtypes for which rows are scaled into range before they go out."""

Demand = Mapping[str, Units]


def added(parts: Iterable[tuple[Demand, float]]) -> dict[str, Units]:
    """The sum of demands, each so many times."""
    total: dict[str, Units] = {}
    for demand, count in parts:
        for place, (first, second, third) in demand.items():
            one, two, three = total.get(place, (0.0, 0.0, 0.0))
            total[place] = (one + first * count, two + second * count, three + third * count)
    return total


def forward(shape: Shape, plan: str, wire_dtype: str, *, tokens: int, start: int, want: Want) -> dict[str, Units]:
    """The demand of one pass over ``tokens`` at positions ``start``…. Raises ``ValueError`` for an unknown plan or
    wire dtype."""
    if (plan != LOCAL and plan not in traffic.REMOTE_PLANS) or wire_dtype not in (*traffic.FLOAT_BYTES, "int8"):
        raise ValueError(f"no plan {plan!r} over {wire_dtype!r}")
    # Where no score crosses the link, the position matters to attention alone.
    at = start if plan in SCORES_ON_LINK else 0
    whole = dict(_without_attention(shape, plan, wire_dtype, tokens, at, want))
    if plan not in SCORES_ON_LINK:
        whole["tee/ATTENTION"] = attention(shape, tokens, start, want)
    return whole


@lru_cache(maxsize=1024)
def _without_attention(shape: Shape, plan: str, wire_dtype: str, tokens: int, start: int, want: Want) -> Demand:
    parts: list[tuple[Demand, float]] = [(tee(shape, plan, wire_dtype, tokens, start, want), 1.0)]
    if plan == LOCAL:
        parts.append(({LOCAL_PRODUCTS: _local_products(shape, tokens, want)}, 1.0))
    else:
        # Most requests of a pass are alike: each kind is priced once.
        kinds: dict[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], int] = {}
        for inputs, outputs, _ in traffic.requests(shape, plan, tokens, start, want):
            key = (tuple(inputs), tuple(outputs))
            kinds[key] = kinds.get(key, 0) + 1
        parts += [(request((list(up), list(down), False), wire_dtype), count) for (up, down), count in kinds.items()]
    return added(parts)


def request(sent: Request, wire_dtype: str) -> dict[str, Units]:
    """The demand of one request: codec on both sides, and the server's computation."""
    inputs, outputs, _ = sent
    parts = [_coded("runner/encode", "server/decode", inputs, wire_dtype)]
    parts.append(_coded("server/encode", "runner/decode", outputs, wire_dtype))
    parts += [{place: units} for place, units in computation(inputs, outputs)]
    demand = added((part, 1.0) for part in parts)
    if wire_dtype == "fp32":
        # An output that is a whole product goes out as it lies; of several that are one product, each is copied.
        calls, tensors, _ = demand["server/encode.fp32"]
        demand["server/encode.fp32"] = (calls, tensors, _values(_merged(outputs)))
    return demand


def _merged(outputs: list[Tensor]) -> list[Tensor]:
    """Those of ``outputs`` that are parts of one product with others."""
    parts = [tensor for tensor in outputs if tensor[0] not in ("x", "z")]
    return parts if len(parts) > 1 else []


def _coded(one: str, other: str, tensors: list[Tensor], wire_dtype: str) -> dict[str, Units]:
    """Both sides' codec of one message. What int8 leaves in fp16 counts with the rest, here as when it is measured."""
    units = (1.0, float(len(tensors)), _values(tensors))
    return {f"{one}.{wire_dtype}": units, f"{other}.{wire_dtype}": units}


def _values(tensors: list[Tensor]) -> float:
    return float(sum(math.prod(dims) for _, dims in tensors))


def computation(inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[tuple[str, Units]]:
    """The server's kernels of one request, from what goes in and what comes out."""
    sizes = dict(inputs)
    out = dict(outputs)
    if "scores" in out or "context" in out:
        keys = math.prod(sizes["k"] if "k" in sizes else sizes["v"])
        queries, many = (sizes["q"], sizes["k"][1]) if "k" in sizes else (sizes["p"], sizes["v"][2])
        yield "server/MATMUL", (1.0, float(keys), float(math.prod(queries) * many))
        return
    if "ids" in sizes:
        yield "server/SUM", (1.0, _values(outputs), 0.0)
        return
    rows = next(iter(sizes.values()))[0]
    for name, width in (("a", "z"), ("h", "x")):
        if name in sizes and width in out and len(sizes) > 1:  # fused: the residual, then the norm's weight
            residual = out[width][1]
            yield _product(rows, sizes[name][1], residual)
            yield "server/SUM", (1.0, float(rows * residual), 0.0)
            rest = [dims[1] for register, dims in outputs if register != width]
            if rest:
                yield "server/SUM", (1.0, float(rows * residual), 0.0)
                yield _product(rows, residual, sum(rest))
            return
    yield _product(rows, next(iter(sizes.values()))[1], sum(dims[1] for _, dims in outputs))


def _product(rows: int, width: int, outs: int) -> tuple[str, Units]:
    return "server/LINEAR", (1.0, float(width * outs), float(rows) * width * outs)


# The runner's own work


def _rows(shape: Shape, n: int, want: Want) -> list[tuple[int, int]]:
    """Of each layer: tokens until attention, and after it. A last layer of which only keys are wanted has 0 after."""
    last = {"none": 0, "last": 1, "all": n}[want]
    return [(n, n)] * (shape.layers - 1) + [(n, last)]


def attention(shape: Shape, n: int, start: int, want: Want) -> Units:
    """Calls, key and value entries read, multiply-adds: of a chunk that begins the prompt the upper half of the scores
    is left out."""
    calls = read = multiplies = 0.0
    for layer, (_, m) in enumerate(_rows(shape, n, want)):
        if not m:
            continue
        window = shape.windows[layer] if layer < len(shape.windows) else None
        positions = start + n
        if window is not None:
            positions = min(positions, window + m - 1)
        seen = positions - (m - 1) / 2 if m == positions else positions
        calls += 1
        read += 2 * shape.kv * positions
        multiplies += 2 * shape.q * m * seen
    return calls, read, multiplies


def tee(shape: Shape, plan: str, wire_dtype: str, n: int, start: int, want: Want) -> dict[str, Units]:
    """What the runner computes besides attention, products of ``local`` and codec."""
    counts: dict[str, list[float]] = {}

    def count(op: str, values: float, calls: int = 1) -> None:
        entry = counts.setdefault(f"tee/{op}", [0.0, 0.0])
        entry[0] += calls
        entry[1] += values

    h, i, q, kv = shape.hidden, shape.intermediate, shape.q, shape.kv
    fused, narrow = plan == "fused", plan != LOCAL and wire_dtype in NARROW
    final = {"none": 0, "last": 1, "all": n}[want]
    if plan not in SCORES_ON_LINK:
        count("EMBEDDING", n * h)
    for layer, (before, m) in enumerate(_rows(shape, n, want)):
        enters = not fused or layer == 0 or layer in shape.cuts
        count("RMSNORM", before * (h if enters else 0), int(enters))
        if fused:
            count("RMSNORM", before * (0 if enters else q + 2 * kv))
        elif narrow:
            count("SCALE", before * h)
        count("ROTARY", before * (q + kv))
        count("KV_CACHE", before * 2 * kv)
        if not m:
            continue
        if plan in SCORES_ON_LINK:
            window = shape.windows[layer] if layer < len(shape.windows) else None
            positions = start + n if window is None else min(start + n, window + m - 1)
            count("SOFTMAX", shape.heads * m * positions)
        count("SILU", m * i)
        if fused:
            count("SCALE", m * (q + h) if narrow else 0)
            count("SCALE", m * (i + h) if narrow else 0)
            count("RMSNORM", m * (2 * h + 2 * i), 3)
        else:
            count("RMSNORM", m * h)
            count("ADD", 2 * m * h, 2)
            if narrow:
                count("SCALE", m * (q + h + i), 3)
    if final:
        count("RMSNORM", final * (shape.vocab if fused else h))
        count("SAMPLING", shape.vocab)
        if narrow and not fused:
            count("SCALE", final * h)
    requests = 0 if plan == LOCAL else traffic.forward(
        shape, plan, wire_dtype, tokens=1, start=start, want="all" if final else "none"
    ).rpc_calls  # fmt: skip
    demand: dict[str, Units] = {place: (calls, values, 0.0) for place, (calls, values) in counts.items()}
    return demand | {"tee/OTHER": (1.0, float(requests), 0.0)}


def _local_products(shape: Shape, n: int, want: Want) -> Units:
    kernels = weights = multiplies = 0.0
    h, i = shape.hidden, shape.intermediate
    for before, m in _rows(shape, n, want):
        first, rest = h * (shape.q + 2 * shape.kv), shape.q * h + 3 * h * i
        kernels += 1 + (3 if m else 0)
        weights += first + (rest if m else 0)
        multiplies += before * first + m * rest
    final = {"none": 0, "last": 1, "all": n}[want]
    if final:
        kernels, weights, multiplies = kernels + 1, weights + h * shape.vocab, multiplies + final * h * shape.vocab
    return kernels, weights, multiplies
