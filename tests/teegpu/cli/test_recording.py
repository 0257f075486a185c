"""The record that a run keeps of itself: complete, failed, interrupted, killed; and what never enters it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from teegpu.cli import recording
from teegpu.cli.recording import without_runner
from teegpu.config import load
from teegpu.model.folder import ModelFolder
from teegpu.record import events as ev
from teegpu.record.run import RunFolder
from teegpu.record.store import RunStore, open_store
from teegpu.stats import environment
from teegpu.stats.document import recorded
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, Start, Teegpu, until

SECRET = "Xanadu-of-the-prompt"
PREFILL_CALLS = 5
"""RPCs of one pass of the tiny model under the plan fused."""


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder, server: LocalServer) -> Teegpu:
    def call(*args: object) -> Outcome:
        return teegpu(
            "run", "--model", model.path, "--endpoint", server.address, "--threads", 1, "--max-tokens", 12, *args
        )

    return call


@pytest.fixture
def store(isolated_user_files: Path) -> RunStore:
    return open_store(load({}, folder=isolated_user_files))


def only(store: RunStore) -> RunFolder:
    (folder,) = store.all()
    return folder


def events_of(folder: RunFolder) -> list[ev.Event]:
    reader = folder.events()
    try:
        events = reader.read()
        assert reader.damage == []
        return events
    finally:
        reader.close()


def content(folder: RunFolder) -> bytes:
    """All that is on disk, decompressed: SQLite's pages hold what was deleted too."""
    with contextlib.closing(sqlite3.connect(folder.path / "run.sqlite")) as connection:
        blocks = connection.execute("SELECT block FROM events").fetchall()
    data = b"".join(zstandard.ZstdDecompressor().decompress(block) for (block,) in blocks)
    return data + b"".join(path.read_bytes() for path in folder.path.iterdir())


# What it has


def test_a_run_has_a_record(run: Teegpu, store: RunStore, server: LocalServer, model: ModelFolder) -> None:
    printed = run("--json", "--note", " 10GbE,\n jumbo ", "Hi").document
    folder = only(store)
    assert folder.id == printed["id"]
    assert folder.status == "complete"
    assert printed["note"] == "10GbE, jumbo"
    assert printed["record"] == {"truncated": False, "failure": None, "damage": []}
    assert printed["environment"]["teegpu"] == printed["settings"]["version"]
    kept = recorded(folder)
    (output,), (kept_output,) = printed.pop("outputs"), kept.pop("outputs")
    assert kept == printed
    assert kept_output == {key: output[key] for key in ("finish_reason", "prompt_tokens", "reused_tokens")}
    meta = folder.meta()
    for key in ("id", "started_at", "model", "settings", "tee", "server", "note", "environment"):
        assert meta[key] == printed[key], key
    assert meta["pid"] == os.getpid()
    assert abs(meta["clock"]["unix_ns"] / 1e9 - folder.path.stat().st_mtime) < 300
    assert "prompt" not in meta


def test_its_events_add_up_to_its_document(run: Teegpu, store: RunStore) -> None:
    printed = run("--json", "Hi").document
    folder = only(store)
    with contextlib.closing(sqlite3.connect(folder.path / "run.sqlite")) as connection, connection:
        connection.execute("UPDATE run SET document = NULL")
    rebuilt = recorded(folder)
    for phase in printed["phases"].values():
        assert phase.pop("processor_seconds") > 0  # known to the process alone
    assert rebuilt["phases"] == printed["phases"]
    assert rebuilt["latency"] == printed["latency"]
    assert rebuilt["endpoints"] == printed["endpoints"]
    events = events_of(folder)
    assert {type(event).__name__ for event in events} >= {"PhaseBegan", "Lap", "Rpc", "TokensMade", "PhaseEnded"}
    sampled = [event for event in events if isinstance(event, ev.Sampled)]
    assert all(event.runner_bytes > 2**20 and event.server_bytes == 0 for event in sampled)
    assert printed["memory"]["runner_peak_bytes"] > 0.9 * max(event.runner_bytes for event in sampled)


