"""Where results go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from teegpu.cli.destination import Destination
from teegpu.errors import UsageError


def test_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    Destination(None, force=False).write("a")
    Destination(Path("-"), force=False).write(iter(["b", "c"]))
    assert capsys.readouterr().out == "abc"


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def pieces() -> Iterator[str]:
        yield "a"
        assert not path.exists()
        yield "b"

    Destination(path, force=False, quiet=True).write(pieces())
    assert path.read_text() == "ab"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def pieces() -> Iterator[str]:
        yield "new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Destination(path, force=True, quiet=True).write(pieces())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_what_comes_to_be_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    destination = Destination(path, force=False, quiet=True)
    path.write_text("theirs")
    with pytest.raises(UsageError, match="--force replaces it"):
        destination.write("mine")
    assert path.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_that_leads_nowhere_is_not_replaced_either(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="it is there already"):
        Destination(path, force=False)


def test_no_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(UsageError, match="--out FILE"):
        Destination(None, force=False)
