"""A group on this machine: a real server that is killed, stopped, taken over and ended."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from teegpu import config, keys
from teegpu.endpoints import parse
from teegpu.errors import UsageError
from teegpu.fleet import group as module
from teegpu.fleet import process
from teegpu.fleet.group import LOADS, Group, Order
from teegpu.wire.messages import HealthReport
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import until

Ordered = Callable[..., Order]


@pytest.fixture
def ordered(tiny_model: TinyModel) -> Iterator[Ordered]:
    """``ordered(**{"server.threads": 2})`` → an order of groups of a tiny model; what serves is ended."""

    def made(**flags: object) -> Order:
        path = str(tiny_model("llama").path)
        return Order("f", config.load({"model.name": path, "server.threads": 1, **flags}, environ={}))

    yield made
    process.end(process.living("f"), 0)


def settled(group: Group) -> int:
    """The process of a group that serves."""
    until(lambda: group.look().serving)
    return group.look().pid


def test_one_that_ends_or_hangs_is_started_anew(ordered: Ordered) -> None:
    group = Group("one", ordered(**{"fleet.hung_seconds": 2.0, "server.layers": "0-0"}), host="127.0.0.1", node="n")
    until(lambda: group.look().said == LOADS)
    first = settled(group)
    seen = group.look()
    assert (seen.node, seen.starts, seen.endpoint is not None and seen.endpoint.layers) == ("n", 1, (0, 0))
    assert len(seen.digest) == 64

    os.kill(first, signal.SIGKILL)
    until(lambda: not group.look().serving)
    second = settled(group)
    # It is there, its port is open, and it computes nothing.
    os.kill(second, signal.SIGSTOP)
    until(lambda: group.look().starts == 3)
    assert settled(group) not in (first, second)

    with socket.create_connection(("127.0.0.1", int(str(group.look().endpoint).rpartition(":")[2].partition("#")[0]))):
        group.end()
    assert process.living("f") == []


def test_one_that_is_there_is_taken_over(ordered: Ordered) -> None:
    order = ordered(**{"fleet.hung_seconds": 2.0})
    before = Group("one", order, host="127.0.0.1")
    first = settled(before)
    before._over.set()  # as where its actor is killed: nobody watches any more
    after = Group("one", order, host="127.0.0.1")
    assert (settled(after), after.look().starts, after.look().endpoint) == (first, 0, before.look().endpoint)
    # One that hangs by then has come up before: it is not taken for one that loads.
    after._over.set()
    after._thread.join()
    os.kill(first, signal.SIGSTOP)
    after = Group("one", order, host="127.0.0.1")
    assert settled(after) != first
    # And where somebody ends it, who watches does not start it anew.
    process.end(process.living("f"), 5.0)
    after._thread.join()
    with pytest.raises(UsageError, match="somebody ended it"):
        after.look()
    assert process.living("f") == []


def test_one_whose_devices_are_another_s_now_is_not_taken_over(ordered: Ordered) -> None:
    """A cluster that is new gives them out as it likes: two groups would be on one."""
    order = ordered()
    before = Group("one", order, host="127.0.0.1", devices="0")
    first = settled(before)
    before._over.set()
    after = Group("one", order, host="127.0.0.1", devices="1")
    assert (settled(after) != first, after.look().starts, len(process.living("f"))) == (True, 1, 1)
    after.end()


def test_one_whose_watch_failed_does_not_seem_to_serve(ordered: Ordered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "_watch", lambda _: None)
    group = Group("one", ordered(), host="127.0.0.1")
    group._thread.join()
    with pytest.raises(UsageError, match="nobody watches it"):
        group.look()


def test_one_that_does_not_come_up_says_why_and_is_tried_more_and_more_seldom(ordered: Ordered) -> None:
    group = Group("one", ordered(**{"model.name": "/nowhere", "model.offline": True}), host="127.0.0.1")
    until(lambda: group.look().starts == 2)
    until(lambda: group.look().said.startswith("it ended: teegpu: ") and "/nowhere" in group.look().said)
    assert group._start_at - time.monotonic() > 1
    group.end()


def test_the_public_key_is_told_and_groups_are_asked_with_a_key(ordered: Ordered) -> None:
    for name in ("gpu", "probe"):
        keys.new(name)
    order = ordered(**{"server.key": "gpu", "server.auth_dir": str(keys.folder()), "link.client_key": "probe"})
    group = Group("one", order, host="127.0.0.1")
    settled(group)
    endpoint = group.look().endpoint
    assert endpoint is not None
    assert endpoint.key == keys.public("gpu").text
    assert parse(str(endpoint)) == endpoint
    group.end()


def test_one_that_does_not_know_the_key_says_so_while_it_loads(ordered: Ordered, tmp_path: Path) -> None:
    for name in ("gpu", "probe"):
        keys.new(name)
    order = ordered(**{"server.key": "gpu", "server.auth_dir": str(tmp_path), "link.client_key": "probe"})
    group = Group("one", order, host="127.0.0.1")
    until(lambda: "does not know this client's key (link.client_key" in group.look().said)
    assert not group.look().serving
    group.end()


def test_what_decides_about_a_group_is_in_its_order(ordered: Ordered) -> None:
    one = ordered()
    assert one.fingerprint == ordered(**{"fleet.hung_seconds": 3.0}).fingerprint
    others = [ordered(**{"server.threads": 2}), ordered(**{"model.name": "other"}), replace(one, insecure=True)]
    assert len({order.fingerprint for order in [one, *others]}) == 4


def test_a_group_gets_the_settings_and_nothing_of_ray(ordered: Ordered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    order = ordered(**{"server.key": "gpu", "server.auth_dir": "/keys", "limits.clients": 7})
    environ = order.environment()
    assert (environ["TEEGPU_SERVER_THREADS"], environ["TEEGPU_LIMITS_CLIENTS"]) == ("1", "7")
    assert not [name for name in environ if name.startswith("RAY_")]
    command = order.command("tcp://10.0.0.1:5")
    assert command[command.index("serve") :] == [
        *("serve", "--config", os.devnull, "--bind", "tcp://10.0.0.1:5", "--key", "gpu", "--auth", "/keys")
    ]
    loaded = config.load({"server.key": "gpu"}, environ=environ)
    assert loaded.limits == order.config.limits
    assert "--insecure" in replace(order, insecure=True).command("tcp://10.0.0.1:5")


def test_how_long_requests_wait_follows_from_how_many_are_served(ordered: Ordered) -> None:
    group = Group("one", ordered(), host="127.0.0.1")
    group._over.set()
    group._thread.join()

    def seen(served: int, waiting: int) -> HealthReport:
        return HealthReport(
            0, "", "", "", "", "", "", (0, 1), 1.0, 1, 1, served, 0, waiting, waiting, 0, 0.5, 0, 0, 0, False, 1
        )  # fmt: skip

    assert group._load(10.0, seen(100, 50), 6).queue_seconds == 0.0
    # In 2 s 40 of others were served, so 10 that wait do so for half a second.
    for number in range(1, 30):
        load = group._load(10.0 + 2 * number, seen(100 + 46 * number, 10), 6)
        group._seen = replace(group._seen, load=load)
    assert load.queue_seconds == pytest.approx(0.5, rel=0.01)
    assert load.busy_share == 0.5
    assert module._free_address("::1").startswith("tcp://[::1]:")
