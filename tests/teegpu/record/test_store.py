"""The run store: what is there of a run, whatever became of it; and which of the old ones go."""

from __future__ import annotations

import errno
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from teegpu.config import load
from teegpu.errors import RecordError
from teegpu.files import Lock
from teegpu.record.run import LOCK, RunFolder
from teegpu.record.store import RunStore, open_store
from teegpu.record.writer import RunWriter
from tests.teegpu.record.eventsamples import RUN, laps

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "state" / "runs")


def create(store: RunStore, run_id: str, *, age_days: float = 0.0, **meta: Any) -> RunWriter:
    started = (NOW - timedelta(days=age_days)).isoformat()
    return store.create(run_id, {"started_at": started, "model": {"name": "m"}} | meta, events_bytes=1 << 20)


def concluded(store: RunStore, run_id: str, status: str = "complete", *, age_days: float = 0.0) -> RunFolder:
    writer = create(store, run_id, age_days=age_days)
    writer.finish({"schema": "teegpu.report/1", "id": run_id, "status": status})
    writer.close()
    return writer.folder


def ids(store: RunStore) -> list[str]:
    return [run.id for run in store.all()]


def size(run: RunFolder) -> int:
    return sum(path.stat().st_size for path in run.path.iterdir())


# The way of a run


def test_a_run_that_ends_well(store: RunStore) -> None:
    writer = create(store, "one")
    folder = writer.folder
    assert folder.status == "running"
    assert folder.meta()["id"] == "one"
    assert folder.document() is None
    writer.update_meta(server={"device": "cpu"})
    writer(RUN)
    told = writer.finish({"schema": "teegpu.report/1", "id": "one", "status": "complete"})
    assert told["record"] == {"truncated": False, "failure": None, "damage": []}
    assert folder.status == "complete", "its end is known before its files are one"
    writer.close()
    assert folder.status == "complete"
    assert folder.document() == told
    assert folder.meta()["server"] == {"device": "cpu"}
    assert sorted(os.listdir(folder.path)) == ["lock", "run.sqlite"]
    reader = folder.events()
    assert reader.read() == RUN
    reader.close()


def test_only_its_user_can_read_a_record(store: RunStore) -> None:
    writer = create(store, "one")
    writer(RUN)
    writer.end()
    paths = [writer.folder.path, *writer.folder.path.iterdir()]
    assert len(paths) == 5, "the log and its index are there while it goes on"
    concluded(store, "two")
    paths += [store.root, *(store.root / "two").iterdir()]
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths] == [0] * len(paths)
    writer.close()


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_other_ends(store: RunStore, status: str) -> None:
    assert concluded(store, "one", status).status == status


def test_text_stays_out_unless_it_is_to_be_saved(store: RunStore) -> None:
    answer = {"text": "a secret", "token_ids": [1, 2], "finish_reason": "stop"}
    for run_id, outputs in (("one", [answer]), ("two", [answer, answer]), ("none", [])):
        writer = create(store, run_id)
        told = writer.finish({"schema": "teegpu.report/1", "status": "complete", "outputs": outputs})
        writer.close()
        assert told["outputs"] == outputs
        assert writer.folder.document()["outputs"] == [{"finish_reason": "stop"}] * len(outputs)
    writer = store.create("three", {}, events_bytes=1 << 20, save_text=True)
    writer.finish({"schema": "teegpu.report/1", "status": "complete", "outputs": [answer]})
    writer.close()
    assert writer.folder.document()["outputs"] == [answer]


def test_two_runs_at_once(store: RunStore) -> None:
    one, two = create(store, "one"), create(store, "two")
    one(laps(3))
    two(laps(5))
    assert [run.status for run in store.all()] == ["running", "running"]
    one.finish({"schema": "teegpu.report/1", "status": "complete"})
    one.close()
    assert [run.status for run in store.all()] == ["running", "complete"]
    two.close()
    for writer, count in ((one, 3), (two, 5)):
        reader = writer.folder.events()
        assert len(reader.read()) == count
        reader.close()


def test_an_id_that_is_there_already(store: RunStore) -> None:
    concluded(store, "one")
    with pytest.raises(RecordError, match="no record can be kept in"):
        create(store, "one")
    assert os.listdir(store.root) == ["one"]


