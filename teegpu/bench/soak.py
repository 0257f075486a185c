"""``teegpu bench soak``: one server, many clients that leave it no rest, and what becomes of its memory and fairness.

The server is ``teegpu serve`` on a TCP port of this machine; the clients are threads here, which send programs of the
fused plan again and again. Most are steady; the greedy ones have more in flight than the server takes from one client,
and programs of many tokens. Three things are held to bounds: the server's memory does not grow, no descriptor is left
open when all clients have gone, and clients of one kind get on alike.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import transports
from teegpu import machine
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.overhead import fused_calls
from teegpu.bench.soakclient import GREEDY, STEADY, SoakClient, requests
from teegpu.bench.soakserver import ServedModel
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import wire_dtype, wire_limits
from teegpu.units import human_bytes
from transports.base import Message

MAX_GROWTH = 0.05
MAX_UNFAIRNESS = 2.0
GREEDY_TOKENS = 64
_SAMPLES = 120
_NOTICES = 20
_LEAVE_SECONDS = 10.0
_STEADY_SECONDS = 0.5
_JOIN_SECONDS = 90.0


def growth(samples: Sequence[int]) -> float | None:
    """How much more the last fifth of ``samples`` is than the second fifth, as a part of it; None for fewer than ten.

    The first fifth is left out: programs are checked and buffers made when they are first needed."""
    fifth = len(samples) // 5
    if fifth < 2:
        return None
    return statistics.median(samples[-fifth:]) / statistics.median(samples[fifth : 2 * fifth]) - 1.0


def unfairness(rates: Sequence[float]) -> float | None:
    """The largest over the smallest; infinite where one is 0, None for fewer than two."""
    if len(rates) < 2:
        return None
    return max(rates) / min(rates) if min(rates) > 0 else float("inf")


class SoakBenchmark:
    """``clients`` at once for ``seconds``, ``greedy`` of them greedy. ``breaches`` are the bounds that did not hold.

    Raises ``UsageError`` for what can't be, and what reading the model raises.
    """

    name = "soak"

    def __init__(self, folder: ModelFolder, base: Config, *, clients: int, seconds: float, greedy: int) -> None:
        if clients < 1:
            raise UsageError(f"--clients {clients} is below the least, 1")
        if not 0 <= greedy <= clients:
            raise UsageError(f"--greedy {greedy} is not between 0 and the {clients} clients that there are")
        if not seconds > 0:
            raise UsageError(f"--minutes {seconds / 60:g} is not above 0")
        if clients > base.limits.clients:
            raise UsageError(f"--clients {clients} is more than limits.clients allows, {base.limits.clients}")
        self.failures: list[str] = []
        self._folder = folder
        self._base = base
        self._kinds = [GREEDY if number < greedy else STEADY for number in range(clients)]
        self._seconds = seconds
        self._spec = read_spec(folder)
        self._threads = base.server.threads or machine.thread_split(embedded=True)[1]
        self._clients: list[SoakClient] = []
        self._rss: list[int] = []
        self._ran_seconds = 0.0
        self._descriptors: dict[str, int] = {}
        self._exit_code: int | None = None
        self._events: dict[str, int] = {}
        self._digest = ""
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        notify(Progress(0, _NOTICES, "soak", "loading"))
        server = ServedModel(self._folder, self._base, threads=self._threads)
        try:
            with WeightStore(self._folder, self._spec) as store:
                self._digest = store.digest()
            address = server.wait()
            messages = self._messages()
            self._warm_up(address, messages)
            before = self._settled(server, 0)
            with self._running(address, messages):
                self._watch(server, notify)
            self._descriptors = {"before": before, "after": self._settled(server, before)}
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.close()
            self._exit_code, self._events = server.exit_code, dict(server.events)
        for client in self._clients:
            if client.tally.errors:
                self.failures.append(f"{client.name}: {client.tally.errors[0]}")

    def _messages(self) -> dict[str, list[Message]]:
        """What the clients of each kind send."""
        with torch.inference_mode():
            pairs = {STEADY: fused_calls(self._spec), GREEDY: fused_calls(self._spec, GREEDY_TOKENS)}
            return {
                kind: requests([call for pair in calls for call in pair], wire_dtype(self._base, ()))
                for kind, calls in pairs.items()
            }

    @staticmethod
    def _warm_up(address: str, messages: dict[str, list[Message]]) -> None:
        """Each request once: whatever the server makes at its first use, it has then."""
        with transports.connect("zmq", address) as client:
            for message in [*messages[STEADY], *messages[GREEDY]]:
                client.request(message)

    @contextlib.contextmanager
    def _running(self, address: str, messages: dict[str, list[Message]]) -> Iterator[None]:
        stop = threading.Event()
        limits, at_once = wire_limits(self._base), 2 * self._base.limits.client_requests
        self._clients = [
            SoakClient(kind, number + 1, address, messages[kind], limits, stop, at_once=at_once)
            for number, kind in enumerate(self._kinds)
        ]
        try:
            for client in self._clients:
                client.start()
            yield
        finally:
            stop.set()
            for client in self._clients:
                if client.ident is not None:
                    client.join(_JOIN_SECONDS)

    def _watch(self, server: ServedModel, notify: Notify) -> None:
        started = time.perf_counter()
        told = 0
        for number in range(1, _SAMPLES + 1):
            time.sleep(max(0.0, started + number * self._seconds / _SAMPLES - time.perf_counter()))
            _ = server.descriptors  # raises where it is gone
            self._rss.append(server.resident_bytes)
            self._ran_seconds = time.perf_counter() - started
            if number * _NOTICES // _SAMPLES > told:
                told = number * _NOTICES // _SAMPLES
                programs = sum(client.tally.programs for client in self._clients)
                outcome = f"{programs:,} programs, server {human_bytes(self._rss[-1])}"
                left = self._seconds - self._ran_seconds
                notify(Progress(told, _NOTICES, "soak", f"{len(self._clients)} clients", outcome, max(0.0, left)))

    @staticmethod
    def _settled(server: ServedModel, expected: int) -> int:
        """Its descriptors once it has taken notice that everybody has left: when they are as many as ``expected``, or
        do not get fewer any more."""
        deadline = time.perf_counter() + _LEAVE_SECONDS
        least, since = server.descriptors, time.perf_counter()
        while least > expected and time.perf_counter() < min(deadline, since + _STEADY_SECONDS):
            time.sleep(0.02)
            if (now := server.descriptors) < least:
                least, since = now, time.perf_counter()
        return least

    @property
    def breaches(self) -> list[str]:
        found = []
        grown = growth(self._rss)
        if grown is not None and grown > MAX_GROWTH:
            found.append(f"the server's memory grew by {grown:.1%}, over the bound of {MAX_GROWTH:.0%}")
        for kind in (STEADY, GREEDY):
            ratio = self._unfairness(kind)
            if ratio is not None and ratio > MAX_UNFAIRNESS:
                found.append(f"a {kind} client got on {ratio:.2f} times as fast as another, over {MAX_UNFAIRNESS:g}")
        if self._descriptors and self._descriptors["after"] > self._descriptors["before"]:
            left = self._descriptors["after"] - self._descriptors["before"]
            found.append(f"{left} descriptors of the server were still open when all clients had left")
        if self._exit_code not in (None, 0):
            found.append(f"the server ended with exit code {self._exit_code}, told to end by SIGTERM")
        return found

    def _unfairness(self, kind: str) -> float | None:
        return unfairness([float(client.tally.programs) for client in self._clients if client.kind == kind])

    def document(self, status: str) -> dict[str, Any]:
        results = [
            {"label": client.name, "kind": client.kind, **client.tally.to_json(self._ran_seconds)}
            for client in self._clients
            if self._rss
        ]
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "clients": len(self._kinds),
                "greedy": self._kinds.count(GREEDY),
                "greedy_tokens": GREEDY_TOKENS,
                "seconds": self._seconds,
                "wire_dtype": wire_dtype(self._base, ()),
                "threads": {"runner": None, "server": self._threads},
                "client_requests": self._base.limits.client_requests,
            },
            notes=self._notes() if results else [],
            results=results,
            server={
                "rss_bytes": self._rss,
                "rss_growth": growth(self._rss),
                "descriptors": self._descriptors or None,
                "exit_code": self._exit_code,
                "log_lines": self._events,
            },
            fairness={kind: self._unfairness(kind) for kind in (STEADY, GREEDY)},
            breaches=self.breaches,
        )

    def _notes(self) -> list[str]:
        grown = growth(self._rss)
        told = [
            f"{self._ran_seconds:.1f} s; server {human_bytes(self._rss[0])} at first, {human_bytes(self._rss[-1])} at "
            f"last, growth after warming up {'unknown' if grown is None else f'{grown:+.2%}'}"
        ]
        for kind in (STEADY, GREEDY):
            ratio = self._unfairness(kind)
            if ratio is not None:
                told.append(f"fairness among {kind} clients, fastest over slowest: {ratio:.2f}")
        if self._descriptors:
            told.append(f"server descriptors: {self._descriptors['before']} before, {self._descriptors['after']} after")
        return [*told, *(f"over its bound: {breach}" for breach in self.breaches)]
