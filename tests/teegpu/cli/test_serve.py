"""``teegpu serve``: the banner, the ways in which it ends, and what it refuses to begin with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import transports
from teegpu import __version__
from teegpu.cli import serve as module
from teegpu.cli.serve import check_address
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import wire_limits
from teegpu.remote.health import probe
from teegpu.wire import codec
from teegpu.wire.messages import PROTOCOL_VERSION, Execute, Refusal, Result
from teegpu.wire.program import Step, single
from tests.teegpu.cli.conftest import Process, Start, Teegpu, until
from transports.base import Message


@pytest.fixture
def damaged(model: ModelFolder, tmp_path: Path) -> Path:
    shutil.copytree(model.path, tmp_path / "model")
    return tmp_path / "model" / "model.safetensors"


def ready(process: Process) -> str:
    """The address of a server that has loaded."""
    while not (line := process.line()).startswith("teegpu GPU server ready at "):
        pass
    return line.split()[-1]


# A server's life


def test_the_banner_and_the_end_by_ctrl_c(start: Start, model: ModelFolder) -> None:
    process = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "bf16", "--threads", 1)
    loading = process.line()
    address = ready(process)
    facts = process.line().rstrip().split(" · ")
    found = probe(Endpoint(address), Config())
    first, came, left = process.line(), process.line(), process.line()
    process.send_signal(signal.SIGINT)
    done = process.finish()

    assert loading == f"loading {model.path.name}\n"
    assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d+", address)
    with WeightStore(model, read_spec(model)) as store:
        digest = store.digest()
    assert re.fullmatch(r"1\d\d\.\d KiB of weights", facts.pop(3))
    assert facts == [
        f"model {model.path.name}", "device cpu", "bf16", "1 CPU thread", f"protocol {PROTOCOL_VERSION}",
        f"digest {digest[:12]}",
    ]  # fmt: skip
    assert (found.welcome.software, found.welcome.digest, found.health.dtype) == (__version__, digest, "bf16")
    assert (done.code, done.out) == (0, "")
    assert first == "activations that runners send are visible to this process in the clear; stop with Ctrl-C\n"
    assert re.fullmatch(r"\d\d:\d\d:\d\d info     client 1 came from 127\.0\.0\.1:\d+\n", came)
    assert re.fullmatch(r"\d\d:\d\d:\d\d info     client 1 at 127\.0\.0\.1:\d+ left after 6 messages\n", left)
    assert done.err == "stopped after 6 requests\n"


def test_int8_weights_are_made_at_the_start_where_that_is_asked_for(start: Start, model: ModelFolder) -> None:
    process = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--shield", "on", "--threads", 1)
    address = ready(process)
    facts = process.line().rstrip().split(" · ")
    found = probe(Endpoint(address), Config())
    process.send_signal(signal.SIGINT)
    process.finish()
    assert re.fullmatch(r"\d+\.\d KiB of int8 weights", facts[4])
    assert found.health.ring_bytes > 0


def scores(positions: int) -> Message:
    """A request for a product of ``positions`` × ``positions`` values."""
    q = torch.ones(1, positions, 256)
    program = single(["q", "k"], Step("matmul", "scores", ("q", "k"), transpose=True))
    execute = Execute(1, program, {"q": q, "k": q}, {"q": "fp32", "k": "fp32"}, {"scores": "fp16"})
    return Message(codec.encode_execute(execute).frames)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_sigterm_lets_the_request_in_hand_be_finished(start: Start, model: ModelFolder, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/gpu"
    process = start("serve", "--model", model.path, "--bind", address, "--dtype", "fp32", "--threads", 1)
    assert ready(process) == address
    replies: list[transports.base.Reply] = []
    with transports.connect("zmq", address) as client:
        client.request(scores(1))
        idle = cpu_ticks(process.pid)
        asking = threading.Thread(target=lambda: replies.append(client.request(scores(6000))))
        asking.start()
        until(lambda: cpu_ticks(process.pid) > idle + 5)  # it is at it: one tick is 10 ms
        process.send_signal(signal.SIGTERM)
        asking.join()
    done = process.finish()
    assert done.code == 0
    assert done.err.endswith("stopped after 2 requests\n")
    answer = codec.Decoder(wire_limits(Config())).decode(replies[0].frames)
    assert isinstance(answer, Result)
    assert answer.tensors["scores"].shape == (1, 6000, 6000)
    assert not (tmp_path / "gpu").exists()


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipe that a server reads while it loads: who has opened that for writing knows that it does."""
    os.mkfifo(tmp_path / "loading")
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'loading')!r}).read()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "loading"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_loads(number: int, start: Start, endless: Path, model: ModelFolder) -> None:
    process = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0")
    with endless.open("w"):
        process.send_signal(number)
        done = process.finish()
    assert (done.code, done.out, done.err) == (0, "", "stopped while loading\n")


