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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from teegpu.cli import main as cli
from teegpu.model.folder import ModelFolder
from teegpu.remote.client import GpuClient
from tests.conftest import TinyModel
from tests.teegpu.api.conftest import Endpoint
from transports.netem.link import EmulatedLink, LinkSpec

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
        _expected[model.path] = document["outputs"][0]["token_ids"]
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


def strikes(
    servers: Servers, first: str, link: EmulatedLink | None, pause: Callable[[], object]
) -> dict[str, tuple[Callable[[], object], int]]:
    """What happens to the server at ``first``, or to the ``link`` before it, and how often. ``pause``: how long that
    lasts."""

    def kill() -> None:
        servers.end(first)
        pause()
        servers.start(first)

    def stop() -> None:
        servers.send(first, signal.SIGSTOP)
        time.sleep(STOP_SECONDS)
        servers.send(first, signal.SIGCONT)

    def restart() -> None:
        servers.end(first, signal.SIGTERM)
        servers.start(first)

    found: dict[str, tuple[Callable[[], object], int]] = {
        "kill": (kill, 1),
        "stop": (stop, 1),
        "restart": (restart, 1),
        "failover": (lambda: servers.end(first), 1),
        "spread": (kill, 1),
        "dead": (lambda: servers.end(first), 1),
    }
    if link is None:
        return found

    def cut() -> None:
        link.cut()
        pause()
        link.restore()

    return found | {"cut": (cut, 1), "stall": (lambda: link.stall(STOP_SECONDS), 1), "drop": (link.drop, 3)}


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
        endpoints, link = [first], None
        if fault in ("cut", "stall", "drop"):
            link = stack.enter_context(EmulatedLink(LinkSpec.parse("rtt=2ms"), first))
            endpoints = [link.endpoint]
        if fault in ("failover", "spread"):
            servers.start(second)
            servers.wait(second)
            endpoints.append(second)
            monkeypatch.setenv("TEEGPU_RUN_SPREAD", "round-robin" if fault == "spread" else "failover")
        what, times = strikes(servers, first, link, lambda: chaos.pause(1.0))[fault]
        chaos.strike(lambda: what() and None, times)  # type: ignore[func-returns-value]
        arguments = [part for endpoint in endpoints for part in ("--endpoint", endpoint)]
        code, document, errors = run("--plan", chaos.plan, "--transport", chaos.transport, *arguments)
        chaos.over()
    assert document["outputs"], document["error"]
    made = document["outputs"][0]["token_ids"]
    retries = sum(phase["rpc_retries"] for phase in document["phases"].values())
    # What stands still and goes on is waited for: sending again would be work for nothing.
    if fault != "spread":  # the one of two that was killed may have had nothing to answer then
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


# Many clients of one endpoint

PROMPTS = ["The", "b" * 40, "a key", "c" * 9, "dd", "e" * 70, "f", "g" * 21]
SERVING_FAULTS = ("kill", "cut", "dead", "stop", "drop", "failover")
SERVING_RUNS = int(os.environ.get("CHAOS_RUNS", 1))


def _asked(url: str, prompt: str, *, stream: bool) -> str:
    """The text of an answer. Raises ``RuntimeError`` with what an error object or event says."""
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            raw = reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(json.loads(error.read())["error"]["message"]) from None
    if not stream:
        return str(json.loads(raw)["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    found = [json.loads(event) for event in events if event != "[DONE]"]
    for event in found:
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
    assert events[-1] == "[DONE]"
    return "".join(choice["text"] for event in found for choice in event["choices"])


@pytest.fixture(scope="module")
def texts(model: ModelFolder) -> list[str]:
    """What each prompt is answered, where all is in the runner and nothing else runs."""
    endpoint = Endpoint(model, {}).start()
    try:
        return [_asked(endpoint.url, prompt, stream=False) for prompt in PROMPTS]
    finally:
        endpoint.end()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", range(SERVING_RUNS))
def test_clients_in_chaos(
    number: int, model: ModelFolder, servers: Servers, addresses: list[str], texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Eight at once while servers are killed and links cut: each gets its right answer, or where no server comes back
    is told so; nothing hangs, and what comes later is answered."""
    fault = SERVING_FAULTS[number % len(SERVING_FAULTS)]
    chaos = Chaos(number, monkeypatch)
    first, second = addresses
    servers.start(first)
    servers.wait(first)
    with contextlib.ExitStack() as stack:
        endpoints, link = [first], None
        if fault in ("cut", "drop"):
            link = stack.enter_context(EmulatedLink(LinkSpec.parse("rtt=1ms"), first))
            endpoints = [link.endpoint]
        if fault == "failover":
            servers.start(second)
            servers.wait(second)
            endpoints.append(second)
        settings: dict[str, object] = {
            "run.prefill_plan": chaos.plan,
            "run.decode_plan": chaos.plan,
            "run.transport": chaos.transport,
            "run.wire_dtype": "fp32",
            "run.endpoints": tuple(endpoints),
            "api.step_tokens": 16,
            "api.sequences": 4,
            "link.retry_backoff_seconds": 0.02,
            "link.retry_budget_seconds": 0.5 if fault == "dead" else BUDGET_SECONDS,
        }
        endpoint = Endpoint(model, settings).start()
        stack.callback(endpoint.end)
        what, times = strikes(servers, first, link, lambda: chaos.pause(0.6))[fault]
        chaos.strike(lambda: what() and None, times)  # type: ignore[func-returns-value]
        orders = [chaos.random.sample(range(len(PROMPTS)), len(PROMPTS))[:3] for _ in range(8)]

        def client(order: list[int]) -> list[tuple[int, str]]:
            made = []
            for place in order:
                try:
                    made.append((place, _asked(endpoint.url, PROMPTS[place], stream=bool(place % 2))))
                except RuntimeError as error:
                    made.append((place, f"told: {error}"))
            return made

        with ThreadPoolExecutor(8) as pool:
            answers = [one for made in pool.map(client, orders) for one in made]
        chaos.over()
        told = "told: the GPU server did not answer as it should: try again later"
        assert [text for place, text in answers if text not in (texts[place], told)] == []
        assert len(answers) == 24
        assert any(text == told for _, text in answers) == (fault == "dead")
        if fault == "dead":
            servers.start(first)
            servers.wait(first)
            deadline = time.monotonic() + 20.0
            while True:
                with contextlib.suppress(RuntimeError):
                    assert _asked(endpoint.url, PROMPTS[0], stream=True) == texts[0]
                    break
                assert time.monotonic() < deadline, "the endpoint has not recovered"
        assert endpoint.engine.running == endpoint.engine.waiting == 0
    assert endpoint.error is None
