"""No prompt, no generated text and no token id is anywhere but where it belongs: not in logs, messages, records or
files that are left, however a run ends; and in the plans that say so, no token id leaves the TEE.

Each search is made once where the secret is meant to be, to see that it would be found.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zstandard

from teegpu.cli import answering
from teegpu.cli import main as cli
from teegpu.model.folder import ModelFolder
from teegpu.model.tokenizer import Tokenizer
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Welcome
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer
from tests.teegpu.cli.conftest import scratch as scratch
from transports.base import Incoming

PROMPT = "xylophone marzipan quokka"
SYSTEM = "zeppelin wombat"
TOKENS = 24
START_SECONDS = 100.0
WINDOW = 6
"""So many tokens in a row, or twice as many characters, are a leak."""

SAMPLING = ("--temperature", "2", "--seed", "7", "--ignore-eos")
"""An untrained model's likeliest token is always the same; drawn from its distribution, the text is one of its own."""


def forms(ids: Sequence[int]) -> set[bytes]:
    """How ``WINDOW`` of ``ids`` in a row could be written somewhere."""
    found: set[bytes] = set()
    for begin in range(len(ids) - WINDOW + 1):
        part = list(ids[begin : begin + WINDOW])
        if len(set(part)) < WINDOW - 1:
            continue  # such as 0, 0, 0, 0: it would be found in anything
        for kind in "hiq":
            found.add(struct.pack(f"<{WINDOW}{kind}", *part))
        found.add(b"".join(msgpack.packb(number) for number in part))
        found |= {separator.join(map(str, part)).encode() for separator in (",", ", ", " ", "\n")}
    return found


def pieces(text: str) -> set[bytes]:
    size = 2 * WINDOW
    windows = {text[begin : begin + size] for begin in range(max(1, len(text) - size + 1))}
    whole = {window for window in windows if len(set(window)) > WINDOW}
    escaped = {json.dumps(window, ensure_ascii=ascii_only)[1:-1] for window in whole for ascii_only in (False, True)}
    return {window.encode() for window in whole | escaped}


@dataclass
class Secrets:
    """What must not be found: the prompt, the answer, and the ids of both."""

    answer: str
    answer_ids: list[int]
    prompt_ids: list[int]

    def in_(self, content: bytes) -> set[str]:
        """The kinds of secrets that ``content`` holds."""
        searched = {
            "prompt": {PROMPT.encode(), b"marzipan", b"quokka", SYSTEM.encode(), b"wombat"},
            "answer": pieces(self.answer),
            "prompt's ids": forms(self.prompt_ids),
            "answer's ids": forms(self.answer_ids),
        }
        on_one_line = re.sub(rb",\s+", b",", content)
        return {
            kind
            for kind, needles in searched.items()
            if any(needle in content or needle in on_one_line for needle in needles)
        }


def everything_in(folder: Path) -> dict[str, bytes]:
    """The content of all files below ``folder``, unpacked, and their names."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".sqlite":
                with contextlib.closing(sqlite3.connect(path)) as database:
                    for (block,) in database.execute("SELECT block FROM events"):
                        content += zstandard.ZstdDecompressor().decompress(block)
            found[str(path.relative_to(folder))] = path.name.encode() + b"\n" + content
    return found


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", max_position_embeddings=1024)


class Served:
    """``teegpu serve`` with a log of all that it has to say."""

    def __init__(self, model: ModelFolder, folder: Path, *, limits: dict[str, str] | None = None) -> None:
        self._log = folder / "server.log"
        environment = os.environ | (limits or {})
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "teegpu", "serve", "--model", str(model.path), "--bind", "tcp://127.0.0.1:0",
                 "--dtype", "fp32", "--threads", "1", "--log-level", "debug", "--log-format", "json"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise AssertionError(self.log.decode())
            time.sleep(0.02)
        self.address: str = self._ready()[0]["fields"]["address"]

    def _ready(self) -> list[dict[str, Any]]:
        lines = [line for line in self.log.split(b"\n")[:-1] if line.startswith(b"{")]
        return [entry for entry in map(json.loads, lines) if entry["event"] == "ready"]

    @property
    def log(self) -> bytes:
        return self._log.read_bytes()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(model, tmp_path_factory.mktemp("log"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def frugal(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that takes shorter programs than the runner knows of. One test kills it."""
    server = Served(model, tmp_path_factory.mktemp("log"), limits={"TEEGPU_LIMITS_PROGRAM_STEPS": "3"})
    yield server
    server.close()


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    served: Served, model: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """``teegpu run`` in this process, with the prompt and the server of this module."""
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "0")

    def call(*args: str, prompt: str = PROMPT, endpoint: str = "") -> Ran:
        capsys.readouterr()
        code = cli.run(arguments(model, endpoint or served.address, prompt, *args))
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def arguments(model: ModelFolder, endpoint: str, prompt: str, *args: str) -> list[str]:
    fixed = ["run", "--model", str(model.path), "--endpoint", endpoint, "--system", SYSTEM, "--threads", "1",
             "--wire-dtype", "fp32"]  # fmt: skip
    return [*fixed, "--max-tokens", str(TOKENS), *SAMPLING, *args, prompt]


