"""``teegpu run`` against servers that mean harm: an exit code, one line, a document, a record, and no file touched."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from teegpu.model.folder import ModelFolder
from teegpu.wire.messages import PROTOCOL_VERSION
from tests.hostile import CutLine, Honest, HostileServer, Parts
from tests.teegpu.cli.conftest import Outcome, ServerFor, Teegpu
from transports import envelope

MARK = "hostile-marker"


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "0.5")
    monkeypatch.setenv("TEEGPU_LINK_REPLY_TIMEOUT_SECONDS", "0.5")

    def call(*args: object) -> Outcome:
        common = ("--model", model.path, "--raw", "--ignore-eos", "--max-tokens", 6, "--threads", 1)
        return teegpu("run", *common, *args, "Hi there")

    return call


Hostile = Callable[..., HostileServer]


@pytest.fixture
def hostile(server_for: ServerFor, model: ModelFolder) -> Iterator[Hostile]:
    made: list[HostileServer] = []

    def make(script: Callable[[Honest], Iterable[Parts]], at: int, **more: Any) -> HostileServer:
        made.append(HostileServer(server_for(model)._server, script, at=at, **more))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture(scope="module")
def audited() -> list[str]:
    """The names of all files that this process opens, removes or renames from now on; hooks can't be taken away."""
    seen: list[str] = []
    watched = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "subprocess.Popen"}
    sys.addaudithook(lambda event, args: seen.append(repr(args)) if event in watched else None)
    return seen


def failed(teegpu: Teegpu, done: Outcome, code: int, message: str) -> dict[str, Any]:
    """Checks that a run with --json ended with ``code`` and ``message`` in its line, document and record."""
    lines = [line for line in done.err.splitlines() if line.startswith("teegpu: ")]
    assert done.code == code, done.err
    assert message in lines[-1]
    assert "Traceback" not in done.err
    assert all(character.isprintable() or character == "\n" for character in done.err)
    document = done.document
    assert (document["status"], document["error"]) == ("failed", lines[-1].removeprefix("teegpu: "))
    kept = teegpu("report", "last", "--json")
    assert kept.code == 0, kept.err
    recorded: dict[str, Any] = json.loads(kept.out)
    assert (recorded["id"], recorded["status"]) == (document["id"], "failed")
    return document


def not_a_number(honest: Honest) -> Iterator[Parts]:
    frame = np.frombuffer(honest.frames[-1], np.float16).copy()
    frame[-1] = np.nan
    yield honest.sealed(honest.parts[1], *honest.frames[:-1], frame.tobytes())


def refusing(honest: Honest) -> Iterator[Parts]:
    text = f"\x1b]8;;file:///etc/{MARK}\x07[bold]click[/bold]\x1b[2J\n" * 20
    yield honest.sealed(msgpack.packb([PROTOCOL_VERSION, "refusal", honest.header[2], "internal", text]))


def flooding(honest: Honest) -> Iterator[Parts]:
    for number in range(10**5):
        yield honest.sealed(b"x", request_id=10**6 + number)


def silent(_: Honest) -> Iterator[Parts]:
    yield from ()


KINDS: dict[str, tuple[Callable[[Honest], Iterable[Parts]], int, str]] = {
    "NaN": (not_a_number, 7, "not finite"),
    "refusal": (refusing, 6, "]8;;file:///etc/hostile-marker [bold]click[/bold] [2J"),
    "flood": (flooding, 7, "what nobody asked"),
    "silence": (silent, 4, "no reply"),
    "garbage": (lambda _: [[b"\x00" * 40]], 7, "is it a teegpu server"),
    "a false table": (lambda h: [h.with_table([["q", [2**20], "fp32"]])], 7, "not valid"),
}


