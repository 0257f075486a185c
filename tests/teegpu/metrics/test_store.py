"""The run store: what is there of a run, whatever became of it; and which of the old ones go."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from teegpu.config import load
from teegpu.errors import RecordError
from teegpu.metrics import environment, eventfile, runlock
from teegpu.metrics import events as ev
from teegpu.metrics.runfolder import write_json
from teegpu.metrics.start import Start
from teegpu.metrics.store import RunFolder, RunStore, RunWriter, open_store
from tests.teegpu.metrics.eventsamples import laps

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
RUN: list[ev.Event] = [
    ev.PhaseBegan(0, ev.PREFILL, 9, 1),
    ev.Lap(0, 4_000_000, ev.TEE, "SILU", 0, 0, 0),
    ev.Lap(4_000_000, 6_000_000, ev.SERIALIZATION, "ENCODE", 0, 0, 0),
    ev.TokensMade(6_000_000, 1),
    ev.PhaseEnded(6_000_000, ev.PREFILL, 9, 1),
]


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
    assert folder.meta()["schema"] == "teegpu.meta/1"
    writer.update_meta(server={"device": "cpu"})
    writer.sink(RUN)
    told = writer.finish({"schema": "teegpu.report/1", "id": "one", "status": "complete"})
    assert told["record"] == {"truncated": False, "failure": None, "damage": []}
    assert folder.status == "complete", "its end is known before its events are compressed"
    writer.close()
    assert folder.status == "complete"
    assert folder.document() == told
    assert folder.meta()["server"] == {"device": "cpu"}
    assert folder.meta()["status"] == "complete"
    assert sorted(os.listdir(folder.path)) == [eventfile.COMPRESSED, "lock", "meta.json", "summary.json"]
    reader = folder.events()
    assert reader.read() == RUN
    reader.close()


def test_only_its_user_can_read_a_record(store: RunStore) -> None:
    writer = create(store, "one")
    paths = [writer.folder.path, *writer.folder.path.iterdir()]
    concluded(store, "two")
    paths += [store.root, *(store.root / "two").iterdir()]
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths] == [0] * len(paths)
    writer.close()


def test_a_run_that_does_not_conclude_is_made_of_its_events(store: RunStore) -> None:
    writer = create(store, "one", note="as it was", settings={"transport": "zmq"})
    writer.sink(RUN[:4])
    writer.sink.end()
    running = writer.folder.document()
    assert running["status"] == "running"
    writer.close()
    assert writer.folder.status == "interrupted"
    document = writer.folder.document()
    assert running | {"status": "interrupted"} == document
    assert (document["id"], document["note"], document["model"]["name"]) == ("one", "as it was", "m")
    prefill = document["phases"]["prefill"]
    assert prefill["seconds"] == pytest.approx(0.006)
    assert prefill["tee_seconds"] == pytest.approx(0.004)
    assert document["record"] == {"truncated": False, "failure": None, "damage": []}
    assert "output" not in document


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_other_ends(store: RunStore, status: str) -> None:
    assert concluded(store, "one", status).status == status


def test_a_clock_that_goes_backwards_breaks_nothing(store: RunStore) -> None:
    writer = create(store, "one")
    for event in (*RUN[:3], ev.Lap(1_000_000, 2_000_000, ev.TEE, "SILU", 0, 0, 0), ev.TokensMade(500_000, 1), RUN[4]):
        writer.sink([event])
    writer.close()
    prefill = writer.folder.document()["phases"]["prefill"]
    parts = ("tee_seconds", "serialization_seconds", "wait_seconds", "other_seconds")
    assert sum(prefill[part] for part in parts) == pytest.approx(prefill["seconds"]) == pytest.approx(0.006)


def test_text_stays_out_unless_it_is_to_be_saved(store: RunStore) -> None:
    answer = {"text": "a secret", "token_ids": [1, 2], "finish_reason": "stop"}
    for run_id, output in (("one", answer), ("two", [answer, answer])):
        writer = create(store, run_id)
        told = writer.finish({"schema": "teegpu.report/1", "status": "complete", "output": output})
        writer.close()
        assert told["output"] == output
        kept = writer.folder.document()["output"]
        assert kept == ({"finish_reason": "stop"} if run_id == "one" else [{"finish_reason": "stop"}] * 2)
    writer = store.create("three", {}, events_bytes=1 << 20, save_text=True)
    writer.finish({"schema": "teegpu.report/1", "status": "complete", "output": answer})
    writer.close()
    assert writer.folder.document()["output"] == answer


def test_saved_text_of_a_run_that_was_killed(store: RunStore) -> None:
    one = create(store, "one")
    one.sink([RUN[0], ev.TextMade(1, "Once "), ev.TextMade(2, "upon")])
    one.close()
    assert one.folder.document()["output"] == {"text": "Once upon", "finish_reason": "interrupted"}
    two = create(store, "two")
    two.sink([RUN[0], ev.TextMade(1, "a"), RUN[0], ev.TextMade(2, "b")])
    two.close()
    assert [output["text"] for output in two.folder.document()["output"]] == ["a", "b"]


def test_two_runs_at_once(store: RunStore) -> None:
    one, two = create(store, "one"), create(store, "two")
    one.sink(laps(3))
    two.sink(laps(5))
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


def test_a_disk_that_is_full_at_the_end(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create(store, "one")
    writer.sink(RUN)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("teegpu.metrics.store.write_json", full)
        writer.finish({"schema": "teegpu.report/1", "status": "complete"})
    assert writer.failure == "No space left on device"
    writer.close()
    assert writer.folder.status == "interrupted"
    assert writer.folder.document()["phases"]["prefill"]["tokens"] == 9


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "meta.json", {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space"):
            write_json(tmp_path / "meta.json", {"a": 2})
    assert os.listdir(tmp_path) == ["meta.json"]
    assert json.loads((tmp_path / "meta.json").read_text()) == {"a": 1}


# Other releases, and damage


@pytest.mark.parametrize(
    ("name", "schema", "message"),
    [
        ("summary.json", "teegpu.report/2", r"run one: summary.json was written by a newer teegpu \(teegpu.report/2"),
        ("meta.json", "teegpu.meta/7", "run one: meta.json was written by a newer teegpu"),
        ("summary.json", "teegpu.report/0", "run one: summary.json is of an unknown schema .teegpu.report/0., not"),
        ("summary.json", "other/9", "unknown schema"),
        ("summary.json", None, r"unknown schema \(none\)"),
    ],
)
def test_a_record_of_another_release(store: RunStore, name: str, schema: str | None, message: str) -> None:
    writer = create(store, "one")
    writer.close()
    (writer.folder.path / name).write_text(json.dumps({"id": "one"} | ({"schema": schema} if schema else {})))
    with pytest.raises(RecordError, match=message):
        writer.folder.document()
    assert ids(store) == ["one"], "it is listed all the same"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_summary_is_made_anew(store: RunStore, content: bytes) -> None:
    writer = create(store, "one")
    writer.sink(RUN)
    writer.finish({"schema": "teegpu.report/1", "status": "complete"})
    writer.close()
    (writer.folder.path / "summary.json").write_bytes(content)
    document = writer.folder.document()
    assert document["status"] == "complete", "which meta.json knows too"
    assert document["phases"]["prefill"]["tokens"] == 9
    assert document["record"]["damage"] == ["summary.json is damaged; these figures are made of the events"]


def test_events_without_what_they_are_of(store: RunStore) -> None:
    writer = create(store, "one")
    writer.sink(RUN)
    writer.close()
    (writer.folder.path / "meta.json").write_text("{")
    document = writer.folder.document()
    assert (document["id"], document["status"]) == ("one", "interrupted")
    assert document["phases"]["prefill"]["tokens"] == 9
    assert document["record"]["damage"] == ["meta.json is not there, or damaged"]
    with pytest.raises(RecordError, match=r"run one: meta\.json is damaged"):
        writer.folder.meta()


def test_what_is_damaged_in_the_events_is_in_the_document(store: RunStore) -> None:
    writer = create(store, "one")
    for _ in range(2):
        writer.sink(RUN)
        writer.sink._round()
    writer.close()
    path = writer.folder.path / eventfile.PLAIN
    path.write_bytes(path.read_bytes()[:-3])
    document = writer.folder.document()
    assert document["phases"]["prefill"]["tokens"] == 9
    (told,) = document["record"]["damage"]
    assert "can't be read" in told
    path.unlink()
    assert writer.folder.document()["record"]["damage"] == ["there is no event file"]


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
    (runs[1].path / eventfile.COMPRESSED).write_bytes(bytes(10_000))
    assert prune(store, keep_bytes=9_000) == ["run-1"], "the older one is small enough"
    assert prune(store, keep_bytes=2 * size(runs[3]) + 10) == ["run-0"]
    (runs[3].path / eventfile.COMPRESSED).write_bytes(bytes(10_000))
    assert prune(store, keep_bytes=5_000) == ["run-2"]
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
    with pytest.raises(RecordError, match="run old can't be removed"):
        store.remove(old.folder)


def test_what_killed_processes_left_is_swept_up(store: RunStore) -> None:
    concluded(store, "one")
    left = [store.root / ".a.new", store.root / ".b.old", store.root / ".c.new", store.root / ".d.new"]
    for path in left:
        path.mkdir()
    lock = runlock.RunLock(left[2])
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


def test_a_start_has_an_id_of_its_own() -> None:
    one, two = Start.now(), Start.now()
    assert one.id != two.id
    assert datetime.fromisoformat(one.at).tzinfo is not None
    assert one.id.startswith(one.at[:10].replace("-", ""))


def test_the_environment_says_what_a_run_ran_on() -> None:
    found = environment.describe()
    assert list(found) == ["machine", "cpu", "cores", "memory_bytes", "system", "python", "torch", "teegpu"]
    assert all(found.values())
    assert os.uname().nodename not in json.dumps(found).split()