@pytest.fixture(scope="module")
def secrets(model: ModelFolder) -> Secrets:
    """What a run of ``PROMPT`` makes, known from one that tells it all."""
    out, before = io.StringIO(), sys.stdout
    sys.stdout = out
    try:
        code = cli.run([*arguments(model, "ipc:///nowhere", PROMPT, "--plan", "local"), "--json", "--no-record"])
    finally:
        sys.stdout = before
    assert code == 0
    answer = json.loads(out.getvalue())["outputs"][0]
    ids = Tokenizer(model).encode_chat(PROMPT, system=SYSTEM)
    assert len(answer["token_ids"]) == TOKENS
    return Secrets(answer["text"], answer["token_ids"], list(ids))


@pytest.fixture
def leaks(
    isolated_user_files: Path, scratch: Path, served: Served, secrets: Secrets
) -> Callable[..., dict[str, set[str]]]:
    """``leaks(err=…)`` → where secrets are: in the run's own files, in temporary ones, in the server's log, in
    ``texts``. Fails where there is no record to look at."""

    def look(*, recorded: bool = True, **texts: str) -> dict[str, set[str]]:
        records = everything_in(isolated_user_files)
        if recorded:
            assert any("run.sqlite" in name for name in records), "no record to look at"
        places = records | everything_in(scratch) | {"server's log": served.log}
        places |= {name: text.encode() for name, text in texts.items()}
        return {name: found for name, content in places.items() if (found := secrets.in_(content))}

    return look


Leaks = Callable[..., dict[str, set[str]]]
Run = Callable[..., Ran]


# ---- however a run ends


@pytest.mark.parametrize("more", [(), ("--plan", "per-op", "--transport", "zmq"), ("--verbose", "--speculate", "4")])
def test_a_complete_run(run: Run, leaks: Leaks, secrets: Secrets, served: Served, more: tuple[str, ...]) -> None:
    done = run(*more)
    assert (done.code, done.out) == (0, secrets.answer + "\n"), done.err
    assert leaks(err=done.err) == {}
    assert b'"debug"' in served.log


def test_a_run_that_saves_its_text_is_found(run: Run, leaks: Leaks) -> None:
    """The same search as above."""
    done = run("--save-text")
    assert done.code == 0
    found = leaks(err=done.err, out=done.out)
    assert found.pop("out") == {"answer"}
    everything = set.union(*found.values())
    assert everything >= {"prompt", "answer", "answer's ids"}
    assert all("runs" in name for name in found), "in the record and nowhere else"


def test_json_on_stdout_is_the_answer_and_nothing_of_it_is_kept(run: Run, leaks: Leaks) -> None:
    done = run("--json")
    assert done.code == 0
    found = leaks(err=done.err, out=done.out)
    assert found.keys() == {"out"}
    assert found["out"] >= {"answer"}


def test_a_run_without_a_server(run: Run, leaks: Leaks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "0.1")
    done = run(endpoint="ipc:///tmp/teegpu-nobody-listens-here")
    assert done.code == 4
    assert leaks(recorded=False, err=done.err, out=done.out) == {}


def test_a_prompt_that_is_too_long(run: Run, leaks: Leaks) -> None:
    done = run(prompt=PROMPT * 100)
    assert done.code == 3
    assert leaks(recorded=False, err=done.err, out=done.out) == {}


def test_a_run_that_is_refused(run: Run, leaks: Leaks, frugal: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec.Decoder, "decode", _without_limits(codec.Decoder.decode))
    done = run("--plan", "fused", endpoint=frugal.address)
    assert done.code == 6, done.err
    assert "refused" in done.err
    assert b"refused" in frugal.log
    assert leaks(err=done.err, out=done.out, log=frugal.log.decode()) == {}


