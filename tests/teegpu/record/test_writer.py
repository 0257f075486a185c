"""Writing a record while a run goes on, whatever the disk does, and however the process ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teegpu.files import Lock
from teegpu.record import database
from teegpu.record import events as ev
from teegpu.record.recorder import Recorder
from teegpu.record.run import LOCK, RunFolder
from teegpu.record.store import RunStore
from teegpu.record.writer import BLOCK_EVENTS, MAX_WAITING_EVENTS, RunWriter
from tests.teegpu.record.eventsamples import EVERY_KIND, laps

NEVER = 3600.0


def begun(folder: Path, *, max_bytes: int = 1 << 24, flush_seconds: float = NEVER) -> RunWriter:
    """A record in ``folder`` whose thread sleeps: ``_round`` does its work when the test says so."""
    database.create(folder, {})
    return RunWriter(RunFolder(folder), Lock(folder / LOCK), {}, max_bytes=max_bytes, flush_seconds=flush_seconds)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[..., RunWriter]]:
    made: list[RunWriter] = []

    def make(**options: float) -> RunWriter:
        made.append(begun(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def read_all(folder: Path) -> tuple[list[ev.Event], list[str]]:
    reader = RunFolder(folder).events()
    try:
        return reader.read(), list(reader.damage)
    finally:
        reader.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)


# Writing and reading


def test_every_kind_of_event_comes_back(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer()
    log(EVERY_KIND)
    log.close()
    log.close()
    assert sorted(os.listdir(tmp_path)) == ["lock", "run.sqlite"]
    events, damage = read_all(tmp_path)
    assert events == EVERY_KIND
    assert list(map(type, events)) == list(map(type, EVERY_KIND))
    assert damage == []
    assert log.failure is None
    assert not log.truncated


def test_many_events_are_many_blocks(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer()
    log(laps(BLOCK_EVENTS * 3 + 1))
    log.finish({})
    assert RunFolder(tmp_path).row("blocks") == (4,)
    reader = RunFolder(tmp_path).events()
    assert [len(reader.read(1000)), len(reader.read(1000)), len(reader.read(1000))] == [1000, 537, 0]
    reader.close()
    assert reader.read() == []


def test_text_that_is_no_unicode_is_recorded_as_far_as_it_is(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer()
    log([ev.Noted(1, "a path: \udcff")])
    log.update_meta(note="a path: \udcff")
    log.finish({"note": "\udcff"})
    assert read_all(tmp_path) == ([ev.Noted(1, "a path: ?")], [])
    assert RunFolder(tmp_path).meta()["note"] == "a path: \udcff"
    assert log.failure is None


def test_what_is_no_event_ends_the_recording_and_nothing_else(writer: Callable[..., RunWriter]) -> None:
    log = writer()
    log(["not an event"])
    log.end()
    assert log.failure is not None
    assert "no event" in log.failure
    log(laps(3))


def test_samples_come_from_the_writer_itself(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer()
    log.sample = lambda: ev.Sampled(1, 2, 3, 4.0)
    for _ in range(5):
        log._round()
    log.close()
    assert read_all(tmp_path)[0] == [ev.Sampled(1, 2, 3, 4.0)] * 2, "about once a second, and at the end"


# The recorder's list, while it grows


def test_what_the_recorder_holds_is_on_disk_within_moments(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    """A run that waits long for a reply hands nothing over; watchers see all the same that it waits."""
    log = writer(flush_seconds=0.001)
    record = Recorder(log=log)
    log.follow(lambda: record.held)
    readers = [RunFolder(tmp_path).events() for _ in range(3)]
    seen: list[list[ev.Event]] = [[] for _ in readers]

    def all_show(event: type[ev.Event]) -> bool:
        for reader, events in zip(readers, seen, strict=True):
            events.extend(reader.read())
        return all(any(isinstance(one, event) for one in events) for events in seen)

    record.begin(ev.DECODE)
    until(lambda: all_show(ev.PhaseBegan))
    record.lap(ev.SERIALIZATION, "SEND", 1, 0, 1)
    until(lambda: all_show(ev.Lap))
    record.end(0, 0)
    log.close()
    until(lambda: all_show(ev.PhaseEnded))
    for reader in readers:
        reader.close()
    assert [type(event).__name__ for event in seen[0]] == ["PhaseBegan", "Lap", "Lap", "PhaseEnded"]
    assert seen == [read_all(tmp_path)[0]] * 3


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(["add", "add", "round", "flush", "interrupt"]), max_size=40))
def test_no_event_is_lost_or_written_twice(steps: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = begun(folder)
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
    log.close()
    assert read_all(folder) == (added, [])


# A process that is killed

RECORDING = """
import os, sys, time
from pathlib import Path
from teegpu.record import events as ev
from teegpu.record.recorder import Recorder
from teegpu.record.store import RunStore

