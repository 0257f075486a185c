"""``teegpu bench link``: round-trip time and bandwidth each way of the link to a GPU server, as a run would get them.

The server is the one of ``run.endpoints``, or an embedded one; an emulated link may stand before either. What is sent
is what any server answers (see ``linkprobe``), over the plain lock-step transport, with the keys of the settings.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import transports
from teegpu import endpoints, machine
from teegpu.bench import document as doc
from teegpu.bench.linkprobe import Crossing, LinkProbe, LinkSamples, figures, measure
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_limits
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.handshake import check_digest, hello
from teegpu.units import human_bytes
from teegpu.wire.codec import Decoder
from teegpu.wire.messages import Welcome
from transports.base import Client
from transports.netem.link import EmulatedLink, LinkSpec

TRANSPORT = "zmq"
_NOTICES = 5


class LinkBenchmark:
    """``rounds`` round trips, then ``transfers`` large messages each way, within about ``seconds``.

    ``folder`` is the model of an embedded server. With an endpoint it may be None: then whatever model the server holds
    will do, else it has to be this one. Raises ``UsageError`` for what can't be measured.
    """

    name = "link"
    failures: tuple[str, ...] = ()

    def __init__(
        self, base: Config, folder: ModelFolder | None, *, rounds: int, transfers: int, seconds: float
    ) -> None:
        for flag, value in (("--rounds", rounds), ("--transfers", transfers)):
            if value < 1:
                raise UsageError(f"{flag} {value} is below the least, 1")
        if not seconds > 0:
            raise UsageError(f"--seconds {seconds:g} is not above 0")
        listed = endpoints.parse_all(base.run.endpoints)
        if len(listed) > 1:
            servers = len(listed)
            raise UsageError(f"run.endpoints names {servers} servers, and a link leads to one: name it with --endpoint")
        self._base = base
        self._folder = folder
        self._rounds, self._transfers, self._seconds = rounds, transfers, seconds
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._endpoint = listed[0] if listed else None
        self._options = client_options(base, self._endpoint)
        self._spec: ModelSpec | None = None
        self._digest = ""
        self._welcome: Welcome | None = None
        self._samples = LinkSamples()
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        total = self._rounds + 2 * self._transfers
        with contextlib.ExitStack() as stack:
            notify(Progress(0, total, "link", "connecting"))
            client, welcome = self._connect(stack)
            machine.keep_freed_memory()
            began = time.perf_counter()

            def told(what: str, done: int, of: int, figure: str) -> None:
                whole = done if what == "round trip" else self._rounds + 2 * done
                if done == of or not done % max(1, of // _NOTICES):
                    left = (time.perf_counter() - began) / whole * (total - whole)
                    notify(Progress(whole, total, what, f"{done} of {of}", figure if done == of else "", left))

            probe = LinkProbe(client, welcome, wire_limits(self._base),
                              timeout_seconds=self._base.link.reply_timeout_seconds)  # fmt: skip
            measure(
                probe,
                self._samples,
                round_trips=self._rounds,
                transfers=self._transfers,
                seconds=self._seconds,
                told=told,
            )

    def _connect(self, stack: contextlib.ExitStack) -> tuple[Client, Welcome]:
        """A connection to the server, through the emulated link where there is one; and what the server said."""
        base = self._base
        if self._folder is not None:
            self._spec = read_spec(self._folder)
        endpoint = self._endpoint or self._embedded(stack)
        address = endpoint.address
        if self._link is not None:
            address = stack.enter_context(EmulatedLink(self._link, address)).endpoint
        client = stack.enter_context(transports.connect(TRANSPORT, address, self._options))
        self._welcome = welcome = hello(client, Decoder(wire_limits(base)), base.link.hello_timeout_seconds)
        if self._folder is not None and self._spec is not None:
            with WeightStore(self._folder, self._spec) as store:
                self._digest = store.digest()
            check_digest(welcome, self._spec, self._digest, endpoint.address)
        return client, welcome

    def _embedded(self, stack: contextlib.ExitStack) -> Endpoint:
        if self._folder is None:
            raise UsageError("there is no server to measure the link to: name one with --endpoint")
        _, threads = machine.thread_split(embedded=True)
        server = EmbeddedServer(self._folder, self._base, threads=self._base.server.threads or threads)
        stack.enter_context(server)
        server.wait()
        return Endpoint(server.endpoint)

    def document(self, status: str) -> dict[str, Any]:
        samples = self._samples
        results: list[dict[str, Any]] = []
        notes: list[str] = []
        link: dict[str, Any] | None = None
        if samples.small:
            results.append(_round_trip(samples))
        if samples.complete:
            results += [_bandwidth("up", samples.up, samples.up_rates)]
            results += [_bandwidth("down", samples.down, samples.down_rates)]
            spec = samples.spec()
            link = {
                "spec": str(spec),
                "rtt_seconds": spec.rtt_seconds,
                "bandwidth_up_bytes_per_second": spec.up_bytes_per_second,
                "bandwidth_down_bytes_per_second": spec.down_bytes_per_second,
            }
            notes.append(f"as a setting: --link {spec}")
        if results:
            notes.append(self._setting())
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "rounds": self._rounds,
                "transfers": self._transfers,
                "endpoint": str(self._endpoint or ""),
                "transport": TRANSPORT,
                "encrypted": self._options.keys is not None,
                "link": str(self._link) if self._link is not None else "",
                "spin_seconds": self._base.link.spin_seconds,
            },
            notes=notes,
            results=results,
            server=_server(self._welcome),
            measured_link=link,
        )

    def _setting(self) -> str:
        where = str(self._endpoint) if self._endpoint else "an embedded server"
        keys = "with keys" if self._options.keys is not None else "without keys"
        return f"to {where}, {keys}; the server's own time is taken off, as its replies tell it"


def _server(welcome: Welcome | None) -> dict[str, Any]:
    if welcome is None:
        return {}
    return {
        "model": welcome.model,
        "digest": welcome.digest,
        "device": welcome.device,
        "dtype": welcome.dtype,
        "version": welcome.software,
    }


def _round_trip(samples: LinkSamples) -> dict[str, Any]:
    small = samples.small[0]
    return {
        "label": "round trip",
        "part": "rtt",
        "bytes": max(small.bytes_up, small.bytes_down),
        "rtt_seconds": figures(samples.rtts),
        "samples": _sampled(samples.small),
    }


def _bandwidth(way: str, crossings: Sequence[Crossing], rates: Sequence[float]) -> dict[str, Any]:
    size = crossings[0].bytes_up if way == "up" else crossings[0].bytes_down
    return {
        "label": f"{way}, {human_bytes(size)}",
        "part": way,
        "bytes": size,
        "bytes_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "network_seconds": figures([each.network_seconds for each in crossings]),
        "server_seconds": figures([each.server_seconds for each in crossings]),
        "samples": _sampled(crossings),
    }


def _sampled(crossings: Sequence[Crossing]) -> dict[str, list[float]]:
    return {
        "network_seconds": [each.network_seconds for each in crossings],
        "server_seconds": [each.server_seconds for each in crossings],
    }
