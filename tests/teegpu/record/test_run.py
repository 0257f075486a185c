"""Reading a record: in full, in part, live, damaged, of another release, in a folder that can't be written."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.errors import RecordError
from teegpu.record import database
from teegpu.record import events as ev
from teegpu.record.run import RunFolder
from teegpu.record.store import RunStore
from tests.teegpu.record.eventsamples import EVERY_KIND, laps

BLOCKS = [laps(4), EVERY_KIND, laps(300, 4), laps(5, 304)]
KNOWN = {repr(event) for block in BLOCKS for event in block}


def concluded(root: Path, *blocks: list[ev.Event]) -> RunFolder:
    writer = RunStore(root).create("one", {"note": "as it was"}, events_bytes=1 << 24)
    writer.end()
    for block in blocks:
        writer(block)
        writer._round()
    writer.finish({"schema": "teegpu.report/1", "status": "complete"})
    writer.close()
    return writer.folder


def changed(run: RunFolder, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(run.path / database.FILE)) as connection, connection:
        connection.execute(sql, values)


def read_all(run: RunFolder) -> tuple[list[ev.Event], list[str]]:
    with closing(run.events()) as reader:
        return reader.read(), list(reader.damage)


# While it is written


def test_who_reads_along_goes_on_across_the_end(tmp_path: Path) -> None:
    writer = RunStore(tmp_path).create("one", {}, events_bytes=1 << 20)
    writer(laps(10))
    writer.end()
    early, late = writer.folder.events(), writer.folder.events()
    assert early.read() == laps(10)
    writer(laps(10, 10))
    writer._round()
    writer.finish({"status": "complete"})
    assert early.read() == laps(10, 10)
    writer.close()
    assert writer.folder.status == "complete"
    assert late.read(15) == laps(15)
    assert late.read() == laps(5, 15)
    assert early.read() == late.read() == early.damage == late.damage == []
    early.close()
    late.close()
    assert read_all(writer.folder) == (laps(20), [])


def test_who_reads_along_reads_on_when_the_record_is_removed(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(20), laps(20, 20))
    with closing(run.events()) as reader:
        assert reader.read(5) == laps(5)
        RunStore(tmp_path).remove(run)
        assert reader.read() == laps(35, 5)
        assert reader.damage == []


def test_reading_takes_little_memory_whatever_the_length(tmp_path: Path) -> None:
    """Of a record of many events, only some blocks are in memory at any time."""
    run = concluded(tmp_path, *(laps(512, 512 * number) for number in range(100)))
    with closing(run.events()) as reader:
        count = 0
        while events := reader.read(100):
            count += len(events)
            assert len(reader._blocks) <= 16
            assert len(reader._rest) <= 512
    assert count == 51_200


# Damage


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All events are there, or it says that some are not; none is there that never happened."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        concluded(folder, *BLOCKS)
        shutil.copy(folder / "one" / database.FILE, folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    assert_read_without_a_crash(folder, content)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_whatever_happens_to_a_file_it_is_read_without_a_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "spoiled"
    if not folder.exists():
        concluded(folder, *BLOCKS)
        shutil.copy(folder / "one" / database.FILE, folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 5000)))
        content[start:end] = data.draw(st.binary(max_size=60) | st.just(bytes(end - start)))
    assert_read_without_a_crash(folder, content)


def assert_read_without_a_crash(folder: Path, content: bytes) -> None:
    (folder / "one" / database.FILE).write_bytes(content)
    run = RunFolder(folder / "one")
    assert run.status in ("complete", "interrupted")
    try:
        events, damage = read_all(run)
    except RecordError:
        return
    assert damage or len(events) == sum(map(len, BLOCKS))
    assert {repr(event) for event in events} <= KNOWN


def test_damage_that_sqlite_can_not_put_into_words_is_damage(tmp_path: Path) -> None:
    run = concluded(tmp_path, *BLOCKS)
    path = run.path / database.FILE
    content = path.read_bytes()
    assert content.count(b"CREATE TABLE run") == 1
    path.write_bytes(content.replace(b"CREATE TABLE run", b"CREATE \x81ABLE run"))
    with pytest.raises(RecordError):
        run.row("status")


def test_a_damaged_block_costs_itself(tmp_path: Path) -> None:
    run = concluded(tmp_path, *BLOCKS)
    whole = database.Packer().block(BLOCKS[1])
    for block in (whole[:-1], b"", b"no block", whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], "text"):
        changed(run, "UPDATE events SET block = ? WHERE id = 2", block)
        events, damage = read_all(run)
        assert events == [*BLOCKS[0], *BLOCKS[2], *BLOCKS[3]]
        assert damage == ["block 2 of the events can't be read: it is damaged"]


def test_a_block_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path) -> None:
    run = concluded(tmp_path, *BLOCKS)
    bomb = zstandard.ZstdCompressor().compress(bytes(20 << 20))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(20 << 20))
    for block, why in ((bomb, "it claims to be larger than any"), (endless, "it is damaged")):
        changed(run, "UPDATE events SET block = ? WHERE id = 2", block)
        assert read_all(run)[1] == [f"block 2 of the events can't be read: {why}"]


def test_blocks_that_are_missing_are_named(tmp_path: Path) -> None:
    run = concluded(tmp_path, *BLOCKS)
    changed(run, "DELETE FROM events WHERE id IN (2, 3)")
    assert read_all(run) == ([*BLOCKS[0], *BLOCKS[3]], ["2 blocks of events before block 4 are missing"])
    changed(run, "DELETE FROM events WHERE id = 4")
    assert read_all(run) == (BLOCKS[0], ["the last 3 blocks of events are missing"])


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    run = concluded(tmp_path, *(random_laps(500, 500 * number) for number in range(20)))
    content = (run.path / database.FILE).read_bytes()
    for end in (0, 10, 4096, len(content) // 2, len(content) - 4096):
        (run.path / database.FILE).write_bytes(content[:end])
        try:
            events, damage = read_all(run)
        except RecordError:
            continue
        assert damage
        assert len(events) < 10_000


def test_pages_in_a_loop_are_damage(tmp_path: Path) -> None:
    run = concluded(tmp_path, *(random_laps(500, 500 * number) for number in range(20)))
    path = run.path / database.FILE
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
    content = bytearray(path.read_bytes())
    page = (root - 1) * database.PAGE_BYTES
    assert content[page] == 5  # a page of pages: its cells follow, each one's first four bytes are a page's number
    cell = page + int.from_bytes(content[page + 12 : page + 14])
    content[page + 8 : page + 12] = content[cell : cell + 4]  # the last page is the first one again
    path.write_bytes(content)
    events, damage = read_all(run)
    assert 0 < len(events) < 10_000
    assert damage[0].endswith("can't be read: they are not in order")


def random_laps(count: int, start: int) -> list[ev.Event]:
    return [ev.Lap(start + at, random.getrandbits(62), ev.TEE, "SILU", 0, 0, 0) for at in range(count)]


@pytest.mark.parametrize("content", [b"x", b"# a file of somebody else's, longer than any header\n" * 100])
def test_what_is_no_database(tmp_path: Path, content: bytes) -> None:
    run = concluded(tmp_path, laps(3))
    (run.path / database.FILE).write_bytes(content)
    assert run.status == "interrupted"
    for read in (run.meta, run.document, run.events):
        with pytest.raises(RecordError, match=r"run one: run.sqlite (can't be read: file is not a d|is not a record)"):
            read()


def test_the_database_of_something_else(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(3))
    (run.path / database.FILE).unlink()
    changed(run, "CREATE TABLE run (meta, document)")
    with pytest.raises(RecordError, match=r"run one: run.sqlite is not a record, or damaged"):
        run.meta()


ENDLESS = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT"


@pytest.mark.parametrize(
    "sql",
    [
        f"DROP TABLE run; CREATE VIEW run AS {ENDLESS} 1 status, 1 blocks, '' meta, '' document FROM t WHERE x < 0",
        f"DROP TABLE events; CREATE VIEW events AS {ENDLESS} x id, x'00' block FROM t",
        "DROP TABLE run; CREATE TABLE run (status, blocks, x, meta AS (printf('%.*c', 900000000, 'x')), document)",
        "CREATE TABLE more (x)",
    ],
    ids=["run", "events", "large", "more"],
)
def test_what_is_no_table_of_ours_is_not_read(tmp_path: Path, sql: str) -> None:
    """A view is a program: one that never ends, or takes all memory."""
    run = concluded(tmp_path, laps(3))
    with closing(sqlite3.connect(run.path / database.FILE)) as connection:
        connection.executescript(sql)
    assert run.status == "interrupted"
    for read in (run.meta, run.document, run.events):
        with pytest.raises(RecordError, match="other tables than a record"):
            read()


def test_words_of_a_damaged_file_are_no_escapes(tmp_path: Path) -> None:
    """SQLite quotes what it can't read."""
    run = concluded(tmp_path, laps(3))
    path = run.path / database.FILE
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE run (", b"CREATE TABLE run \x1b"))
    with pytest.raises(RecordError, match="can't be read") as caught:
        run.meta()
    assert str(caught.value).isprintable()


def test_a_document_in_too_many_brackets_is_damaged(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(3))
    deep = '{"a":' * 100_000
    changed(run, "UPDATE run SET meta = ?, document = ?", deep, deep)
    with pytest.raises(RecordError, match="what was run is damaged"):
        run.meta()
    with pytest.raises(ValueError, match="brackets"):
        run.document()


def test_a_record_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(3))
    (run.path / database.FILE).unlink()
    os.mkfifo(run.path / database.FILE)
    with pytest.raises(RecordError, match="is not a file"):
        run.meta()


