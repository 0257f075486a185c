"""``teegpu report``: a run through the command line in every format, and records of all kinds."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teegpu.record.store import RunStore
from teegpu.record.writer import RunWriter
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import Outcome, ServerFor, Teegpu
from tests.teegpu.report import samples
from tests.teegpu.report.chrometrace import problems
from tests.teegpu.report.test_page import read
from tests.teegpu.report.test_trace import assert_nested

ID = "20260102-030405-abcdef"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("TEEGPU_RECORD_DIR", str(tmp_path / "runs"))
    return RunStore(tmp_path / "runs")


@contextlib.contextmanager
def begun(store: RunStore, run_id: str, **changes: Any) -> Iterator[RunWriter]:
    """A run that is going on."""
    made = samples.document(**changes)
    meta = {name: made[name] for name in ("started_at", "model", "settings", "tee", "server", "note", "environment")}
    writer = store.create(run_id, meta, events_bytes=2**20)
    try:
        writer(samples.events())
        yield writer
    finally:
        writer.close()


def put(store: RunStore, run_id: str = ID, **changes: Any) -> None:
    """A run that is complete."""
    with begun(store, run_id, **changes) as writer:
        writer.finish(samples.document(id=run_id, **changes))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal as standard input; → the end that a user types at."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield ours
    os.close(ours)


# One run, as it is


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded") / "runs"


@pytest.fixture
def real(
    teegpu: Teegpu, tiny_model: TinyModel, server_for: ServerFor, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> RunStore:
    """The store with one run of the tiny model in it."""
    monkeypatch.setenv("TEEGPU_RECORD_DIR", str(recorded))
    store = RunStore(recorded)
    if not store.all():
        model = tiny_model("llama", vocab_size=1000)
        done = teegpu("run", "--model", model.path, "--endpoint", server_for(model).address, "--threads", 1,
                      "--max-tokens", 5, "--ignore-eos", "--chunk-tokens", 8, "A prompt of some chunks")  # fmt: skip
        assert done.code == 0, done.err
        assert done.err.splitlines()[-1] == "details: teegpu report last"
    return store


def test_a_real_run_as_a_table(real: RunStore, teegpu: Teegpu) -> None:
    done = teegpu("report", "last")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"run {real.all()[0].id} · ")
    assert done.out.count("TOTAL") == 2
    assert done.out.count("100.0%") == 2
    assert "\x1b" not in done.out


def test_the_three_lines_alone(real: RunStore, teegpu: Teegpu) -> None:
    whole, brief = teegpu("report", "last").out, teegpu("report", "last", "--brief").out
    assert whole.startswith(brief.rstrip("\n"))
    labels = [line.partition("  ")[0] for line in brief.splitlines()]  # a long line goes on below itself
    wanted = ["Verdict", "Largest cost", "To do"]
    assert [label for label in labels if label in wanted] == wanted
    done = teegpu("report", "last", "--brief", "--json")
    assert done.code == 2
    assert "--brief" in done.err


def test_a_real_run_as_a_document(real: RunStore, teegpu: Teegpu) -> None:
    document = teegpu("report", "last", "--json").document
    assert document == real.all()[0].document()
    assert teegpu("report", "show", document["id"], "--format", "json").document == document


def test_a_real_run_as_csv(real: RunStore, teegpu: Teegpu) -> None:
    rows = list(csv.DictReader(io.StringIO(teegpu("report", "last", "--format", "csv").out)))
    document = real.all()[0].document()
    calls = {row["phase"]: row["value"] for row in rows if row["metric"] == "rpc_calls"}
    assert calls == {name: str(document["phases"][name]["rpc_calls"]) for name in ("prefill", "decode")}


def test_a_real_run_as_a_trace(real: RunStore, teegpu: Teegpu) -> None:
    text = teegpu("report", "last", "--format", "trace").out
    assert problems(text) == []
    loaded = json.loads(text)["traceEvents"]
    assert_nested(loaded)
    phases = real.all()[0].document()["phases"]
    requests = [entry for entry in loaded if entry.get("cat") == "request"]
    assert len(requests) == phases["prefill"]["rpc_calls"] + phases["decode"]["rpc_calls"]
    assert len({entry["tid"] for entry in requests}) > 1, "its chunks overlap"
    laps = sum(entry["dur"] for entry in loaded if entry.get("cat") in ("tee", "serialization", "wait", "other"))
    assert laps / 1e6 == pytest.approx(phases["prefill"]["seconds"] + phases["decode"]["seconds"], rel=0.01)


def test_a_real_run_as_a_page_with_its_timelines(real: RunStore, teegpu: Teegpu) -> None:
    out = teegpu("report", "last", "--format", "html").out
    read(out)
    assert out.count("<svg") == 6


@pytest.mark.parametrize(("form", "begins"), [("md", "### Run "), ("svg", "<svg ")])
def test_a_real_run_in_other_formats(form: str, begins: str, real: RunStore, teegpu: Teegpu) -> None:
    assert teegpu("report", "last", "--format", form).out.startswith(begins)


def test_verbose_ends_a_run_with_all_of_it(teegpu: Teegpu, tiny_model: TinyModel, server_for: ServerFor) -> None:
    model = tiny_model("llama", vocab_size=1000)
    options = ["--model", model.path, "--endpoint", server_for(model).address, "--threads", 1, "--max-tokens", 3]
    done = teegpu("run", *options, "-v", "Hi")
    assert done.err.count("TOTAL") == 2
    assert "Where the time went" in done.err
    both = teegpu("run", *options, "-v", "-q", "Hi")
    assert (both.code, both.out) == (2, "")


def test_without_a_record_no_details_are_promised(
    teegpu: Teegpu, tiny_model: TinyModel, server_for: ServerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEGPU_RECORD_KEEP", "false")
    model = tiny_model("llama", vocab_size=1000)
    options = ["--model", model.path, "--endpoint", server_for(model).address, "--threads", 1, "--max-tokens", 3]
    assert "details:" not in teegpu("run", *options, "Hi").err


# Records of all kinds


def test_an_empty_store_says_how_to_make_a_run(store: RunStore, teegpu: Teegpu) -> None:
    for command in ("last", "show x"):
        done = teegpu("report", *command.split())
        assert (done.code, done.out) == (8, "")
        assert "teegpu run" in done.err
    done = teegpu("report", "list")
    assert (done.code, done.out) == (0, "")
    assert "teegpu run" in done.err
    listed = {teegpu("report", "list", *form).out for form in (["--json"], ["--format", "json"])}
    assert len(listed) == 1
    assert '"runs": []' in listed.pop()


def test_a_run_that_goes_while_they_are_listed_is_not_in_the_list(
    two: RunStore, teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = two.all()
    two.remove(runs[1])
    monkeypatch.setattr(RunStore, "all", lambda _: runs)
    assert [each["id"] for each in json.loads(teegpu("report", "list", "--json").out)["runs"]] == [runs[0].id]
    assert teegpu("report", "rm", "--all", "--yes").code == 0
    done = teegpu("report", "list")
    assert (done.out, "no runs are recorded" in done.err) == ("", True)


def test_an_unknown_run_names_the_nearest(store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    done = teegpu("report", "show", "20260102-030405-abcdee")
    assert done.code == 8
    assert f"did you mean '{ID}'" in done.err


def test_a_unique_beginning_is_enough(store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    put(store, "20260103-030405-abcdef")
    assert teegpu("report", "show", "20260102").out.startswith(f"run {ID}")
    assert teegpu("report", "show", "2026010").code == 8
    assert teegpu("report", "last").out.startswith("run 20260103-030405-abcdef")


def test_a_run_that_goes_on_says_so(store: RunStore, teegpu: Teegpu) -> None:
    with begun(store, ID) as writer:
        writer.end()
        out = teegpu("report", "last").out
        assert out.splitlines()[1] == "running: figures so far"
        assert "smollm2-135m" in out
        assert teegpu("report", "list").out.splitlines()[1].split()[3] == "running"


def test_a_run_that_broke_off_is_marked(store: RunStore, teegpu: Teegpu) -> None:
    with begun(store, ID):
        pass
    out = teegpu("report", "last").out
    assert out.splitlines()[1] == "interrupted"
    assert "Prefill: 12 tokens in 100 ms" in out
    assert "100.0%" in out


def test_a_damaged_record_says_so(store: RunStore, teegpu: Teegpu) -> None:
    with begun(store, ID):
        pass
    with contextlib.closing(sqlite3.connect(store.find(ID).path / "run.sqlite")) as connection, connection:
        connection.execute("UPDATE events SET block = zeroblob(20)")
    done = teegpu("report", "last")
    assert done.code == 0
    assert "! damaged record: " in done.out
    trace = teegpu("report", "last", "--format", "trace")
    assert trace.code == 0
    assert "damaged record: " in trace.err
    json.loads(trace.out)


@pytest.mark.parametrize(
    "sql",
    ["UPDATE run SET document = replace(document, 'report/1', 'report/2')", "PRAGMA user_version = 2"],
)
def test_a_newer_version_is_refused_and_listed(sql: str, store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    with contextlib.closing(sqlite3.connect(store.find(ID).path / "run.sqlite")) as connection, connection:
        connection.execute(sql)
    done = teegpu("report", "show", ID)
    assert (done.code, done.out) == (8, "")
    assert "newer" in done.err
    listed = teegpu("report", "list")
    assert listed.code == 0
    assert "unreadable" in listed.out
    assert "newer" in listed.out


def test_a_record_of_an_older_release_says_so(store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    (store.root / "20250102-030405-abcdef").mkdir()
    (store.root / "20250102-030405-abcdef" / "meta.json").write_text("{}")
    done = teegpu("report", "show", "2025")
    assert (done.code, done.out) == (8, "")
    assert "was recorded by an older teegpu" in done.err
    listed = teegpu("report", "list")
    assert listed.code == 0
    assert "unreadable" in listed.out
    assert "older teegpu" in listed.out
    assert teegpu("report", "rm", "2025", "--yes").code == 0
    assert len(store.all()) == 1


def test_a_file_of_run_json_is_as_good_as_a_record(store: RunStore, teegpu: Teegpu, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(samples.document()))
    assert teegpu("report", "show", path).out.startswith(f"run {ID}")
    assert teegpu("report", "show", path, "--format", "html").code == 0
    done = teegpu("report", "show", path, "--format", "trace")
    assert (done.code, done.out) == (8, "")
    assert "no events" in done.err


# Files


def test_a_file_is_written_whole_and_never_replaced_unasked(store: RunStore, teegpu: Teegpu, tmp_path: Path) -> None:
    put(store)
    path = tmp_path / "page.html"
    done = teegpu("report", "last", "--out", path)
    assert (done.code, done.out) == (0, "")
    assert path.read_text().startswith("<!DOCTYPE html>")
    path.write_text("mine")
    done = teegpu("report", "last", "--out", path)
    assert done.code == 2
    assert "--force" in done.err
    assert path.read_text() == "mine"
    assert teegpu("report", "last", "--out", path, "--force").code == 0
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["page.html"]


@pytest.mark.parametrize(
    "outputs",
    [
        {"outputs": [{"text": "Once"}, {"text": ""}]},
        {"output": {"text": "Once upon a time"}},  # as older versions wrote them
        {"output": [{"text": "Once"}, {"text": ""}]},
    ],
)
def test_a_file_with_the_text_of_a_run_is_for_the_user_alone(
    store: RunStore, teegpu: Teegpu, tmp_path: Path, outputs: dict[str, Any]
) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(samples.document(**outputs)))
    written = tmp_path / "written.json"
    done = teegpu("report", "show", path, "--out", written)
    assert (done.code, done.err) == (0, f"written to {written}, with the text of the run: only you may read it\n")
    assert json.loads(written.read_text()).items() >= outputs.items()
    assert written.stat().st_mode & 0o777 == 0o600


def test_a_file_that_can_not_be_looked_at(store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    done = teegpu("report", "show", "a" * 300 + ".json")
    assert done.code == 8
    assert done.err.endswith(".json can't be read: File name too long\n")


def test_a_table_in_a_file_is_plain(store: RunStore, teegpu: Teegpu, tmp_path: Path) -> None:
    put(store)
    assert teegpu("report", "last", "--out", tmp_path / "report.txt").code == 0
    text = (tmp_path / "report.txt").read_text()
    assert "TOTAL" in text
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_dash_is_standard_output(store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    assert teegpu("report", "last", "--out", "-", "--format", "md").out.startswith("### Run")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "htm"], "did you mean 'html'"),
        (["--json", "--format", "md"], "two formats"),
        (["--out", "nowhere/page.html"], "there is no folder"),
        (["--out", "."], "it is a folder"),
    ],
)
def test_options_that_can_not_be(options: list[str], told: str, store: RunStore, teegpu: Teegpu) -> None:
    put(store)
    done = teegpu("report", "last", *options)
    assert (done.code, done.out) == (2, "")
    assert told in done.err


# Lists


def test_the_newest_come_first(store: RunStore, teegpu: Teegpu) -> None:
    for day in (1, 2, 3):
        put(store, f"2026010{day}-030405-abcdef", note=f"number {day}")
    lines = teegpu("report", "list").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"2026010{day}-030405-abcdef" for day in (3, 2, 1)]
    assert lines[1].endswith("number 3")
    done = teegpu("report", "list", "-n", 1)
    assert len(done.out.splitlines()) == 2
    assert "2 older ones" in done.err


def test_a_list_for_programs(store: RunStore, teegpu: Teegpu) -> None:
    assert json.loads(teegpu("report", "list", "--json").out) == {"schema": "teegpu.runs/1", "runs": []}
    put(store)
    found = json.loads(teegpu("report", "list", "--json").out)["runs"]
    assert [run["id"] for run in found] == [ID]
    assert found[0]["ttft_seconds"] == 2.001


# Comparing


@pytest.fixture
def two(store: RunStore) -> RunStore:
    put(store)
    slower = {"ttft_seconds": 2.001, "tpot_median_seconds": 0.055, "tpot_p95_seconds": 0.06}
    put(store, "20260103-030405-abcdef", latency=slower)
    return store


def compare(teegpu: Teegpu, *options: object) -> Outcome:
    return teegpu("report", "compare", "20260102", "20260103", *options)


def test_two_runs_side_by_side(two: RunStore, teegpu: Teegpu) -> None:
    done = compare(teegpu)
    assert (done.code, done.err) == (0, "")
    assert "+10.0% worse" in done.out


def test_a_threshold_that_is_missed_ends_with_code_9(two: RunStore, teegpu: Teegpu) -> None:
    done = compare(teegpu, "--fail-if", "tpot_median_seconds>5%", "--fail-if", "ttft_seconds>5%")
    assert done.code == 9
    assert "FAILED tpot_median_seconds>5%" in done.out
    assert done.err.count("\n") == 1
    assert "tpot_median_seconds>5%: 20260103-030405-abcdef has 55 ms" in done.err
    assert "ttft_seconds" not in done.err


def test_a_threshold_that_is_kept_ends_with_code_0(two: RunStore, teegpu: Teegpu) -> None:
    done = compare(teegpu, "--fail-if", "tpot_median_seconds>15%", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["thresholds"][0]["failed"] is False


@pytest.mark.parametrize("condition", ["tpot_median>5%", "tpot_median_seconds", "tpot_median_seconds>five"])
def test_a_condition_that_is_none_is_a_usage_error(condition: str, two: RunStore, teegpu: Teegpu) -> None:
    done = compare(teegpu, "--fail-if", condition)
    assert (done.code, done.out) == (2, "")
    assert "--fail-if" in done.err


def test_one_run_can_not_be_compared(two: RunStore, teegpu: Teegpu) -> None:
    assert teegpu("report", "compare", "20260102").code == 2


def test_a_comparison_in_other_formats(two: RunStore, teegpu: Teegpu) -> None:
    assert compare(teegpu, "--format", "csv").out.startswith("run,figure,value,")
    assert "| TTFT |" in compare(teegpu, "--format", "md").out
    assert compare(teegpu, "--format", "html").code == 2


def test_a_saved_file_may_be_the_baseline(two: RunStore, teegpu: Teegpu, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(samples.document()))
    assert teegpu("report", "compare", path, "20260103", "--fail-if", "tpot_median_seconds>5%").code == 9


# Deleting


def test_records_are_deleted(two: RunStore, teegpu: Teegpu) -> None:
    done = teegpu("report", "rm", "20260102", "20260102-030405", "--yes")
    assert (done.code, done.out) == (0, "")
    assert "deleted 1 record" in done.err
    assert [run.id for run in two.all()] == ["20260103-030405-abcdef"]


def test_all_but_those_that_are_going(two: RunStore, teegpu: Teegpu) -> None:
    with begun(two, "20260104-030405-abcdef"):
        assert teegpu("report", "rm", "--all", "--yes").code == 0
        assert [run.id for run in two.all()] == ["20260104-030405-abcdef"]
        done = teegpu("report", "rm", "last", "--yes")
        assert done.code == 8
        assert "still going" in done.err
    assert len(two.all()) == 1


def test_old_ones(store: RunStore, teegpu: Teegpu) -> None:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    put(store, "a", started_at=(now - timedelta(days=8)).isoformat())
    put(store, "b", started_at=(now - timedelta(days=6)).isoformat())
    assert teegpu("report", "rm", "--older-than", "7d", "--yes").code == 0
    assert [run.id for run in store.all()] == ["b"]
    assert "nothing to delete" in teegpu("report", "rm", "--older-than", "7d", "--yes").err


@pytest.mark.parametrize("options", [[], ["x", "--all"], ["--older-than", "soon"], ["--older-than", "7"]])
def test_what_to_delete_must_be_clear(options: list[str], two: RunStore, teegpu: Teegpu) -> None:
    assert teegpu("report", "rm", *options, "--yes").code == 2
    assert len(two.all()) == 2


def test_nothing_is_deleted_unasked(two: RunStore, teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    done = teegpu("report", "rm", "20260102")
    assert done.code == 2
    assert "--yes" in done.err
    assert len(two.all()) == 2


@pytest.mark.parametrize(("answer", "left"), [("y\n", 1), ("n\n", 2), ("\n", 2)])
def test_a_terminal_is_asked(answer: str, left: int, two: RunStore, teegpu: Teegpu, terminal: int) -> None:
    os.write(terminal, answer.encode())
    done = teegpu("report", "rm", "20260102")
    assert done.code == 0
    assert f"Delete the record of run {ID}? [y/N]" in done.err
    assert len(two.all()) == left
