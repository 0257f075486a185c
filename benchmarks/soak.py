"""Many clients leave one server no rest: its memory does not grow, nothing stays open, and clients get on alike.

The server is ``teegpu serve`` on a TCP port of this machine; the clients are threads here, which send programs of the
fused plan again and again. A quarter of them is greedy: more in flight than the server takes from one client, and
programs of many tokens. Exits with 9 where a bound does not hold.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import transports
from benchmarks.harness import Script, model_of, ms, spread
from benchmarks.rpc import fused_calls
from teegpu import children, machine
from teegpu.errors import TeegpuError, ThresholdError, WireError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.options import wire_dtype, wire_limits
from teegpu.remote.handshake import hello
from teegpu.units import human_bytes
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Result
from transports.base import Client, ClientOptions, Message, Reply
from transports.errors import LimitError, TransportError

STEADY, GREEDY = "steady", "greedy"
MAX_GROWTH = 0.05
MAX_UNFAIRNESS = 2.0
GREEDY_TOKENS = 64

_SAMPLES = 120
_LEAVE_SECONDS = 10.0
_STEADY_SECONDS = 0.5
_JOIN_SECONDS = 90.0
_END_SECONDS = 30.0
_HELLO_SECONDS = 30.0
_PROGRAMS_A_CONNECTION = 200
"""Then a steady client leaves and comes back: connections must come and go in a soak."""


class Served:
    """``teegpu serve`` as its operator starts it. ``events`` counts the lines of its log by event, ``ended`` has the
    reasons why it ended connections."""

    def __init__(self, folder: ModelFolder, threads: int) -> None:
        self.events: dict[str, int] = {}
        self.ended: list[str] = []
        self.address = ""
        self._ready = threading.Event()
        command = [sys.executable, "-P", "-m", "teegpu", "serve", "--offline", "--config", os.devnull]
        command += ["--model", str(folder.path), "--bind", "tcp://127.0.0.1:0", "--log-format", "json"]
        # Its log is its standard error, which is read here as it comes.
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=children.environment({k: v for k, v in os.environ.items() if not k.startswith("TEEGPU_")}),
        )
        self._reader = threading.Thread(target=self._read, daemon=True, name="the server's log")
        self._reader.start()
        self._ready.wait()
        if not self.address:
            raise TeegpuError("the GPU server did not start")

    def _read(self) -> None:
        assert self._process.stderr is not None  # a pipe
        for line in self._process.stderr:
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:
                sys.stderr.write(line)
                continue
            self.events[entry["event"]] = self.events.get(entry["event"], 0) + 1
            if entry["event"] == "connection-ended":
                self.ended.append(entry["fields"]["reason"])
            elif entry["event"] == "ready":
                self.address = entry["fields"]["address"]
                self._ready.set()
        self._ready.set()

    @property
    def resident_bytes(self) -> int:
        return machine.resident_bytes(pid=self._process.pid)

    def descriptors(self, expected: int = 0) -> int:
        """Its open files and sockets, once it has taken notice that everybody has left: when they are as many as
        ``expected``, or do not get fewer any more. Raises ``OSError`` where it is gone."""
        deadline = time.perf_counter() + _LEAVE_SECONDS
        least, since = self._open(), time.perf_counter()
        while least > expected and time.perf_counter() < min(deadline, since + _STEADY_SECONDS):
            time.sleep(0.02)
            if (now := self._open()) < least:
                least, since = now, time.perf_counter()
        return least

    def _open(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def close(self) -> int:
        """Its exit code after SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_END_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(_END_SECONDS)
            if self._process.stderr is not None:
                self._process.stderr.close()


@dataclass
class Tally:
    """What became of a client's programs. Seconds are the server's own, as its replies say."""

    programs: int = 0
    refusals: int = 0
    connections: int = 0
    errors: list[str] = field(default_factory=list)
    queue_seconds: list[float] = field(default_factory=list)


class SoakClient(threading.Thread):
    """``steady``: one request at a time, and a new connection now and then. ``greedy``: ``at_once`` in flight, more
    than the server takes from one client, so that it is refused some all the time."""

    def __init__(self, kind: str, number: int, address: str, messages: Sequence[Message], limits: Limits,
                 stop: threading.Event, *, at_once: int) -> None:  # fmt: skip
        super().__init__(name=f"{kind} client {number}", daemon=True)
        self.kind = kind
        self.tally = Tally()
        self._address, self._messages, self._decoder = address, messages, codec.Decoder(limits)
        self._asked_to_stop = stop
        self._at_once = at_once if kind == GREEDY else 1

    def run(self) -> None:
        options = ClientOptions(connect_timeout_seconds=_HELLO_SECONDS, reply_timeout_seconds=60.0, spin_seconds=0.0,
                                window_requests=self._at_once)  # fmt: skip
        name = "pipelined" if self.kind == GREEDY else "zmq"
        while not self._asked_to_stop.is_set():
            self.tally.connections += 1
            try:
                with transports.connect(name, self._address, options) as client:
                    hello(client, self._decoder, _HELLO_SECONDS)
                    self._use(client)
            except (TransportError, WireError) as error:
                self.tally.errors.append(str(error))
                self._asked_to_stop.wait(0.1)

    def _use(self, client: Client) -> None:
        done = 0
        while not self._asked_to_stop.is_set() and (self.kind == GREEDY or done < _PROGRAMS_A_CONNECTION):
            batch = [self._messages[(done + place) % len(self._messages)] for place in range(self._at_once)]
            done += len(batch)
            if self.kind == STEADY:
                self._count(client.request(batch[0]))
                continue
            polls = [client.begin(message).poll for message in batch]
            while polls and not self._asked_to_stop.is_set():
                polls = [poll for poll in polls if not self._came(poll)]
                time.sleep(0.0005)

    def _came(self, poll: Any) -> bool:
        try:
            reply = poll()
        except LimitError:
            self.tally.refusals += 1
            return True
        if reply is not None:
            self._count(reply)
        return reply is not None

    def _count(self, reply: Reply) -> None:
        answer = self._decoder.decode(reply.frames)
        if not isinstance(answer, Result):
            raise WireError(f"the server answered with a {type(answer).__name__}, where a result was expected")
        self.tally.programs += 1
        self.tally.queue_seconds.append(answer.times.queue_seconds)