# Other releases


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(3))
    changed(run, f"PRAGMA user_version = {database.VERSION + 1}")
    for read in (run.meta, run.document, run.events):
        with pytest.raises(RecordError, match=r"run one was written by a newer teegpu \(version 2 of the record, this"):
            read()
    assert run.status == "interrupted"


def test_events_that_only_a_later_release_knows_are_named(tmp_path: Path) -> None:
    run = concluded(tmp_path, laps(3), laps(3, 3), laps(3, 6))
    payload = msgpack.packb((False, bytes([99]), [(1, 2)]))
    changed(run, "UPDATE events SET block = ? WHERE id = 2", zstandard.ZstdCompressor().compress(payload))
    told = "block 2 of the events can't be read: it holds what this release does not know"
    assert read_all(run) == ([*laps(3), *laps(3, 6)], [told])


# A folder that can't be written

AS_NOBODY = """
import os, sys
from contextlib import closing
from pathlib import Path
from teegpu.record.run import RunFolder
os.setgid(65534), os.setuid(65534)
run = RunFolder(Path(sys.argv[1]))
with closing(run.events()) as reader:
    print(run.status, len(reader.read()), reader.damage, run.meta()["note"])
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where others may go too."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write there")
@pytest.mark.parametrize("ended", [True, False])
def test_a_folder_that_can_not_be_written(scratch: Path, ended: bool) -> None:
    run = concluded(scratch / "runs", laps(30))
    if not ended:
        # As a process leaves it that was killed: with its log.
        writer = RunStore(scratch / "runs").create("two", {"note": "as it was"}, events_bytes=1 << 20)
        writer(laps(40))
        writer.end()
        shutil.copytree(writer.folder.path, run.path, dirs_exist_ok=True)
        writer.close()
    for path in (scratch, scratch / "runs", run.path, *run.path.iterdir()):
        path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, run.path], capture_output=True, text=True, check=False, timeout=60
    )
    expected = "complete 30 [] as it was\n" if ended else "interrupted 40 [] as it was\n"
    assert (done.stdout, done.stderr) == (expected, "")
