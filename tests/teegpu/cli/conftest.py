"""The command as its user meets it: called in this process, or as a process of its own; and a GPU server to talk to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

import transports
from teegpu.cli import main as cli
from teegpu.gpu import server as gpu
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.wire.limits import Limits
from tests.conftest import TinyModel

DEADLINE_SECONDS = 30.0


# The command, in this process


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        assert document["schema"] == "teegpu.report/1"
        return document


Teegpu = Callable[..., Outcome]


@pytest.fixture
def teegpu(capsys: pytest.CaptureFixture[str]) -> Teegpu:
    """``teegpu("run", "Hi")`` → exit code, stdout and stderr."""

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        code = cli.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


# The command, as a process


class Process(subprocess.Popen[str]):
    """The command in a session of its own. ``finish`` gives what it printed."""

    def finish(self) -> Outcome:
        # ``communicate`` would leave out what was read ahead of a line.
        rest: list[str] = []
        errors = threading.Thread(target=lambda: rest.append(self.stderr.read() if self.stderr else ""))
        errors.start()
        out = self.stdout.read() if self.stdout else ""
        errors.join()
        return Outcome(self.wait(DEADLINE_SECONDS), out, rest[0])

    def line(self) -> str:
        """The next line of its stderr. Raises where it ends without one."""
        assert self.stderr is not None
        line = self.stderr.readline()
        if not line:
            raise AssertionError(f"the process ended: {self.finish()}")
        return line


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start("run", "Hi")`` → a process; whatever is left of it and its group is killed after the test.

    ``closed_stdin``: it has no standard input at all. ``entry``: what Python runs. Other keywords are those of
    ``Popen``.
    """
    with contextlib.ExitStack() as stack:

        def make(
            *args: object, closed_stdin: bool = False, entry: Sequence[str] = ("-m", "teegpu"), **options: Any
        ) -> Process:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
            command = [sys.executable, *entry, *map(str, args)]
            if closed_stdin:
                command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
            process = stack.enter_context(Process(command, text=True, start_new_session=True, **options))
            stack.callback(_kill_group, process.pid)
            return process

        yield make


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder (with a path short enough for sockets) of all that the test starts."""
    path = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


def processes_naming(text: str) -> list[int]:
    """The processes with ``text`` in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


@pytest.fixture
def nothing_left(scratch: Path) -> Callable[[], None]:
    """Fails unless every process that uses ``scratch`` is gone, and our folders in it, within a few seconds."""

    def check() -> None:
        # torch leaves an empty folder of its own in the temporary folder
        until(lambda: not processes_naming(str(scratch)) and not list(scratch.glob("teegpu-*")))

    return check


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does, and tells nobody of."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


# A GPU server in a thread


class LocalServer:
    """Serves a model in fp32, and can be told to stop answering.

    ``hold(n)``: within it, the first ``n`` execute requests of clients that are new are answered; when the next one
    comes, ``reached`` is set, and nothing more is answered before the end of it.
    """

    def __init__(self, folder: ModelFolder) -> None:
        spec, limits = read_spec(folder), Limits()
        with WeightStore(folder, spec) as store:
            executor, identity = gpu.load(store, spec, device="cpu", dtype="fp32", limits=limits)
        self._transport = transports.listen("tcp://127.0.0.1:0")
        self.address = self._transport.address
        self._server = gpu.GpuServer(self._transport, executor, identity, limits)
        self._left: int | None = None
        self._seen: set[bytes] = set()
        self._old: set[bytes] = set()
        self._go = threading.Event()
        self._go.set()
        self.reached = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="local server")
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended:
            incoming = self._transport.next()
            if incoming is None:
                continue
            self._seen.add(incoming.client)
            # What a runner that is gone has asked for may still wait in the queue.
            counts = self._left is not None and incoming.client not in self._old
            if counts and msgpack.unpackb(incoming.frames[0])[1] == "execute":
                assert self._left is not None
                self._left -= 1
                if self._left < 0:
                    self.reached.set()
                    self._go.wait()
            encoded = self._server.answer(incoming)
            self._transport.reply(incoming, transports.base.Message(encoded.frames))

    @contextlib.contextmanager
    def hold(self, answered: int) -> Iterator[None]:
        self._old = set(self._seen)
        self._go.clear()
        self.reached.clear()
        self._left = answered
        try:
            yield
        finally:
            self._left = None
            self._go.set()

    def wait_until_held(self) -> None:
        assert self.reached.wait(DEADLINE_SECONDS), "the runner has not sent as many requests"

    def close(self) -> None:
        self._ended = True
        self._go.set()
        self._transport.wake()
        self._thread.join()
        self._transport.close()


ServerFor = Callable[[ModelFolder], LocalServer]


@pytest.fixture(scope="session")
def server_for() -> Iterator[ServerFor]:
    """``server_for(folder)`` → the server of that model; there is one for the whole session."""
    servers: dict[Path, LocalServer] = {}

    def get(folder: ModelFolder) -> LocalServer:
        if folder.path not in servers:
            servers[folder.path] = LocalServer(folder)
        return servers[folder.path]

    yield get
    for server in servers.values():
        server.close()


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", vocab_size=1000)


@pytest.fixture
def server(server_for: ServerFor, model: ModelFolder) -> LocalServer:
    """That of ``model``."""
    return server_for(model)