@pytest.mark.parametrize("transport", ["zmq", "pipelined"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_answer_ends_the_run_and_leaves_its_record(
    kind: str, transport: str, run: Callable[..., Outcome], hostile: Hostile, teegpu: Teegpu
) -> None:
    script, code, message = KINDS[kind]
    # hello, then 5 replies a token: in prefill, or after some tokens
    at = 3 if transport == "zmq" else 13
    server = hostile(script, at=at, once=kind != "silence")
    done = run("--endpoint", server.address, "--transport", transport, "--json", "-q")
    document = failed(teegpu, done, code, message)
    assert len(document["outputs"][0]["token_ids"]) == (0 if at == 3 else 2)
    assert document["phases"]["prefill"]["rpc_calls"] <= 5


def test_what_a_server_calls_itself_is_shown_and_stored_without_escapes_and_opens_nothing(
    run: Callable[..., Outcome], hostile: Hostile, teegpu: Teegpu, audited: list[str]
) -> None:
    name = f"\x1b]0;x\x07../../../../tmp/{MARK}\n[red]\u202e"

    def renamed(honest: Honest) -> Iterator[Parts]:
        body = honest.header[3] | dict.fromkeys(("software", "instance", "model", "device"), name)
        yield honest.with_header(3, body | {"limits": {MARK: 1}})

    audited.clear()
    server = hostile(renamed, at=0, once=False)
    # Every reply but the first is a result, which has no such field: it is let through as it is.
    server._script = lambda honest: renamed(honest) if honest.header[1] == "welcome" else [honest.parts]
    shown = run("--endpoint", server.address)
    kept = teegpu("report", "last")
    done = run("--endpoint", server.address, "--json")
    assert (shown.code, kept.code, done.code) == (0, 0, 0), (shown.err, kept.err, done.err)
    for text in (shown.err, kept.out, kept.err, done.out, done.err):
        assert "\x1b]" not in text
        assert "\u202e" not in text
        assert "\x07" not in text
    assert MARK in done.document["server"]["device"]
    assert not [opened for opened in audited if MARK in opened]


def test_a_server_that_changes_its_model_between_connections(
    run: Callable[..., Outcome], hostile: Hostile, teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost in the middle; who answers then has another digest: not the one to go on with."""
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "20")
    welcomes: list[int] = []

    def changed(honest: Honest) -> Iterator[Parts]:
        if honest.header[1] == "welcome":
            welcomes.append(1)
            if len(welcomes) > 1:
                yield honest.with_header(3, honest.header[3] | {"digest": "0" * 64})
                return
        yield honest.parts

    server = hostile(changed, at=0, once=False)
    line = CutLine(server.address, 5000)
    try:
        done = run("--endpoint", line.address, "--json", "-q")
    finally:
        line.close()
    assert len(welcomes) == 2
    failed(teegpu, done, 5, "give both the same --model")


def test_a_refusal_by_the_transport_with_escapes(run: Callable[..., Outcome], hostile: Hostile, teegpu: Teegpu) -> None:
    script = lambda honest: [envelope.pack_refusal(honest.request_id, envelope.REFUSED_FRAMING, "\x1b[2J\nbad" * 90)]  # noqa: E731
    done = run("--endpoint", hostile(script, at=2).address, "--json", "-q")
    failed(teegpu, done, 7, "could not read the request: ?[2J?bad?[2J")


def in_its_own_time(honest: Honest) -> Iterator[Parts]:
    """Right, and each time well within the time-out of a request."""
    time.sleep(0.15)
    yield honest.parts


@pytest.mark.parametrize(
    ("name", "seconds"), [("link.pass_timeout_seconds", "0.3"), ("run.deadline_seconds", "0.5")], ids=["pass", "answer"]
)
def test_a_server_that_is_slow_for_each_request(
    run: Callable[..., Outcome],
    hostile: Hostile,
    teegpu: Teegpu,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    seconds: str,
) -> None:
    monkeypatch.setenv("TEEGPU_" + name.upper().replace(".", "_"), seconds)
    server = hostile(in_its_own_time, 2, once=False)
    done = run("--endpoint", server.address, "--plan", "attention", "--json")
    failed(teegpu, done, 4, f"the servers have taken longer than {name}, {seconds}, allows")
