"""Where results go."""

from __future__ import annotations

import os
import socket
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


@pytest.mark.parametrize("force", [True, False])
def test_a_pipe_is_written_to_and_never_replaced(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o644)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        Destination(path, force=force, quiet=True).write(["a", "b"], private=True)
        assert os.read(reader, 9) == b"ab"
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_to_where_a_link_leads_to_it(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    destination = Destination(path, force=True, quiet=True)
    assert destination.flows
    destination.write("a")
    assert path.is_symlink()


def test_standard_output_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    Destination(Path("/dev/stdout"), force=False).write("a")
    assert capsys.readouterr().out == "a"


def test_a_socket_is_no_place_for_a_result(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(UsageError, match="s: it is no file"):
            Destination(tmp_path / "s", force=True)


def test_a_name_that_can_not_be_is_told_before_there_is_a_result(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it can't be written: file name too long"):
        Destination(tmp_path / ("a" * 256), force=True)
    Destination(tmp_path / ("ä" * 127), force=False, quiet=True).write("long, and no longer than may be")
    assert os.listdir(tmp_path) == ["ä" * 127]


def test_a_folder_that_goes_meanwhile_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    destination = Destination(folder / "out", force=True)
    folder.rmdir()
    with pytest.raises(UsageError, match="out: it can't be written: no such file or directory"):
        destination.write("a")
