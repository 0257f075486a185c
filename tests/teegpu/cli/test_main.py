"""The frame of the command line: lazy commands, exit codes, one line per error, completion."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

import teegpu
import transports.errors
from teegpu import errors
from teegpu.cli import main as cli
from teegpu.cli.common import from_transport, sigterm_as_interrupt
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import ServerFor, Start

COMMAND = [sys.executable, "-m", "teegpu"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None] | typer.Typer], None]:
    """``command(function)`` makes ``teegpu probe`` run it."""

    def install(exported: Callable[..., None] | typer.Typer) -> None:
        module = ModuleType("teegpu.cli.probe")
        vars(module)["exported"] = exported
        monkeypatch.setitem(sys.modules, "teegpu.cli.probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Entry("Only for this test.", "exported"))

    return install


def failing(error: BaseException) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"teegpu {teegpu.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 0
    out = capsys.readouterr().out
    for name, entry in cli.COMMANDS.items():
        assert f" {name} " in out
        assert entry.summary in " ".join(out.replace("│", "").split())
    assert "Exit codes: 0 done" in out


def test_a_terminal_without_a_size_is_printed_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("0", ""):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.run(["model", "list"]) == 0
        assert "smollm2-135m" in capsys.readouterr().out


def test_help_explains_every_exit_code() -> None:
    explained = {int(part.split()[0]) for part in cli.EPILOG.removeprefix("Exit codes: ").split(", ")}
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.TeegpuError)
    ]
    own = {kind.exit_code for kind in kinds}
    assert explained == own | {0, errors.EXIT_BUG, errors.EXIT_INTERRUPTED, errors.EXIT_BROKEN_PIPE}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    assert f"Usage: teegpu {name}" in capsys.readouterr().out


def test_a_function_is_a_command(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def probe(count: int, loud: bool = False) -> None:
        typer.echo(f"{count} {loud}")

    command(probe)
    assert cli.run(["probe", "3", "--loud"]) == 0
    assert capsys.readouterr().out == "3 True\n"


def test_an_app_is_a_group(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def only() -> None:
        typer.echo("done")

    command(app)
    assert cli.run(["probe", "only"]) == 0
    assert capsys.readouterr().out == "done\n"


def test_an_exit_code_of_a_command(command: Callable[..., None]) -> None:
    command(failing(typer.Exit(4)))
    assert cli.run(["probe"]) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "teegpu: No such command 'rnu'. Did you mean 'run'? (see 'teegpu --help')\n"),
        (["--nonsense"], "teegpu: there is no option --nonsense (see 'teegpu --help')\n"),
        (["run", "--plann=x"], "teegpu run: there is no option --plann, did you mean '--plan'? (see 'teegpu run --"),
        (["run", "--endpont", "x"], "teegpu run: there is no option --endpont, did you mean '--endpoint'? (see"),
        (["run", "--feedd=3"], "teegpu run: there is no option --feedd (see"),  # a hidden one is for nobody
        (
            ["config", "shwo"],
            "teegpu config: No such command 'shwo'. Did you mean 'show'? (see 'teegpu config --help')\n",
        ),
        (["config", "init", "a", "b"], "teegpu config init: "),
    ],
)
def test_usage_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--bind", "a", "--bind=b"], "--bind is given 2 times: b counts, and not a\n"),
        (["--bind=a", "--bind", "b", "--bind", "c"], "--bind is given 3 times: c counts, and not a, b\n"),
        (["--system", "secret", "--system", "word"], "--system is given 2 times: the last counts, and not others\n"),
        (["--bind", "a", "--bind", "a"], ""),
        (["--bind", "a", "--stop", "x", "--stop", "y"], ""),
        (["--json", "--json"], ""),
        (["--bind", "a", "--bind", "b", "--quiet"], ""),
    ],
)
def test_an_option_that_is_given_another_value_is_told_of(
    args: list[str], told: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(
        flag_0: Annotated[str, typer.Option("--bind")] = "",
        system: Annotated[str, typer.Option()] = "",
        stop: Annotated[list[str] | None, typer.Option()] = None,
        as_json: Annotated[bool, typer.Option("--json")] = False,
        quiet: Annotated[bool, typer.Option()] = False,
    ) -> None:
        typer.echo(f"{flag_0} {system} {stop} {as_json} {quiet}")

    command(probe)
    assert cli.run(["probe", *args]) == 0
    assert capsys.readouterr().err == (f"teegpu probe: {told}" if told else "")


def test_a_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config"]) == 2
    captured = capsys.readouterr()
    assert "Usage: teegpu config" in captured.out
    assert captured.err == ""


def subclasses(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(deeper for direct in kind.__subclasses__() for deeper in subclasses(direct))]


@pytest.mark.parametrize(
    "kind", [kind for kind in subclasses(errors.TeegpuError) if kind.__module__ == errors.__name__]
)
def test_our_errors_are_one_line_and_an_exit_code(
    kind: type[errors.TeegpuError], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(failing(kind("what happened; what to do")))
    assert cli.run(["probe"]) == kind.exit_code
    assert capsys.readouterr().err == "teegpu: what happened; what to do\n"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (transports.errors.ConnectError, 4),
        (transports.errors.ConnectionLostError, 4),
        (transports.errors.ReplyTimeoutError, 4),
        (transports.errors.UnknownTransportError, 2),
        (transports.errors.BadAddressError, 2),
        (transports.errors.FrameError, 7),
        (transports.errors.LimitError, 2),
    ],
)
def test_transport_errors(
    kind: type[Exception], code: int, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(failing(kind("the link said no")))
    assert cli.run(["probe"]) == code
    assert capsys.readouterr().err == "teegpu: the link said no\n"


def test_every_transport_error_has_an_exit_code() -> None:
    for kind in subclasses(transports.errors.TransportError):
        assert isinstance(from_transport(kind("x")), errors.TeegpuError)
    assert from_transport(ValueError("x")) is None


def test_an_interrupt_is_130_and_quiet(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(failing(KeyboardInterrupt()))
    assert cli.run(["probe"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("off by one"), EOFError("struct"), FileNotFoundError(2, "no such", "x")])
def test_anything_else_is_a_bug(
    error: Exception, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(failing(error))
    assert cli.run(["probe"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert type(error).__name__ in err
    assert err.endswith("teegpu: this is a bug in teegpu; please report it with the lines above\n")


def test_a_full_disk_is_no_bug(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(failing(OSError(errno.ENOSPC, "No space left on device", "/some/file")))
    assert cli.run(["probe"]) == 1
    assert capsys.readouterr().err == "teegpu: /some/file: No space left on device\n"


def test_what_an_error_quotes_can_not_take_over_the_terminal(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(failing(errors.ModelError("/models/\x1b]0;x\x07: no such folder")))
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    assert cli.run(["probe"]) == 3
    assert shown.getvalue() == "teegpu: /models/�]0;x�: no such folder\n"


def test_the_process_ends_with_the_code_and_nothing_that_it_said_is_lost() -> None:
    """Without taking itself apart, which takes long where torch was loaded."""
    code = (
        "import atexit, sys; from teegpu.cli import main as cli; atexit.register(print, 'taken apart')\n"
        "def run(args): sys.stdout.write('out'); sys.stderr.write('err'); return 3\n"
        "cli.run = run; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out", "err")


@pytest.mark.parametrize(
    ("encoding", "args"), [("ascii", ["run", "--help"]), ("latin-1", ["bench", "ladder", "--help"])]
)
def test_characters_that_the_output_lacks_are_replaced(encoding: str, args: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, *args],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["config", "show"], ["config", "show", "--json"]])
def test_a_reader_that_went_away(args: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*COMMAND, *args], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "config", "show"], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"teegpu: No space left on device\n")


def test_no_stderr_to_write_to(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*COMMAND, "rnu"], stdout=subprocess.PIPE, stderr=writing, cwd=tmp_path, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (2, b"")


def test_python_m_teegpu() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"teegpu {teegpu.__version__}\n"


def test_sigterm_interrupts_where_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_as_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_a_thread_changes_nothing() -> None:
    seen: list[object] = []

    def look() -> None:
        with sigterm_as_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def completions(words: str, position: int) -> list[str]:
    environment = os.environ | {"_TEEGPU_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_completion_of_commands() -> None:
    assert completions("teegpu ", 1) == list(cli.COMMANDS)
    assert completions("teegpu mo", 1) == ["model"]


def test_completion_of_what_a_command_takes() -> None:
    assert completions("teegpu config ", 2) == ["show", "init", "path"]
    assert completions("teegpu config init --", 3) == ["--force", "--active", "--help"]
    assert "--endpoint" in completions("teegpu doctor --e", 2)


def test_the_completion_script_works_in_bash(tmp_path: Path) -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(
        [*COMMAND, "--show-completion", "bash"], env=environment, capture_output=True, text=True, check=True
    )
    program = tmp_path / "teegpu"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m teegpu "$@"\n')
    program.chmod(0o755)
    test = 'COMP_WORDS=(teegpu do); COMP_CWORD=1; _teegpu_completion teegpu; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{shown.stdout}\n{test}"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "doctor\n"


def test_a_process_of_the_command_leaves_no_core_dump_and_is_closed_to_others() -> None:
    """From its start, whichever command it is: what it does comes after."""
    code = (
        "import ctypes; from pathlib import Path; from teegpu.cli import main as cli\n"
        "def run(args): print(ctypes.CDLL(None).prctl(3), Path('/proc/self/limits').read_text()); return 0\n"
        "cli.run = run; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    dumpable, limits = done.stdout.split(" ", 1)
    assert dumpable == "0"
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def test_the_process_is_the_one_that_runs(start: Start, server_for: ServerFor, tiny_model: TinyModel) -> None:
    """A run that waits for its server: neither it nor anything that it has started could leave a core dump."""
    folder = tiny_model("llama")
    server = server_for(folder)
    with server.hold(2):
        process = start("run", "--model", folder.path, "--endpoint", server.address, "--max-tokens", "4", "Hi")
        server.wait_until_held()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert process.finish().code == 0
