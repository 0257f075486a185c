"""What went is refused with one line that says so."""

from __future__ import annotations

import pytest

from teegpu.cli import gone
from tests.teegpu.cli.conftest import Teegpu


@pytest.mark.parametrize("path", gone.COMMANDS)
def test_a_command_that_went_says_what_to_use(teegpu: Teegpu, path: str) -> None:
    done = teegpu(*path.split(), "--model", "whatever")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"teegpu: 'teegpu {path}' is gone: {gone.COMMANDS[path]}\n"


def test_a_flag_that_went_says_what_to_use(teegpu: Teegpu) -> None:
    for flag, what in gone.FLAGS.items():
        done = teegpu(*flag.split(), "whatever")
        assert (done.code, done.out) == (2, "")
        assert done.err == f"teegpu: 'teegpu {flag}' is gone: {what}\n"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("spell --loud", "'teegpu spell' is gone: read it out"),
        ("config spell", "'teegpu config spell' is gone: leave it out"),
        ("config show --loud=3", "'teegpu config show --loud' is gone: use --json"),
    ],
)
def test_commands_and_flags_at_any_depth(args: str, line: str, monkeypatch: pytest.MonkeyPatch, teegpu: Teegpu) -> None:
    monkeypatch.setitem(gone.COMMANDS, "spell", "read it out")
    monkeypatch.setitem(gone.COMMANDS, "config spell", "leave it out")
    monkeypatch.setitem(gone.FLAGS, "config show --loud", "use --json")
    done = teegpu(*args.split())
    assert (done.code, done.out, done.err) == (2, "", f"teegpu: {line}\n")


def test_no_command_that_went_is_there(teegpu: Teegpu) -> None:
    for path in gone.COMMANDS:
        *group, name = path.split()
        assert f"│ {name} " not in teegpu(*group, "--help").out
