"""The server that a run starts for itself: how it comes, what it says when it can't, and that it goes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teegpu import config
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConnectionFailedError, ModelError, TeegpuError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.remote import embedded as embedded_server
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.health import probe
from tests.conftest import TinyModel

FOLDER = ModelFolder("tiny", Path("/nowhere/tiny"))

Fake = Callable[[str], EmbeddedServer]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def fake(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """``fake(script)``: an embedded server whose child is that shell script."""
    made: list[EmbeddedServer] = []

    def make(script: str) -> EmbeddedServer:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        made.append(EmbeddedServer(FOLDER, Config(), threads=3))
        return made[-1]

    yield make
    for server in made:
        server.close()
        assert server.ended
    assert list(scratch.iterdir()) == []


READY = """echo '{"address": "there"}'"""
UNTIL_TOLD = "cat >/dev/null"


def test_a_real_one(tiny_model: TinyModel, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes nothing from the current folder, neither modules nor settings, and our limits from us."""
    (tmp_path / "torch.py").write_text("raise SystemExit('from the current folder')")
    (tmp_path / "config.toml").write_text("[server]\nbnd = 'no such setting'\n")
    (tmp_path / "ours.toml").write_text("[limits]\nmessage_mib = 77\n")
    monkeypatch.chdir(tmp_path)
    settings = config.load({"server.dtype": "fp32"}, tmp_path / "ours.toml")
    with EmbeddedServer(tiny_model("llama"), settings, threads=1) as server:
        assert server.endpoint.startswith(f"ipc://{scratch}/teegpu-")
        (folder,) = scratch.glob("teegpu-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert server.wait() == {"address": server.endpoint}
        assert probe(Endpoint(server.endpoint), settings).health.dtype == "fp32"
        assert probe(Endpoint(server.endpoint), settings).welcome.limits["message_bytes"] == 77 * 2**20
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
        assert Path(server.endpoint.removeprefix("ipc://")).is_socket()
    assert server._child.process.returncode == 0
    assert server.last_words == ""
    assert not Path(f"/proc/{server.pid}").exists()
    assert not folder.exists()


def test_what_the_child_is_told(fake: Fake) -> None:
    server = fake(f'printf "%s\\n" "[\\"$*\\"]"; {UNTIL_TOLD}')
    (told,) = server.wait()
    assert told == (
        "-P -m teegpu serve --embedded --offline --config /dev/null --model /nowhere/tiny "
        f"--bind {server.endpoint} --device auto --dtype auto --weights full --threads 3"
    )


def test_a_child_that_is_told_to_end_does(fake: Fake, tmp_path: Path) -> None:
    server = fake(f"{READY}; {UNTIL_TOLD}; echo ended >{tmp_path}/ended")
    assert server.wait() == {"address": "there"}
    server.close()
    assert (tmp_path / "ended").read_text() == "ended\n"


def test_a_child_that_does_not_listen_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_server, "_STOP_SECONDS", 0.1)
    server = fake(f"trap '' TERM; {READY}; exec sleep 1000 2>/dev/null")
    server.wait()
    server.close()
    assert server.failure().args == (
        "the embedded GPU server ended by signal SIGKILL, which may mean that this machine is out of memory",
    )


def test_a_child_that_still_loads_is_not_waited_for(fake: Fake) -> None:
    server = fake("exec sleep 1000 2>/dev/null")
    server.close()
    assert server.ended


def test_an_interrupt_while_it_ends_leaves_no_child(fake: Fake) -> None:
    server = fake(f"{READY}; exec sleep 1000 2>/dev/null")
    server.wait()
    main = threading.get_ident()
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        server.close()
    timer.join()
    assert not Path(f"/proc/{server.pid}").exists()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("echo 'a warning' >&2; echo 'teegpu: no such model' >&2; exit 3", ModelError, "no such model"),
        ("echo 'teegpu: server.bind: no' >&2; exit 2", UsageError, "server.bind: no"),
        ("echo 'teegpu: disk full' >&2; exit 1", TeegpuError, "disk full"),
        ("exit 3", ConnectionFailedError, "the embedded GPU server ended with exit code 3"),
        ("exit 0", ConnectionFailedError, "the embedded GPU server ended with exit code 0"),
        (
            "printf 'Traceback\\nValueError: why\\nteegpu: this is a bug in teegpu\\n' >&2; exit 70",
            ConnectionFailedError,
            "the embedded GPU server ended with exit code 70 (ValueError: why)",
        ),
        ("kill -TERM $$", ConnectionFailedError, "the embedded GPU server ended by signal SIGTERM"),
        (
            "kill -KILL $$",
            ConnectionFailedError,
            "the embedded GPU server ended by signal SIGKILL, which may mean that this machine is out of memory",
        ),
        ("kill -40 $$", ConnectionFailedError, "the embedded GPU server ended by signal 40"),
    ],
)
def test_why_it_could_not_load(script: str, kind: type[TeegpuError], message: str, fake: Fake) -> None:
    server = fake(script)
    with pytest.raises(TeegpuError) as raised:
        server.wait()
    assert type(raised.value) is kind
    assert str(raised.value) == message


def test_output_that_ends_before_the_child(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_server, "_STOP_SECONDS", 0.1)
    server = fake("exec sleep 1000 >/dev/null 2>&1")
    with pytest.raises(ConnectionFailedError, match="closed its output and is still there"):
        server.wait()


def test_ended_waits_for_a_process_that_is_about_to(fake: Fake) -> None:
    server = fake(f"{READY}; {UNTIL_TOLD}")
    server.wait()
    killer = threading.Timer(0.1, os.kill, (server.pid, signal.SIGKILL))
    killer.start()
    assert server.ended
    killer.join()


def test_ended_says_no_of_a_living_one(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_server, "_GONE_SECONDS", 0.05)
    server = fake(f"{READY}; {UNTIL_TOLD}")
    server.wait()
    assert not server.ended


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = embedded_server._private_folder()
    folder.rmdir()
    assert folder.parent == Path("/tmp")


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/absent")
    with pytest.raises(UsageError, match=r"in /proc/absent \(no such file or directory\): set TMPDIR to a folder"):
        EmbeddedServer(FOLDER, Config(), threads=1)


def test_no_usable_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(UsageError, match=r"in the usual places \(no usable temporary directory found"):
        EmbeddedServer(FOLDER, Config(), threads=1)


def test_a_child_that_can_not_be_started_leaves_no_folder(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        EmbeddedServer(FOLDER, Config(), threads=1)
    assert list(scratch.iterdir()) == []
