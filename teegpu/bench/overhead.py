"""``teegpu bench overhead``: what an RPC of a decode step costs beyond its computation and the exchange of its bytes.

The two programs of the fused plan, with one token, go through the real client to the real server in its own process. In
turn with each of them a bare zmq message of the same frame sizes goes to an echo in another process.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import transports
from teegpu import machine
from teegpu.bench import document as doc
from teegpu.bench.echo import Echo
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.samples import quantile
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.metrics.events import DECODE, OTHER, Event, Lap, Rpc
from teegpu.metrics.recorder import Recorder
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_dtype, wire_limits
from teegpu.tee import plans
from teegpu.tee.embedded_server import EmbeddedServer
from teegpu.tee.gpu_client import GpuClient
from teegpu.tee.greeting import hello
from teegpu.tee.products import Call, drive
from teegpu.wire.codec import Decoder
from transports.base import Client, Message, Reply

PLAN = "fused"
PROGRAMS = ("after attention", "after MLP")
WARM_UP_ROUNDS = 50
_NOTICES = 10


class Trip(NamedTuple):
    """One RPC, in nanoseconds. ``round_trip`` is the caller's whole time. ``wait`` is from sending to receiving; the
    server's claims lie within it. ``echo`` is the round trip of the bare message that followed."""

    round_trip: int
    encode: int
    wait: int
    decode: int
    queue: int
    server_decode: int
    compute: int
    server_encode: int
    echo: int


PARTS = (
    ("round_trip", "round trip of one RPC"),
    ("compute", "− the server's computation"),
    ("echo", "− bare zmq round trip of the same bytes"),
    ("overhead", "= overhead"),
    ("encode", "  runner, encoding"),
    ("decode", "  runner, decoding and checks"),
    ("runner_rest", "  runner, its transport and the rest"),
    ("queue", "  server, queue"),
    ("server_decode", "  server, decoding"),
    ("server_encode", "  server, encoding"),
    ("transport", "  transport, beyond the bare round trip"),
)
"""Row by row: its key, and what it is called."""


def parts(trips: Sequence[Trip]) -> dict[str, list[float]]:
    """Seconds of each part of each trip, by the keys of ``PARTS``.

    The echo is taken off as its median, so that its outliers are not charged to the RPCs. The parts of one trip then
    add up to its overhead.
    """
    echo = statistics.median(trip.echo for trip in trips)
    rows = []
    for trip in trips:
        claimed = trip.queue + trip.server_decode + trip.compute + trip.server_encode
        rows.append(
            trip._asdict()
            | {
                "overhead": trip.round_trip - trip.compute - echo,
                "runner_rest": trip.round_trip - trip.encode - trip.wait - trip.decode,
                "transport": trip.wait - claimed - echo,
            }
        )
    return {key: [row[key] / 1e9 for row in rows] for key, _ in PARTS}


def figures(values: Sequence[float]) -> dict[str, float]:
    """Of values in seconds. Percentiles of parts need not add up to those of the whole."""
    return {"median": statistics.median(values), "p95": quantile(values, 0.95), "min": min(values)}


