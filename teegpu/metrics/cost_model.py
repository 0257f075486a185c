"""How long a phase takes under given settings, from measured rates: one model for ``auto``, for ``tune`` and for plans
on paper. Pure formulas.

    Δ = demand of the passes (metrics.demand)      B = their traffic (metrics.traffic)      p = prices (metrics.rates)

    tee           = Σ over the runner's places        p · Δ
    serialization = Σ over runner/encode, /decode     p · Δ   (+ zstd where it pays, + what an event loop adds)
    server        = Σ over the server's places        p · Δ
    link          = B.up / up, B.down / down, B.rounds · (RTT + overhead)

``metrics.predict`` puts them together: their sum in lock step; where the chunks of a prompt overlap, the largest of
them and the pipeline's fill, with both sides slower by ``slowdown`` where they share cores (where they take turns with
all cores: with their sum longer by it), and never below what these cores can do. A plan whose products cost more
(masked, verified) is priced by ``product_cost``, a factor on all that a request costs both sides.

**zstd** is modelled as its policy decides: frames of at least ``min_bytes``, and only where the bytes that it saves
take the link longer than the codec takes both sides.

Accuracy is checked by ``teegpu tune --against``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Final

from teegpu.metrics import demand, predict, traffic
from teegpu.metrics.demand import LOCAL, LOCAL_PRODUCTS, Demand
from teegpu.metrics.predict import Link, Prediction, Work
from teegpu.metrics.rates import CODEC_PLACES, Rates
from teegpu.metrics.traffic import RESIDUAL, SCORES_ON_LINK, Shape, Tensor, Traffic

CHUNKS_COUNTED: Final = 64
"""Of a prompt in more chunks than this, some are counted and stand for those between them."""

MIN_COMPRESSED_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """What is predicted. ``chunk_tokens`` as the decoder uses them, not 0. ``servers``: how many share the requests of
    chunks that are under way together. ``rows``: tokens of one pass of decode, guessed ones included.
    ``compressed_bytes``: the least frame that +zstd compresses."""

    plan: str
    wire_dtype: str
    transport: str
    chunk_tokens: int
    servers: int = 1
    rows: int = 1
    compressed_bytes: int = MIN_COMPRESSED_BYTES
    product_cost: float = 1.0

    @property
    def overlaps(self) -> bool:
        return self.transport.startswith("pipelined")


@dataclass(frozen=True, slots=True)
class Phase:
    """A prediction and what it is made of: busy seconds of each side, and what crosses."""

    seconds: float
    bound_by: str
    work: Work
    traffic: Traffic


class CostModel:
    """Predicts for the model of ``shape`` with ``rates``."""

    def __init__(self, shape: Shape, rates: Rates) -> None:
        self.shape = shape
        self.rates = rates

    def knows(self, plan: str, wire_dtype: str) -> bool:
        """Whether all prices are there that ``plan`` needs."""
        parts = demand.forward(self.shape, plan, wire_dtype, tokens=2, start=0, want="last")
        return all(self.rates.knows(place) for place in parts)

    def prefill(self, settings: Settings, tokens: int, *, start: int = 0) -> Phase:
        """``tokens`` of a prompt after ``start`` that are in the KV cache, its first token included. Raises
        ``ValueError`` for unknown names, ``KeyError`` where a price is missing (see ``knows``)."""
        chunk = max(1, settings.chunk_tokens)
        chunks = traffic.chunk_count(tokens, chunk)
        overlaps = settings.overlaps and chunks > 1 and settings.plan != LOCAL
        asked = prompt_demand(self.shape, settings.plan, settings.wire_dtype, tokens, chunk, start)
        if settings.plan == LOCAL:
            return self._alone(asked)
        sent = traffic.prefill(
            self.shape, settings.plan, settings.wire_dtype, tokens=tokens, chunk_tokens=chunk,
            overlaps=settings.overlaps, start=start,
        )  # fmt: skip
        return self._remote(settings, asked, sent, math.ceil(tokens / chunks), chunks if overlaps else 1)

    def decode(self, settings: Settings, position: int) -> Phase:
        """One pass at ``position``, its token drawn. Raises as ``prefill``."""
        want: traffic.Want = "last" if settings.rows == 1 else "all"
        plan, wire = settings.plan, settings.wire_dtype
        asked = demand.forward(self.shape, plan, wire, tokens=settings.rows, start=position, want=want)
        if plan == LOCAL:
            return self._alone(asked)
        sent = traffic.forward(
            self.shape, plan, wire, tokens=settings.rows, start=position, want=want, overlaps=settings.overlaps
        )
        return self._remote(settings, asked, sent, settings.rows, 1)

    def local_seconds(self, tokens: int) -> float | None:
        """The prefill of ``tokens`` in the TEE alone; None where its rates are not known."""
        settings = Settings(LOCAL, "fp32", "zmq", tokens)
        return self.prefill(settings, tokens).seconds if self.knows(LOCAL, "fp32") else None

    # The parts

    def _alone(self, asked: Demand) -> Phase:
        """Without a server beside it, a run has all cores that its prices were measured with a share of: products, most
        of the work, take that much less."""
        rates = self.rates
        spent = {place: rates.seconds(place, amount) for place, amount in asked.items()}
        if rates.cores and LOCAL_PRODUCTS in spent:
            spent[LOCAL_PRODUCTS] *= rates.runner_share or 1.0
        seconds = sum(spent.values())
        return Phase(seconds, "runner", Work(tee=seconds), Traffic())

    def _remote(self, settings: Settings, asked: Demand, sent: Traffic, rows: int, chunks: int) -> Phase:
        rates, factor = self.rates, settings.product_cost
        spent = {place: rates.seconds(place, amount) for place, amount in asked.items()}
        tee = sum(seconds for place, seconds in spent.items() if place.startswith("tee/"))
        codec = {place: sum(s for name, s in spent.items() if name.startswith(place)) for place in CODEC_PLACES}
        computing = sum(s for place, s in spent.items() if place.startswith("server/") and "code." not in place)
        ours, theirs = codec["runner/encode"] + codec["runner/decode"], codec["server/decode"] + codec["server/encode"]
        if chunks > 1:
            ours += sent.rpc_calls * rates.overlap_seconds
        work = Work(tee, ours * factor, 0.0, computing * factor, theirs * factor)
        if settings.transport.endswith("+zstd"):
            work, sent = self._compressed(settings, work, sent, rows)
        link = rates.link
        if chunks > 1:
            sharing = max(1, settings.servers)
            work = replace(work, gpu=work.gpu / sharing, server_serialization=work.server_serialization / sharing)
            if rates.cores:
                work = self._crowded(work, sent)
            wider = Link(
                link.rtt_seconds, link.up_bytes_per_second * sharing, link.down_bytes_per_second * sharing,
                link.overhead_seconds,
            )  # fmt: skip
            found: Prediction = predict.overlapped(sent, wider, work, chunks)
        else:
            found = predict.lock_step(sent, link, work)
        return Phase(found.seconds, found.bound_by, work, sent)

    def _crowded(self, work: Work, sent: Traffic) -> Work:
        """Both sides at once on the same cores. Where they take turns with all of them, what one does the other waits
        for: then it is their sum that takes longer, by what changing hands costs."""
        slow, rates = self.rates.slowdown, self.rates
        moving = (sent.bytes_up_with_headers + sent.bytes_down_with_headers) * rates.moving_seconds / rates.cores
        if rates.takes_turns:
            ours, theirs = rates.runner_share * slow, rates.server_share * slow
            return replace(work, runner_share=ours, server_share=theirs, moving=moving * slow)
        return replace(
            work,
            tee=work.tee * slow,
            serialization=work.serialization * slow,
            gpu=work.gpu * slow,
            server_serialization=work.server_serialization * slow,
            runner_share=rates.runner_share,
            server_share=rates.server_share,
            moving=moving,
        )

    def _compressed(self, settings: Settings, work: Work, sent: Traffic, rows: int) -> tuple[Work, Traffic]:
        """The work and the traffic where frames that are large enough are compressed, if that pays."""
        known = self.rates.compression.get(settings.wire_dtype)
        if known is None:
            return work, sent
        link = self.rates.link
        per_byte = known.compress_seconds + known.decompress_seconds
        up, down = (
            share if (1.0 - ratio) / rate > per_byte else 0.0
            for share, ratio, rate in zip(
                self._large(settings, rows), (known.up, known.down),
                (link.up_bytes_per_second, link.down_bytes_per_second), strict=True,
            )
        )  # fmt: skip
        large_up, large_down = up * sent.bytes_up, down * sent.bytes_down
        return (
            replace(
                work,
                serialization=work.serialization
                + large_up * known.compress_seconds
                + large_down * known.decompress_seconds,
                server_serialization=work.server_serialization
                + large_up * known.decompress_seconds
                + large_down * known.compress_seconds,
            ),
            replace(
                sent,
                bytes_up=round(sent.bytes_up - large_up * (1.0 - known.up)),
                bytes_down=round(sent.bytes_down - large_down * (1.0 - known.down)),
            ),
        )

    def _large(self, settings: Settings, rows: int) -> tuple[float, float]:
        """The share of the bytes, up and down, that are in frames which may be compressed."""
        up: list[int] = []
        down: list[int] = []
        for inputs, outputs, _ in traffic.requests(self.shape, settings.plan, rows, 0, "last"):
            up += frames(inputs, settings.wire_dtype)
            down += frames(outputs, settings.wire_dtype)
        shares = [
            sum(size for size in sizes if size >= settings.compressed_bytes) / max(1, sum(sizes))
            for sizes in (up, down)
        ]
        return shares[0], shares[1]


def frames(tensors: Sequence[Tensor], wire_dtype: str) -> list[int]:
    """Bytes of the frames of one message: neighbours of one narrow wire dtype share a frame, as in ``wire.layout``."""
    sizes: list[int] = []
    before = ""
    for register, dims in tensors:
        narrow = "" if register == "ids" or wire_dtype == "fp32" else wire_dtype
        if wire_dtype == "int8" and register in RESIDUAL:
            narrow = "fp16"
        size = traffic.frame_bytes(register, dims, wire_dtype)
        if narrow and narrow == before:
            sizes[-1] += size
        else:
            sizes.append(size)
        before = narrow
    return sizes


@lru_cache(maxsize=512)
def prompt_demand(shape: Shape, plan: str, wire_dtype: str, tokens: int, chunk: int, start: int) -> Demand:
    """The demand of a prompt of ``tokens`` after ``start``, in chunks. Raises ``ValueError`` for unknown names."""
    spans = list(pairwise(traffic.chunk_edges(start, start + tokens, chunk)))
    last = len(spans) - 1
    # Where scores cross the link, no two chunks are alike; else they differ in attention alone.
    every = max(1, math.ceil(last / CHUNKS_COUNTED)) if plan in SCORES_ON_LINK else 1

    def one(begin: int, end: int, want: traffic.Want) -> Demand:
        return demand.forward(shape, plan, wire_dtype, tokens=end - begin, start=begin, want=want)

    parts: list[tuple[Demand, float]] = []
    for index in range(0, last, every):
        parts.append((one(*spans[min(index + every // 2, last - 1)], "none"), min(every, last - index)))
    parts.append((one(*spans[last], "last"), 1))
    return demand.added(parts)
