"""What a plan sends: RPC calls, rounds and bytes each way, from a model's dimensions alone. Pure formulas.

They count what ``tee.decoder`` sends with the programs of ``tee.plans``, tensor by tensor: the frames of a message. Its
envelope and header come on top, some 500 bytes for both directions of one RPC (``HEADER_BYTES_UP``, ``…_DOWN``).
Written out for one layer and n tokens (Q = heads · head_dim, K = kv_heads · head_dim, H hidden, I intermediate, P
positions):

| plan      | up                                              | down                                        |
|-----------|-------------------------------------------------|---------------------------------------------|
| per-op    | 3 n·H + n·Q + 2 n·H + n·I, and below            | n·(Q + 2K) + n·H + 2 n·I + n·H, and below   |
| batched   | n·H + n·Q + n·H + n·I, and below                | the same                                    |
| the two   | q n·Q, keys P·K; weights heads·n·P, values P·K  | scores heads·n·P; context n·Q               |
| attention | n·H + n·Q + n·H + n·I                           | n·(Q + 2K) + n·H + 2 n·I + n·H              |
| fused     | n·(Q + H) + n·(I + H)                           | n·(H + 2I) + n·(H + Q + 2K)                 |
| the same  | where products are normalised before they are added | n·(H + 4I) + n·(H + 2Q + 4K)            |

Of the last layer only what is wanted is computed: a chunk whose logits nobody needs ends at its keys and values, one
whose last token is wanted goes on with that one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal

from teegpu import facts
from teegpu.model.arch import ARCHITECTURES
from teegpu.model.spec import BEFORE

Want = Literal["none", "last", "all"]

DECODE_RUNS: Final = 16

HEADER_BYTES_UP: Final = 290
HEADER_BYTES_DOWN: Final = 210
"""Envelope and header of a request and of its reply, as SmolLM2's fused programs have them (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a model that its traffic depends on. ``windows``: of each layer, the sliding window or None.
    ``cuts``: the layers at which another server's group of layers begins; ``fused`` makes two requests of one there.
    ``products``: how many of each matrix ``fused`` gets: two, where what comes out of attention and MLP is normalised.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int | None, ...] = ()
    cuts: tuple[int, ...] = ()
    products: int = 1

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_values(self) -> int:
        """Values in the matrices of one layer."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.intermediate)

    @property
    def fused_work(self) -> float:
        """How many times as much a server computes in ``fused`` as in other plans."""
        twice = self.hidden * (self.q + 2 * self.kv + 2 * self.intermediate)
        return 1.0 + (self.products - 1) * twice / self.layer_values

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Shape | None:
        """The shape in the ``model`` of a document, or None where it does not say (a record of an older release)."""
        names = "layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size"
        sizes = [value for name in names if isinstance(value := model.get(name), int) and value > 0]
        if len(sizes) != len(names):
            return None
        windows = tuple(model.get("layer_windows") or ())
        products = products_of(str(model.get("architecture")))
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = sizes
        return cls(layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, windows=windows, products=products)


def products_of(architecture: str) -> int:
    """``Shape.products`` of an architecture; of one that is not known, that of most."""
    row = ARCHITECTURES.get(architecture)
    return 1 if row is None or row.norms == BEFORE else 2


@dataclass(frozen=True, slots=True)
class Traffic:
    """``rounds`` are the RPCs that can't be had at the same time, ``bytes_*`` those of tensors, without headers."""

    rpc_calls: int = 0
    rounds: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.rpc_calls + other.rpc_calls,
            self.rounds + other.rounds,
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
        )

    def times(self, count: int) -> Traffic:
        return Traffic(self.rpc_calls * count, self.rounds * count, self.bytes_up * count, self.bytes_down * count)

    @property
    def bytes_up_with_headers(self) -> int:
        return self.bytes_up + self.rpc_calls * HEADER_BYTES_UP

    @property
    def bytes_down_with_headers(self) -> int:
        return self.bytes_down + self.rpc_calls * HEADER_BYTES_DOWN


def together(plan: str, layers: int) -> int:
    """The rounds of one pass with its logits, where requests that do not need each other are under way together; 0 for
    a plan without requests."""
    row = facts.PLANS.get(plan)
    # What per-op sends more is projections of one input, which can be under way together.
    return 0 if row is None else replace(row, merged=True).rpc_calls(layers)


AUTO_CHUNK_TOKENS: Final = 256
"""Chunk of an overlapped prefill where none is chosen by prediction: small enough that the pipeline fills early, large
enough that a matrix product still runs at full speed. ``docs/benchmarks.md`` has the measurement."""