def record(root):
    log = RunStore(Path(root)).create("one", {"note": "as it was"}, events_bytes=1 << 26)
    log._flush_seconds = 0.002
    recorder = Recorder(log=log, batch=70)
    log.follow(lambda: recorder.held)
    recorder.begin(ev.DECODE)
    for number in range(10_000_000):
        recorder.add(ev.Lap(number, number + 1, ev.TEE, "SILU", number % 30, 0, 0))
        if number % 10 == 0:
            time.sleep(0.001)

for root in sys.argv[1:]:
    process = os.fork()
    if not process:
        record(root)
        os._exit(1)
    print(process, flush=True)
    os.waitpid(process, 0)
"""


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Iterator[tuple[int, Path]]]:
    """(process, root) of one process after the other that records as quickly as it can."""
    roots = [tmp_path / str(number) for number in range(12)]
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDING, *roots], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    yield ((int(line), root) for root, line in zip(roots, process.stdout, strict=False))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


def test_a_killed_process_leaves_all_that_happened_before(recording: Iterator[tuple[int, Path]]) -> None:
    """At whatever moment: in the middle of a transaction, of emptying the log, between two."""
    count = 0
    for number, (process, root) in enumerate(recording):
        store = RunStore(root)
        until(lambda store=store: bool(store.all()))  # type: ignore[misc]
        (run,) = store.all()
        reader = run.events()
        seen: list[ev.Event] = []
        deadline = time.monotonic() + random.uniform(0.0, 0.05 * number)
        while time.monotonic() < deadline:
            seen += reader.read()
            time.sleep(0.001)
        assert run.status == "running"
        os.kill(process, signal.SIGKILL)
        until(lambda run=run: run.status == "interrupted")  # type: ignore[misc]
        reader.close()
        assert run.meta()["note"] == "as it was"
        events, damage = read_all(run.path)
        assert damage == []
        assert events[: len(seen)] == seen, "what was there once"
        kept = [event.start_ns for event in events if isinstance(event, ev.Lap)]
        assert kept == list(range(len(kept))), "all of them up to the last, each once"
        assert read_all(run.path) == (events, []), "reading it changes nothing"
        count += 1
    assert count == 12


# A disk that is full or slow

FULL = """
import resource, sys, time
from pathlib import Path
from teegpu.record import events as ev
from teegpu.record.store import RunStore
log = RunStore(Path(sys.argv[1])).create("one", {}, events_bytes=1 << 26)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
number = 0
while log.failure is None:
    log([ev.Lap(at, at + at * at % 1001, ev.TEE, "SILU", at % 30, 0, at % 77) for at in range(number, number + 2000)])
    number += 2000
    log._flush_seconds = 0.001
    while log.waiting_events > 20_000 and log.failure is None:
        time.sleep(0.001)  # what is left out for the writer's sake is another test's
