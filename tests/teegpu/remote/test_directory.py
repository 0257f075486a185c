"""Servers that come and go: names with many addresses, files that change, and what is made of those that are broken."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from teegpu.endpoints import FORMAT, Endpoint
from teegpu.errors import ConfigError, ShieldError
from teegpu.remote import directory
from teegpu.remote.directory import Directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "FILE_SECONDS", 0.01)
    monkeypatch.setattr(directory, "NAME_SECONDS", 0.05)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "endpoints.json"
    write(path, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    return path


def write(path: Path, *entries: str) -> None:
    """As who writes such a file should: whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"format": FORMAT, "endpoints": list(entries)}))
    new.replace(path)


class Watched:
    """What a directory told."""

    def __init__(self, directory: Directory) -> None:
        self.told: list[list[str]] = []
        self.notes: list[str] = []
        self.fault: Exception | None = None
        self.first = [str(endpoint) for endpoint in directory.first()]
        directory.watch(self._tell, self.notes.append)

    def _tell(self, found: list[Endpoint]) -> None:
        if self.fault is not None:
            raise self.fault
        self.told.append([str(endpoint) for endpoint in found])


def test_a_file_is_followed(file: Path) -> None:
    with closing(Directory([f"@{file}#key=ours", "tcp://127.0.0.1:9"])) as found:
        watched = Watched(found)
        assert watched.first == ["tcp://127.0.0.1:1#key=ours", "tcp://127.0.0.1:2#key=ours", "tcp://127.0.0.1:9"]
        write(file, "tcp://127.0.0.1:2", "tcp://127.0.0.1:3#key=theirs")
        until(lambda: watched.told)
    # who writes the file does not decide whom to believe
    assert watched.told == [["tcp://127.0.0.1:2#key=ours", "tcp://127.0.0.1:3#key=ours", "tcp://127.0.0.1:9"]]
    assert watched.notes == []


def test_what_is_said_of_a_file_goes_for_all_in_it(file: Path) -> None:
    write(file, "tcp://127.0.0.1:1#operator=me,key=mine,layers=0-1")
    with closing(Directory([f"@{file}#operator=them,key=ours,share=2,layers=0-9"])) as found:
        assert Watched(found).first == ["tcp://127.0.0.1:1#layers=0-1,key=ours,share=2,operator=them"]


BROKEN: dict[str, Callable[[Path], object]] = {
    "half written": lambda path: path.write_text('{"format": "teegpu.endpoints/1", "endp'),
    "empty": lambda path: path.write_text(""),
    "of nobody": write,
    "gone": Path.unlink,
    "another format": lambda path: path.write_text('{"format": "teegpu.endpoints/2", "endpoints": ["tcp://a:1"]}'),
    "no list": lambda path: path.write_text('{"format": "teegpu.endpoints/1", "endpoints": "tcp://a:1"}'),
    "no text": lambda path: path.write_text('{"format": "teegpu.endpoints/1", "endpoints": [1]}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "long": lambda path: path.write_text(" " * (2 << 20)),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "twice": lambda path: write(path, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
    "both sides": lambda path: write(path, "tcp://127.0.0.1:1#share=1", "tcp://127.0.0.1:2#share=2"),
    "no address": lambda path: write(path, "127.0.0.1:1"),
    "a file": lambda path: write(path, f"@{path}"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_file_that_is_broken_changes_nothing(damage: str, file: Path) -> None:
    with closing(Directory([f"@{file}"])) as found:
        watched = Watched(found)
        BROKEN[damage](file)
        until(lambda: watched.notes)
        time.sleep(0.05)
        assert watched.told == []
        (note,) = watched.notes  # once, however often it is looked at
        assert note.startswith("the servers stay as they are: ")
        assert "\n" not in note
        write(file, "tcp://127.0.0.1:3")
        until(lambda: watched.told)
    assert watched.told == [["tcp://127.0.0.1:3"]]


@pytest.mark.parametrize("damage", BROKEN)
def test_a_file_that_is_broken_from_the_start(damage: str, file: Path) -> None:
    BROKEN[damage](file)
    with closing(Directory([f"@{file}"])) as found, pytest.raises(ConfigError):
        found.first()


def test_servers_that_can_not_be_used_are_told_of_once(file: Path) -> None:
    with closing(Directory([f"@{file}"])) as found:
        watched = Watched(found)
        watched.fault = ShieldError("they are one server")
        write(file, "tcp://127.0.0.1:3")
        until(lambda: watched.notes)
        watched.fault = None
        write(file, "tcp://127.0.0.1:4")
        until(lambda: watched.told)
    assert watched.notes == ["the servers stay as they are: they are one server"]


class Names:
    """A name service."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: list[str] | OSError = list(hosts)
        self.asked = 0

    def __call__(self, address: str) -> list[str]:
        self.asked += 1
        if isinstance(self.hosts, OSError):
            raise self.hosts
        return [f"tcp://{host}:5555" for host in self.hosts]


def test_a_name_is_as_many_servers_as_it_has_addresses_and_is_followed() -> None:
    names = Names("10.0.0.1", "[fd00::1]")
    with closing(Directory(["tcp://gpu.local:5555#key=ours"], names)) as found:
        watched = Watched(found)
        assert watched.first == ["tcp://10.0.0.1:5555#key=ours", "tcp://[fd00::1]:5555#key=ours"]
        names.hosts = ["10.0.0.1", "10.0.0.2"]
        until(lambda: watched.told)
        assert watched.told == [["tcp://10.0.0.1:5555#key=ours", "tcp://10.0.0.2:5555#key=ours"]]
        names.hosts = OSError(2, "Name or service not known")
        until(lambda: watched.notes)
    assert len(watched.told) == 1
    assert watched.notes == [
        "the servers stay as they are: tcp://gpu.local:5555 has no address now (Name or service not known)"
    ]


def test_a_lost_server_hurries_the_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "NAME_SECONDS", 1e6)
    names = Names("10.0.0.1")
    with closing(Directory(["tcp://gpu.local:5555"], names)) as found:
        watched = Watched(found)
        names.hosts = ["10.0.0.2"]
        time.sleep(0.05)
        assert (names.asked, watched.told) == (1, [])
        found.hurry()
        until(lambda: watched.told)


def test_a_name_that_nobody_knows_yet_stays_a_name() -> None:
    names = Names()
    names.hosts = OSError(2, "Name or service not known")
    with closing(Directory(["tcp://gpu.local:5555"], names)) as found:
        assert Watched(found).first == ["tcp://gpu.local:5555"]


def test_a_name_service_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LOOKUP_SECONDS", 0.05)
    answer = threading.Event()

    def resolve(_: str) -> list[str]:
        answer.wait()
        return ["tcp://10.0.0.1:5555"]

    with closing(Directory(["tcp://gpu.local:5555"], resolve)) as found:
        watched = Watched(found)
        assert watched.first == ["tcp://gpu.local:5555"]
        answer.set()
        until(lambda: watched.told)
    assert watched.told == [["tcp://10.0.0.1:5555"]]


def test_where_nothing_can_change_nothing_is_watched() -> None:
    with closing(Directory(["tcp://127.0.0.1:1", "ipc:///run/gpu"])) as found:
        before = set(threading.enumerate())
        Watched(found)
        assert set(threading.enumerate()) <= before
