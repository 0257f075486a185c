"""What ``teegpu fleet up`` does all the time: as many groups as are wanted, and a file that says where they are."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from teegpu import endpoints
from teegpu.errors import ConfigError
from teegpu.fleet.group import LOADS, Look, Order
from teegpu.fleet.scaling import Scaling
from teegpu.units import plural

TICK_SECONDS: Final = 0.5

FOLLOW_SECONDS: Final = 2.0
"""Runners look at the file twice a second: after so long none asks a group that is not in it."""

UNSEEN_SECONDS: Final = 5.0
"""A group that its actor has told nothing of for as long is not listed: its machine may be gone."""

ROOM_SECONDS: Final = 10.0
"""A group that has no place after so long is spoken of."""

LOST_SECONDS: Final = 5.0
"""Before another group is placed, where one was lost before anything was seen of it."""

NO_ROOM: Final = "no machine has had room for it yet"

SETTLE_SECONDS: Final = 15.0
"""How long groups that were found at the start may take to be looked at; until then the file stays as it is."""


@dataclass(frozen=True, slots=True)
class Found:
    """A group that serves on a machine, whoever started it, and what it was ordered as."""

    name: str
    order: str
    pid: int = 0
    address: str = ""


class Placed(Protocol):
    """A group with its place in the cluster, or in line for one since ``since``. ``machine``: the only one where it may
    be, as it was serving there already."""

    name: str
    machine: str | None
    since: float

    def look(self) -> tuple[float, Look] | None:
        """What was seen of it last, and when by ``time.monotonic``; None where it has no place yet. Raises
        ``LostError``."""

    def end(self) -> None:
        """Ends it."""

    @property
    def ended(self) -> bool:
        """Whether it is over, or has not begun. Raises ``LostError``."""

    def leave(self) -> None:
        """Gives its place back; where it still serves, it goes on."""


class LostError(Exception):
    """The actor of a group is gone, or its machine is."""


class Cluster(Protocol):
    """Where groups are placed."""

    def machines(self) -> frozenset[str]:
        """Those that are there now. Raises ``ConnectionFailedError`` where the cluster itself is gone."""

    def found(self, machine: str) -> Sequence[Found] | None:
        """What serves there already; None while it is asked. Raises ``ConfigError`` where it can't take part."""

    def forget(self, machine: str, names: Sequence[str]) -> None:
        """Ends these groups there, which nobody wants."""

    def place(self, name: str, order: Order, machine: str | None = None) -> Placed: ...


