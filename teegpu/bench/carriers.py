"""``teegpu bench transports``: round trip and throughput by size for each transport, with keys and without, and for
bare zmq beside them.

The far sides are processes of their own, but for ``inprocess``, which is a server in a thread and the floor of what the
protocol costs without a network. Ways take turns, and bare zmq sends frames of the same sizes.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import transports
from teegpu.bench import document as doc
from teegpu.bench.echo import Echo
from teegpu.bench.exchanges import (
    SIZES,
    BareCarrier,
    Carrier,
    Mirrors,
    ProductCarrier,
    Reach,
    Way,
    batch_of,
    checked_sizes,
    take_turns,
    whole_rounds,
)
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.mirror import Mirror
from teegpu.config import Config
from teegpu.errors import UsageError, nearest
from teegpu.settings import TRANSPORTS
from transports.base import ClientOptions
from transports.link import LinkSpec

BARE: Final = "bare zmq"
INPROCESS: Final = "inprocess"
OVER: Final = ("tcp", "ipc")


class TransportBenchmark:
    """``rounds`` times each of ``sizes`` bytes up and as many down, over each of ``names`` (of ``settings.TRANSPORTS``)
    and each kind of address in ``over``. ``base.run.link`` may name an emulated link, which stands before tcp only.

    Raises ``UsageError`` for what can't be measured.
    """

    name = "transports"
    failures: tuple[str, ...] = ()

    def __init__(
        self,
        base: Config,
        *,
        rounds: int,
        sizes: Sequence[int] = SIZES,
        names: Sequence[str] = TRANSPORTS,
        over: Sequence[str] = (),
    ) -> None:
        self._sizes = checked_sizes(sizes, rounds)
        self._names = _checked(names, TRANSPORTS, "--transport")
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._over = _checked(over or (OVER if self._link is None else ("tcp",)), OVER, "--over")
        if self._link is not None and "ipc" in self._over:
            raise UsageError("--over ipc: the emulated link is one over tcp, leave out one of --over and --link")
        self._base = base
        self._rounds = rounds
        self._ways: list[Way] = []
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        with contextlib.ExitStack() as stack:
            notify(Progress(0, self._rounds, "transports", "loading"))
            self._open(stack)
            take_turns(self._ways, self._rounds, notify, "transports")

    def _open(self, stack: contextlib.ExitStack) -> None:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-")))
        reach = Reach(self._link, stack)
        mirrors = Mirrors([(_address(over, sockets / "open"), _address(over, sockets / "keys")) for over in self._over],
                          stack)  # fmt: skip
        linked = [name for name in self._names if name != INPROCESS]
        for place, over in enumerate(self._over):
            for encrypted in (False, True):
                options = ClientOptions(
                    spin_seconds=self._base.link.spin_seconds,
                    compression_level=self._base.compression.level,
                    compression_min_bytes=self._base.compression.min_bytes,
                    curve=mirrors.curve if encrypted else None,
                )
                there = reach((mirrors.keys if encrypted else mirrors.open)[place])
                with transports.connect("zmq", there, options) as client:
                    envelopes = {size: ProductCarrier(client, client).envelope_bytes(size) for size in self._sizes}
                address = _address(over, sockets / f"bare-{encrypted}")
                echo = Echo(address, BareCarrier.frames(envelopes), options.spin_seconds, keys=encrypted, reach=reach)
                self._add(BARE, over, encrypted, BareCarrier(stack.enter_context(echo), envelopes))
                for name in linked:
                    client = stack.enter_context(transports.connect(name, there, options))
                    self._add(name, over, encrypted, ProductCarrier(client, client))
        if INPROCESS in self._names:
            server = transports.listen("inprocess://teegpu-bench")
            stack.enter_context(Mirror(server))
            client = stack.enter_context(transports.connect(INPROCESS, server.address))
            self._add(INPROCESS, "", False, ProductCarrier(client, client))

    def _add(self, name: str, over: str, encrypted: bool, carrier: Carrier) -> None:
        label = ", ".join(part for part in (name, over, "keys" if encrypted else "") if part)
        facts = {"transport": name, "over": over, "encrypted": encrypted}
        # A link's bandwidth says how long a batch may be; what does not cross it takes no notice.
        link = self._link if over else None
        self._ways += [Way(label, facts, size, carrier, batch_of(size, link)) for size in self._sizes]

    def document(self, status: str) -> dict[str, Any]:
        whole = whole_rounds(self._ways)
        results = [self._result(way, whole) for way in self._ways] if whole else []
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=None,
            digest="",
            settings={
                "rounds": self._rounds,
                "sizes": list(self._sizes),
                "transports": list(self._names),
                "over": list(self._over),
                "link": str(self._link) if self._link is not None else "",
                "spin_seconds": self._base.link.spin_seconds,
                "compression": {"level": self._base.compression.level, "min_bytes": self._base.compression.min_bytes},
            },
            notes=_NOTES if results else [],
            results=results,
        )

    def _result(self, way: Way, whole: int) -> dict[str, Any]:
        result = way.figures(whole)
        if not way.facts["over"]:
            del result["link_share"]
        bare = self._bare(way)
        if bare is not None and bare is not way:
            result["to_bare"] = {
                "round_trip_seconds": result["round_trip"]["median"] - statistics.median(bare.round_trips[:whole]),
                "round_trip_ratio": result["round_trip"]["median"] / statistics.median(bare.round_trips[:whole]),
                "throughput_ratio": statistics.median(bare.batches[:whole]) / statistics.median(way.batches[:whole]),
            }
        return result

    def _bare(self, way: Way) -> Way | None:
        """Bare zmq with the same bytes at the same kind of address, keys or none."""
        alike = {**way.facts, "transport": BARE}
        return next((other for other in self._ways if other.size == way.size and other.facts == alike), None)


_NOTES: Final = [
    "as many bytes up as down, of random fp16 values; a round trip is one request, with all that both sides do for it",
    "throughput is each way, while both are busy: several requests in flight where the transport can, else one by one",
    "inprocess: the server is a thread of the same process",
]


def _address(over: str, path: Path) -> str:
    return "tcp://127.0.0.1:0" if over == "tcp" else f"ipc://{path}"


def _checked(given: Sequence[str], known: Sequence[str], flag: str) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise UsageError(f"{flag} {name} is not one of {', '.join(known)}{nearest(name, list(known))}")
    return tuple(dict.fromkeys(given))