def test_a_second_signal_does_not_wait() -> None:
    class Server:
        stopped = 0

        def stop(self) -> None:
            self.stopped += 1

    server: Any = Server()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with module.Stop() as stop:
        with stop.ends(server):
            assert stop.serving
            signal.raise_signal(signal.SIGTERM)
            assert server.stopped == 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert server.stopped == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_whose_exception_was_swallowed_still_ends_loading() -> None:
    server: Any = None
    with module.Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), stop.ends(server):
            pytest.fail("it serves")
    assert not stop.serving


# Its log, and its end


def events(process: Process, until_event: str) -> list[dict[str, Any]]:
    """The lines of a log for machines, up to the one with ``until_event``."""
    found = []
    while not found or found[-1]["event"] != until_event:
        found.append(json.loads(process.line()))
    return found


@pytest.fixture
def logging_server(start: Start, model: ModelFolder) -> Callable[..., tuple[Process, str]]:
    """``logging_server(bind)`` → a process that serves, and its address."""

    def make(bind: str = "tcp://127.0.0.1:0", *args: object, **environment: str) -> tuple[Process, str]:
        command = ["serve", "--model", model.path, "--bind", bind, "--dtype", "fp32", "--threads", 1]
        process = start(*command, "--log-format", "json", *args, env=os.environ | environment)
        return process, events(process, "ready")[-1]["fields"]["address"]

    return make


def test_a_log_for_machines_and_limits_of_the_settings(logging_server: Callable[..., tuple[Process, str]]) -> None:
    """Every line is an object; what clients ask for, and what they say wrong, is in none of them."""
    process, address = logging_server(TEEGPU_LIMITS_PROGRAM_MIB="1")
    with transports.connect("zmq", address) as client:
        answer = codec.Decoder(wire_limits(Config())).decode(client.request(scores(1000)).frames)
        for _ in range(50):
            client.request(Message([b"not a message: a secret prompt"]))
    assert isinstance(answer, Refusal)
    assert (answer.code, "limits.program_mib on the server" in answer.text) == ("too-large", True)
    seen = events(process, "client-left")
    process.send_signal(signal.SIGTERM)
    done = process.finish()
    seen += [json.loads(line) for line in done.err.splitlines()]
    assert [line["event"] for line in seen] == ["client-came", *["refused"] * 20, "client-left", "end"]
    assert [line["fields"]["code"] for line in seen if line["event"] == "refused"] == ["too-large", *["malformed"] * 19]
    assert seen[-1]["fields"]["requests_served"] == seen[-1]["fields"]["requests_refused"] == 51
    assert "secret" not in json.dumps(seen)
    assert done.code == 0


@pytest.mark.alone
def test_a_second_signal_ends_it_in_the_middle_of_a_product(
    logging_server: Callable[..., tuple[Process, str]],
) -> None:
    process, address = logging_server()
    with transports.connect("pipelined", address) as client:
        client.request(scores(1))
        idle = cpu_ticks(process.pid)
        # A second or more of work on one core, in one call into torch: Python takes notice of nothing meanwhile.
        q = torch.ones(1, 4500, 6000)
        program = single(["q", "k"], Step("matmul", "scores", ("q", "k"), transpose=True))
        encodings = {"q": "fp32", "k": "fp32"}
        long = Execute(1, program, {"q": q, "k": q}, encodings, {"scores": "fp16"})
        client.begin(Message(codec.encode_execute(long).frames))
        until(lambda: cpu_ticks(process.pid) > idle + 60)  # receiving it took less
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)  # two of a kind that come together are one to the system
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - started < 8


# Embedded (see also tests/teegpu/tee/test_embedded_server.py)