def test_an_embedded_server_is_in_it(teegpu: Teegpu, model: ModelFolder, store: RunStore) -> None:
    done = teegpu("run", "--model", model.path, "--threads", 1, "--max-tokens", 2, "Hi")
    assert done.code == 0
    folder = only(store)
    events = events_of(folder)
    assert any(isinstance(event, ev.Noted) and "embedded GPU server" in event.text for event in events)
    assert recorded(folder)["memory"]["server_bytes"] > 2**20
    last = [event for event in events if isinstance(event, ev.Sampled)][-1]
    assert last.server_bytes > 2**20
    assert last.cpu_seconds > 0


def test_no_text_and_no_token_is_in_it(run: Teegpu, store: RunStore) -> None:
    done = run("--json", "--system", f"sys {SECRET}", "--stop", f"stop {SECRET}", f"Hi {SECRET}")
    assert done.code == 0
    everything = content(only(store))
    assert SECRET.encode() not in everything
    assert b"Rpc" not in everything
    label = next(event.label for event in events_of(only(store)) if isinstance(event, ev.Rpc))
    assert label.encode() in everything, "or we have not looked into the events"
    for text in (done.document["outputs"][0]["text"], json.dumps(done.document["outputs"][0]["text"])[1:-1]):
        assert len(text) > 5
        assert text.encode() not in everything
    assert not any(isinstance(event, ev.TextMade) for event in events_of(only(store)))


def test_text_that_is_to_be_saved(run: Teegpu, store: RunStore) -> None:
    printed = run("--json", "--save-text", "--system", "Be brief", f"Hi {SECRET}").document
    folder = only(store)
    assert recorded(folder)["outputs"] == printed["outputs"]
    assert folder.meta()["prompt"] == {"text": f"Hi {SECRET}", "system": "Be brief"}
    pieces = [event.text for event in events_of(folder) if isinstance(event, ev.TextMade)]
    assert "".join(pieces) == printed["outputs"][0]["text"]


