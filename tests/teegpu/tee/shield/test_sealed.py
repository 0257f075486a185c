from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teegpu.errors import ShieldError
from teegpu.tee.shield import sealed
from teegpu.tee.shield.sealed import DamagedError, SealedFile, SealedWriter, SealKey

PARTS = [("first", 70), ("empty", 0), ("second", 33)]
CONTENT = bytes(range(103))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return sealed.data_folder(str(tmp_path / "data")) / "file"


def write(path: Path, key: SealKey, **binding: str) -> None:
    with SealedWriter(path, key, "test", binding, PARTS) as writer:
        writer.append(CONTENT[:50])
        writer.append(np.frombuffer(CONTENT[50:], dtype=np.uint8))


def test_parts_come_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "PIECE_BYTES", 16)
    key = SealKey.load()
    write(path, key, model="m")
    with SealedFile(path, SealKey.load(), "test", {"model": "m"}) as file:
        assert file.sizes == dict(PARTS)
        assert file.read("second").tobytes() == CONTENT[70:]
        assert file.read("first").tobytes() == CONTENT[:70]
        assert file.read("empty").size == 0
    assert CONTENT[:20] not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_two_files_share_no_bytes(path: Path) -> None:
    key = SealKey.load()
    write(path, key)
    first = path.read_bytes()
    write(path, key)
    assert path.read_bytes()[-119:] != first[-119:]


def test_every_changed_byte_is_noticed(path: Path) -> None:
    key = SealKey.load()
    write(path, key, model="m")
    whole = path.read_bytes()

    def readable() -> bool:
        try:
            with SealedFile(path, key, "test", {"model": "m"}) as file:
                file.read("first")
                file.read("second")
        except DamagedError:
            return False
        return True

    assert readable()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert not readable(), place
    for length in (0, 10, 80, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not readable(), length
    path.write_bytes(whole + b"x")
    assert not readable()


def test_another_kind_binding_or_key_is_refused(path: Path) -> None:
    key = SealKey.load()
    write(path, key, model="m")
    for other, kind, model in ((key, "test", "n"), (key, "tset", "m"), (SealKey(bytes(32)), "test", "m")):
        with pytest.raises(DamagedError, match="damaged"):
            SealedFile(path, other, kind, {"model": model})


def test_what_is_not_whole_leaves_nothing(path: Path) -> None:
    key = SealKey.load()
    with pytest.raises(ValueError, match="fewer"), SealedWriter(path, key, "test", {}, PARTS) as writer:
        writer.append(CONTENT[:80])
    with pytest.raises(ValueError, match="more"), SealedWriter(path, key, "test", {}, PARTS) as writer:
        writer.append(CONTENT + b"x")
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_keeps_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = SealKey.load()
    write(path, key)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ShieldError, match=r"no space left for .*shield\.dir"):
        write(path, key)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_files_that_others_can_read_are_refused(path: Path, mode: int) -> None:
    key = SealKey.load()
    write(path, key)
    path.chmod(mode)
    with pytest.raises(ShieldError, match="chmod 600"):
        SealedFile(path, key, "test", {})
    seal = sealed.state_folder() / "seal.key"
    seal.chmod(mode)
    with pytest.raises(ShieldError, match=r"seal\.key: others .* chmod 600"):
        SealKey.load()


def test_folders_that_others_can_enter_are_refused(path: Path) -> None:
    SealKey.load()
    sealed.state_folder().chmod(0o755)
    with pytest.raises(ShieldError, match="chmod 700"):
        SealKey.load()
    path.parent.chmod(0o750)
    with pytest.raises(ShieldError, match="chmod 700"):
        sealed.data_folder(str(path.parent))


def test_the_key_is_made_once_and_shown_nowhere() -> None:
    first = SealKey.load()
    file = sealed.state_folder() / "seal.key"
    raw = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.derive("a") == SealKey.load().derive("a")
    assert first.derive("a") != first.derive("b")
    assert first.derive("a", b"1") != first.derive("a", b"2")
    assert raw.hex() not in repr(first)
    file.write_bytes(raw[:31])
    with pytest.raises(ShieldError, match="damaged"):
        SealKey.load()


def test_one_process_makes_a_file_at_a_time(path: Path) -> None:
    leftover = path.with_name(".file~abc")
    leftover.write_bytes(b"x")
    waited = []
    code = (
        "import sys, pathlib\nfrom teegpu.tee.shield.sealed import making\n"
        "with making(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        assert not leftover.exists()

        def waiting() -> None:
            waited.append(True)
            other.kill()

        with sealed.making(path, waiting):
            pass
    assert waited == [True]
