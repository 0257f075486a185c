"""How a run ends when something is in its way: one clear line, the right exit code, the partial text, no orphan."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from teegpu import runner as runner_module
from teegpu.model.folder import ModelFolder
from teegpu.remote import servers, waiting
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.wire.messages import PROTOCOL_VERSION
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, ServerFor, Start, Teegpu, processes_naming, until
from transports import envelope

PREFILL_CALLS = 5
"""RPCs of one pass of the tiny model under the plan fused."""


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder) -> Teegpu:
    def call(*args: object) -> Outcome:
        return teegpu("run", "--model", model.path, "--threads", 1, "--max-tokens", 12, *args)

    return call


def one_line(done: Outcome) -> str:
    """What a failed run says, which is one line, after the one that says what it hides."""
    *before, line = done.err.splitlines()
    assert len(before) <= 1
    assert all(told.startswith("privacy") for told in before)
    assert line.startswith("teegpu: ")
    return line.removeprefix("teegpu: ")


# Settings, models and prompts that can't be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "fusd"], "did you mean 'fused'?"),
        (["--decode-plan", "batch"], "did you mean 'batched'?"),
        (["--transport", "zqm"], "did you mean 'zmq'?"),
        (["--wire-dtype", "fp61"], "did you mean 'fp16'?"),
        (["--dtype", "bf61"], "did you mean 'bf16'?"),
        (["--temperature", "-1"], "temperature"),
        (["--link", "rtt=5parsecs"], "rtt"),
        (["--link", "rtt=5ms", "--plan", "local"], "choose another plan"),
        (["--endpoint", "127.0.0.1:5555"], "write tcp://host:port"),
        (["--endpoint", "tcp://127.0.0.1:1", "--dtype", "bf16"], "--dtype would be for the embedded server"),
        (["--plan", "local", "--device", "cpu", "--dtype", "fp32"], "--device and --dtype would be for the embedded"),
    ],
)
def test_settings_that_can_not_be(options: list[str], message: str, run: Teegpu) -> None:
    done = run(*options, "Hi")
    assert done.code == 2
    assert message in one_line(done)
    assert done.out == ""


def test_options_that_the_command_does_not_know(run: Teegpu) -> None:
    done = run("--pln", "fused", "Hi")
    assert done.code == 2
    assert "--plan" in done.err


@pytest.mark.parametrize(
    ("name", "message"), [("smolm2-135m", "did you mean 'smollm2-135m'?"), ("./nowhere", "no such file or folder")]
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_unknown_models(name: str, message: str, options: list[str], teegpu: Teegpu) -> None:
    done = teegpu("run", "--model", name, *options, "Hi")
    assert done.code == 3
    assert message in one_line(done)
    assert bool(done.out) == bool(options)
    if options:
        assert (done.document["status"], done.document["error"]) == ("failed", one_line(done))


def test_a_fault_in_the_advice_does_not_take_the_place_of_what_a_run_failed_of(
    run: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advised(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("teegpu.cli.answering.advised", advised)
    done = run("--plan", "local", "")
    assert done.code == 3
    assert "the prompt is empty" in one_line(done)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(prompt: str, run: Teegpu, server: LocalServer) -> None:
    done = run("--endpoint", server.address, prompt)
    assert done.code == 3
    assert "the prompt is empty" in one_line(done)


def test_a_prompt_longer_than_the_context(run: Teegpu, server: LocalServer) -> None:
    done = run("--endpoint", server.address, "--raw", "a" * 257)
    assert done.code == 3
    assert one_line(done) == "the prompt has 257 tokens, the model's context ends at 256: shorten it"
    full = run("--endpoint", server.address, "--raw", "--json", "a" * 250)
    assert full.document["outputs"][0]["finish_reason"] == "length"


def test_one_prompt_of_several_is_too_long(run: Teegpu, server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(f"Hi\n{'a' * 300}\nHo\n")
    done = run("--endpoint", server.address, "--raw", "--json", "--prompts-file", tmp_path / "prompts")
    assert done.code == 3
    first, second = done.document["outputs"]
    assert (len(first["token_ids"]), second["token_ids"], second["finish_reason"]) == (12, [], "interrupted")


def test_a_damaged_model(teegpu: Teegpu, model: ModelFolder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model.path, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = teegpu("run", "--model", tmp_path / "model", "--plan", "local", "Hi")
    assert done.code == 3
    assert "model.safetensors" in one_line(done)


# Servers that are not there, or not ours


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("transport", ["zmq", "pipelined"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_server(transport: str, options: list[str], run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "0.3")
    address = free_address()
    started = time.monotonic()
    done = run("--endpoint", address, "--transport", transport, *options, "Hi")
    assert time.monotonic() - started < 5
    assert done.code == 4
    assert one_line(done).startswith(f"no server answers at {address} within 0.3 s: connection refused, nobody listens")
    assert bool(done.out) == bool(options)
    if options:
        document = done.document
        assert (document["status"], document["error"]) == ("failed", one_line(done))
        assert document["settings"]["endpoints"] == [address]
        assert document["phases"]["prefill"]["passes"] == 0
        assert document["outputs"] == []


def test_a_server_of_another_model(run: Teegpu, tiny_model: TinyModel, server_for: ServerFor) -> None:
    other = server_for(tiny_model("llama", vocab_size=1000, seed=1))
    done = run("--endpoint", other.address, "Hi")
    assert done.code == 5
    assert "give both the same --model" in one_line(done)


class Impostor:
    """A zmq ROUTER that answers every message by ``answer``, which gets its envelope and frames."""

    def __init__(self, answer: Callable[[int], list[bytes]]) -> None:
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._stop, stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(stopped,))
        self._thread.start()

    def _serve(self, stopped: socket.socket) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        with stopped:
            while self._socket in (ready := dict(poller.poll())):
                client, head, *_ = self._socket.recv_multipart()
                request_id = envelope.peek_request_id(head)
                assert request_id is not None
                self._socket.send_multipart([client, *self._answer(request_id)])
            assert stopped.fileno() in ready

    def close(self) -> None:
        self._stop.close()
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def impostor() -> Iterator[Callable[[Callable[[int], list[bytes]]], str]]:
    """``impostor(answer)`` → its address."""
    made: list[Impostor] = []

    def make(answer: Callable[[int], list[bytes]]) -> str:
        made.append(Impostor(answer))
        return made[-1].address

    yield make
    for one in made:
        one.close()


def sealed(request_id: int, header: Any) -> list[bytes]:
    frame = header if isinstance(header, bytes) else msgpack.packb(header)
    return [envelope.pack(request_id, [len(frame)]), frame]


WELCOME = {
    "software": "9.9", "instance": "x", "model": "m", "digest": "d", "dims": {"layers": 2}, "device": "cpu",
    "dtype": "fp32", "threads": 1, "memory_bytes": 1, "limits": {}, "layers": [0, 1],
    "ring_digest": "", "ranks": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (
            lambda number: sealed(number, [PROTOCOL_VERSION + 1, "welcome", 0, WELCOME]),
            5,
            f"protocol version {PROTOCOL_VERSION + 1}, this is version {PROTOCOL_VERSION}: install the same",
        ),
        (
            lambda number: sealed(number, [PROTOCOL_VERSION, "refusal", 0, "version", "speak up to 9"]),
            5,
            "refused (version): speak up to 9",
        ),
        (
            lambda number: sealed(number, [PROTOCOL_VERSION, "refusal", 0, "internal", "no\n\x1b[31mway"]),
            6,
            "refused (internal): no  [31mway",
        ),
        (lambda number: sealed(number, [PROTOCOL_VERSION, "hello", 0, "9.9", False]), 7, "is not a teegpu GPU server"),
        (lambda number: sealed(number, b"\xc1"), 7, "a reply that is not valid"),
        (lambda number: sealed(number, [PROTOCOL_VERSION, "welcome", 0, {}]), 7, "a reply that is not valid"),
        (lambda _: [b"HTTP/1.1 400 Bad Request"], 7, "is it a teegpu server of the same release?"),
        (lambda number: sealed(number, [PROTOCOL_VERSION, "welcome", 0, WELCOME]), 5, "give both the same --model"),
    ],
)
def test_servers_that_answer_something_else(
    answer: Callable[[int], list[bytes]], code: int, message: str, run: Teegpu, impostor: Callable[..., str]
) -> None:
    address = impostor(answer)
    done = run("--endpoint", address, "Hi")
    assert message in one_line(done)
    assert done.code == code
    assert address in one_line(done) or code == 5


def test_a_server_whose_transport_is_of_another_version(run: Teegpu, impostor: Callable[..., str]) -> None:
    def answer(number: int) -> list[bytes]:
        head, frame = sealed(number, b"later")
        return [head[:4] + bytes([envelope.VERSION + 1]) + head[5:], frame]

    done = run("--endpoint", impostor(answer), "Hi")
    assert "install the same release on both sides" in one_line(done)
    assert done.code == 5


def test_a_server_that_does_not_reply_in_time(
    run: Teegpu, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEGPU_LINK_REPLY_TIMEOUT_SECONDS", "0.3")
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "0.5")
    with server.hold(PREFILL_CALLS):
        done = run("--endpoint", server.address, "--json", "Hi")
    assert done.code == 4
    assert "within 0.3 s (link.reply_timeout_seconds)" in one_line(done)
    assert len(done.document["outputs"][0]["token_ids"]) == 1


# A server that dies


class Watched(EmbeddedServer):
    """The embedded server that was started last."""

    last: EmbeddedServer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Watched.last = self


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "EmbeddedServer", Watched)


@pytest.mark.usefixtures("watched")
def test_the_embedded_server_dies_in_prefill(
    run: Teegpu, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    stopped: list[threading.Timer] = []
    sampler = Runner.sampler

    def stop_first(runner: Runner) -> Any:
        """The request is on its way to a process that stands still when that is killed."""
        os.kill(Watched.last.pid, signal.SIGSTOP)
        stopped.append(threading.Timer(0.3, os.kill, (Watched.last.pid, signal.SIGKILL)))
        stopped[0].start()
        return sampler(runner)

    monkeypatch.setattr(Runner, "sampler", stop_first)
    done = run("--json", "-q", "Hi")
    stopped[0].join()
    assert done.code == 4
    assert one_line(done) == (
        "the embedded GPU server ended by signal SIGKILL, which may mean that this machine is out of memory"
    )
    assert done.document["status"] == "failed"
    assert done.document["error"] == one_line(done)
    assert done.document["outputs"][0]["text"] == ""
    assert done.document["phases"]["prefill"]["seconds"] > 0.2
    nothing_left()


@pytest.mark.usefixtures("watched")
def test_the_embedded_server_dies_in_decode(
    run: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    written: list[str] = []

    class Killer:
        """Kills the server when the first text has come."""

        def write(self, text: str) -> None:
            written.append(text)
            if len(written) == 1:
                os.kill(Watched.last.pid, signal.SIGKILL)

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Killer())
        done = run("--dtype", "fp32", "Hi")
    assert done.code == 4
    note, *summary, last = done.err.splitlines()
    assert note.startswith("no endpoint given")
    assert f"failed · {model.path.name} · fused" in "\n".join(summary)
    assert last.startswith("teegpu: the embedded GPU server ended by signal SIGKILL")
    assert written[-1] == "\n"
    assert len("".join(written)) > 1
    nothing_left()


def test_a_separate_server_dies_in_decode(run: Teegpu, start: Start, model: ModelFolder) -> None:
    process = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "fp32", "--threads", 1)
    line = process.line()
    while not line.startswith("teegpu GPU server ready at "):
        line = process.line()
    address = line.split()[-1]
    generate = runner_module.Engine.generate

    def dies_after_three(*args: Any, on_token: Callable[[int], bool], **options: Any) -> Any:
        count = 0

        def counted(token: int) -> bool:
            nonlocal count
            count += 1
            if count == 3:
                process.kill()
                process.wait()
            return on_token(token)

        return generate(*args, on_token=counted, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner_module.Engine, "generate", dies_after_three)
        patched.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "1")
        patched.setattr(waiting, "FIRST_SECONDS", 0.0)
        done = run("--endpoint", address, "--json", "Hi")
    assert done.code == 4
    lines = done.err.splitlines()
    told = f"lost the server at {address}: connection refused, nobody listens there; trying for another"
    assert any(line.startswith(told) for line in lines)
    error = one_line(replace(done, err=f"{lines[0]}\n{lines[-1]}"))
    assert error.startswith(f"no reply from {address} for 1.0 s, in spite of ")
    assert done.document["status"] == "failed"
    assert len(done.document["outputs"][0]["token_ids"]) == 3
    assert done.document["outputs"][0]["text"]


def test_whom_a_run_waits_for_is_said(run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.0)
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "1")
    address = free_address()
    done = run("--endpoint", address, "Hi")
    assert done.code == 4
    told = f"waiting for the server at {address}: connection refused, nobody listens there; trying for another 1 s"
    assert told in done.err.splitlines()


# The embedded server


@pytest.mark.parametrize("code", [2, 3])
def test_an_embedded_server_that_can_not_load_says_why(
    code: int, run: Teegpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    child = tmp_path / "python"
    tokenizers = f"case $* in *teegpu.model.foreign*) exec {sys.executable} $*;; esac"
    child.write_text(f"#!/bin/sh\n{tokenizers}\necho 'teegpu: the reason' >&2\nexit {code}\n")
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    done = run("-q", "Hi")
    assert (done.code, done.out, done.err) == (code, "", "teegpu: the reason\n")
    nothing_left()


def test_no_folder_for_its_socket(run: Teegpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent")[-40:])
    done = run("-q", "Hi")
    assert done.code == 2
    assert "set TMPDIR to a folder that can be written to" in one_line(done)


# Signals


def interrupt_group(pid: int) -> None:
    """Ctrl-C in a terminal."""
    os.killpg(pid, signal.SIGINT)


Send = Callable[[int], None]
SENDERS = [
    pytest.param(interrupt_group, id="ctrl-c"),
    pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), id="sigterm"),
]


def test_ctrl_c_while_loading(
    start: Start, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None]
) -> None:
    process = start("run", "--json", "--model", model.path, "Hi")
    assert process.line().startswith("no endpoint given: ")
    until(lambda: bool(processes_naming(str(scratch))))
    interrupt_group(process.pid)
    done = process.finish()
    assert done.code == 130
    assert all(line.startswith("privacy ") for line in done.err.splitlines())
    assert done.document["status"] == "interrupted"
    assert done.document["outputs"] == []
    nothing_left()


@pytest.mark.parametrize("send", SENDERS)
def test_a_signal_in_prefill(send: Send, start: Start, model: ModelFolder, server: LocalServer) -> None:
    """Chunks overlap: requests are in flight, and an event loop awaits them."""
    command = [
        "run",
        "--model",
        model.path,
        "--endpoint",
        server.address,
        "--threads",
        1,
        "--json",
        "--chunk-tokens",
        16,
    ]
    with server.hold(3):
        process = start(*command, "--json", "--prompt-tokens", 100)
        server.wait_until_held()
        send(process.pid)
        done = process.finish()
    assert done.code == 130
    assert all(line.startswith("privacy ") for line in done.err.splitlines())
    document = done.document
    assert document["status"] == "interrupted"
    assert document["outputs"][0]["text"] == ""
    assert document["outputs"][0]["prompt_tokens"] == 100
    assert document["phases"]["prefill"]["passes"] == 1
    assert document["phases"]["decode"]["passes"] == 0


def test_ctrl_c_in_decode(start: Start, model: ModelFolder, server: LocalServer, teegpu: Teegpu) -> None:
    command = ["run", "--model", model.path, "--endpoint", server.address, "--threads", 1]
    with server.hold(3 * PREFILL_CALLS):
        process = start(*command, "Hi")
        server.wait_until_held()
        interrupt_group(process.pid)
        done = process.finish()
    assert done.code == 130
    text = teegpu(*command, "-q", "--max-tokens", 3, "Hi").out
    assert done.out == text
    assert len(text) > 3
    _, *lines = done.err.splitlines()
    assert lines[1].startswith(f"interrupted · {model.path.name} · fused · ")
    assert [line.split()[0] for line in lines[2:5]] == ["tokens", "prefill", "decode"]


def test_ctrl_c_in_decode_ends_the_embedded_server(
    start: Start, model: ModelFolder, nothing_left: Callable[[], None]
) -> None:
    process = start("run", "--model", model.path, "--ignore-eos", "--max-tokens", 240, "--link", "rtt=5ms", "-q", "Hi")
    assert process.stdout is not None
    assert process.stdout.read(1)
    interrupt_group(process.pid)
    done = process.finish()
    assert (done.code, done.err) == (130, "")
    assert done.out.endswith("\n")
    nothing_left()


def test_sigkill_leaves_no_embedded_server(
    start: Start, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None]
) -> None:
    process = start("run", "--model", model.path, "--ignore-eos", "--max-tokens", 240, "--link", "rtt=5ms", "Hi")
    assert process.stdout is not None
    assert process.stdout.read(1)
    assert list(scratch.glob("teegpu-*"))
    process.kill()
    assert process.finish().code == -signal.SIGKILL
    nothing_left()


def test_sigkill_while_loading_leaves_no_embedded_server(
    start: Start, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None]
) -> None:
    process = start("run", "--model", model.path, "Hi")
    assert process.line().startswith("no endpoint given: ")
    # the server's command line names the folder
    until(lambda: bool(processes_naming(str(scratch))))
    process.kill()
    process.finish()
    nothing_left()


# Pipes


def test_a_reader_that_has_enough(start: Start, model: ModelFolder, nothing_left: Callable[[], None]) -> None:
    """``teegpu run … | head -c 1``, without a standard input."""
    process = start("run", "--model", model.path, "--ignore-eos", "--max-tokens", 200, "-q", "Hi",
                    closed_stdin=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) == 141
    nothing_left()
