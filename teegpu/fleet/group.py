"""A group: one ``teegpu serve``, of one or several ranks, that is started, watched and started anew on its machine.

Watched is what runners need: it is asked how it is over the queue that their requests stand in, so a process that is
there, or bound, and does not compute is given up (``fleet.hung_seconds``).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from teegpu import endpoints, keys
from teegpu.config import Config, RunSettings
from teegpu.endpoints import Endpoint
from teegpu.errors import TeegpuError, UsageError
from teegpu.fleet.process import Process, end
from teegpu.fleet.scaling import Load
from teegpu.remote import embedded
from transports import addresses
from transports.errors import AuthenticationError, TransportError

if TYPE_CHECKING:
    from teegpu.wire.messages import HealthReport

TICK_SECONDS: Final = 0.2
"""A process that has ended is seen within this time."""

ASK_SECONDS: Final = 1.0
"""Between two questions how it is."""

_LONGEST_PAUSE: Final = 60.0
"""Between two starts of a group that does not come up."""

_END_SECONDS: Final = 5.0
"""How much longer than ``server.drain_seconds`` a group may take to end."""

_KEPT: Final = 0.7
"""How much of its mean queue stays with each answer."""


@dataclass(frozen=True, slots=True)
class Order:
    """What every group of ``fleet`` is to be. ``config`` is read on the machine of the fleet's controller alone."""

    fleet: str
    config: Config = field(repr=False)
    insecure: bool = False

    def command(self, address: str) -> list[str]:
        """``teegpu serve`` at ``address``, without the settings that ``environment`` gives."""
        server = self.config.server
        given = ["--bind", address]
        given += [part for option, value in (("--key", server.key), ("--auth", server.auth_dir)) if value
                  for part in (option, value)]  # fmt: skip
        given += ["--insecure"] if self.insecure else []
        return [sys.executable, "-P", "-m", "teegpu", "serve", "--config", os.devnull, *given]

    def environment(self) -> dict[str, str]:
        """Without Ray's own, which let who has them into the cluster."""
        made = embedded.child_environment(self.config, ("model.", "server.", "limits.", "compression."))
        return {name: value for name, value in made.items() if not name.startswith("RAY_")}

    @property
    def fingerprint(self) -> str:
        """Groups with another one are not what is ordered now."""
        values = {key: value for key, value in self.config.values().items() if key.split(".")[0] in _DECIDE}
        return hashlib.sha256(json.dumps([self.insecure, values], sort_keys=True).encode()).hexdigest()


_DECIDE: Final = frozenset({"model", "server", "limits", "compression"})


@dataclass(frozen=True, slots=True)
class Look:
    """A group as it was seen last. ``node`` is Ray's name of its machine; ``endpoint`` what runners are to be told;
    ``said``: why it does not serve; ``starts``: how often it was started here."""

    name: str
    node: str
    endpoint: Endpoint | None = None
    pid: int = 0
    serving: bool = False
    load: Load = field(default_factory=Load)
    model: str = ""
    digest: str = ""
    said: str = ""
    starts: int = 0


LOADS: Final = "it loads"