def test_several_prompts(run: Teegpu, store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Hi\nHo\n")
    done = run("--prompts-file", tmp_path / "prompts", "--save-text", "-q")
    assert done.code == 0
    folder = only(store)
    assert folder.meta()["prompt"]["text"] == ["Hi", "Ho"]
    assert len(recorded(folder)["outputs"]) == 2
    assert recorded(folder)["phases"]["prefill"]["passes"] == 2


def test_no_record(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--no-record", "Hi").code == 0
    monkeypatch.setenv("TEEGPU_RECORD_KEEP", "false")
    assert run("--save-text", "Hi").code == 0
    assert store.all() == []
    both = run("--no-record", "--save-text", "Hi")
    assert both.code == 2
    assert "leave one out" in both.err


def test_old_records_go(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_RECORD_KEEP_RUNS", "2")
    printed = [run("--json", "--max-tokens", 1, "Hi").document["id"] for _ in range(3)]
    assert [folder.id for folder in store.all()] == printed[:0:-1]


# Other ends


def test_a_run_that_fails_before_it_begins(run: Teegpu, store: RunStore, tiny_model: TinyModel) -> None:
    done = run("--model", tiny_model("llama", vocab_size=1000, seed=1).path, "--note", "wrong one", "Hi")
    assert done.code == 5
    folder = only(store)
    assert folder.status == "failed"
    document = recorded(folder)
    assert "give both the same --model" in document["error"]
    assert document["note"] == "wrong one"
    assert document["environment"]["cores"] >= 1
    assert done.err.splitlines()[-1].startswith("teegpu: the server at")


def test_a_bug_tells_its_kind_only(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LookupError(SECRET)

    monkeypatch.setattr("teegpu.runner.Engine.generate", broken)
    done = run("--json", "Hi")
    assert done.code == 70
    assert done.document["error"] == f"LookupError: {SECRET}"
    assert recorded(only(store))["error"] == "LookupError"
    assert SECRET.encode() not in content(only(store))


def test_a_reader_that_goes_away(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, _: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        assert run("Hi").code == 141
    document = recorded(only(store))
    assert (document["status"], document["error"]) == ("interrupted", "the reader of the output went away")
    assert document["phases"]["prefill"]["tokens"] > 0


def test_two_runs_at_once_of_which_one_is_killed(
    start: Start, store: RunStore, server: LocalServer, model: ModelFolder
) -> None:
    """The one that goes on is interrupted with Ctrl-C in the end."""
    arguments = ("run", "--model", model.path, "--endpoint", server.address, "--threads", 1, "-q", "Hi")
    with server.hold(2 * PREFILL_CALLS):
        one, two = start(*arguments), start(*arguments)
        server.wait_until_held()
        until(lambda: len(store.all()) == 2)
        assert [folder.status for folder in store.all()] == ["running", "running"]
        folders = {folder.meta()["pid"]: folder for folder in store.all()}

        # The record is read while the run waits for a reply, and has all up to that wait. One of them may have had all
        # the replies that there were.
        def answered(folder: RunFolder) -> bool:
            return any(isinstance(event, ev.Rpc) for event in events_of(folder))

        until(lambda: any(answered(folder) for folder in folders.values()))
        one, two = (one, two) if answered(folders[one.pid]) else (two, one)
        killed, other = folders[one.pid], folders[two.pid]
        assert recorded(killed)["status"] == "running"
        one.kill()
        one.wait()
        assert killed.status == "interrupted"
        assert other.status == "running"
        document = recorded(killed)
        assert document["status"] == "interrupted"
        assert document["phases"]["prefill"]["rpc_calls"] >= 1
        assert document["phases"]["prefill"]["seconds"] > 0
        assert document["record"]["damage"] == []
        two.send_signal(signal.SIGINT)
        assert two.finish().code == 130
    assert other.status == "interrupted"
    assert recorded(other)["status"] == "interrupted"
    assert sorted(os.listdir(other.path)) == ["lock", "run.sqlite"]


# A disk that does not do its part


def one_warning(done: Outcome) -> str:
    (told,) = [line for line in done.err.splitlines() if "record" in line]
    return told


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_a_disk_that_is_full_in_the_middle(options: list[str], run: Teegpu, store: RunStore) -> None:
    """No file of this process may become larger than some pages for a while, as the kernel sees to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        done = run(*options, "Hi")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 0
    assert len(done.out) > 2
    assert one_warning(done) == f"the record of this run is not whole: disk I/O error in {store.root}"
    assert recorded(only(store))["schema"] == "teegpu.report/1"
    assert run("-q", "Hi").err == ""


@pytest.mark.parametrize("options", [[], ["-q"], ["--json"]])
def test_a_place_where_nothing_can_be_kept(
    run: Teegpu, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEEGPU_RECORD_DIR", str(tmp_path / "file"))
    done = run(*options, "Hi")
    assert done.code == 0
    assert done.out
    assert one_warning(done) == (
        f"this run is not recorded: no record can be kept in {tmp_path}/file: File exists (record.dir, or --no-record)"
    )


def test_a_record_that_only_the_run_knows_of(monkeypatch: pytest.MonkeyPatch, store: RunStore, run: Teegpu) -> None:
    """Its folder is removed while it runs: that is no reason for the run to fail."""
    import shutil

    describe = recording.Recording.describe

    def removed(self: Any, runner: Any) -> None:
        describe(self, runner)
        shutil.rmtree(store.root)

    monkeypatch.setattr(recording.Recording, "describe", removed)
    done = run("Hi")
    assert done.code == 0
    assert "its files are gone" in one_warning(done)


# Measuring it


def test_what_is_attested_is_in_a_record_as_soon_as_it_is_known(store: RunStore) -> None:
    settings, start = load({}), environment.Start.now()
    with recording.Recording(settings, start, without_runner(settings, start, "failed"), prompt=None, say=print) as one:
        found = only(store)
        assert found.meta()["tee"]["attested"] is False
        one.attested(found.meta()["tee"] | {"attested": True})
        until(lambda: found.meta()["tee"]["attested"] is True)
        assert found.status == "running"