def growth(samples: Sequence[int]) -> float | None:
    """How much more the last fifth of ``samples`` is than the second fifth, as a part of it; None for fewer than ten.

    The first fifth is left out: programs are checked and buffers made when they are first needed."""
    fifth = len(samples) // 5
    if fifth < 2:
        return None
    return statistics.median(samples[-fifth:]) / statistics.median(samples[fifth : 2 * fifth]) - 1.0


def breaches(clients: Sequence[SoakClient], memory: Sequence[int], left_open: int, exit_code: int) -> list[str]:
    """The bounds that did not hold."""
    found = [f"{client.name}: {client.tally.errors[0]}" for client in clients if client.tally.errors]
    if (grown := growth(memory)) is not None and grown > MAX_GROWTH:
        found.append(f"the server's memory grew by {grown:.1%}, over the bound of {MAX_GROWTH:.0%}")
    for kind in (STEADY, GREEDY):
        done = [client.tally.programs for client in clients if client.kind == kind]
        if len(done) > 1 and max(done) > MAX_UNFAIRNESS * min(done):
            found.append(f"a {kind} client made {max(done):,} programs, another {min(done):,}")
    if left_open > 0:
        found.append(f"{left_open} descriptors of the server were still open when all clients had left")
    if exit_code:
        found.append(f"the server ended with exit code {exit_code}, asked by SIGTERM")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--clients", type=int, default=8)
    script.parser.add_argument("--minutes", type=float, default=10.0)
    given = script.parse(arguments)
    settings = script.settings()
    folder = model_of(settings)
    spec, limits, wire = read_spec(folder), wire_limits(settings), wire_dtype(settings, ())
    messages: dict[str, list[Message]] = {}
    for kind, tokens in ((STEADY, 1), (GREEDY, GREEDY_TOKENS)):
        calls = [call for pair in fused_calls(spec, tokens) for call in pair]
        messages[kind] = [
            Message(codec.encode_execute(Execute(1, call.program, call.inputs,
                    dict.fromkeys(call.program.inputs, wire), dict.fromkeys(call.program.outputs, wire))).frames)
            for call in calls
        ]  # fmt: skip
    stop, memory = threading.Event(), []
    with torch.inference_mode():
        server = Served(folder, settings.server.threads or machine.thread_split(embedded=True)[1])
        try:
            # Each request once: whatever the server makes at its first use, it has then.
            with transports.connect("zmq", server.address) as client:
                for message in [*messages[STEADY], *messages[GREEDY]]:
                    client.request(message)
            before = server.descriptors()
            kinds = [GREEDY if number < given.clients // 4 else STEADY for number in range(given.clients)]
            at_once = 2 * settings.limits.client_requests
            clients = [
                SoakClient(kind, number + 1, server.address, messages[kind], limits, stop, at_once=at_once)
                for number, kind in enumerate(kinds)
            ]
            for each in clients:
                each.start()
            for number in range(_SAMPLES):
                time.sleep(given.minutes * 60 / _SAMPLES)
                memory.append(server.resident_bytes)
                if not number % 10:
                    done = sum(each.tally.programs for each in clients)
                    script.tell(f"{number} of {_SAMPLES}: {done:,} programs, server {human_bytes(memory[-1])}")
            stop.set()
            for each in clients:
                each.join(_JOIN_SECONDS)
            left_open = server.descriptors(before) - before
        finally:
            stop.set()
            exit_code = server.close()
    rows = [["client", "programs", "queue median, ms", "queue p95, ms", "refused", "connections", "errors"]]
    results = []
    for each in clients:
        tally = each.tally
        waits = spread(tally.queue_seconds or [0.0])
        rows.append([each.name, f"{tally.programs:,}", ms(waits["median"]), ms(waits["p95"]), f"{tally.refusals:,}",
                     f"{tally.connections:,}", str(len(tally.errors))])  # fmt: skip
        results.append(asdict(tally) | {"client": each.name, "queue_seconds": waits})
    results.append({"memory_bytes": memory, "log_lines": server.events})
    found = breaches(clients, memory, left_open, exit_code)
    found += [f"the server ended a connection: {reason}" for reason in server.ended[:1]]
    grown = growth(memory)
    notes = [
        f"{given.minutes:g} minutes; server {human_bytes(memory[0])} at first, {human_bytes(memory[-1])} at last",
        f"its growth after warming up: {'unknown' if grown is None else f'{grown:+.2%}'}",
        *(f"over its bound: {breach}" for breach in found),
    ]
    script.finish(rows, notes, results, folder=folder)
    if found:
        sys.exit(ThresholdError.exit_code)


if __name__ == "__main__":
    main()
