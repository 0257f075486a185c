"""The event file: written while a run goes on, whatever the disk does; read in full, in part, live, or damaged."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teegpu.errors import RecordError
from teegpu.metrics import eventblocks, eventfile, runlock
from teegpu.metrics import events as ev
from teegpu.metrics.eventblocks import Encoder
from teegpu.metrics.eventfile import COMPRESSED, PLAIN
from teegpu.metrics.eventlog import BLOCK_EVENTS, MAX_WAITING_EVENTS, EventReader, EventWriter
from teegpu.metrics.recorder import Recorder
from tests.teegpu.metrics.eventsamples import EVERY_KIND, laps

NEVER = 3600.0


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[..., EventWriter]]:
    """``writer(max_bytes=…)`` → one whose thread sleeps; ``_round`` does its work when the test says so."""
    made: list[EventWriter] = []

    def make(**options: object) -> EventWriter:
        settings = {"max_bytes": 1 << 24, "flush_seconds": NEVER} | options
        made.append(EventWriter(tmp_path / PLAIN, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close(compress=False)


def read_all(folder: Path) -> tuple[list[ev.Event], list[str]]:
    reader = EventReader(folder)
    try:
        return reader.read(), list(reader.damage)
    finally:
        reader.close()


def written(folder: Path, *blocks: Sequence[ev.Event]) -> list[int]:
    """A plain file of these blocks; where each begins, and the end."""
    encoder = Encoder()
    data, edges = eventblocks.header(), []
    for block in blocks:
        edges.append(len(data))
        data += encoder.block(block)
    (folder / PLAIN).write_bytes(data)
    return [*edges, len(data)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)


# Writing and reading


@pytest.mark.parametrize("compress", [False, True])
def test_every_kind_of_event_comes_back(writer: Callable[..., EventWriter], tmp_path: Path, compress: bool) -> None:
    log = writer()
    log(EVERY_KIND)
    log.close(compress=compress)
    assert os.listdir(tmp_path) == [COMPRESSED if compress else PLAIN]
    assert (tmp_path / (COMPRESSED if compress else PLAIN)).stat().st_mode & 0o777 == 0o600
    events, damage = read_all(tmp_path)
    assert events == EVERY_KIND
    assert list(map(type, events)) == list(map(type, EVERY_KIND))
    assert damage == []
    assert log.failure is None
    assert not log.truncated


def test_many_events_are_many_blocks(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer()
    log(laps(BLOCK_EVENTS * 3 + 1))
    log.close(compress=False)
    assert (tmp_path / PLAIN).read_bytes().count(eventblocks.MARKER) == 4
    reader = EventReader(tmp_path)
    assert [len(reader.read(1000)), len(reader.read(1000)), len(reader.read(1000))] == [1000, 537, 0]
    reader.close()
    assert reader.read() == []


def test_text_that_is_no_unicode_is_recorded_as_far_as_it_is(
    writer: Callable[..., EventWriter], tmp_path: Path
) -> None:
    log = writer()
    log([ev.Noted(1, "a path: \udcff")])
    log.close()
    assert read_all(tmp_path) == ([ev.Noted(1, "a path: ?")], [])


def test_what_is_no_event_ends_the_recording_and_nothing_else(writer: Callable[..., EventWriter]) -> None:
    log = writer()
    log(["not an event"])
    log.end()
    assert log.failure is not None
    assert "no event" in log.failure
    log(laps(3))


def test_samples_come_from_the_writer_itself(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer()
    log.sample = lambda: ev.Sampled(1, 2, 3, 4.0)
    for _ in range(5):
        log._round()
    log.close()
    assert read_all(tmp_path)[0] == [ev.Sampled(1, 2, 3, 4.0)] * 2, "about once a second, and at the end"


# The recorder's list, while it grows


def test_what_the_recorder_holds_is_on_disk_within_moments(tmp_path: Path) -> None:
    """A run that waits long for a reply hands nothing over; a watcher sees all the same that it waits."""
    log = EventWriter(tmp_path / PLAIN, max_bytes=1 << 20, flush_seconds=0.001)
    record = Recorder(log=log)
    log.follow(lambda: record.held)
    reader = EventReader(tmp_path)
    seen: list[ev.Event] = []

    def shows(event: type[ev.Event]) -> bool:
        seen.extend(reader.read())
        return any(isinstance(one, event) for one in seen)

    record.begin(ev.DECODE)
    until(lambda: shows(ev.PhaseBegan))
    record.lap(ev.SERIALIZATION, "SEND", 1, 0, 1)
    until(lambda: shows(ev.Lap))
    record.end(0, 0)
    log.close()
    seen += reader.read()
    assert [type(event).__name__ for event in seen] == ["PhaseBegan", "Lap", "Lap", "PhaseEnded"]
    assert read_all(tmp_path)[0] == seen


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(["add", "add", "round", "flush", "interrupt"]), max_size=40))
def test_no_event_is_lost_or_written_twice(steps: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = EventWriter(folder / PLAIN, max_bytes=1 << 20, flush_seconds=NEVER)
    interrupt = False

    def other_sink(_: Sequence[ev.Event]) -> None:
        if interrupt:
            raise KeyboardInterrupt

    def log_and_perhaps_not_return(events: Sequence[ev.Event]) -> None:
        log(events)
        other_sink(events)

    record = Recorder(log=log_and_perhaps_not_return, batch=4)
    log.follow(lambda: record.held)
    added: list[ev.Event] = []
    for step in steps:
        if step == "add":
            added += laps(1, len(added))
            record.remark(added[-1])
        elif step == "round":
            log._round()
        else:
            interrupt = step == "interrupt"
            try:
                record.flush()
            except KeyboardInterrupt:
                assert interrupt
            interrupt = False
    record.flush()
    log.close(compress=False)
    assert read_all(folder) == (added, [])


# A disk that is full or slow


class FullDisk:
    """Takes ``room`` bytes and no more; what is left of a write goes to the disk, as it does on a real one."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, file: int, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(file, data[: self.room])
        self.room -= count
        return count


