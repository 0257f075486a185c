"""``run --watch`` and ``watch``, on real terminals and without one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu.model.folder import ModelFolder
from teegpu.record.store import RunStore
from tests.teegpu.cli.terminal import Terminal, children_of

NothingLeft = Callable[[], None]


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., ModelFolder]) -> ModelFolder:
    return tiny_model("llama")


@pytest.fixture
def store(isolated_user_files: Path) -> RunStore:
    return RunStore(isolated_user_files / "state" / "teegpu" / "runs")


def run_args(model: ModelFolder, *more: object) -> list[object]:
    return ["run", "--model", model.path, "--offline", "--ignore-eos", *more]


@pytest.mark.parametrize("which", ["model", pytest.param("smollm2", marks=pytest.mark.extra)])
def test_a_run_is_watched_to_its_end(which: str, request: pytest.FixtureRequest, nothing_left: NothingLeft) -> None:
    """With a piped prompt: the keys come from the terminal."""
    model = request.getfixturevalue(which)
    with Terminal(*run_args(model, "--watch", "--max-tokens", 12), size=(120, 40), piped=b"Hi there") as terminal:
        terminal.wait_for("complete", "q closes", "Prefill")
        terminal.press("1")
        terminal.wait_for("where the time goes", "11 tokens")
        terminal.resize(80, 24)
        terminal.signal(signal.SIGWINCH)
        terminal.wait_for("communication", "serial.")
        terminal.press("q")
        assert terminal.finish() == 0
        assert "decode" in terminal.written
        assert "tokens/s" in terminal.written
    nothing_left()


def test_a_run_is_stopped(model: ModelFolder, server_for: Callable[..., object], nothing_left: NothingLeft) -> None:
    server = server_for(model)
    with server.hold(40):  # type: ignore[attr-defined]
        args = run_args(model, "Hi", "--watch", "--endpoint", server.address)  # type: ignore[attr-defined]
        with Terminal(*args) as terminal:
            terminal.wait_for("of ≤", "in flight")
            terminal.press("q")
            terminal.wait_for("The run is not finished")
            terminal.press("s")
            assert terminal.finish() == 130, terminal.written
            assert "interrupted" in terminal.written
    nothing_left()


@pytest.mark.slow
def test_a_run_that_is_killed_under_the_monitor(
    model: ModelFolder, server_for: Callable[..., object], nothing_left: NothingLeft
) -> None:
    server = server_for(model)
    with server.hold(40):  # type: ignore[attr-defined]
        args = run_args(model, "Hi", "--watch", "--endpoint", server.address)  # type: ignore[attr-defined]
        with Terminal(*args) as terminal:
            terminal.wait_for("of ≤", "in flight")
            (child,) = children_of(terminal.pid)
            os.kill(child, signal.SIGKILL)
            terminal.wait_for("interrupted", "q closes")
            terminal.press("q")
            assert terminal.finish() == 128 + signal.SIGKILL
    nothing_left()


@pytest.mark.slow
@pytest.mark.extra
def test_the_end_of_the_terminal_ends_run_and_screen(
    model: ModelFolder, server_for: Callable[..., object], nothing_left: NothingLeft
) -> None:
    server = server_for(model)
    with server.hold(40):  # type: ignore[attr-defined]
        args = run_args(model, "Hi", "--watch", "--endpoint", server.address)  # type: ignore[attr-defined]
        with Terminal(*args) as terminal:
            terminal.wait_for("of ≤", "in flight")
            terminal.signal(signal.SIGHUP)
            assert terminal.finish() == 130, terminal.written
    nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize(
    "over", [pytest.param(True, id="at-the-end"), pytest.param(False, id="under-way", marks=pytest.mark.extra)]
)
def test_a_terminal_that_goes_away_leaves_nothing_behind(
    model: ModelFolder, server_for: Callable[..., object], nothing_left: NothingLeft, over: bool
) -> None:
    server = server_for(model)
    args = run_args(model, "Hi", "--watch", "--no-record", "--endpoint", server.address, "--max-tokens", 4)  # type: ignore[attr-defined]
    with contextlib.nullcontext() if over else server.hold(5), Terminal(*args) as terminal:  # type: ignore[attr-defined]
        terminal.wait_for("q closes" if over else "in flight")
        terminal.hang_up()
    nothing_left()


@pytest.mark.slow
@pytest.mark.extra
def test_another_terminal_watches_and_leaves_the_run_alone(
    model: ModelFolder, server_for: Callable[..., object], start: Callable[..., object], teegpu: Callable[..., object]
) -> None:
    server = server_for(model)
    with server.hold(40):  # type: ignore[attr-defined]
        args = run_args(model, "Hi", "--endpoint", server.address, "--max-tokens", 20)  # type: ignore[attr-defined]
        process = start(*args)
        server.wait_until_held()  # type: ignore[attr-defined]
        refused = teegpu("watch", "--speed", 2)
        assert refused.code == 2  # type: ignore[attr-defined]
        assert "goes on" in refused.err  # type: ignore[attr-defined]
        frame = teegpu("watch", "--once")
        assert "prefill" in frame.out  # type: ignore[attr-defined]
        with Terminal("watch") as terminal:
            terminal.wait_for("of ≤", "in flight")
            terminal.press("5")
            terminal.wait_for("The text is not in the record")
            terminal.press("q")
            assert terminal.finish() == 0
    ended = process.finish()  # type: ignore[attr-defined]
    assert ended.code == 0, ended


def test_without_a_terminal_there_are_lines(
    model: ModelFolder, start: Callable[..., object], store: RunStore, nothing_left: NothingLeft
) -> None:
    process = start(*run_args(model, "Hi", "--watch", "--no-record", "--max-tokens", 8, "--link", "rtt=60ms"))
    ended = process.finish()  # type: ignore[attr-defined]
    assert ended.code == 0, ended
    assert ended.out.strip()
    assert " prefill · " in ended.err or " decode · " in ended.err
    assert "\x1b" not in ended.err
    assert store.all() == []
    nothing_left()


def test_what_is_wrong_is_told_before_there_is_a_screen(model: ModelFolder) -> None:
    with Terminal("run", "--watch", "--model", "no-such-model", "--offline", "Hi") as terminal:
        assert terminal.finish() == 3
        assert "no-such-model" in terminal.text.replace("\n", "")


# Runs that have ended


@pytest.fixture
def ended(teegpu: Callable[..., object], model: ModelFolder, store: RunStore) -> str:
    done = teegpu(*run_args(model, "Hi", "--max-tokens", 6, "--transport", "inprocess", "--plan", "local"))
    assert done.code == 0, done  # type: ignore[attr-defined]
    return store.find("last").id


def test_one_plain_frame(teegpu: Callable[..., object], ended: str) -> None:
    for args in (("--once",), (ended, "--once"), ()):  # no terminal here: a frame, whatever was asked for
        frame = teegpu("watch", *args)
        assert frame.code == 0  # type: ignore[attr-defined]
        assert "complete" in frame.out  # type: ignore[attr-defined]
        assert "where the time goes" in frame.out  # type: ignore[attr-defined]
        assert "slowest layers" in frame.out  # type: ignore[attr-defined]
        assert "\x1b" not in frame.out  # type: ignore[attr-defined]


def test_a_run_that_is_not_there(teegpu: Callable[..., object], ended: str) -> None:
    refused = teegpu("watch", ended[:-1] + "x", "--once")
    assert refused.code == 8  # type: ignore[attr-defined]
    assert ended in refused.err  # type: ignore[attr-defined]


@pytest.mark.parametrize("args", [("--once", "--speed", 1), ("--speed", -1), ("--theme", "teegpu-drak")])
def test_options_that_can_not_be(args: tuple[object, ...], teegpu: Callable[..., object], ended: str) -> None:
    assert teegpu("watch", *args).code == 2  # type: ignore[attr-defined]


def test_a_replay_on_a_terminal(ended: str) -> None:
    with Terminal("watch", ended, "--speed", 0) as terminal:
        terminal.wait_for("complete", "report")
        terminal.press("j")
        terminal.wait_for("Jump to token")
        terminal.press("2\r")
        terminal.wait_for("paused")
        terminal.press("1")
        terminal.wait_for("where the time goes", "1 of ≤ 5 tokens")
        terminal.press("q")
        assert terminal.finish() == 0


@pytest.mark.parametrize("speed", [0, 1])
def test_a_replay_ends_with_its_terminal(ended: str, speed: int) -> None:
    """Its signal is SIGHUP, as of a window that is closed; what it waits for is a terminal that takes nothing."""
    with Terminal("watch", ended, "--speed", speed) as terminal:
        terminal.wait_for("report")
        terminal.hang_up()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_replay_ends_when_it_is_told_to(ended: str, number: signal.Signals) -> None:
    with Terminal("watch", ended) as terminal:
        terminal.wait_for("report")
        terminal.signal(number)
        assert terminal.finish() == 0
        assert "\x1b[?1049l" in terminal.raw.decode()  # the screen is given back


def test_a_terminal_that_takes_nothing_more_holds_nothing_up(ended: str) -> None:
    with Terminal("watch", ended, size=(200, 60)) as terminal:
        terminal.wait_for("report")
        terminal.fill()
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGHUP


@pytest.mark.parametrize("goes", [True, False])
def test_the_end_of_its_terminal_ends_a_run_in_order(
    model: ModelFolder, server_for: Callable[..., object], store: RunStore, nothing_left: NothingLeft, goes: bool
) -> None:
    server = server_for(model)
    with server.hold(40), Terminal(*run_args(model, "Hi", "--endpoint", server.address)) as terminal:  # type: ignore[attr-defined]
        terminal.wait_for("privacy none")
        if goes:
            assert terminal.hang_up() in (130, 141)
        else:
            terminal.signal(signal.SIGHUP)
            assert terminal.finish() == 130
    assert store.find("last").status == "interrupted"
    nothing_left()


def test_a_terminal_that_takes_nothing_more_does_not_hold_up_a_run(
    model: ModelFolder, server_for: Callable[..., object], nothing_left: NothingLeft
) -> None:
    server = server_for(model)
    args = run_args(model, "Hi", "--watch", "--no-record", "--endpoint", server.address)  # type: ignore[attr-defined]
    with server.hold(40), Terminal(*args, size=(200, 60)) as terminal:  # type: ignore[attr-defined]
        terminal.wait_for("of ≤", "in flight")
        terminal.fill()
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGHUP
    nothing_left()


def test_a_terminal_that_goes_without_a_signal(ended: str) -> None:
    """As where something between, which starts commands, keeps SIGHUP from them."""
    with Terminal("watch", ended, ignored=signal.SIGHUP) as terminal:
        terminal.wait_for("report")
        terminal.hang_up()
