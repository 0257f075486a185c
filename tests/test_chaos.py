"""Runs whose servers are killed, stopped and started again, and whose link is cut, stalled and dropped, at any moment.

Each run draws its fault, moment, plan and transport from a random generator of its own number, so a run that fails can
be had again. All must give the right tokens where a server comes back in time, or say what is wrong where none does.

``make chaos`` makes more runs than the tests do, with longer stops: CHAOS_RUNS and CHAOS_STOP_SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from teegpu.cli import main as cli
from teegpu.model.folder import ModelFolder
from teegpu.tee.gpu_client import GpuClient
from tests.conftest import TinyModel
from transports.link import EmulatedLink, LinkSpec

STOP_SECONDS = float(os.environ.get("CHAOS_STOP_SECONDS", "0.4"))
BUDGET_SECONDS = 20.0
ROOT = Path(__file__).resolve().parent.parent

PROMPT_TOKENS, CHUNK_TOKENS, MAX_TOKENS = 64, 8, 16
REQUESTS = 70
"""A run has more than these with every plan; the fault comes with one of them."""


class Servers:
    """'teegpu serve' processes, by their address."""

    def __init__(self, folder: ModelFolder, log: Path) -> None:
        self._folder = folder
        self._log = log
        self._running: dict[str, int] = {}
        self._stderr = log.open("w")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.prefork"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def start(self, address: str) -> None:
        if address in self._running:
            return
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        arguments = ["--model", str(self._folder.path), "--bind", address, "--dtype", "fp32", "--threads", "1",
                     "--offline", "--config", os.devnull]  # fmt: skip
        self._parent.stdin.write(json.dumps(arguments) + "\n")
        self._parent.stdin.flush()
        self._running[address] = int(self._parent.stdout.readline())

    def wait(self, address: str) -> None:
        """Waits until the server listens."""
        host, _, port = address.removeprefix("tcp://").partition(":")
        deadline = time.monotonic() + 20.0
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
                return
            assert time.monotonic() < deadline, f"no server at {address}: {self._log.read_text()}"
            time.sleep(0.005)

    def send(self, address: str, number: int) -> None:
        os.kill(self._running[address], number)

    def end(self, address: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal that ends the server, and waits until it has."""
        pid = self._running.pop(address)
        os.kill(pid, number)
        deadline = time.monotonic() + 20.0
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"the server did not end by signal {number}"
            time.sleep(0.002)

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(20.0)
        self._parent.stdout.close()
        self._stderr.close()


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def servers(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(model, tmp_path_factory.mktemp("chaos") / "servers.log")
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def addresses() -> list[str]:
    """Two, with ports that the kernel gives to nobody else while their servers are down."""
    found: list[str] = []
    while len(found) < 2:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(f"tcp://127.0.0.1:{port}")
    return found


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(model: ModelFolder, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """``run(arguments)`` → exit code, document and stderr of a 'teegpu run'."""

    def call(*arguments: object) -> tuple[int, dict[str, Any], str]:
        command = ["run", "--model", model.path, "--threads", 1, "--json", "-q", "--raw", "--ignore-eos",
                   "--prompt-tokens", PROMPT_TOKENS, "--chunk-tokens", CHUNK_TOKENS, "--max-tokens", MAX_TOKENS,
                   "--wire-dtype", "fp32", *arguments]  # fmt: skip
        capsys.readouterr()
        code = cli.run([str(argument) for argument in command])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


_expected: dict[Path, list[int]] = {}


@pytest.fixture
def expected(model: ModelFolder, run: Callable[..., tuple[int, dict[str, Any], str]]) -> list[int]:
    """The tokens of a run in which nothing goes wrong: all in the runner, without a network."""
    if model.path not in _expected:
        _, document, _ = run("--plan", "local")
        _expected[model.path] = document["output"]["token_ids"]
    assert len(_expected[model.path]) == MAX_TOKENS
    return _expected[model.path]


class Chaos:
    """What is done to a run when it makes its n-th request: by a thread, so that requests are under way meanwhile."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(number)
        self.plan = self.random.choice(["fused", "attention", "batched", "per-op"])
        self.transport = self.random.choice(["pipelined", "pipelined", "zmq", "pipelined+zstd"])
        self._monkeypatch = monkeypatch
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def strike(self, what: Callable[[], None], times: int = 1) -> None:
        """Has ``what`` done at so many moments."""
        moments = set(self.random.sample(range(2, REQUESTS), times))
        delays = [self.random.uniform(0.0, 0.004) for _ in range(times)]
        encode, made = GpuClient._encode, 0

        def act(delay: float) -> None:
            time.sleep(delay)
            try:
                what()
            except BaseException as error:
                self._failures.append(error)
                raise

        def counted(client: GpuClient, call: Any) -> Any:
            nonlocal made
            made += 1
            if made in moments:
                self._threads.append(threading.Thread(target=act, args=(delays.pop(),)))
                self._threads[-1].start()
            return encode(client, call)

        self._monkeypatch.setattr(GpuClient, "_encode", counted)

    def pause(self, longest: float) -> None:
        time.sleep(self.random.uniform(0.0, longest))

    def over(self) -> None:
        for thread in self._threads:
            thread.join()
        assert not self._failures


FAULTS = ("kill", "stop", "cut", "restart", "stall", "drop", "failover", "spread", "dead")
RUNS = int(os.environ.get("CHAOS_RUNS", len(FAULTS)))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_in_chaos(
    number: int,
    servers: Servers,
    addresses: list[str],
    expected: list[int],
    run: Callable[..., tuple[int, dict[str, Any], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = FAULTS[number % len(FAULTS)]
    chaos = Chaos(number, monkeypatch)
    first, second = addresses
    servers.start(first)
    servers.wait(first)
    budget = 0.7 if fault == "dead" else BUDGET_SECONDS
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", str(budget))
    with contextlib.ExitStack() as stack:
        endpoints = [first]
        if fault in ("cut", "stall", "drop"):
            link = stack.enter_context(EmulatedLink(LinkSpec.parse("rtt=2ms"), first))
            endpoints = [link.endpoint]
        if fault in ("failover", "spread"):
            servers.start(second)
            servers.wait(second)
            endpoints.append(second)
            monkeypatch.setenv("TEEGPU_RUN_SPREAD", "round-robin" if fault == "spread" else "failover")

        def kill() -> None:
            servers.end(first)
            chaos.pause(1.0)
            servers.start(first)

        def stop() -> None:
            servers.send(first, signal.SIGSTOP)
            time.sleep(STOP_SECONDS)
            servers.send(first, signal.SIGCONT)

        def cut() -> None:
            link.cut()
            chaos.pause(1.0)
            link.restore()

        def restart() -> None:
            servers.end(first, signal.SIGTERM)
            servers.start(first)

        actions: dict[str, tuple[Callable[[], object], int]] = {
            "kill": (kill, 1),
            "stop": (stop, 1),
            "cut": (cut, 1),
            "restart": (restart, 1),
            "stall": (lambda: link.stall(STOP_SECONDS), 1),
            "drop": (lambda: link.drop(), 3),
            "failover": (lambda: servers.end(first), 1),
            "spread": (kill, 1),
            "dead": (lambda: servers.end(first), 1),
        }
        what, times = actions[fault]
        chaos.strike(lambda: what() and None, times)  # type: ignore[func-returns-value]
        arguments = [part for endpoint in endpoints for part in ("--endpoint", endpoint)]
        code, document, errors = run("--plan", chaos.plan, "--transport", chaos.transport, *arguments)
        chaos.over()
    assert "output" in document, document["error"]
    made = document["output"]["token_ids"]
    retries = sum(phase["rpc_retries"] for phase in document["phases"].values())
    # What stands still and goes on is waited for: sending again would be work for nothing.
    assert (retries == 0) == (fault in ("stop", "stall"))
    if fault == "dead":
        assert code == 4
        assert document["status"] == "failed"
        assert made == expected[: len(made)]
        (line,) = errors.splitlines()
        assert line.startswith(f"teegpu: no reply from {first} for ")
        assert "link.retry_budget_seconds is 0.7" in line
        assert document["error"] == line.removeprefix("teegpu: ")
    else:
        assert (code, errors) == (0, "")
        assert made == expected
        assert [server["address"] for server in document["endpoints"]] == endpoints
        assert all(server["rpc_calls"] > 0 for server in document["endpoints"])
    for phase in document["phases"].values():
        parts = sum(phase[f"{part}_seconds"] for part in ("tee", "serialization", "wait", "other"))
        assert phase["seconds"] == pytest.approx(parts, rel=0.01)
