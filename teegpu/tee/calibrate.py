"""Prices of a model's work, read off real passes of its first layers: what the cost model is made from.

A decoder of a few layers runs over the real connection, plan by plan, at one token and at many; the laps of the runner
and the claims of the server are then explained by the counts of ``metrics.demand``. Whatever a request or an operation
really costs here, Python included, is in the prices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from teegpu.metrics import demand, traffic
from teegpu.metrics.demand import LOCAL
from teegpu.metrics.events import DECODE, OTHER, PREFILL, SERIALIZATION, TEE, Event, Lap, Rpc
from teegpu.metrics.leastsquares import Row, least_squares
from teegpu.metrics.predict import Link
from teegpu.metrics.rates import Units
from teegpu.metrics.recorder import Recorder
from teegpu.metrics.summary import PhaseTotal, Summary
from teegpu.metrics.traffic import Request, Shape
from teegpu.model.spec import ModelSpec
from teegpu.tee import plans
from teegpu.tee.decoder import Decoder, Pass
from teegpu.tee.generate import Session
from teegpu.tee.gpu_client import GpuClient
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import Call, LocalProducts, Products, drive
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.weights import TeeWeights

OpenClient = Callable[[str, Recorder], GpuClient]
"""A client that runs programs in a wire dtype and tells a recorder."""

_SERVER_SUMS = ("ADD", "SCALE", "EMBEDDING")


def shape_of(spec: ModelSpec, cuts: Sequence[int] = ()) -> Shape:
    """The dimensions that traffic and work depend on."""
    return Shape(
        spec.layers,
        spec.hidden_size,
        spec.intermediate_size,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.vocab_size,
        spec.layer_windows if any(spec.layer_windows) else (),
        tuple(cuts),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of pass: ``tokens`` at ``start``, measured ``repeats`` times after one that does not count."""

    plan: str
    wire_dtype: str
    tokens: int
    start: int = 0
    repeats: int = 3


@dataclass
class Observed:
    """Seconds by place and work, and exchanges (bytes up, bytes down, seconds on the network)."""

    places: dict[str, dict[Units, list[float]]] = field(default_factory=dict)
    network: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, place: str, units: Units, seconds: float) -> None:
        self.places.setdefault(place, {}).setdefault(units, []).append(seconds)

    def merge(self, other: Observed) -> None:
        """Adds what another has seen."""
        for place, rows in other.places.items():
            for units, times in rows.items():
                self.places.setdefault(place, {}).setdefault(units, []).extend(times)
        self.network += other.network

    def prices(self) -> dict[str, Units]:
        """The prices that explain it best. Medians count, errors as shares of the time."""
        return {place: _fitted(rows) for place, rows in self.places.items()}

    def link(self) -> Link:
        """The link as the exchanges have it: the RTT is that of the quickest, what the usual one takes more is its
        overhead. Raises ``ValueError`` without any."""
        if not self.network:
            raise ValueError("no request was measured")
        kinds: dict[tuple[int, int], list[float]] = {}
        for up, down, seconds in self.network:
            kinds.setdefault((up, down), []).append(seconds)
        rows: list[Row] = []
        for (up, down), times in kinds.items():
            usual = max(statistics.median(times), 1e-9)
            rows.append(((1.0, float(up), float(down)), usual, 1.0 / usual**2))
        each, up_seconds, down_seconds = least_squares(rows) or [0.0, 0.0, 0.0]
        least = min(seconds for _, _, seconds in self.network)
        rtt = min(each, least)
        return Link(rtt, _rate(up_seconds), _rate(down_seconds), each - rtt)


def _rate(seconds_per_byte: float) -> float:
    return 1.0 / seconds_per_byte if seconds_per_byte > 0.0 else float("inf")


def _fitted(rows: Mapping[Units, list[float]]) -> Units:
    measured: list[Row] = []
    for units, times in rows.items():
        usual = statistics.median(times)
        if usual > 0.0:
            measured.append((units, usual, 1.0 / usual**2))
    used = [index for index in range(3) if any(units[index] for units, _, _ in measured)]
    solved = least_squares([(tuple(units[i] for i in used), s, w) for units, s, w in measured]) if used else None
    found = dict(zip(used, solved or [], strict=False))
    return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)