LOCK_STEP_CHUNK_TOKENS: Final = 2048
"""Chunk of a lock-step prefill. It only bounds memory: nothing would overlap."""


def default_chunk(*, overlaps: bool) -> int:
    """The chunk where nothing is predicted."""
    return AUTO_CHUNK_TOKENS if overlaps else LOCK_STEP_CHUNK_TOKENS


def chunk_count(tokens: int, chunk_tokens: int) -> int:
    """The fewest chunks of at most ``chunk_tokens`` that ``tokens`` fit into; at least one."""
    return max(1, math.ceil(tokens / max(1, chunk_tokens)))


def chunk_edges(start: int, stop: int, chunk_tokens: int) -> list[int]:
    """Where the chunks of the tokens from ``start`` to ``stop`` begin, and ``stop``: the fewest that have at most
    ``chunk_tokens`` each, and as equal as can be. A small one after large ones would overlap with little."""
    count = chunk_count(stop - start, chunk_tokens)
    return [start + (stop - start) * number // count for number in range(count + 1)]


@lru_cache(maxsize=512)
def prefill(
    shape: Shape, plan: str, wire_dtype: str, *, tokens: int, chunk_tokens: int, overlaps: bool, start: int = 0
) -> Traffic:
    """The traffic of a prompt's prefill: ``tokens`` new ones after ``start`` that are in the KV cache.

    With ``overlaps`` (a pipelined transport) the chunks are under way together, so that all of them take the rounds of
    the last one.
    """
    edges = chunk_edges(start, start + tokens, chunk_tokens)
    total = Traffic()
    last = len(edges) - 2
    for chunk, (begin, end) in enumerate(pairwise(edges)):
        part = forward(
            shape, plan, wire_dtype, tokens=end - begin, start=begin, want="last" if chunk == last else "none",
            overlaps=overlaps,
        )  # fmt: skip
        if overlaps and chunk != last:
            part = Traffic(part.rpc_calls, 0, part.bytes_up, part.bytes_down)
        total += part
    return total


@lru_cache(maxsize=64)
def decode(shape: Shape, plan: str, wire_dtype: str, *, passes: int, start: int, overlaps: bool) -> Traffic:
    """The traffic of ``passes`` steps of one token each, the first at position ``start``.

    With scores on the link a step grows with its position, in a straight line but for a sliding window's end and the
    last group of int8: of many steps, ``DECODE_RUNS`` stretches are each taken for straight.
    """
    if passes <= 0:
        return Traffic()

    def step(position: int) -> Traffic:
        return forward(shape, plan, wire_dtype, tokens=1, start=position, want="last", overlaps=overlaps)

    if not facts.plan(plan).remote_attention:  # then a step's traffic does not depend on its position
        return step(start).times(passes)
    total = Traffic()
    length = max(1, math.ceil(passes / DECODE_RUNS))
    for first in range(start, start + passes, length):
        count = min(length, start + passes - first)
        ends = step(first) + step(first + count - 1)
        total += Traffic(*(value * count // 2 for value in astuple(ends)))
    return total


def forward(
    shape: Shape, plan: str, wire_dtype: str, *, tokens: int, start: int, want: Want, overlaps: bool = False
) -> Traffic:
    """The traffic of one forward pass over ``tokens`` at positions ``start``…. Raises ``ConfigError`` for an unknown
    plan or wire dtype."""
    # Where no score crosses the link, a pass does not depend on its position.
    return _forward(shape, plan, wire_dtype, tokens, start if facts.plan(plan).remote_attention else 0, want, overlaps)


@lru_cache(maxsize=1024)
def _forward(shape: Shape, plan: str, wire_dtype: str, tokens: int, start: int, want: Want, overlaps: bool) -> Traffic:
    total = Traffic()
    for up, down, at_once in messages(shape, plan, wire_dtype, tokens=tokens, start=start, want=want):
        total += Traffic(1, 0 if at_once and overlaps else 1, up, down)
    return total


def messages(
    shape: Shape, plan: str, wire_dtype: str, *, tokens: int, start: int, want: Want
) -> Iterator[tuple[int, int, bool]]:
    """The requests of one forward pass in their order: bytes up, bytes down, and whether one can be under way together
    with the one before it. Raises ``ConfigError`` as ``forward`` does."""
    if not facts.plan(plan).remote:
        return
    for inputs, outputs, at_once in requests(shape, plan, tokens, start, want):
        up = sum(frame_bytes(register, dims, wire_dtype) for register, dims in inputs)
        down = sum(frame_bytes(register, dims, wire_dtype) for register, dims in outputs)
        yield up, down, at_once


def frame_bytes(register: str, dims: tuple[int, ...], wire_dtype: str) -> int:
    """Bytes of the frame that carries ``register`` of ``dims``, as ``wire.dtypes.nbytes`` has them."""
    values = math.prod(dims)
    if register == "ids":
        return values * facts.INT32_BYTES
    encoding = facts.wire_dtype(wire_dtype).for_register(register)
    return encoding.row_bytes(dims[-1]) * (values // dims[-1])


Tensor = tuple[str, tuple[int, ...]]
"""A register and its dimensions."""
Request = tuple[list[Tensor], list[Tensor], bool]
"""What goes up, what comes down, and whether it goes together with the message before it where requests can."""


def requests(shape: Shape, plan: str, n: int, start: int, want: Want) -> Iterator[Request]:
    """The requests of one forward pass of a remote plan over ``n`` tokens at positions ``start``…, in their order."""
    if facts.plan(plan).fused:
        yield from _fused(shape, n, want)
    else:
        yield from _plain(shape, plan, n, start, want)


def _fused(shape: Shape, n: int, want: Want) -> Iterator[Request]:
    qkv = ("qkv", shape.q + 2 * shape.kv)
    joined = shape.products > 1
    residual, added = ("x", "d") if joined else ("z", "x")
    yield [("n", (n, shape.hidden))], [(qkv[0], (n, qkv[1]))], False
    for layer in range(shape.layers):
        last = layer == shape.layers - 1
        if last and want == "none":
            return
        m = 1 if last and want == "last" else n
        yield (
            [("a", (m, shape.q)), ("x", (m, shape.hidden))],
            [("o" if joined else "z", (m, shape.hidden)), *[("gate_up", (m, 2 * shape.intermediate))] * shape.products],
            False,
        )
        if layer + 1 in shape.cuts and not last:
            sent: list[Tensor] = [("h", (m, shape.intermediate)), *([] if joined else [("z", (m, shape.hidden))])]
            yield sent, [(added, (m, shape.hidden))], False
            yield [("n", (m, shape.hidden))], [(qkv[0], (m, qkv[1]))], False
            continue
        name, width = ("logits", shape.vocab) if last else qkv
        yield (
            [("h", (m, shape.intermediate)), (residual, (m, shape.hidden))],
            [(added, (m, shape.hidden)), *[(name, (m, width))] * shape.products],
            False,
        )


def _plain(shape: Shape, plan: str, n: int, start: int, want: Want) -> Iterator[Request]:
    row = facts.plan(plan)
    scores_on_link, merged = row.remote_attention, row.merged
    if scores_on_link:  # and with them the embedding
        yield [("ids", (n,))], [("x", (n, shape.hidden))], False
    for layer in range(shape.layers):
        last = layer == shape.layers - 1
        yield from _products("n", n, shape.hidden, "qkv", (shape.q, shape.kv, shape.kv), merged)
        if last and want == "none":
            return
        m = 1 if last and want != "all" else n
        if scores_on_link:
            window = shape.windows[layer] if layer < len(shape.windows) else None
            first_query = start + n - m
            positions = start + n - (0 if window is None else max(0, first_query - window + 1))
            queries, keys = (shape.heads, m, shape.head_dim), (shape.kv_heads, positions, shape.head_dim)
            scores = (shape.heads, m, positions)
            yield [("q", queries), ("k", keys)], [("scores", scores)], False
            yield [("p", scores), ("v", keys)], [("context", queries)], False
        yield from _products("a", m, shape.q, "o", (shape.hidden,), merged)
        yield from _products("n", m, shape.hidden, "gate_up", (shape.intermediate, shape.intermediate), merged)
        yield from _products("h", m, shape.intermediate, "d", (shape.hidden,), merged)
    m = n if want == "all" else 1
    yield [("n", (m, shape.hidden))], [("logits", (m, shape.vocab))], False


def _products(
    source: str, rows: int, width: int, output: str, sizes: tuple[int, ...], merged: bool
) -> Iterator[Request]:
    """One input with matrices of ``sizes`` outputs: in one message, side by side, or the input again with each."""
    for index, size in enumerate((sum(sizes),) if merged else sizes):
        yield [(source, (rows, width))], [(output, (rows, size))], index > 0
