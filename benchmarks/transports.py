"""Round trip and throughput of each transport by size, with keys and without, beside bare zmq with the same bytes, and
with its own encryption, CURVE, where there are keys.

As many bytes go up as down, of random fp16 values. The throughput is each way, of a batch, in flight together where the
transport can. Ways take turns, round by round, so that what drifts hits all alike. Needs no model.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import transports
from benchmarks.farside import LENGTH, Echo, question
from benchmarks.harness import Script, ms, spread
from teegpu import facts
from teegpu.bench.child import Child
from teegpu.units import human_bytes
from transports import security
from transports.base import Client, ClientOptions
from transports.netem.link import EmulatedLink, LinkSpec
from transports.security import ClientKeys

BARE: Final = "bare zmq"
KEYED: Final = {BARE: ", CURVE"}
"""What is said of each way with keys; of the others that they have them."""
SIZES: Final = (1024, 64 * 1024, 2**20, 8 * 2**20)
BATCH_BYTES: Final = 32 * 2**20
BATCH_REQUESTS: Final = 32
BATCH_SECONDS: Final = 0.25
"""A batch has so many bytes, in 2 requests at least and so many at most; over a slow link no more than it carries in
this time."""
WARM_UP_ROUNDS: Final = 3


@dataclass
class Way:
    """One size over one transport. ``seconds(count)``: of that many exchanges."""

    name: str
    keys: bool
    size: int
    batch: int
    seconds: Callable[[int], float]
    trips: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)

    def figures(self, bare: Way) -> dict[str, Any]:
        rates = [self.size * self.batch / seconds for seconds in self.batches]
        return {
            "transport": self.name,
            "keys": self.keys,
            "bytes": self.size,
            "requests_in_batch": self.batch,
            "round_trip_seconds": spread(self.trips),
            "bytes_per_second": spread(rates),
            "of_bare": statistics.median(bare.batches) / statistics.median(self.batches),
        }


def exchange(client: Client, size: int) -> Callable[[int], float]:
    message = question(size)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        if count == 1:
            client.request(message)
        else:
            for sent in [client.begin(message) for _ in range(count)]:
                sent.wait()
        return time.perf_counter() - started

    return seconds


def batch_of(size: int, link: LinkSpec | None) -> int:
    most = float(BATCH_BYTES)
    if link is not None:
        most = min(most, min(link.up_bytes_per_second, link.down_bytes_per_second) * BATCH_SECONDS)
    return max(2, min(BATCH_REQUESTS, int(most // size)))


def opened(
    stack: contextlib.ExitStack, sizes: Sequence[int], over: str, link: LinkSpec | None, spin_seconds: float
) -> list[Way]:
    """Every way, connected. ``over``: tcp or ipc."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-")))
    own = security.new_pair()
    (folder / "bench.pub").write_text(own.public.text)
    far = stack.enter_context(Child("benchmarks.farside", "messages there and back"))

    def address(name: str) -> str:
        return "tcp://127.0.0.1:0" if over == "tcp" else f"ipc://{folder}/{name}"

    def reach(there: str) -> str:
        return there if link is None else stack.enter_context(EmulatedLink(link, there)).endpoint

    ask = {"do": "mirrors", "open": [address("open")], "keys": [address("keys")], "clients": str(folder)}
    found = far.ask(ask)
    own_keys = ClientKeys(own, security.parse_public(found["public"], "the far side"))
    ways: list[Way] = []
    for keys in (False, True):
        options = ClientOptions(spin_seconds=spin_seconds, keys=own_keys if keys else None)
        there = reach(found["keys" if keys else "open"][0])
        clients = {
            name: stack.enter_context(transports.connect(name, there, options))
            for name, row in facts.TRANSPORTS.items()
            if row.sockets
        }
        frames = []
        for size in sizes:
            reply = clients[facts.ZMQ.name].request(question(size))
            up, down = reply.bytes_up - LENGTH.size - size, reply.bytes_down - size
            frames.append(([up, LENGTH.size, size], [down, size]))
        echo = Echo(far, address(f"bare-{keys}"), frames, spin_seconds, keys=keys, reach=reach)
        stack.callback(echo.close)
        for number, size in enumerate(sizes):
            batch = batch_of(size, link)
            ways.append(Way(BARE, keys, size, batch, lambda count, n=number, e=echo: e.seconds(n, count)))  # type: ignore[misc]
            ways += [Way(name, keys, size, batch, exchange(client, size)) for name, client in clients.items()]
    return ways


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "", model=False)
    script.parser.add_argument("--rounds", type=int, default=20)
    script.parser.add_argument("--size", type=int, action="append", help="bytes each way; several times")
    script.parser.add_argument("--over", choices=("tcp", "ipc"), default="tcp")
    script.parser.add_argument("--link", help="emulate one (with tcp): rtt=5ms,bandwidth=1gbit")
    given = script.parse(arguments)
    link = LinkSpec.parse(given.link) if given.link else None
    with contextlib.ExitStack() as stack:
        ways = opened(stack, given.size or SIZES, given.over, link, script.settings().link.spin_seconds)
        for done in range(-WARM_UP_ROUNDS, given.rounds):
            for way in ways:
                trip, batch = way.seconds(1), way.seconds(way.batch)
                if done >= 0:
                    way.trips.append(trip)
                    way.batches.append(batch)
            script.tell(f"round {done + 1} of {given.rounds}")
    rows = [["bytes each way, transport", "ms a round trip", "p95", "min", "MB/s each way", "min–max", "of bare zmq"]]
    results = []
    for way in sorted(ways, key=lambda way: way.size):
        bare = next(other for other in ways if (other.name, other.keys, other.size) == (BARE, way.keys, way.size))
        figures = way.figures(bare)
        results.append(figures)
        trip, rate = figures["round_trip_seconds"], figures["bytes_per_second"]
        rows.append([
            f"{human_bytes(way.size)}, {way.name}{KEYED.get(way.name, ', keys') if way.keys else ''}",
            ms(trip["median"]), ms(trip["p95"]), ms(trip["min"]), f"{rate['median'] / 1e6:,.1f}",
            f"{rate['min'] / 1e6:,.1f}–{rate['max'] / 1e6:,.1f}", f"{figures['of_bare']:.1%}",
        ])  # fmt: skip
    script.finish(rows, [f"{given.rounds} rounds over {given.over}{f', link {link}' if link else ''}"], results)


if __name__ == "__main__":
    main()
