"""``teegpu fleet`` with a real Ray: machines, a controller and groups that are lost, and the end of each."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from teegpu import files
from teegpu.errors import EXIT_INTERRUPTED
from teegpu.fleet import cluster as fleet_cluster
from teegpu.fleet import process
from teegpu.fleet.controller import Controller
from teegpu.fleet.group import TICK_SECONDS, Order
from teegpu.model.folder import ModelFolder
from tests.teegpu.cli.conftest import Outcome, Process, Start, Teegpu, until


def needs_ray(test: Callable[..., None]) -> Callable[..., None]:
    missing = importlib.util.find_spec("ray") is None
    return pytest.mark.skipif(missing, reason="Ray is not installed")(pytest.mark.alone(test))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Groups outlive who started them, a failing test too; and Ray is set up by variables."""
    before = dict(os.environ)
    yield
    process.end(process.living("fleet"), 0)
    os.environ.clear()
    os.environ |= before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--replicas", "3..1"], "--replicas 3..1: write the least and the most"),
        (["--replicas", "0"], "--replicas 0: write the least"),
        (["--name", "../up"], "--name ../up: up to 40 letters"),
        (["--out", "/nowhere/e.json"], "there is no folder /nowhere"),
        (["--key", "gpu", "--auth", "/keys"], "--key is given and --client-key is not"),
        (["--layers", "front"], "--layers = "),
        (["--model", "~nobody-here/model"], "model.name = '~nobody-here/model' names a user without a home"),
        (["--ray", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_what_can_not_be_is_refused(args: list[str], said: str, teegpu: Teegpu) -> None:
    done = teegpu("fleet", "up", *args)
    assert (done.code, done.out, done.err.count("\n")) == (4 if "--ray" in args else 2, "", 1)
    assert said in done.err


def test_without_ray_it_is_said_how_to_get_it(teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = teegpu("fleet", "up")
    assert (done.code, done.err) == (
        2, "teegpu: a fleet is placed by Ray, which is not installed: pip install 'teegpu[fleet]'\n"
    )  # fmt: skip


def test_one_controller_at_a_time(teegpu: Teegpu) -> None:
    with files.Lock(files.private_folder(process.folder("fleet")) / "up.lock"):
        done = teegpu("fleet", "up")
    assert done.code == 2
    assert "a fleet 'fleet' is up already" in done.err


@pytest.mark.parametrize(("args", "closed"), [([], 1), (["--keep"], 0)])
def test_ctrl_c_ends_the_groups_unless_they_are_kept(
    args: list[str], closed: int, teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = SimpleNamespace(
        hosts=lambda: ["127.0.0.1"], open_board=lambda _: None, bundle=lambda _: {"CPU": 1}, post=lambda _: False
    )
    calls: list[float] = []

    def interrupted(_: Controller) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C, within the command

    def close(_: Controller, wait_seconds: float) -> int:
        calls.append(wait_seconds)
        return 1

    monkeypatch.setattr("teegpu.fleet.cluster.started", lambda *_: contextlib.nullcontext(cluster))
    monkeypatch.setattr(Controller, "tick", interrupted)
    monkeypatch.setattr(Controller, "close", close)
    done = teegpu("fleet", "up", *args)
    assert (done.code, len(calls), "the groups serve on" in done.err) == (0, closed, not closed)


def test_a_signal_while_it_starts_is_an_interrupt(teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: object, **__: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fleet_cluster, "_ray", lambda **_: SimpleNamespace(init=told))
    assert teegpu("fleet", "up").code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before


def test_paths_are_whole_wherever_a_group_starts(
    teegpu: Teegpu, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[Order] = []
    cluster = SimpleNamespace(
        hosts=lambda: ["10.0.0.1"], open_board=lambda _: None, post=lambda _: True,
        bundle=lambda order: orders.append(order) or {"CPU": 1},
    )  # fmt: skip
    monkeypatch.setattr("teegpu.fleet.cluster.started", lambda *_: contextlib.nullcontext(cluster))
    monkeypatch.chdir(model.path.parent)
    keys = ("--key", "gpu", "--client-key", "./probe.key", "--auth", "clients")
    assert teegpu("fleet", "up", "--model", model.path.name, *keys, "--out", tmp_path / "e").code == 0
    (settings,) = (order.config for order in orders)
    folder = Path.cwd()
    assert (settings.model.name, settings.server.key) == (str(model.path), "gpu")
    assert (settings.link.client_key, settings.server.auth_dir) == (str(folder / "probe.key"), str(folder / "clients"))


@pytest.mark.parametrize(("key", "code"), [([], 2), (["--insecure"], 0)])
def test_machines_that_others_reach_need_keys(
    key: list[str], code: int, teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = SimpleNamespace(
        hosts=lambda: ["10.0.0.1"], open_board=lambda _: None, bundle=lambda _: {"CPU": 1}, post=lambda _: True
    )
    monkeypatch.setattr("teegpu.fleet.cluster.started", lambda *_: contextlib.nullcontext(cluster))
    done = teegpu("fleet", "up", *key)
    assert (done.code, "tcp://10.0.0.1:0 can be reached from other machines" in done.err) == (code, not key)
    assert ("warning: --insecure: anybody who reaches this address can use the server" in done.err) == bool(key)


def test_where_there_is_none(teegpu: Teegpu) -> None:
    assert teegpu("fleet", "down").err == "ended 0 groups\n"
    assert (teegpu("fleet", "status").code, teegpu("fleet", "status", "--json").code) == (4, 4)


@pytest.mark.parametrize("command", ["status", "down"])
def test_a_fleet_that_is_up_is_not_taken_for_one_without_a_controller(command: str, teegpu: Teegpu) -> None:
    """What is ended behind its back it would place again."""
    with fleet_cluster.controlled("fleet"):
        done = teegpu("fleet", command)
    assert (done.code, "give the --ray it has" in done.err) == (2, True)


def test_who_listens_where_a_killed_controller_had_its_ray_is_not_joined(teegpu: Teegpu) -> None:
    folder = files.private_folder(process.folder("fleet"))
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        (folder / "ray").write_text(f"127.0.0.1:{stranger.getsockname()[1]}")
        assert teegpu("fleet", "down").err == "ended 0 groups\n"
        with fleet_cluster.controlled("fleet"):  # another one, which has not begun
            assert fleet_cluster.recorded("fleet") == ""
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_a_controller_that_does_not_end_is_not_waited_for_for_ever(
    teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = SimpleNamespace(status=lambda: {"groups": [], "drain_seconds": 0.1}, ask_to_end=lambda: None)
    monkeypatch.setattr("teegpu.fleet.cluster.joined", lambda *_: contextlib.nullcontext(hung))
    monkeypatch.setattr("teegpu.cli.fleet._MORE_SECONDS", 0.0)
    done = teegpu("fleet", "down", "--ray", "127.0.0.1:1")
    assert (done.code, "asked to end fleet 'fleet' and has not within 0.1 s: kill it" in done.err) == (4, True)


def test_a_ray_that_ends_with_its_controller_is_not_asked_while_it_does(
    teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([{"groups": [{}], "drain_seconds": 1.0}])  # who asks again is told nothing, and fails
    there = iter([True, True, False])
    asked = SimpleNamespace(status=lambda: next(said), ask_to_end=lambda: None)
    monkeypatch.setattr("teegpu.fleet.cluster.recorded", lambda _: "127.0.0.1:1")
    monkeypatch.setattr("teegpu.fleet.cluster.joined", lambda *_: contextlib.nullcontext(asked))
    monkeypatch.setattr("teegpu.fleet.cluster.is_controlled", lambda _: next(there))
    done = teegpu("fleet", "down")
    assert (done.code, done.err, list(there)) == (0, "ended 1 group\n", [])


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


class Machines:
    """A cluster, told what to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Token and loopback addresses, as 'fleet up' has them for a Ray of its own.
        self.environ = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 32, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "AUTOSCALER_METRIC_PORT": "0", "RAY_TMPDIR": str(folder),
            # A machine that is lost is to be missed sooner than after half a minute.
            "RAY_health_check_period_ms": "300", "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_initial_delay_ms": "300",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.teegpu.fleet.machines", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.environ,
        )  # fmt: skip
        self.address = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._line() == "done"

    def groups(self, name: str) -> list[process.Process]:
        """What serves on a machine."""
        before = os.environ.get("XDG_STATE_HOME")
        os.environ["XDG_STATE_HOME"] = str(self.folder / name)
        try:
            return process.living("fleet")
        finally:
            if before is None:
                del os.environ["XDG_STATE_HOME"]
            else:
                os.environ["XDG_STATE_HOME"] = before

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def machines(short: Path) -> Iterator[Machines]:
    made = Machines(short)
    try:
        for name in ("a", "b"):
            made.tell(f"add {name}")
        yield made
    finally:
        made.close()
        for name in ("a", "b"):
            process.end(made.groups(name), 0)


class Fleet:
    """The commands, on a cluster or on a Ray of their own."""

    def __init__(self, start: Start, model: ModelFolder, folder: Path, environ: dict[str, str], *more: str) -> None:
        self._start, self._environ, self._more = start, environ, more
        self._own = ["--model", str(model.path), "--threads", "1", "--out", str(folder / "e.json")]
        self.file = folder / "e.json"

    def up(self, *args: str) -> Process:
        return self._start("fleet", "up", *self._own, *args, *self._more, env=self._environ)

    def call(self, command: str, *args: str, **environ: str) -> Outcome:
        return self._start("fleet", command, *args, *self._more, env=self._environ | environ).finish()

    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = json.loads(self.call("status", "--json").out or '{"groups": []}')["groups"]
        return groups

    def listed(self) -> list[str]:
        found: list[str] = json.loads(self.file.read_text())["endpoints"] if self.file.exists() else []
        return found


def until_said(process: Process, *words: str) -> list[str]:
    """The lines up to the one that has all ``words``."""
    lines = [process.line()]
    while not all(word in lines[-1] for word in words):
        lines.append(process.line())
    return lines


@needs_ray
def test_machines_that_come_and_go_and_a_head_that_goes(
    machines: Machines, start: Start, model: ModelFolder, tmp_path: Path
) -> None:
    fleet = Fleet(start, model, tmp_path, machines.environ, "--ray", machines.address)
    up = fleet.up("--replicas", "1..2")
    until_said(up, "serves at")
    until(lambda: len(fleet.listed()) == 1)
    until(lambda: [each["state"] for each in fleet.groups()] == ["serving"])  # it is told a moment after the file
    ((group,), before) = fleet.groups(), fleet.listed()
    assert (group["state"], group["endpoint"], group["model"]) == ("serving", before[0], model.path.name)
    assert "is up already" in fleet.call("up").err

    here, other = ("a", "b") if machines.groups("a") else ("b", "a")
    machines.tell(f"lose {here}")
    until_said(up, "lost: ")
    until_said(up, "serves at")
    until(lambda: fleet.listed() != before)
    assert (len(machines.groups(other)), len(fleet.listed())) == (1, 1)
    # It was out of reach, and its group went on: there is room for two.
    machines.tell(f"add {here}")
    until_said(up, "serves already at", before[0])
    until(lambda: len(fleet.listed()) == 2)
    assert before[0] in fleet.listed()

    machines.tell("headless")
    done = up.finish()
    assert (done.code, "the groups serve on" in done.err) == (4, True)
    assert [len(machines.groups(name)) for name in ("a", "b")] == [1, 1]
    assert len(fleet.listed()) == 2
    # Without the cluster each machine has its own to end; what Ray still has there does not start it anew.
    for name in ("a", "b"):
        alone = Fleet(start, model, tmp_path, machines.environ | {"XDG_STATE_HOME": str(machines.folder / name)})
        assert [group["state"] for group in alone.groups()] == ["unwatched"]
        assert alone.call("down").err == "ended 1 group\n"
    time.sleep(2 * TICK_SECONDS)
    assert [machines.groups(name) for name in ("a", "b")] == [[], []]


@needs_ray
def test_a_ray_of_its_own_and_a_controller_that_is_killed(
    start: Start, model: ModelFolder, tmp_path: Path, short: Path
) -> None:
    environ = {**os.environ, "TMPDIR": str(short)}
    fleet = Fleet(start, model, tmp_path, environ)
    up = fleet.up("--replicas", "1")
    until_said(up, "serves at")
    (group,) = process.living("fleet")
    pid, address = group.pid, (process.folder("fleet") / "ray").read_text()
    assert address.startswith("127.0.0.1:")
    other = {"XDG_STATE_HOME": str(tmp_path), "RAY_AUTH_TOKEN": "0" * 32, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    stranger = fleet.call("status", "--ray", address, **other)
    assert (stranger.code, "can't be used" in stranger.err) == (4, True)

    up.kill()
    up.finish()
    (left,) = fleet.groups()
    assert (left["state"], left["pid"], left["endpoint"]) == ("unwatched", pid, fleet.listed()[0])
    again = fleet.up("--replicas", "1")
    until_said(again, "serves already at")
    until_said(again, "serves at")
    assert (group.alive, group.pid, len(fleet.listed())) == (True, pid, 1)
    assert fleet.call("down").err == "ended 1 group\n"
    assert (again.finish().code, group.alive, fleet.file.exists()) == (0, False, False)
    assert not list(short.glob("teegpu-*")), "what the killed one's Ray left is gone too"