def test_a_place_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"no record can be kept in .*/file/runs: Not a directory"):
        create(RunStore(tmp_path / "file" / "runs"), "one")


def test_a_record_of_an_older_release_is_listed_and_can_be_removed(store: RunStore) -> None:
    concluded(store, "new")
    (store.root / "old").mkdir()
    (store.root / "old" / "meta.json").write_text("{}")
    old = store.find("old")
    assert ids(store) == ["new", "old"]
    assert old.status == "interrupted"
    for read in (old.meta, old.document, old.events):
        with pytest.raises(RecordError, match=r"run old was recorded by an older teegpu, .* teegpu report rm old"):
            read()
    store.remove(old)
    assert ids(store) == ["new"]


def test_a_record_that_can_not_be_looked_at_hides_no_others(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("mine", "roots"):
        concluded(store, run_id)
    stat_of = Path.stat

    def stat(path: Path, **how: bool) -> os.stat_result:
        if path.parent.name == "roots":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat_of(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    assert set(ids(store)) == {"mine", "roots"}
    with pytest.raises(RecordError, match=r"run roots: run\.sqlite can't be read: Permission denied"):
        store.find("roots").meta()


def test_what_is_no_run_is_not_listed(store: RunStore) -> None:
    concluded(store, "one")
    (store.root / "empty").mkdir()
    (store.root / "file").write_text("")
    (store.root / ".hidden").mkdir()
    assert ids(store) == ["one"]


# Finding


def test_finding(store: RunStore) -> None:
    for run_id in ("20260101-100000-aaaaaa", "20260101-110000-bbbbbb", "20260102-100000-cccccc"):
        concluded(store, run_id)
    assert store.find("last").id == "20260102-100000-cccccc"
    assert store.find("20260101-11").id == "20260101-110000-bbbbbb"
    assert store.find("20260101-100000-aaaaaa").id == "20260101-100000-aaaaaa"
    with pytest.raises(RecordError, match="'20260101' is the beginning of 2 runs: 20260101-110000-bbbbbb, 2026"):
        store.find("20260101")
    with pytest.raises(RecordError, match="there is no run '20260102-100000-ccccc1', did you mean '20260102-1000"):
        store.find("20260102-100000-ccccc1")
    for nonsense in ("", "../20260102-100000-cccccc", "zzz"):
        with pytest.raises(RecordError, match="there is no run"):
            store.find(nonsense)


def test_a_start_that_came_to_nothing_is_not_the_last_run(store: RunStore) -> None:
    first = concluded(store, "20260101-100000-aaaaaa", "failed")
    assert store.find("last").id == first.id  # there is no other
    began = create(store, "20260101-110000-bbbbbb")
    began.finish({"status": "failed", "phases": {"prefill": {"seconds": 0.0, "rpc_calls": 3}}})
    began.close()
    for name, status in (("20260101-120000-cccccc", "failed"), ("20260101-130000-dddddd", "interrupted")):
        refused = create(store, name)
        refused.finish({"status": status, "phases": {"prefill": {"seconds": 0.0, "busy": {"gpu_seconds": 0.0}}}})
        refused.close()
    assert store.find("last").id == began.folder.id
    assert store.find("20260101-12").id == "20260101-120000-cccccc"
    create(store, "20260101-140000-eeeeee").close()
    assert store.find("last").id == "20260101-140000-eeeeee", "it was killed, perhaps in the middle of its work"


def test_an_empty_store(store: RunStore) -> None:
    assert store.all() == []
    with pytest.raises(RecordError, match=r"there is no record of a run in .*: 'teegpu run' makes one"):
        store.find("last")
    assert store.prune(keep_runs=1, keep_bytes=1, keep_days=1, now=NOW) == []


def test_the_last_run_is_the_last_whatever_the_clock_said(store: RunStore) -> None:
    concluded(store, "20300101-000000-aaaaaa", age_days=-1000)
    concluded(store, "20260101-000000-bbbbbb")
    concluded(store, "20260101-000000-aaaaaa", age_days=5)
    assert ids(store) == ["20260101-000000-aaaaaa", "20260101-000000-bbbbbb", "20300101-000000-aaaaaa"]
    assert store.find("last").id == "20260101-000000-aaaaaa"


# Pruning


def prune(store: RunStore, **bounds: float) -> list[str]:
    limits: dict[str, Any] = {"keep_runs": 100, "keep_bytes": 1 << 30, "keep_days": 100} | bounds
    return store.prune(**limits, now=NOW)


def test_pruning_by_number(store: RunStore) -> None:
    for number in range(5):
        concluded(store, f"run-{number}")
    assert prune(store, keep_runs=2) == ["run-2", "run-1", "run-0"]
    assert ids(store) == ["run-4", "run-3"]
    assert sorted(os.listdir(store.root)) == ["run-3", "run-4"]
    assert prune(store, keep_runs=2) == []


def test_pruning_by_age(store: RunStore) -> None:
    for number, age in enumerate((40, 20, -300, 5)):
        concluded(store, f"run-{number}", age_days=age)
    assert prune(store, keep_days=30) == ["run-0"]
    assert prune(store, keep_days=1) == ["run-1"]
    assert ids(store) == ["run-3", "run-2"], "the newest stays, and what is of the future is not old"


def test_pruning_by_size(store: RunStore) -> None:
    runs = [concluded(store, f"run-{number}") for number in range(4)]
    (runs[1].path / "more").write_bytes(bytes(100_000))
    assert prune(store, keep_bytes=90_000) == ["run-1"], "the older one is small enough"
    assert prune(store, keep_bytes=2 * size(runs[3]) + 10) == ["run-0"]
    (runs[3].path / "more").write_bytes(bytes(100_000))
    assert prune(store, keep_bytes=50_000) == ["run-2"]
    assert ids(store) == ["run-3"], "never the last one"


def test_a_run_under_way_is_never_pruned_nor_removed(store: RunStore) -> None:
    old = create(store, "old", age_days=500)
    concluded(store, "middle", age_days=400)
    concluded(store, "new")
    assert prune(store, keep_runs=1, keep_days=1, keep_bytes=1) == ["middle"]
    with pytest.raises(RecordError, match="run old is under way"):
        store.remove(old.folder)
    assert old.folder.status == "running"
    old.close()
    store.remove(old.folder)
    assert ids(store) == ["new"]


def test_what_can_not_be_removed_is_told(store: RunStore) -> None:
    run = concluded(store, "one")
    (store.root / ".one.old" / "in the way").mkdir(parents=True)
    with pytest.raises(RecordError, match="run one can't be removed"):
        store.remove(run)
    assert ids(store) == ["one"]


def test_two_who_remove_the_same_record_have_both_removed_it(store: RunStore) -> None:
    run = concluded(store, "one")
    with ThreadPoolExecutor(1) as pool, Lock(run.path / LOCK):  # as another holds it who removes it, or looks
        removal = pool.submit(store.remove, run)
        time.sleep(0.05)
        run.path.rename(store.root / ".one.old")
    removal.result()
    store.remove(run)
    assert ids(store) == []


def test_pruning_while_one_is_written_and_another_is_read(store: RunStore) -> None:
    read = concluded(store, "read")
    reader = read.events()
    writer = create(store, "written")
    writer(laps(10))
    concluded(store, "new")
    assert prune(store, keep_runs=1) == ["read"]
    assert ids(store) == ["new", "written"]
    writer(laps(10, 10))
    writer.finish({"status": "complete"})
    writer.close()
    assert writer.failure is None
    assert (reader.read(), reader.damage) == ([], [])
    reader.close()


def test_what_killed_processes_left_is_swept_up(store: RunStore) -> None:
    concluded(store, "one")
    left = [store.root / ".a.new", store.root / ".b.old", store.root / ".c.new", store.root / ".d.new"]
    for path in left:
        path.mkdir()
    lock = Lock(left[2] / LOCK)
    long_ago = NOW.timestamp() - 7200
    for path in left[:3]:
        os.utime(path, (long_ago, long_ago))
    os.utime(left[3], (NOW.timestamp(), NOW.timestamp()))
    prune(store)
    assert sorted(os.listdir(store.root)) == [".c.new", ".d.new", "one"]
    lock.close()


# Where it is


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert open_store(load({}, folder=tmp_path)).root == tmp_path / "state" / "teegpu" / "runs"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store(load({}, folder=tmp_path)).root == tmp_path / ".local" / "state" / "teegpu" / "runs"
    assert open_store(load({"record.dir": "~/mine"}, folder=tmp_path)).root == tmp_path / "mine"