class Group:
    """The group ``name`` on this machine, at an address of ``host``. One that is there already is taken over, where it
    has the same ``devices``: which are its own now."""

    def __init__(self, name: str, order: Order, *, host: str, node: str = "", devices: str = "") -> None:
        self._order, self._host, self._devices = order, host, devices
        self._process = Process(order.fleet, name)
        self._settings = order.config.fleet
        self._seen = Look(name, node)
        self._before: tuple[float, HealthReport] | None = None
        self._failures = 0
        self._since = self._start_at = time.monotonic()
        self._watched = False
        self._starting = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name=f"group {name}")
        self._thread.start()

    def look(self) -> Look:
        """Raises ``UsageError`` where somebody else has ended it: it is not started anew, and not watched any more."""
        if not self._thread.is_alive() and not self._over.is_set():
            raise UsageError("nobody watches it any more: somebody ended it, or to watch it failed")
        return self._seen

    def end(self) -> None:
        """Lets it answer what it has, and ends it; returns when it is gone."""
        self._over.set()
        with self._starting:
            self._end()

    def _end(self) -> None:
        end([self._process], self._order.config.server.drain_seconds + _END_SECONDS)

    # The thread

    def _watch(self) -> None:
        ask_at = 0.0
        while not self._over.wait(TICK_SECONDS):
            now = time.monotonic()
            if self._watched and not self._process.wanted:
                return  # As 'fleet down' does where Ray's head is gone, and Ray has not yet ended us.
            if self._watched and not self._process.alive:
                words = "" if self._process.served else self._process.last_words()
                self._failed(f"it ended: {words or self._process.log}")
            elif not self._watched and now >= self._start_at:
                self._start()
            elif self._watched and now >= ask_at:
                self._ask()
                ask_at = now + ASK_SECONDS

    def _start(self) -> None:
        """Where it is there already, it is taken over, unless the devices that it has may be another group's now."""
        try:
            with self._starting:
                about = self._process.about
                found = self._process.alive and about.get("devices", "") == self._devices
                address = about.get("address", "") if found else _free_address(self._host)
                endpoint = self._endpoint(address)
                if not found and not self._over.is_set():
                    if self._process.alive:
                        self._end()
                    about = {"address": address, "order": self._order.fingerprint, "devices": self._devices}
                    self._process.begin(self._order.command(address), self._order.environment(), about)
        except (TeegpuError, TransportError, OSError) as error:
            self._failed(str(error))
            return
        self._watched, self._since, self._before = True, time.monotonic(), None
        self._seen = replace(
            self._seen, endpoint=endpoint, said="" if found else LOADS, starts=self._seen.starts + (not found)
        )

    def _endpoint(self, address: str) -> Endpoint:
        own, layers = keys.server_keys(self._order.config), self._order.config.server.layers
        options = [f"layers={layers}"] if layers else []
        options += [f"key={own.own.public.text}"] if own is not None else []
        return endpoints.parse(address + ("#" + ",".join(options) if options else ""))

    def _ask(self) -> None:
        from teegpu.remote import health  # it takes torch, which takes its time: the group loads meanwhile

        endpoint, config = self._seen.endpoint, self._order.config
        if endpoint is None:
            return
        link = replace(config.link, hello_timeout_seconds=self._settings.hung_seconds)
        try:
            found = health.probe(endpoint, replace(config, run=RunSettings(endpoints=(str(endpoint),)), link=link))
        except (TeegpuError, TransportError) as error:
            self._silent(str(error), loads=not isinstance(error, AuthenticationError))
            return
        if not self._process.wanted:
            return
        self._process.trim()
        self._process.has_served()
        now = time.monotonic()
        self._since, self._failures = now, 0
        load = self._load(now, found.health, health.ROUND_TRIPS + 1)
        ends = found.health.draining
        self._seen = replace(
            self._seen, pid=self._process.pid, serving=not ends, load=load,
            model=found.welcome.model, digest=found.welcome.digest, said="it is being stopped" if ends else "",
        )  # fmt: skip

    def _silent(self, why: str, *, loads: bool) -> None:
        """``loads``: whether it may be that it is not yet there."""
        served = self._process.served
        seconds = self._settings.hung_seconds if served else self._settings.load_seconds
        if not self._process.alive or self._over.is_set():
            return
        if time.monotonic() - self._since >= seconds:
            self._process.kill()
            self._failed(f"it was given up, after {seconds:g} s without an answer: {why}")
        else:
            self._seen = replace(
                self._seen, pid=self._process.pid, serving=False, said=LOADS if loads and not served else why
            )

    def _failed(self, why: str) -> None:
        """It is started anew: at once, and if it does not come up after more and more time."""
        self._watched = False
        self._start_at = time.monotonic() + (min(_LONGEST_PAUSE, 2.0**self._failures) if self._failures else 0.0)
        self._failures += 1
        self._seen = replace(self._seen, pid=0, serving=False, load=Load(), said=why)

    def _load(self, now: float, report: HealthReport, own: int) -> Load:
        """``own``: how many requests we make at a time. By Little's law one waits for as long as it takes to serve
        those that stand in line."""
        queue = self._seen.load.queue_seconds
        if self._before is not None:
            then, before = self._before
            served = report.requests_served - before.requests_served - own
            queue = _KEPT * queue + (1 - _KEPT) * report.waiting_requests * (now - then) / max(1, served)
        self._before = (now, report)
        return Load(report.busy_share, queue)


def _free_address(host: str) -> str:
    """With a port that nobody has now: where another takes it first, the server ends, and the next one gets another."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((host, 0))
        return f"tcp://{addresses.at(host, free.getsockname()[1])}"
