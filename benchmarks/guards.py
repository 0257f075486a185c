"""What the guards against a hostile peer take of a decode step, on both sides.

No guard can be turned off, so there is no run without them to compare with. Each is called by itself, thousands of
times, on a connection that is there, and held against a step of the fused plan. Of that step only requests are counted,
and not what the runner computes between them: of a real one they are a smaller share.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import transports
from benchmarks.harness import Script, model_of, ms
from benchmarks.rpc import fused_calls
from teegpu import facts, machine
from teegpu.model.reader import read_spec
from teegpu.options import client_options, wire_dtype, wire_limits
from teegpu.record.events import DECODE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.deadline import Deadline
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.handshake import hello
from teegpu.wire.codec import Decoder
from transports import inflow
from transports.base import Message, ServerOptions
from transports.dealer import DealerClient
from transports.fairqueue import FairQueue
from transports.guard import SWEEP_SECONDS
from transports.router import RouterServer

CALLS = 200
"""In each sample."""


class Guard(NamedTuple):
    """It takes ``seconds`` for each request, or once every ``period_seconds``."""

    side: str
    what: str
    seconds: float
    period_seconds: float = 0.0

    def share(self, requests: int, step_seconds: float) -> float:
        """Of a step, or of a processor."""
        if self.period_seconds:
            return self.seconds / self.period_seconds
        return self.seconds * requests / step_seconds


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        samples.append((time.perf_counter() - began) / CALLS)
    return statistics.median(samples)


def of_the_runner(client: DealerClient, call: Call, outputs: Sequence[torch.Tensor], repeats: int) -> list[Guard]:
    connection, deadline = client._connection, Deadline(pass_seconds=1e9, reply_seconds=1.0)
    if connection is None:
        raise RuntimeError("the client has had answers, and no connection")

    def waited() -> None:
        deadline.allow(call)
        deadline.spend(call, 0.0)

    def finite() -> list[bool]:
        return [math.isfinite(values.sum().item()) for values in outputs]

    works: list[tuple[str, Callable[[], object]]] = [
        ("deadlines of request, pass and answer", waited),
        ("whether the connection stands", connection.check_monitor),
        ("bytes that have come, counted anew", connection.inflow.settle),
        ("values of an answer are finite", finite),
    ]
    return [Guard("runner", what, seconds_of(work, repeats)) for what, work in works]


def of_tcp(connections: int, repeats: int) -> list[Guard]:
    """What looks after connections from time to time, and a server's accounts. The embedded server's is no TCP, and
    the kernel counts no bytes of it."""
    queue = FairQueue[int](max_clients=64, max_client_requests=64, max_client_bytes=2**26)

    def accounted() -> None:
        queue.push(b"account", b"client", 1, 4096)
        queue.pop()
        queue.done(b"account", 4096, 1e-4)

    accounts = Guard("server", "accounts and turns", seconds_of(accounted, repeats))
    router = RouterServer("tcp://127.0.0.1:0", ServerOptions())
    with router as server, contextlib.ExitStack() as stack:
        arriving: Callable[[], object] = list
        for _ in range(connections):
            client = stack.enter_context(transports.connect("zmq", server.address))
            sent = client.begin(Message([b"x"]))
            incoming = server.next(10.0)
            if incoming is None:
                raise RuntimeError("a request of ours has not come")
            server.reply(incoming, Message([b"y"]))
            sent.wait()
            if isinstance(client, DealerClient) and client._connection is not None:
                arriving = client._connection.inflow.look

        def swept() -> None:
            with router._lock:
                router._update_connections()
                router._sweep(0.0)

        return [
            Guard("runner", "what arrives, looked at", seconds_of(arriving, repeats), inflow.LOOK_SECONDS),
            accounts,
            Guard("server", f"connections ({connections}), looked at", seconds_of(swept, repeats), SWEEP_SECONDS),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--rounds", type=int, default=50, help="steps, and samples of each guard")
    script.parser.add_argument("--connections", type=int, default=1, help="of the server whose guard is measured")
    given = script.parse(arguments)
    settings = script.settings(run__transport="zmq")
    folder = model_of(settings)
    spec, limits = read_spec(folder), wire_limits(settings)
    runner_threads, server_threads = machine.thread_split(embedded=True)
    torch.set_num_threads(settings.run.threads or runner_threads)
    record = Recorder(lambda _: None)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        server = stack.enter_context(EmbeddedServer(folder, settings, threads=server_threads))
        server.wait()
        client = stack.enter_context(transports.connect("zmq", server.endpoint, client_options(settings)))
        welcome = hello(client, Decoder(limits), settings.link.hello_timeout_seconds)
        wire = wire_dtype(settings, [welcome.dtype])
        gpu = GpuClient(client, spec, wire_dtype=wire, recorder=record, limits=limits)
        calls = list(itertools.chain.from_iterable(fused_calls(spec)))
        requests = facts.FUSED.rpc_calls(spec.layers)
        record.begin(DECODE)
        samples = []
        for done in range(-5, given.rounds):
            began = time.perf_counter()
            for call in calls:
                drive(gpu.run(call))
            if done >= 0:
                samples.append((time.perf_counter() - began) / len(calls) * requests)
            record.flush()
        step_seconds = statistics.median(samples)
        outputs = list(drive(gpu.run(calls[0])).values())
        if not isinstance(client, DealerClient):
            raise TypeError("the transport 'zmq' is no DealerClient")
        guards = of_the_runner(client, calls[0], outputs, given.rounds)
    guards += of_tcp(given.connections, given.rounds)
    shares = [guard.share(requests, step_seconds) for guard in guards]
    rows = [["side", "guard", "µs", "when", "share"]]
    for guard, share in zip(guards, shares, strict=True):
        when = f"every {guard.period_seconds * 1e3:g} ms" if guard.period_seconds else "each request"
        rows.append([guard.side, guard.what, f"{guard.seconds * 1e6:.1f}", when, f"{share:.2%}"])
    rows.append(["both", "all", "", "", f"{sum(shares):.2%}"])
    notes = [f"{requests} requests of a step take {ms(step_seconds)} ms: {wire} wire, server in {welcome.dtype}"]
    results = [{**guard._asdict(), "share": share} for guard, share in zip(guards, shares, strict=True)]
    script.finish(rows, notes, results, folder=folder)


if __name__ == "__main__":
    main()
