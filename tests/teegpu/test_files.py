"""Files that are replaced as a whole, and locks that end with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from teegpu import files
from teegpu.errors import ConfigError
from teegpu.files import expanded, user_folder


def test_a_file_is_replaced_as_a_whole_and_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    files.replace(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert path.stat().st_mode & 0o777 == 0o600
    files.replace(path, b"\xff", mode=0o644, durable=True)
    assert path.read_bytes() == b"\xff"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["kept"]


def test_a_mode_that_is_not_given_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "kept", mode=None):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o640


def test_what_has_come_to_be_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with files.replacing(path, overwrite=False) as file:
        file.write(b"mine")
    with pytest.raises(FileExistsError), files.replacing(path, overwrite=False) as file:
        file.write(b"again")
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["kept"]


def test_what_fails_half_way_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    files.replace(path, "old")
    with pytest.raises(TypeError), files.replacing(path) as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept"]


def test_a_folder_that_is_made_is_private_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    made = files.private_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    assert files.private_folder(made).stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/teegpu"),
        ({"XDG_STATE_HOME": "s", "HOME": "/h"}, "/h/.local/state/teegpu"),
        ({"XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/teegpu"),
        ({"HOME": "/h"}, "/h/.local/state/teegpu"),
    ],
)
def test_where_a_users_files_lie(environ: dict[str, str], expected: str) -> None:
    assert files.user_folder("state", environ) == Path(expected)


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not files.locked(path)
    with files.Lock(path, wait=False) as lock:
        assert files.locked(path)
        with pytest.raises(BlockingIOError):
            files.Lock(path, wait=False)
        lock.close()
        assert not files.locked(path)


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, pathlib\nfrom teegpu import files\n"
        "lock = files.Lock(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert files.locked(path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not files.locked(path)


def test_no_home_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(ConfigError, match="set HOME, or XDG_CACHE_HOME, to one"):
        user_folder("cache", {})
    assert user_folder("cache", {"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/teegpu")
    with pytest.raises(ConfigError, match=r"record\.dir = '~nosuchuser/x' names a user without a home folder"):
        expanded("~nosuchuser/x", "record.dir")


def test_what_can_not_be_looked_at_may_be_there(tmp_path: Path) -> None:
    assert files.there(tmp_path)
    assert not files.there(tmp_path / "nothing")
    assert files.there(tmp_path / ("a" * 300))


def test_a_path_with_a_nul_is_told_as_that() -> None:
    with pytest.raises(ConfigError, match=r"record\.dir = 'a\\x00b' is no path: there is a NUL in it"):
        expanded("a\0b", "record.dir")