class OverheadBenchmark:
    """``rounds`` times both programs over ``base.run.transport``, in ``base.run.wire_dtype``.

    Raises ``UsageError`` for settings that can't be measured, and what reading the model raises.
    """

    name = "overhead"
    failures: tuple[str, ...] = ()

    def __init__(self, folder: ModelFolder, base: Config, *, rounds: int) -> None:
        if rounds < 1:
            raise UsageError(f"--rounds {rounds} is below the least, 1")
        if base.run.transport == "inprocess":
            raise UsageError("--transport inprocess has no second process to measure: use zmq or pipelined")
        self._folder = folder
        self._base = base
        self._rounds = rounds
        self._spec = read_spec(folder)
        runner, server = machine.thread_split(embedded=True)
        self._runner_threads = base.run.threads or runner
        self._server_threads = base.server.threads or server
        self._trips: tuple[list[Trip], list[Trip]] = ([], [])
        self._sizes: list[tuple[list[int], list[int]]] = []
        self._server: dict[str, Any] = {}
        self._digest = ""
        self._wire_dtype = base.run.wire_dtype
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._runner_threads)
        try:
            with contextlib.ExitStack() as stack, torch.inference_mode():
                notify(Progress(0, self._rounds, self._base.run.transport, "loading"))
                self._run(stack, notify)
        finally:
            torch.set_num_threads(threads_before)

    def _run(self, stack: contextlib.ExitStack, notify: Notify) -> None:
        base, spec = self._base, self._spec
        server = stack.enter_context(EmbeddedServer(self._folder, base, threads=self._server_threads))
        with WeightStore(self._folder, spec) as store:
            self._digest = store.digest()
        server.wait()
        transport = stack.enter_context(transports.connect(base.run.transport, server.endpoint, client_options(base)))
        events: list[Event] = []
        record = Recorder(events.extend)

        limits = wire_limits(base)
        welcome = hello(transport, Decoder(limits), base.link.hello_timeout_seconds)
        self._wire_dtype = wire_dtype(base, [welcome.dtype])

        def client(through: Client) -> GpuClient:
            return GpuClient(through, spec, wire_dtype=self._wire_dtype, recorder=record, limits=limits)

        gpu, tap = client(transport), _Tap(transport)
        gpu.hello(base.link.hello_timeout_seconds, self._digest)
        self._server = {"device": welcome.device, "dtype": welcome.dtype, "threads": welcome.threads}
        calls = fused_calls(spec)
        for number in range(2):
            drive(client(tap).run(calls[len(calls) // 2][number]))
            self._sizes.append((tap.frames_up, tap.frames_down))
        # Beside the server's own socket: that folder is private, and goes with the server.
        echo = stack.enter_context(Echo(server.endpoint + "-echo", self._sizes, base.link.spin_seconds))
        record.begin(DECODE)
        started = time.perf_counter()
        for done in range(-WARM_UP_ROUNDS, self._rounds):
            for number, call in enumerate(calls[done % len(calls)]):
                record.flush()
                events.clear()
                started_ns = time.perf_counter_ns()
                # What the caller does between requests is not part of the next one.
                record.lap_until(started_ns, OTHER, "OTHER")
                drive(gpu.run(call))
                ended_ns = time.perf_counter_ns()
                record.flush()
                trip = trip_of(events, ended_ns - started_ns, echo.round_trip_ns(number))
                if done >= 0:
                    self._trips[number].append(trip)
            self._tell(done, started, notify)

    def _tell(self, done: int, started: float, notify: Notify) -> None:
        every = max(1, self._rounds // _NOTICES)
        if done < 0 or (done + 1) % every:
            return
        left = (time.perf_counter() - started) / (done + 1 + WARM_UP_ROUNDS) * (self._rounds - done - 1)
        median = statistics.median(parts(self._trips[0] + self._trips[1])["overhead"])
        outcome = f"overhead {median * 1e3:.3f} ms"
        notify(Progress(done + 1, self._rounds, self._base.run.transport, "rounds", outcome, left))

    def document(self, status: str) -> dict[str, Any]:
        """Figures over both programs together, and in ``programs`` of each with its frame sizes and every sample."""
        pairs = min(map(len, self._trips))
        trips = self._trips[0][:pairs] + self._trips[1][:pairs]
        results: list[dict[str, Any]] = []
        notes: list[str] = []
        programs: list[dict[str, Any]] = []
        if trips:
            together = parts(trips)
            results = [{"part": key, "label": label, "seconds": figures(together[key])} for key, label in PARTS]
            calls = plans.get(PLAN).rpc_calls(self._spec.layers)
            overhead = results[[key for key, _ in PARTS].index("overhead")]["seconds"]["median"]
            notes.append(self._setting())
            notes.append(f"{overhead * 1e3:.3f} ms × {calls} RPCs = {overhead * calls * 1e3:.1f} ms a decode step")
            programs = [self._program(number) for number in range(2)]
            for program in programs:
                up, down = sum(program["frame_bytes_up"]), sum(program["frame_bytes_down"])
                own = program["overhead_seconds"]["median"]
                notes.append(f"{program['name']}: {up:,} bytes up, {down:,} down, overhead {own * 1e3:.3f} ms")
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "rounds": self._rounds,
                "plan": PLAN,
                "transport": self._base.run.transport,
                "wire_dtype": self._wire_dtype,
                "spin_seconds": self._base.link.spin_seconds,
                "threads": {"runner": self._runner_threads, "server": self._server.get("threads")},
            },
            notes=notes,
            results=results,
            server=self._server,
            programs=programs,
        )

    def _setting(self) -> str:
        run, server = self._base.run, self._server
        threads = f"threads: {self._runner_threads} for the runner, {server['threads']} for the server"
        return f"{run.transport}, {self._wire_dtype} wire, server in {server['dtype']} on {server['device']}; {threads}"

    def _program(self, number: int) -> dict[str, Any]:
        by_part = parts(self._trips[number])
        up, down = self._sizes[number]
        return {
            "name": PROGRAMS[number],
            "frame_bytes_up": up,
            "frame_bytes_down": down,
            "overhead_seconds": figures(by_part["overhead"]),
            "samples_nanoseconds": {
                name: [trip[place] for trip in self._trips[number]] for place, name in enumerate(Trip._fields)
            },
        }


def fused_calls(spec: ModelSpec, tokens: int = 1) -> list[tuple[Call, Call]]:
    """Both programs of each layer of the fused plan, with random values for so many tokens. The last layer's are left
    out where there are others: its second program ends in lm_head, which is not what a step consists of."""
    random = torch.Generator().manual_seed(0)

    def values(width: int) -> torch.Tensor:
        return torch.randn(tokens, width, generator=random)

    attended, gated = values(spec.heads * spec.head_dim), values(spec.intermediate_size)
    residual = values(spec.hidden_size)
    codes = plans.programs(spec, plans.get(PLAN))
    return [
        (
            Call(code.after_attention, {"a": attended, "x": residual}, layer),
            Call(code.after_mlp, {"h": gated, "z": residual}, layer),
        )
        for layer, code in enumerate(codes[: max(1, len(codes) - 1)])
    ]


def trip_of(events: Sequence[Event], round_trip_ns: int, echo_ns: int) -> Trip:
    """The trip that ``events`` recorded, of one RPC."""
    rpc = next(event for event in events if isinstance(event, Rpc))
    laps = {event.op: event.end_ns - event.start_ns for event in events if isinstance(event, Lap)}
    claims = (rpc.queue_seconds, rpc.decode_seconds, rpc.compute_seconds, rpc.encode_seconds)
    queue, server_decode, compute, server_encode = (round(claim * 1e9) for claim in claims)
    return Trip(
        round_trip=round_trip_ns,
        encode=laps["ENCODE"],
        wait=rpc.received_ns - rpc.sent_ns,
        decode=laps["DECODE"],
        queue=queue,
        server_decode=server_decode,
        compute=compute,
        server_encode=server_encode,
        echo=echo_ns,
    )


class _Tap(Client):
    """Hands everything on, and keeps the frame sizes of the last exchange, the transport's own frame first."""

    name = "tap"

    def __init__(self, inner: Client) -> None:
        self._inner = inner
        self.endpoint = inner.endpoint
        self.frames_up: list[int] = []
        self.frames_down: list[int] = []

    def request(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        reply = self._inner.request(message, timeout_seconds=timeout_seconds)
        up = [memoryview(frame).nbytes for frame in message.frames]
        down = [frame.nbytes for frame in reply.frames]
        self.frames_up = [reply.bytes_up - sum(up), *up]
        self.frames_down = [reply.bytes_down - sum(down), *down]
        return reply

    def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Any:
        return self._inner.request_async(message, timeout_seconds=timeout_seconds)

    def close(self) -> None:
        self._inner.close()
