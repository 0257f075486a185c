"""The controller beside a cluster that is made up: what it places, lists, takes over and ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from teegpu import config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, ConnectionFailedError
from teegpu.fleet.controller import (
    FOLLOW_SECONDS,
    LOST_SECONDS,
    NO_ROOM,
    ROOM_SECONDS,
    SETTLE_SECONDS,
    UNSEEN_SECONDS,
    Controller,
    Found,
    LostError,
)
from teegpu.fleet.group import LOADS, Look, Order
from teegpu.fleet.scaling import Load, Scaling

ORDER = Order("f", config.load({"fleet.grow_seconds": 5.0, "fleet.shrink_seconds": 5.0}, environ={}))


@dataclass
class FakeGroup:
    name: str
    machine: str | None
    since: float
    seen: tuple[float, Look] | None = None
    lost: bool = False
    ending: bool = False
    gone: bool = False
    left: bool = False
    room: bool = True
    ended_lost: bool = False

    def look(self) -> tuple[float, Look] | None:
        if self.lost:
            raise LostError("the actor died")
        return self.seen

    def end(self) -> None:
        assert not self.ending, "a second signal would end it at once"
        self.ending = True

    @property
    def ended(self) -> bool:
        if self.ended_lost:
            raise LostError("the actor died")
        return self.gone or not self.room

    def leave(self) -> None:
        self.left = True


@dataclass
class FakeCluster:
    now: float = 0.0
    there: set[str] = field(default_factory=lambda: {"a", "b"})
    serving: dict[str, Sequence[Found] | ConfigError | None] = field(default_factory=dict)
    placed: list[tuple[FakeGroup, str | None]] = field(default_factory=list)
    forgotten: list[tuple[str, Sequence[str]]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def machines(self) -> frozenset[str]:
        return frozenset(self.there)

    def found(self, machine: str) -> Sequence[Found] | None:
        found = self.serving.get(machine, [])
        if isinstance(found, ConfigError):
            raise found
        return found

    def forget(self, machine: str, names: Sequence[str]) -> None:
        self.forgotten.append((machine, names))

    def place(self, name: str, order: Order, machine: str | None = None) -> FakeGroup:
        group = FakeGroup(name, machine, self.now)
        self.placed.append((group, machine))
        return group

    @property
    def groups(self) -> list[FakeGroup]:
        return [group for group, _ in self.placed]

    def serve(self, *groups: FakeGroup, load: Load | None = None, node: str = "a") -> None:
        """They are seen to serve, now."""
        for group in groups:
            endpoint = Endpoint(f"tcp://10.0.0.{self.groups.index(group)}:5555")
            group.seen = self.now, Look(group.name, node, endpoint, 1, serving=True, load=load or Load())


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


Make = Callable[..., Controller]


@pytest.fixture
def make(cluster: FakeCluster, tmp_path: Path) -> Make:
    def made(least: int, most: int) -> Controller:
        scaling = Scaling(least, most, ORDER.config.fleet)
        return Controller(cluster, ORDER, scaling, tmp_path / "e.json", cluster.told.append, lambda: cluster.now)

    return made


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[], list[str]]:
    """The ends of the addresses in the file."""

    def read() -> list[str]:
        path = tmp_path / "e.json"
        found = json.loads(path.read_text())["endpoints"] if path.exists() else []
        return [text.removeprefix("tcp://10.0.0.").removesuffix(":5555") for text in found]

    return read


def states(controller: Controller) -> list[str]:
    return [group["state"] for group in controller.status()["groups"]]


Listed = Callable[[], list[str]]


def test_as_many_as_wanted_are_placed_and_those_that_serve_are_listed(
    cluster: FakeCluster, make: Make, listed: Listed
) -> None:
    controller = make(2, 3)
    controller.tick()
    assert [machine for _, machine in cluster.placed] == [None, None]
    assert (states(controller), listed()) == (["pending", "pending"], [])
    one, other = cluster.groups
    one.seen = 0.0, Look(one.name, "a", Endpoint("tcp://10.0.0.0:5555"), 1, said=LOADS)
    cluster.serve(other)
    controller.tick()
    assert (states(controller), listed()) == (["loading", "serving"], ["1"])
    cluster.serve(one)
    controller.tick()
    assert listed() == ["0", "1"]
    assert len(cluster.placed) == 2


def test_one_that_does_not_serve_is_not_listed_unless_it_is_the_last(
    cluster: FakeCluster, make: Make, listed: Listed
) -> None:
    controller = make(2, 2)
    controller.tick()
    cluster.serve(*cluster.groups)
    controller.tick()
    one = cluster.groups[0]
    assert one.seen is not None
    one.seen = 0.0, replace(one.seen[1], serving=False, said="it ended")
    controller.tick()
    assert listed() == ["1"]
    cluster.now += UNSEEN_SECONDS + 1  # of the other nothing has been heard since
    controller.tick()
    assert listed() == ["1"], "an empty file would change nothing for runners"
    cluster.serve(one)
    controller.tick()
    assert listed() == ["0"], "nor is one that was not heard of"


def test_one_with_another_model_is_not_listed(cluster: FakeCluster, make: Make, listed: Listed) -> None:
    controller = make(3, 3)
    controller.tick()
    cluster.serve(*cluster.groups)
    other = cluster.groups[0]
    assert other.seen is not None
    other.seen = other.seen[0], replace(other.seen[1], digest="f" * 64)
    controller.tick()
    controller.tick()
    assert listed() == ["1", "2"]
    assert [line for line in cluster.told if other.name in line] == [
        f"group {other.name}: not listed: its model is ffffffffffff, and that of the others "
    ]


def test_a_lost_actor_comes_again_where_it_was_and_a_lost_machine_elsewhere(cluster: FakeCluster, make: Make) -> None:
    controller = make(1, 1)
    controller.tick()
    (group,) = cluster.groups
    cluster.serve(group, node="a")
    controller.tick()
    group.lost = True
    controller.tick()
    again, machine = cluster.placed[-1]
    assert (again.name, machine, group.left) == (group.name, "a", True)
    cluster.serve(again, node="a")
    controller.tick()
    again.lost = True
    cluster.there = {"b"}
    controller.tick()
    other, machine = cluster.placed[-1]
    assert machine is None
    assert other.name != group.name, "the one before may still be there, where nobody sees it"


def test_who_is_awaited_on_a_machine_that_goes_is_placed_elsewhere(cluster: FakeCluster, make: Make) -> None:
    cluster.serving = {"a": [Found("one", ORDER.fingerprint)]}
    controller = make(1, 1)
    controller.tick()
    cluster.there = {"b"}
    controller.tick()
    controller.tick()
    (one, _), (other, machine) = cluster.placed
    assert (one.left, other.name != "one", machine) == (True, True, None)


def test_what_serves_already_is_taken_over(cluster: FakeCluster, make: Make, listed: Listed, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"endpoints": ["tcp://10.0.0.9:5555"]}')
    mine = ORDER.fingerprint
    cluster.serving = {"a": [Found("one", mine), Found("old", "other settings")], "b": [Found("two", mine)]}
    controller = make(1, 3)
    controller.tick()
    assert [(group.name, machine) for group, machine in cluster.placed] == [("one", "a"), ("two", "b")]
    assert cluster.forgotten == [("a", ["old"])]
    assert controller.status()["wanted"] == 2
    cluster.serve(cluster.groups[0])
    controller.tick()
    assert listed() == ["9"], "who follows the file should not lose one that is about to be seen"
    cluster.now = SETTLE_SECONDS
    controller.tick()
    assert listed() == ["9"], "the first was not heard of for long"
    cluster.serve(cluster.groups[0])
    controller.tick()
    assert listed() == ["0"]


def test_what_is_too_many_or_twice_is_ended(cluster: FakeCluster, make: Make) -> None:
    cluster.serving = {"a": [Found(name, ORDER.fingerprint) for name in ("one", "two", "three")]}
    controller = make(1, 2)
    controller.tick()
    assert cluster.forgotten == [("a", ["three"])]
    # A machine that was thought lost comes back, with one that goes on elsewhere.
    cluster.there.add("c")
    cluster.serving["c"] = [Found("two", ORDER.fingerprint)]
    controller.tick()
    assert cluster.forgotten[1:] == [("c", ["two"])]


def test_nothing_is_placed_before_all_machines_have_told(cluster: FakeCluster, make: Make) -> None:
    cluster.serving = {"b": None}
    controller = make(1, 1)
    controller.tick()
    assert cluster.placed == []
    cluster.serving = {}
    controller.tick()
    assert len(cluster.placed) == 1


def test_one_that_is_new_and_says_nothing_holds_up_nobody(cluster: FakeCluster, make: Make, listed: Listed) -> None:
    controller = make(1, 1)
    controller.tick()
    cluster.there.add("c")
    cluster.serving["c"] = None
    cluster.serve(*cluster.groups)
    controller.tick()
    assert listed() == ["0"]


def test_one_that_is_lost_before_it_was_seen_is_not_placed_again_at_once(cluster: FakeCluster, make: Make) -> None:
    controller = make(1, 1)
    controller.tick()
    cluster.groups[0].lost = True
    controller.tick()
    controller.tick()
    assert (len(cluster.placed), cluster.groups[0].left) == (1, True)
    cluster.now += LOST_SECONDS
    controller.tick()
    assert len(cluster.placed) == 2


def test_one_that_ends_while_its_actor_is_lost_is_ended_all_the_same(cluster: FakeCluster, make: Make) -> None:
    controller = make(1, 2)
    cluster.serving = {"a": [Found("one", ORDER.fingerprint), Found("two", ORDER.fingerprint)]}
    controller.tick()
    while not any(group.ending for group in cluster.groups):
        cluster.now += 1
        cluster.serve(*cluster.groups)
        controller.tick()
    (leaving,) = (group for group in cluster.groups if group.ending)
    leaving.ended_lost = True
    controller.tick()
    assert (cluster.forgotten, leaving.left) == ([("a", [leaving.name])], True)


def test_a_file_that_can_not_be_written_is_tried_again(
    cluster: FakeCluster, make: Make, listed: Listed, tmp_path: Path
) -> None:
    (tmp_path / "e.json").mkdir()
    controller = make(1, 1)
    controller.tick()
    cluster.serve(*cluster.groups)
    controller.tick()
    controller.tick()
    assert len([line for line in cluster.told if "can't be written, and is tried again" in line]) == 1
    (tmp_path / "e.json").rmdir()
    controller.tick()
    assert listed() == ["0"]


def test_a_machine_that_can_not_take_part(cluster: FakeCluster, make: Make) -> None:
    cluster.serving = {"b": ConfigError("machine b has another version")}
    make(1, 1).tick()
    assert "machine b has another version" in cluster.told
    assert len(cluster.placed) == 1
    cluster.serving["a"] = ConfigError("no token")
    with pytest.raises(ConfigError, match="no token"):
        make(1, 1).tick()


def test_one_that_is_not_needed_leaves_the_file_first(cluster: FakeCluster, make: Make, listed: Listed) -> None:
    controller = make(1, 2)
    controller.tick()

    def pass_time(seconds: float, load: Load) -> None:
        for _ in range(int(seconds)):
            cluster.now += 1
            cluster.serve(*(group for group in cluster.groups if not group.ending), load=load)
            controller.tick()

    pass_time(7, Load(1.0))
    assert len(cluster.placed) == 2
    pass_time(2, Load(0.5))
    assert listed() == ["0", "1"]
    while len(listed()) == 2:
        pass_time(1, Load(0.1))
    left = cluster.groups[1 - int(listed()[0])]
    assert (left.ending, "ending" in states(controller)) == (False, True)
    pass_time(FOLLOW_SECONDS, Load(0.1))
    assert (left.ending, left.left) == (True, False)
    pass_time(5, Load(0.1))
    assert "ending" in states(controller), "it answers what it has"
    left.gone = True
    pass_time(1, Load(0.1))
    assert (left.left, states(controller)) == (True, ["serving"])


def test_where_there_is_no_room_it_is_said_once(cluster: FakeCluster, make: Make) -> None:
    controller = make(1, 1)
    for _ in range(3):
        controller.tick()
        cluster.now += ROOM_SECONDS
    assert [line for line in cluster.told if NO_ROOM in line] == [f"group {cluster.groups[0].name}: {NO_ROOM}"]
    assert controller.status()["groups"][0]["said"] == NO_ROOM


def test_a_cluster_that_is_gone_ends_the_controller_and_no_group(
    cluster: FakeCluster, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = make(1, 1)
    controller.tick()

    def gone(_: FakeCluster) -> frozenset[str]:
        raise ConnectionFailedError("Ray's head is gone")

    monkeypatch.setattr(FakeCluster, "machines", gone)
    with pytest.raises(ConnectionFailedError):
        controller.tick()
    assert not cluster.groups[0].ending


def test_a_file_that_can_not_be_removed_keeps_no_group(cluster: FakeCluster, make: Make, tmp_path: Path) -> None:
    (tmp_path / "e.json").mkdir()
    controller = make(1, 1)
    controller.tick()
    cluster.groups[0].gone = True
    controller.close(1.0)
    assert cluster.groups[0].ending


def test_the_end(cluster: FakeCluster, make: Make, listed: Listed, tmp_path: Path) -> None:
    controller = make(3, 3)
    controller.tick()
    *serving, pending = cluster.groups
    pending.room = False
    cluster.serve(*serving)
    controller.tick()
    assert listed() == ["0", "1"]
    for group in serving:
        group.gone = True
    assert controller.close(60.0) == 2, "nobody waits for one that never had a place"
    assert all(group.ending and group.left for group in cluster.groups), "it may get one at any time"
    assert not (tmp_path / "e.json").exists()
