"""What a machine tells before groups are placed on it, beside a Ray that is made up."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from teegpu import __version__, config
from teegpu.errors import ConfigError, ConnectionFailedError, UsageError
from teegpu.fleet import cluster as module
from teegpu.fleet.cluster import RayCluster, RayPlaced
from teegpu.fleet.controller import Found, LostError
from teegpu.fleet.group import Order

FOUND = [Found("one", "order")]


class RayError(Exception):
    pass


class LateError(RayError):
    pass


class UnavailableError(RayError):
    pass


def joined(answer: object, *, ready: bool = True, **more: Any) -> RayCluster:
    """A cluster of one machine, that answers so."""

    def get(_: object, timeout: float = 0) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    ray = SimpleNamespace(
        get=get,
        wait=lambda asked, timeout: (asked if ready else [], []),
        nodes=lambda: [{"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}],
        exceptions=SimpleNamespace(
            RayError=RayError, GetTimeoutError=LateError, ActorUnavailableError=UnavailableError
        ),
        **more,
    )
    made = RayCluster(ray, "f", "127.0.0.1:1")
    made._there = lambda *_: object()  # type: ignore[method-assign]
    return made


def test_a_machine_of_the_same_version_with_a_token_takes_part() -> None:
    assert joined((__version__, "token", FOUND)).found("a") == FOUND
    waits, asked = joined(None, ready=False), []
    waits._there = lambda *given: asked.append(given)  # type: ignore[method-assign]
    assert (waits.found("a"), waits.found("a"), len(asked)) == (None, None, 1)


def test_a_machine_that_takes_its_time_is_asked_once() -> None:
    made, asked = joined(None, ready=False), list[object]()
    made._there = lambda *order: asked.append(order)  # type: ignore[method-assign]
    assert [made.found("a") for _ in range(3)] == [None] * 3
    assert len(asked) == 1


class Answers:
    """Whatever is asked of it is answered by itself."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        return self


def placed(answer: object, *, ready: bool = True, room: bool = True, unfit: Sequence[str] = ()) -> RayPlaced:
    """A group in a cluster that answers so. It is told to end."""
    pytest.importorskip("ray")

    def group(*_: object, bundle_label_selector: list[dict[str, str]] | None, **__: object) -> SimpleNamespace:
        return SimpleNamespace(selector=bundle_label_selector)

    util = SimpleNamespace(
        placement_group=group, placement_group_table=lambda _: {"state": "CREATED" if room else "PENDING"}
    )
    made = joined(answer, ready=ready, remote=Answers(), util=util, cluster_resources=dict)
    made._unfit |= set(unfit)
    found = made.place("one", Order("f", config.load({}, environ={})))
    found.end()
    return found


def test_a_group_has_ended_where_it_never_began() -> None:
    assert placed(None).ended
    assert not placed(None, ready=False).ended
    assert placed(None, ready=False, room=False).ended


@pytest.mark.parametrize("error", [RayError("it died"), UnavailableError("no route")])
def test_who_can_not_be_told_to_end_is_lost(error: Exception) -> None:
    with pytest.raises(LostError):
        _ = placed(error).ended


def test_nothing_is_placed_where_it_can_not_be() -> None:
    made = joined(("0.0.1", "token", []))
    with pytest.raises(ConfigError):
        made.found("a")
    assert made._unfit == {"a"}
    assert placed(None)._room.selector is None
    assert placed(None, unfit=["b", "a"])._room.selector == [{"ray.io/node-id": "!in(a,b)"}]


def test_what_the_controller_said_is_not_missing_where_it_is_late() -> None:
    board = SimpleNamespace(read=SimpleNamespace(remote=object))
    with pytest.raises(ConnectionFailedError, match="is not to be had within"):
        joined(LateError(), get_actor=lambda _: board).status()
    assert joined(RayError("it died"), get_actor=lambda _: board).status() is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((__version__, "", []), "machine 10.0.0.1: Ray lets in whoever reaches it"),
        (("0.0.1", "token", []), "machine 10.0.0.1 has teegpu 0.0.1"),
        (RayError("ModuleNotFoundError: teegpu\nTraceback"), r"machine 10.0.0.1 can't take part \(ModuleNotFoundError"),
    ],
)
def test_another_machine_does_not(answer: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        joined(answer).found("a")


def test_a_machine_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="Ray starts no worker there"):
        joined(None, ready=False).found("a")


@pytest.mark.parametrize(
    ("gpus", "device", "takes"),
    [
        (0, "auto", {"CPU": 2}),
        (8, "auto", {"CPU": 2, "GPU": 4}),
        (8, "cpu", {"CPU": 2}),
        (0, "cuda", {"CPU": 2, "GPU": 4}),
    ],
)
def test_what_a_group_takes(gpus: int, device: str, takes: dict[str, float]) -> None:
    flags = {"server.threads": 2, "server.ranks": 4, "server.device": device}
    order = Order("f", config.load(flags, environ={}))
    assert joined(None, cluster_resources=lambda: {"GPU": gpus}).bundle(order) == takes


def test_a_ray_that_knows_no_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    for version, refused in (("2.51.1", True), ("2.52.0", False), ("3.0.0.dev0", False)):
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__=version))
        with pytest.raises(UsageError, match="knows no tokens") if refused else contextlib.nullcontext():
            module._ray(own=True)


def test_two_controllers_of_one_fleet() -> None:
    class Taken:
        def options(self, **_: object) -> Taken:
            return self

        def remote(self, _: object) -> None:
            raise ValueError("the name is taken")

    pytest.importorskip("ray")
    made = joined(
        None,
        remote=lambda _: Taken(),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "a" * 56),
    )
    with pytest.raises(UsageError, match="is up already"):
        made.open_board({})