def test_an_embedded_server_ends_with_its_standard_input_while_it_loads(
    start: Start, endless: Path, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None]
) -> None:
    bind = f"ipc://{tempfile.mkdtemp(prefix='teegpu-', dir=scratch)}/gpu"
    process = start("serve", "--embedded", "--model", model.path, "--bind", bind, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with endless.open("w"):
        process.stdin.close()
        assert process.wait(30) == 0
    assert process.stdout is not None
    assert process.stdout.read() == ""
    nothing_left()


# What it refuses


@pytest.mark.parametrize(
    "bind",
    [
        "tcp://127.0.0.1:5555", "tcp://127.8.9.1:0", "tcp://localhost:5555", "tcp://[::1]:5555", "ipc:///run/gpu",
        "tcp://127.0.0.1:*",
    ],
)  # fmt: skip
def test_addresses_of_this_machine(bind: str) -> None:
    check_address(bind, insecure=False)


@pytest.mark.parametrize(
    "bind", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:5555", "tcp://[::]:5555", "tcp://eth0:5555",
             "tcp://127.example.com:5555", "tcp://localhost.example.com:5555"],
)  # fmt: skip
def test_addresses_that_others_reach_need_to_be_wanted(bind: str) -> None:
    with pytest.raises(ConfigError, match="can be reached from other machines: give the server a key"):
        check_address(bind, insecure=False)
    check_address(bind, insecure=True)


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("127.0.0.1:5555", "is not an address: write tcp://host:port"),
        ("tcp://127.0.0.1", "after tcp:// comes host:port"),
        ("tcp://127.0.0.1:99999", "port 99999 is above 65535"),
        ("inprocess://gpu", "reaches nobody outside of this process"),
    ],
)
@pytest.mark.parametrize("insecure", [False, True])
def test_addresses_that_can_not_be(bind: str, message: str, insecure: bool) -> None:
    with pytest.raises(ConfigError, match=re.escape("server.bind: ")) as raised:
        check_address(bind, insecure=insecure)
    assert message in str(raised.value)


def test_an_open_address_without_insecure(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("serve", "--model", model.path, "--bind", "tcp://0.0.0.0:0")
    assert done.code == 2
    assert done.err.startswith("teegpu: server.bind: tcp://0.0.0.0:0 can be reached from other machines")
    assert len(done.err.splitlines()) == 1


def test_insecure_is_warned_of(teegpu: Teegpu) -> None:
    done = teegpu("serve", "--model", "./nowhere", "--bind", "tcp://0.0.0.0:0", "--insecure")
    assert done.code == 3
    assert done.err.startswith("warning: --insecure: anybody who reaches this address can use the server")


def test_a_port_that_is_taken(teegpu: Teegpu, model: ModelFolder) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        bind = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = teegpu("serve", "--model", model.path, "--bind", bind)
    assert done.code == 2
    assert done.err == (
        f"teegpu: can't listen on {bind}: another program listens there; "
        "choose another port, or port 0 for any free one\n"
    )


def test_a_path_that_can_not_be_made(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("serve", "--model", model.path, "--bind", "ipc:///proc/teegpu/gpu")
    assert done.code == 2
    assert done.err.startswith("teegpu: can't listen on ipc:///proc/teegpu/gpu: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("what", ["truncated", "corrupt header", "empty", "missing"])
def test_weights_that_can_not_be_read(what: str, teegpu: Teegpu, damaged: Path) -> None:
    whole = damaged.read_bytes()
    if what == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes({"truncated": whole[:-100], "corrupt header": b"\xff" * 8 + whole[8:], "empty": b""}[what])
    done = teegpu("serve", "--model", damaged.parent, "--bind", "tcp://127.0.0.1:0")
    assert done.code == 3
    lines = [line for line in done.err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1
    assert "model" in lines[0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--device", "gpu0"], 2, "gpu0"),
        (["--dtype", "bf61"], 2, "did you mean 'bf16'?"),
        (["--threads", "-1"], 2, "--threads"),
        (["--model", "smolm2-135m"], 3, "did you mean 'smollm2-135m'?"),
    ],
)
def test_settings_that_can_not_be(
    options: list[str], code: int, message: str, teegpu: Teegpu, model: ModelFolder
) -> None:
    given = options if "--model" in options else ["--model", model.path, *options]
    done = teegpu("serve", "--bind", "tcp://127.0.0.1:0", *given)
    assert done.code == code
    assert message in done.err.splitlines()[-1]


def test_signals_are_given_back(teegpu: Teegpu, model: ModelFolder) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    teegpu("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--device", "cuda:99")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