log(["what comes now is left"])
log.finish({"status": "complete"})
log.close()
print(log.failure)
"""


@pytest.mark.parametrize("room", [60_000, 200_001, 1_000_000])
def test_a_full_disk_ends_the_recording_and_nothing_else(room: int, tmp_path: Path) -> None:
    """No file may grow beyond ``room``, as the kernel sees to."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, str(room)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ("disk I/O error", "database or disk is full")
    (run,) = RunStore(tmp_path).all()
    assert run.status in ("complete", "interrupted"), "as far as there was room for how it ended"
    events, damage = read_all(run.path)
    assert damage == []
    assert [event.start_ns for event in events if isinstance(event, ev.Lap)] == list(range(len(events)))


def test_a_record_that_is_as_large_as_it_may_get(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer(max_bytes=400_000)
    tokens: list[ev.Event] = []
    for number in range(400):
        tokens.append(ev.TokensMade(number, 1))
        log([*noise(100, number * 100), tokens[-1]])
        log._round()
    assert log.truncated
    log.close()
    assert 370_000 < (tmp_path / database.FILE).stat().st_size <= 400_000
    reader = RunFolder(tmp_path).events()
    events = reader.read()
    assert reader.truncated
    assert reader.damage == []
    reader.close()
    kept = [event for event in events if isinstance(event, ev.Lap)]
    assert [lap.layer for lap in kept] == list(range(len(kept)))
    assert [event for event in events if isinstance(event, ev.TokensMade)] == tokens, "which are few"


def noise(count: int, start: int) -> list[ev.Event]:
    """Laps that zstd makes little smaller."""
    return [ev.Lap(random.getrandbits(60), random.getrandbits(60), ev.TEE, "SILU", start + number, 0, 0)
            for number in range(count)]  # fmt: skip


def test_it_is_never_larger_even_of_what_is_little(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer(max_bytes=60_000)
    for number in range(1500):
        log([ev.TokensMade(number, 1)])
        log._round()
    log.close()
    assert 40_000 < (tmp_path / database.FILE).stat().st_size <= 60_000
    assert log.truncated


def test_a_record_that_rolls_has_the_latest(tmp_path: Path) -> None:
    """As large as it may get, and what is missing is no damage, also for who reads along."""
    store = RunStore(tmp_path)
    writer = store.create("one", {}, events_bytes=1 << 17, rolls=True)
    writer.end()
    with contextlib.closing(writer.folder.events()) as early, contextlib.closing(writer.folder.events()) as behind:
        count = 0
        behind.read(1)
        for _ in range(120):
            writer([ev.Noted(number, os.urandom(8).hex()) for number in range(count, count + 512)])
            count += 512
            writer._round()
            if count < 40_000:
                early.read()
        writer.finish({"status": "complete"})
        writer.close()
        assert sum(file.stat().st_size for file in writer.folder.path.glob("run.sqlite*")) <= 1.3 * (1 << 17)
        for reader in (early, behind, writer.folder.events()):
            events = reader.read()
            assert [event.at_ns for event in events if isinstance(event, ev.Noted)][-1] == count - 1
            assert (reader.damage, reader.truncated) == ([], True)
            reader.close()


def test_a_disk_that_is_too_slow_costs_detail_and_not_memory(writer: Callable[..., RunWriter], tmp_path: Path) -> None:
    log = writer(flush_seconds=0.001)
    other = sqlite3.connect(tmp_path / database.FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # nobody else can write until it ends
    log(laps(10))
    until(lambda: not log._batches)
    count, size = 0, 1000
    while not log.truncated and log.failure is None:
        log([*laps(size - 1, count * size), ev.TokensMade(count, 1)])
        count += 1
    assert count * size > MAX_WAITING_EVENTS - 2 * size
    for number in range(count, count + 50):
        log([*laps(size - 1, number * size), ev.TokensMade(number, 1)])
    held = sum(event is not None for _, batch in log._batches for event in batch)
    assert held < MAX_WAITING_EVENTS + size
    other.execute("ROLLBACK")
    other.close()
    log.close()
    reader = RunFolder(tmp_path).events()
    tokens = [event for event in reader.read() if isinstance(event, ev.TokensMade)]
    assert tokens == [ev.TokensMade(number, 1) for number in range(count + 50)]
    assert reader.truncated
    reader.close()
    assert log.failure is None