def test_a_full_disk_ends_the_recording(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer(write=FullDisk(16 + 300))
    log(laps(10))
    log._round()
    assert log.failure is None
    log(laps(10, 10))
    log._round()
    assert log.failure == "No space left on device"
    log(laps(10, 20))
    log.close()
    assert read_all(tmp_path) == (laps(10), []), "what was whole, and no half a block"


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        EventWriter(tmp_path / PLAIN, max_bytes=100, write=FullDisk(3))


def test_a_file_that_can_not_be_compressed_stays_as_it_is(
    writer: Callable[..., EventWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = writer()
    log(laps(10))

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", no_space)
    log.close()
    assert os.listdir(tmp_path) == [PLAIN]
    assert read_all(tmp_path) == (laps(10), [])


def test_a_file_keeps_to_its_size(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer(max_bytes=40_000)
    tokens: list[ev.Event] = []
    for number in range(40):
        tokens.append(ev.TokensMade(number, 1))
        log([*laps(100, number * 100), tokens[-1]])
        log._round()
    assert log.truncated
    log.close(compress=False)
    size = (tmp_path / PLAIN).stat().st_size
    assert 35_000 < size <= 40_000
    reader = EventReader(tmp_path)
    events = reader.read()
    assert reader.truncated
    assert reader.damage == []
    reader.close()
    kept = [event for event in events if isinstance(event, ev.Lap)]
    assert kept == laps(len(kept))
    assert [event for event in events if isinstance(event, ev.TokensMade)] == tokens, "which are few"


def test_a_file_is_never_larger_even_of_what_is_little(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer(max_bytes=2_000)
    for number in range(1000):
        log([ev.TokensMade(number, 1)])
        log._round()
    log.close(compress=False)
    assert 1_500 < (tmp_path / PLAIN).stat().st_size <= 2_000


def test_a_disk_that_is_too_slow_costs_detail_and_not_memory(
    writer: Callable[..., EventWriter], tmp_path: Path
) -> None:
    stuck, go = threading.Event(), threading.Event()

    def slow(file: int, data: memoryview) -> int:
        stuck.set()
        assert go.wait(20)
        return os.write(file, data)

    go.set()
    log = writer(write=slow, flush_seconds=0.001)
    go.clear()
    stuck.clear()
    log(laps(10))
    assert stuck.wait(20)
    count, size = 0, 1000
    while not log.truncated:
        log([*laps(size - 1, count * size), ev.TokensMade(count, 1)])
        count += 1
    assert count * size > MAX_WAITING_EVENTS - 2 * size
    for number in range(count, count + 50):
        log([*laps(size - 1, number * size), ev.TokensMade(number, 1)])
    held = sum(event is not None for _, batch in log._batches for event in batch)
    assert held < MAX_WAITING_EVENTS + size
    go.set()
    log.close(compress=False)
    reader = EventReader(tmp_path)
    tokens = [event for event in reader.read() if isinstance(event, ev.TokensMade)]
    assert tokens == [ev.TokensMade(number, 1) for number in range(count + 50)]
    assert reader.truncated
    reader.close()


# Damage


def test_a_torn_end_is_named_at_every_byte(tmp_path: Path) -> None:
    edges = written(tmp_path, laps(3), laps(3, 3), EVERY_KIND)
    whole = (tmp_path / PLAIN).read_bytes()
    for end in range(edges[2] + 1, edges[3]):
        (tmp_path / PLAIN).write_bytes(whole[:end])
        events, damage = read_all(tmp_path)
        assert events == laps(6)
        assert damage == [f"{end - edges[2]:,} bytes from byte {edges[2]:,} on can't be read"]
    (tmp_path / PLAIN).write_bytes(whole[: edges[2]])
    assert read_all(tmp_path) == (laps(6), [])


def test_a_torn_end_is_waited_for_while_the_run_lives(tmp_path: Path) -> None:
    edges = written(tmp_path, laps(3), EVERY_KIND)
    whole = (tmp_path / PLAIN).read_bytes()
    lock = runlock.RunLock(tmp_path)
    for end in range(edges[1] + 1, edges[2]):
        (tmp_path / PLAIN).write_bytes(whole[:end])
        reader = EventReader(tmp_path)
        assert reader.read() == laps(3)
        assert reader.read() == reader.damage == []
        with (tmp_path / PLAIN).open("ab") as file:
            file.write(whole[end:])
        assert reader.read() == EVERY_KIND
        assert reader.damage == []
        reader.close()
    lock.close()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_costs_one_block(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    blocks = [laps(4), EVERY_KIND, laps(2, 4), laps(5, 6)]
    edges = written(folder, *blocks)
    content = bytearray((folder / PLAIN).read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / PLAIN).write_bytes(content)
    events, damage = read_all(folder)
    hit = [start <= bit // 8 < end for start, end in pairwise(edges)]
    assert events == [event for block, lost in zip(blocks, hit, strict=True) if not lost for event in block]
    assert len(damage) == 1
    assert "can't be read" in damage[0]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_happens_to_a_file_it_is_read_without_a_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "spoiled"
    folder.mkdir(exist_ok=True)
    written(folder, laps(20), EVERY_KIND, laps(20, 20))
    content = bytearray((folder / PLAIN).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 200)))
        content[start:end] = data.draw(st.binary(max_size=60) | st.just(eventblocks.MARKER * 3))
    (folder / PLAIN).write_bytes(content)
    events, _ = read_all(folder)
    known = [*laps(40), *EVERY_KIND]
    assert all(event in known for event in events)


def test_damage_in_the_middle_does_not_hold_a_watcher_up(tmp_path: Path) -> None:
    """A length that was damaged says that more is to come: what comes is then of the blocks behind it."""
    edges = written(tmp_path, laps(3), laps(3, 3), laps(3, 6))
    content = bytearray((tmp_path / PLAIN).read_bytes())
    content[edges[0] + 10] ^= 0x40  # the length: 4 MiB more
    (tmp_path / PLAIN).write_bytes(content)
    lock = runlock.RunLock(tmp_path)
    reader = EventReader(tmp_path)
    assert reader.read() == laps(6, 3)
    assert len(reader.damage) == 1
    reader.close()
    lock.close()


def test_events_that_only_a_later_release_knows_are_named(tmp_path: Path) -> None:
    import zlib

    import msgpack

    payload = msgpack.packb((bytes([99]), [(1, 2)]))
    checked = len(payload).to_bytes(8, "big")[::-1][:4]
    checked = bytes(4) + checked
    block = eventblocks.MARKER + checked + zlib.crc32(payload, zlib.crc32(checked)).to_bytes(4, "little") + payload
    (tmp_path / PLAIN).write_bytes(eventblocks.header() + block + Encoder().block(laps(2)))
    events, damage = read_all(tmp_path)
    assert events == laps(2)
    assert damage == [f"a block before byte {16 + len(block)} holds what this release does not know"]


def newer_header() -> bytes:
    import zlib

    start = eventblocks.MAGIC + (eventblocks.VERSION + 1).to_bytes(4, "little")
    return start + zlib.crc32(start).to_bytes(4, "little")


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / PLAIN).write_bytes(newer_header() + Encoder().block(laps(3)))
    with pytest.raises(RecordError, match=r"written by a newer teegpu \(version 2 of the format, this one reads 1\)"):
        EventReader(tmp_path)
    eventfile.compress(tmp_path)
    with pytest.raises(RecordError, match="newer teegpu"):
        EventReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"# a file of somebody else's, longer than any header\n"])
def test_what_is_no_event_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PLAIN).write_bytes(content)
    events, damage = read_all(tmp_path)
    assert events == []
    assert len(damage) == bool(content)


def test_no_event_file_at_all(tmp_path: Path) -> None:
    assert read_all(tmp_path) == ([], ["there is no event file"])
    (tmp_path / PLAIN).mkdir()
    with pytest.raises(RecordError, match="can't be read"):
        read_all(tmp_path)


# Compressed


def test_who_reads_along_goes_on_across_the_compression(writer: Callable[..., EventWriter], tmp_path: Path) -> None:
    log = writer()
    log(laps(10))
    log._round()
    early, late = EventReader(tmp_path), EventReader(tmp_path)
    assert early.read() == laps(10)
    log(laps(10, 10))
    log.close()
    assert early.read() == laps(10, 10)
    assert late.read(15) == laps(15)
    assert late.read() == laps(5, 15)
    assert early.read() == late.read() == early.damage == late.damage == []
    early.close()
    late.close()
    assert os.listdir(tmp_path) == [COMPRESSED]


def test_a_damaged_frame_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventfile, "_FRAME_BYTES", 2000)
    written(tmp_path, *(laps(20, number * 20) for number in range(30)))
    eventfile.compress(tmp_path)
    content = (tmp_path / COMPRESSED).read_bytes()
    frames = content.count(b"\x28\xb5\x2f\xfd")
    assert frames > 5
    for place in range(0, len(content), 37):
        (tmp_path / COMPRESSED).write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        events, damage = read_all(tmp_path)
        assert damage or events == laps(600), place
        assert len(events) >= 600 * (frames - 3) / frames, place
        assert set(events) <= set(laps(600))


def test_a_compressed_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    written(tmp_path, *(laps(20, number * 20) for number in range(30)))
    eventfile.compress(tmp_path)
    content = (tmp_path / COMPRESSED).read_bytes()
    for end in (0, 3, 12, len(content) // 2, len(content) - 1):
        (tmp_path / COMPRESSED).write_bytes(content[:end])
        events, damage = read_all(tmp_path)
        assert events == laps(len(events))
        assert bool(damage) == bool(end)