class Controller:
    """``tick`` is called again and again; ``close`` ends all groups. ``tell`` gets a line for people."""

    def __init__(
        self,
        cluster: Cluster,
        order: Order,
        scaling: Scaling,
        path: Path,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._order, self._scaling = cluster, order, scaling
        self._path, self._tell, self._clock = path, tell, clock
        self._groups: dict[str, Placed] = {}
        self._looks: dict[str, Look] = {}
        self._leaving: dict[str, tuple[float, Placed]] = {}
        self._known: set[str] = set()
        self._listed: list[str] = []
        self._began = clock()
        self._told: dict[str, str] = {}
        self._wanted = 0
        self._place_at = clock()

    def tick(self) -> None:
        """Looks at everything once. Raises ``TeegpuError`` where the fleet can't go on."""
        machines = self._cluster.machines()
        ready = self._meet(machines)
        serving = self._alike(self._look(machines))
        if ready or self._wanted:
            wanted = self._scaling.decide(self._clock(), [look.load for look in serving.values()])
            if self._wanted not in (0, wanted):
                self._tell(f"{plural(wanted, 'group')} wanted, {self._wanted} before")
            self._wanted = wanted
            for _ in range(wanted - len(self._groups) if self._clock() >= self._place_at else 0):
                name = secrets.token_hex(4)
                self._groups[name] = self._cluster.place(name, self._order)
            self._retire(len(self._groups) - wanted, serving)
            self._list([look for name, look in serving.items() if name in self._groups])
        self._part()

    def _meet(self, machines: frozenset[str]) -> bool:
        """Takes over what serves on machines that are new, and ends what nobody wants. → whether all have told: before
        they have, nothing is begun."""
        self._known &= machines
        for machine in sorted(machines - self._known):
            try:
                found = self._cluster.found(machine)
            except ConfigError as error:
                if not self._known:  # what is wrong with the first one is so with all
                    raise
                self._tell(str(error))
                found = []
            if found is None:
                continue
            self._known.add(machine)
            unwanted = []
            for each in found:
                elsewhere = each.name in self._groups or each.name in self._leaving
                if elsewhere or each.order != self._order.fingerprint or len(self._groups) >= self._scaling.most:
                    unwanted.append(each.name)
                else:
                    self._groups[each.name] = self._cluster.place(each.name, self._order, machine)
                    self._tell(f"group {each.name} serves already at {each.address}")
            if unwanted:
                self._tell(f"ending {', '.join(unwanted)}, of an earlier fleet")
                self._cluster.forget(machine, unwanted)
            self._scaling.wanted = max(self._scaling.wanted, len(self._groups))
        return machines <= self._known

    def _look(self, machines: frozenset[str]) -> dict[str, Look]:
        """Those that serve, by name."""
        serving = {}
        for name, group in list(self._groups.items()):
            try:
                seen = group.look()
            except LostError as error:
                last = self._looks.pop(name, None)
                self._say(name, f"lost: {error}")
                group.leave()
                del self._groups[name]
                if last is None:
                    self._place_at = self._clock() + LOST_SECONDS
                elif last.node in machines:  # the actor alone: what it watched may well serve on
                    self._groups[name] = self._cluster.place(name, self._order, last.node)
                continue
            if seen is None:
                if group.machine is not None and group.machine not in machines:
                    group.leave()
                    del self._groups[name]
                elif self._clock() - group.since > ROOM_SECONDS:
                    self._say(name, NO_ROOM)
                continue
            at, look = seen
            self._looks[name] = look
            if look.serving and self._clock() - at <= UNSEEN_SECONDS:
                serving[name] = look
            elif look.said:
                self._say(name, look.said)
        return serving

    def _alike(self, serving: Mapping[str, Look]) -> dict[str, Look]:
        """Those with the model that most have: one name may be two models on two machines."""
        digests = [look.digest for look in serving.values()]
        digest = max(digests, key=digests.count, default="")
        for name, look in serving.items():
            other = f"not listed: its model is {look.digest[:12]}, and that of the others {digest[:12]}"
            self._say(name, f"serves at {look.endpoint}" if look.digest == digest else other)
        return {name: look for name, look in serving.items() if look.digest == digest}

    def _retire(self, many: int, serving: Mapping[str, Look]) -> None:
        """Takes out those that do least. They are ended when runners have followed."""

        def use(name: str) -> tuple[bool, bool, float]:
            look = serving.get(name)
            return look is not None, name in self._looks, 0.0 if look is None else look.load.busy_share

        for name in sorted(self._groups, key=use)[: max(0, many)]:
            self._leaving[name] = (self._clock() + FOLLOW_SECONDS, self._groups.pop(name))
            self._say(name, "is not needed: it answers what it has, and ends")

    def _part(self) -> None:
        for name, (end_at, group) in list(self._leaving.items()):
            try:
                if end_at and self._clock() >= end_at:
                    group.end()
                    self._leaving[name] = (0.0, group)
                if end_at or not group.ended:
                    continue
            except LostError:
                if name in self._looks:
                    self._cluster.forget(self._looks[name].node, [name])
            group.leave()
            del self._leaving[name]
            self._looks.pop(name, None)
            self._told.pop(name, None)

    def _list(self, serving: Sequence[Look]) -> None:
        """Writes the file where it is to be another. It never gets empty: runners would take no notice."""
        found = any(group.machine is not None and name not in self._looks for name, group in self._groups.items())
        if found and self._clock() - self._began < SETTLE_SECONDS:
            return
        listed = sorted((look.endpoint for look in serving if look.endpoint is not None), key=str)
        texts = [str(endpoint) for endpoint in listed]
        if texts and texts != self._listed:
            try:
                endpoints.write(self._path, listed)
                self._listed = texts
            except OSError as error:
                self._say("", f"{self._path} can't be written, and is tried again: {error.strerror}")

    def _say(self, name: str, text: str) -> None:
        """Once, until there is something else to say of the group ``name``, or of the fleet."""
        if text and self._told.get(name) != text:
            self._told[name] = text
            self._tell(f"group {name}: {text}" if name else text)

    def status(self) -> dict[str, Any]:
        """What ``teegpu fleet status`` shows."""
        leaving = {name: group for name, (_, group) in self._leaving.items()}
        return {
            "fleet": self._order.fleet,
            "replicas": [self._scaling.least, self._scaling.most],
            "wanted": self._wanted,
            "file": str(self._path),
            "drain_seconds": self._order.config.server.drain_seconds,
            "groups": [
                _shown(name, self._looks.get(name), ending=name in leaving) for name in [*self._groups, *leaving]
            ],
        }

    def close(self, wait_seconds: float) -> int:
        """Removes the file and ends all groups, together. → how many there were."""
        with contextlib.suppress(OSError):  # groups end all the same
            self._path.unlink()
        groups = self._groups | {name: group for name, (_, group) in self._leaving.items()}
        for group in groups.values():
            with contextlib.suppress(LostError):
                group.end()
        deadline = time.monotonic() + wait_seconds
        for group in groups.values():
            with contextlib.suppress(LostError):
                while not group.ended and time.monotonic() < deadline:
                    time.sleep(0.05)
            group.leave()
        return sum(name in self._looks for name in groups)


def _shown(name: str, look: Look | None, *, ending: bool) -> dict[str, Any]:
    if look is None:
        look = Look(name, "", said=NO_ROOM)
        state = "pending"
    else:
        state = "serving" if look.serving else "loading" if look.said == LOADS else "not serving"
    return {
        "name": name,
        "state": "ending" if ending else state,
        "endpoint": "" if look.endpoint is None else str(look.endpoint),
        "pid": look.pid,
        "model": look.model,
        "digest": look.digest,
        "busy_share": look.load.busy_share,
        "queue_seconds": look.load.queue_seconds,
        "starts": look.starts,
        "said": look.said,
    }
