"""What an RPC of a decode step costs beyond its computation and the bare exchange of its bytes.

The two programs of the fused plan, with one token, go through the real client to the real server in its own process. In
turn with each of them a bare zmq message of the same frame sizes goes to an echo in another process.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

import transports
from benchmarks.farside import Echo
from benchmarks.harness import Script, model_of, ms, spread
from teegpu import facts, machine
from teegpu.bench.child import Child
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_dtype, wire_limits
from teegpu.record.events import DECODE, OTHER, Event, Lap, Rpc
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.handshake import check_digest, hello
from teegpu.tee import plans
from teegpu.wire.codec import Decoder
from transports.base import Changed, Client, Message, Reply, Sent

WARM_UP_ROUNDS = 50


class Trip(NamedTuple):
    """One RPC, in seconds. ``round_trip`` is the caller's whole time. ``wait`` is from sending to receiving; the
    server's claims lie within it. ``echo`` is the round trip of the bare message that followed."""

    round_trip: float
    encode: float
    wait: float
    decode: float
    queue: float
    server_decode: float
    compute: float
    server_encode: float
    echo: float


PARTS = (
    ("round_trip", "round trip of one RPC"),
    ("compute", "− the server's computation"),
    ("echo", "− bare zmq round trip of the same bytes"),
    ("overhead", "= overhead"),
    ("encode", "runner, encoding"),
    ("decode", "runner, decoding and checks"),
    ("runner_rest", "runner, its transport and the rest"),
    ("queue", "server, queue"),
    ("server_decode", "server, decoding"),
    ("server_encode", "server, encoding"),
    ("transport", "transport, beyond the bare round trip"),
)


def parts(trips: Sequence[Trip]) -> dict[str, list[float]]:
    """Seconds of each part of each trip, by the keys of ``PARTS``.

    The echo is taken off as its median, so that its outliers are not charged to the RPCs. The parts of one trip then
    add up to its overhead."""
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
    return {key: [row[key] for row in rows] for key, _ in PARTS}


def fused_calls(spec: ModelSpec, tokens: int = 1) -> list[tuple[Call, Call]]:
    """Both programs of each layer of the fused plan, with random values for so many tokens. The last layer's are left
    out where there are others: its second program ends in lm_head, which is not what a step consists of."""
    random = torch.Generator().manual_seed(0)

    def values(width: int) -> torch.Tensor:
        return torch.randn(tokens, width, generator=random)

    attended, gated = values(spec.heads * spec.head_dim), values(spec.intermediate_size)
    residual = values(spec.hidden_size)
    codes = plans.programs(spec, facts.FUSED)
    return [
        (
            Call(code.after_attention, {"a": attended, "x": residual}, layer),
            Call(code.after_mlp, {"h": gated, "z": residual}, layer),
        )
        for layer, code in enumerate(codes[: max(1, len(codes) - 1)])
    ]


class Tap(Client):
    """Hands everything on, and keeps the frame sizes of the last exchange, the transport's own frame first."""

    name = "tap"

    def __init__(self, inner: Client) -> None:
        self._inner = inner
        self.endpoint = inner.endpoint
        self.sizes: tuple[list[int], list[int]] = ([], [])

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        up = [memoryview(frame).nbytes for frame in message.frames]
        return Changed(self._inner.begin(message, timeout_seconds=timeout_seconds), partial(self._measure, up))

    def _measure(self, up: list[int], reply: Reply) -> Reply:
        down = [frame.nbytes for frame in reply.frames]
        self.sizes = ([reply.bytes_up - sum(up), *up], [reply.bytes_down - sum(down), *down])
        return reply

    def close(self) -> None:
        self._inner.close()


def trip_of(events: Sequence[Event], round_trip: float, echo: float) -> Trip:
    """The trip that ``events`` recorded, of one RPC."""
    rpc = next(event for event in events if isinstance(event, Rpc))
    laps = {event.op: (event.end_ns - event.start_ns) / 1e9 for event in events if isinstance(event, Lap)}
    wait = (rpc.received_ns - rpc.sent_ns) / 1e9
    return Trip(round_trip, laps["ENCODE"], wait, laps["DECODE"], rpc.queue_seconds, rpc.decode_seconds,
                rpc.compute_seconds, rpc.encode_seconds, echo)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--rounds", type=int, default=2000, help="of both programs")
    script.parser.add_argument("--transport", default="zmq")
    given = script.parse(arguments)
    settings = script.settings(run__transport=given.transport)
    folder = model_of(settings)
    spec, limits = read_spec(folder), wire_limits(settings)
    runner_threads, server_threads = machine.thread_split(embedded=True)
    torch.set_num_threads(settings.run.threads or runner_threads)
    trips: tuple[list[Trip], list[Trip]] = ([], [])
    events: list[Event] = []
    record = Recorder(events.extend)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        server = stack.enter_context(EmbeddedServer(folder, settings, threads=server_threads))
        with WeightStore(folder, spec) as store:
            digest = store.digest()
        server.wait()
        transport = stack.enter_context(
            transports.connect(settings.run.transport, server.endpoint, client_options(settings))
        )
        welcome = hello(transport, Decoder(limits), settings.link.hello_timeout_seconds)
        wire = wire_dtype(settings, [welcome.dtype])
        tap = Tap(transport)
        gpu, tapped = (
            GpuClient(through, spec, wire_dtype=wire, recorder=record, limits=limits) for through in (transport, tap)
        )
        check_digest(welcome, spec, digest, transport.endpoint)
        calls = fused_calls(spec)
        sizes = []
        for call in calls[len(calls) // 2]:
            drive(tapped.run(call))
            sizes.append(tap.sizes)
        # Beside the server's own socket: that folder is private, and goes with the server.
        far = stack.enter_context(Child("benchmarks.farside", "a bare zmq round trip"))
        echo = Echo(far, server.endpoint + "-echo", sizes, settings.link.spin_seconds)
        stack.callback(echo.close)
        record.begin(DECODE)
        for done in range(-WARM_UP_ROUNDS, given.rounds):
            for number, call in enumerate(calls[done % len(calls)]):
                record.flush()
                events.clear()
                started_ns = time.perf_counter_ns()
                # What the caller does between requests is not part of the next one.
                record.lap_until(started_ns, OTHER, "OTHER")
                drive(gpu.run(call))
                round_trip = (time.perf_counter_ns() - started_ns) / 1e9
                record.flush()
                trip = trip_of(events, round_trip, echo.seconds(number))
                if done >= 0:
                    trips[number].append(trip)
    found = {key: spread(values) for key, values in parts(trips[0] + trips[1]).items()}
    rows = [["milliseconds", "median", "p95", "min"]]
    rows += [[label, *(ms(found[key][figure]) for figure in ("median", "p95", "min"))] for key, label in PARTS]
    overhead, count = found["overhead"]["median"], facts.FUSED.rpc_calls(spec.layers)
    notes = [
        f"{given.rounds} rounds over {given.transport}, {wire} wire, server in {welcome.dtype} on {welcome.device}, "
        f"threads: {torch.get_num_threads()} for the runner, {welcome.threads} for the server",
        f"{ms(overhead)} ms × {count} RPCs = {overhead * count * 1e3:.1f} ms a decode step",
        *(f"{name}: {sum(up):,} bytes up, {sum(down):,} down"
          for name, (up, down) in zip(("after attention", "after MLP"), sizes, strict=True)),
    ]  # fmt: skip
    results = [{"part": key, "seconds": figures} for key, figures in found.items()]
    script.finish(rows, notes, results, folder=folder)


if __name__ == "__main__":
    main()