class Calibration:
    """Measures passes over the first ``layers`` layers of ``spec``; ``borders`` are those at which another group of
    servers begins.

    ``weights`` are the runner's own; of them the embedding and norms are used, and for the plan local the matrices of
    these layers. What it measures is in ``observed``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: TeeWeights,
        rotary: RotaryTable,
        open_client: OpenClient,
        *,
        layers: int,
        borders: Sequence[int] = (),
    ) -> None:
        count = max(1, min(layers, spec.layers))
        self.spec = replace(spec, layers=count, layer_windows=spec.layer_windows[:count])
        self._borders = tuple(border for border in borders if border < count)
        self.shape = shape_of(self.spec, self._borders)
        self.observed = Observed()
        self._weights = weights
        self._rotary = rotary
        self._open_client = open_client
        self._events: list[Event] = []
        self._record = Recorder(self._events.extend)
        self._decoders: dict[tuple[str, str], Decoder] = {}
        self._random = torch.Generator().manual_seed(0)

    def run(self, steps: Iterable[Step], *, until: float = float("inf")) -> int:
        """Measures ``steps`` in turn, and goes through them again for their repeats; how many passes there were.

        Past ``until`` (a reading of ``time.perf_counter``) only steps that have not been measured once go on. Raises
        what requests do.
        """
        listed = list(steps)
        done = 0
        with torch.inference_mode():
            for turn in range(max((step.repeats for step in listed), default=-1) + 1):
                for step in listed:
                    if step.repeats < turn or (turn > 1 and time.perf_counter() > until):
                        continue
                    self._measure(step, counts=turn > 0)
                    done += 1
        return done

    def _measure(self, step: Step, *, counts: bool) -> None:
        spec, record = self.spec, self._record
        decoder = self._decoder(step)
        stop = step.start + step.tokens
        cache = KVCache(spec, max(stop, 1))
        if step.start:
            nothing = torch.zeros(step.start, spec.kv_heads, spec.head_dim)
            for layer in range(spec.layers):
                cache.write(layer, 0, nothing, nothing)
        self._rotary.prepare(stop)
        ids = torch.randint(0, spec.vocab_size, (step.tokens,), generator=self._random)
        self._events.clear()
        record.begin(DECODE)
        try:
            drive(decoder.forward(Pass(ids, step.start, cache, "none")))
        finally:
            record.end(step.tokens, 1)
        if counts:
            self._take(step)

    def _decoder(self, step: Step) -> Decoder:
        key = step.plan, step.wire_dtype if step.plan != LOCAL else ""
        decoder = self._decoders.get(key)
        if decoder is None:
            plan = plans.get(step.plan)
            products: Products = (
                self._open_client(step.wire_dtype, self._record)
                if plan.remote
                else LocalProducts(self._weights, self._record)
            )
            borders = self._borders if plan.remote else ()
            decoder = Decoder(self.spec, self._weights, self._rotary, plan, products, self._record, borders)
            self._decoders[key] = decoder
        return decoder

    def overlapped(self, prompt: Sequence[int], wire_dtype: str, chunk_tokens: int) -> PhaseTotal:
        """The figures of a fused prefill of ``prompt`` through these layers with its chunks in flight together, and of
        the final norm and lm_head after them."""
        summary = Summary()
        recorder = Recorder(lambda events: summary.add(events))
        gpu = self._open_client(wire_dtype, recorder)
        decoder = Decoder(self.spec, self._weights, self._rotary, plans.get("fused"), gpu, recorder)

        def set_overlapped(on: bool) -> None:
            gpu.overlapped = on

        Session(
            decoder,
            decoder,
            cache=KVCache(self.spec),
            rotary=self._rotary,
            recorder=recorder,
            max_positions=self.spec.max_positions,
            chunk_tokens=chunk_tokens,
            overlap=gpu.can_overlap,
            set_overlapped=set_overlapped,
        ).generate(prompt, max_tokens=1, sampler=Sampler(SamplingOptions()))
        recorder.flush()
        return summary.phases[PREFILL]

    def tensors(self, prompt: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the fused plan sends up and gets down for ``prompt`` in the last of the layers but one, in fp32."""
        kept = _Keeping(self._open_client("fp32", self._record), max(0, self.spec.layers - 2))
        decoder = Decoder(self.spec, self._weights, self._rotary, plans.get("fused"), kept, self._record, self._borders)
        self._rotary.prepare(len(prompt))
        ids = torch.tensor(list(prompt), dtype=torch.int64)
        with torch.inference_mode():
            drive(decoder.forward(Pass(ids, 0, KVCache(self.spec, len(prompt)), "none")))
        return kept.up, kept.down

    # Reading the events of one pass

    def _take(self, step: Step) -> None:
        laps = [event for event in self._events if isinstance(event, Lap)]
        self._take_runner(step, laps)
        if step.plan == LOCAL:
            self._take_local(step, laps)
            return
        sent = list(traffic.requests(self.shape, step.plan, step.tokens, step.start, "none"))
        rpcs = [event for event in self._events if isinstance(event, Rpc)]
        coded = _codec_laps(laps)
        for request, rpc, (encode, decode) in zip(sent, rpcs, coded, strict=True):
            self._take_request(step, request, rpc, encode, decode)

    def _take_runner(self, step: Step, laps: Sequence[Lap]) -> None:
        asked = demand.forward(
            self.shape, step.plan, step.wire_dtype, tokens=step.tokens, start=step.start, want="none"
        )
        spent: dict[str, float] = {}
        for lap in laps:
            place = "tee/OTHER" if lap.part == OTHER else f"tee/{lap.op}" if lap.part == TEE else ""
            spent[place] = spent.get(place, 0.0) + (lap.end_ns - lap.start_ns) / 1e9
        for place, units in asked.items():
            if place.startswith("tee/") and place != "tee/LINEAR" and any(units):
                self.observed.add(place, units, spent.get(place, 0.0))

    def _take_local(self, step: Step, laps: Sequence[Lap]) -> None:
        products = [lap for lap in laps if lap.part == TEE and lap.op == "LINEAR"]
        sent = list(traffic.requests(self.shape, "attention", step.tokens, step.start, "none"))
        for (inputs, outputs, _), lap in zip(sent, products, strict=True):
            for _, units in demand.computation(inputs, outputs):
                self.observed.add("tee/LINEAR", units, (lap.end_ns - lap.start_ns) / 1e9)

    def _take_request(self, step: Step, sent: Request, rpc: Rpc, encode: float, decode: float) -> None:
        add = self.observed.add
        asked = demand.request(sent, step.wire_dtype)
        claimed = {
            f"runner/encode.{step.wire_dtype}": encode,
            f"runner/decode.{step.wire_dtype}": decode,
            f"server/decode.{step.wire_dtype}": rpc.queue_seconds + rpc.decode_seconds,
            f"server/encode.{step.wire_dtype}": rpc.encode_seconds,
        }
        for name, (_, seconds) in rpc.operations.items():
            place = "SUM" if name in _SERVER_SUMS else "MATMUL" if name == "MATMUL" else "LINEAR"
            claimed[f"server/{place}"] = claimed.get(f"server/{place}", 0.0) + seconds
        for place, units in asked.items():
            if place in claimed:
                add(place, units, claimed[place])
        server = rpc.queue_seconds + rpc.decode_seconds + rpc.compute_seconds + rpc.encode_seconds
        network = (rpc.received_ns - rpc.sent_ns) / 1e9 - server
        self.observed.network.append((rpc.bytes_up, rpc.bytes_down, max(0.0, network)))


class _Keeping:
    """Products of another that also keeps the tensors of one layer."""

    narrow_range = False

    def __init__(self, inner: GpuClient, layer: int) -> None:
        self.up: list[torch.Tensor] = []
        self.down: list[torch.Tensor] = []
        self._inner = inner
        self._layer = layer

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        outputs = await self._inner.run(call)
        if call.layer == self._layer:
            # Copies: the decoder writes to what it was given.
            self.up += [tensor.clone() for tensor in call.inputs.values() if isinstance(tensor, torch.Tensor)]
            self.down += [tensor.clone() for tensor in outputs.values()]
        return outputs

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]


def _codec_laps(laps: Sequence[Lap]) -> list[tuple[float, float]]:
    """Seconds of encoding and of decoding, request by request: in lock step they come in that order."""
    found: list[tuple[float, float]] = []
    encode = 0.0
    for lap in laps:
        if lap.part != SERIALIZATION:
            continue
        seconds = (lap.end_ns - lap.start_ns) / 1e9
        if lap.op == "DECODE":
            found.append((encode, seconds))
            encode = 0.0
        else:
            encode += seconds
    return found