def _without_limits(decode: Callable[..., object]) -> Callable[..., object]:
    """Replies as they are, but for the limits that a server tells: a runner that knows them keeps to them."""

    def decoded(self: codec.Decoder, frames: Sequence[memoryview]) -> object:
        message = decode(self, frames)
        if isinstance(message, Welcome):
            message.limits.clear()
        return message

    return decoded


def test_another_model(run: Run, leaks: Leaks, tiny_model: TinyModel) -> None:
    other = tiny_model("llama", max_position_embeddings=1024, seed=1)
    done = run("--model", str(other.path))
    assert done.code == 5
    assert leaks(recorded=False, err=done.err, out=done.out) == {}


@pytest.fixture
def after_some_text(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """``after_some_text(act)``: ``act`` is called when a run has written some of its answer."""

    def prepare(act: Callable[[], None]) -> None:
        write, pieces_left = answering._write, [4]

        def writing(text: str) -> None:
            write(text)
            pieces_left[0] -= 1
            if pieces_left[0] == 0:
                act()

        monkeypatch.setattr(answering, "_write", writing)

    return prepare


def test_a_run_that_is_interrupted(
    run: Run, leaks: Leaks, after_some_text: Callable[[Callable[[], None]], None]
) -> None:
    after_some_text(lambda: os.kill(os.getpid(), signal.SIGINT))
    done = run()
    assert done.code == 130
    assert done.out
    assert leaks(err=done.err) == {}


def test_a_server_that_is_killed(
    run: Run, leaks: Leaks, frugal: Served, after_some_text: Callable[[Callable[[], None]], None]
) -> None:
    after_some_text(frugal.process.kill)
    done = run("--plan", "per-op", endpoint=frugal.address)
    assert done.code == 4, done.err
    assert done.out
    assert leaks(err=done.err, log=frugal.log.decode()) == {}


# ---- what crosses the link


Messages = list[list[bytes]]


@pytest.fixture(scope="module")
def tapped(model: ModelFolder) -> Iterator[tuple[LocalServer, Messages]]:
    server = LocalServer(model)
    messages: Messages = []
    answer = server._server.answer

    def recording(incoming: Incoming) -> codec.Encoded:
        messages.append([bytes(frame) for frame in incoming.frames])
        encoded = answer(incoming)
        messages.append([bytes(frame) for frame in encoded.frames])
        return encoded

    server._server.answer = recording  # type: ignore[method-assign]
    yield server, messages
    server.close()


@pytest.fixture
def captured(tapped: tuple[LocalServer, Messages]) -> tuple[str, Messages]:
    """The address of a server, and all frames of all messages that it gets and gives from now on, in turn."""
    server, messages = tapped
    messages.clear()
    return server.address, messages


def integers_in(message: list[bytes]) -> list[torch.Tensor]:
    """The tensors of whole numbers in a request."""
    decoded = codec.Decoder(Limits()).decode([memoryview(frame) for frame in message])
    if not isinstance(decoded, Execute):
        return []
    return [tensor for tensor in decoded.tensors.values() if not tensor.is_floating_point()]


@pytest.mark.parametrize("plan", ["attention", "fused", "local"])
@pytest.mark.parametrize("more", [(), ("--wire-dtype", "int8", "--speculate", "4")])
def test_no_token_id_leaves_the_tee(
    plan: str, more: tuple[str, ...], run: Run, secrets: Secrets, captured: tuple[str, Messages]
) -> None:
    address, messages = captured
    done = run("--plan", plan, *more, "--json", endpoint=address)
    assert done.code == 0
    own = replace(secrets, answer_ids=json.loads(done.out)["outputs"][0]["token_ids"])
    assert bool(messages) == (plan != "local")
    for request in messages[::2]:
        assert not integers_in(request)
    for frame in (frame for message in messages for frame in message):
        assert own.in_(frame) == set()


@pytest.mark.parametrize("plan", ["per-op", "batched"])
def test_plans_that_send_token_ids_are_seen_to(
    plan: str, run: Run, secrets: Secrets, captured: tuple[str, Messages]
) -> None:
    """The searches of the test above, where there is something to be found."""
    address, messages = captured
    assert run("--plan", plan, endpoint=address).code == 0
    ids = torch.cat([tensor.flatten() for request in messages[::2] for tensor in integers_in(request)]).tolist()
    assert ids == secrets.prompt_ids + secrets.answer_ids[:-1]
    assert any("prompt's ids" in secrets.in_(frame) for message in messages for frame in message)
