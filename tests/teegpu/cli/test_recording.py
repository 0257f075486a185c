"""The record that a run keeps of itself: complete, failed, interrupted, killed; and what never enters it."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from teegpu.cli import recording
from teegpu.config import load
from teegpu.metrics import events as ev
from teegpu.metrics import store as store_module
from teegpu.metrics.eventlog import EventWriter
from teegpu.metrics.store import RunFolder, RunStore, open_store
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, ServerFor, Start, Teegpu, until

SECRET = "Xanadu-of-the-prompt"
PREFILL_CALLS = 5
"""RPCs of one pass of the tiny model under the plan fused."""


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", vocab_size=1000)


@pytest.fixture
def server(server_for: ServerFor, model: ModelFolder) -> LocalServer:
    return server_for(model)


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
    """All that is on disk, decompressed."""
    data = b""
    for path in folder.path.iterdir():
        raw = path.read_bytes()
        if path.suffix == ".zst":
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
                raw = reader.read()
        data += raw
    return data


# What it has


def test_a_run_has_a_record(run: Teegpu, store: RunStore, server: LocalServer, model: ModelFolder) -> None:
    printed = run("--json", "--note", " 10GbE,\n jumbo ", "Hi").document
    folder = only(store)
    assert folder.id == printed["id"]
    assert folder.status == "complete"
    assert printed["note"] == "10GbE, jumbo"
    assert printed["record"] == {"truncated": False, "failure": None, "damage": []}
    assert printed["environment"]["teegpu"] == printed["settings"]["version"]
    kept = folder.document()
    output, kept_output = printed.pop("output"), kept.pop("output")
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
    (folder.path / "summary.json").unlink()
    rebuilt = folder.document()
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
    assert folder.document()["memory"]["server_bytes"] > 2**20
    last = [event for event in events if isinstance(event, ev.Sampled)][-1]
    assert last.server_bytes > 2**20
    assert last.cpu_seconds > 0


def test_no_text_and_no_token_is_in_it(run: Teegpu, store: RunStore) -> None:
    done = run("--json", "--system", f"sys {SECRET}", "--stop", f"stop {SECRET}", f"Hi {SECRET}")
    assert done.code == 0
    everything = content(only(store))
    assert SECRET.encode() not in everything
    assert b"Rpc" not in everything
    assert b"z+gate+up" in everything, "or we have not looked into the events"
    for text in (done.document["output"]["text"], json.dumps(done.document["output"]["text"])[1:-1]):
        assert len(text) > 5
        assert text.encode() not in everything
    assert not any(isinstance(event, ev.TextMade) for event in events_of(only(store)))


def test_text_that_is_to_be_saved(run: Teegpu, store: RunStore) -> None:
    printed = run("--json", "--save-text", "--system", "Be brief", f"Hi {SECRET}").document
    folder = only(store)
    assert folder.document()["output"] == printed["output"]
    assert folder.meta()["prompt"] == {"text": f"Hi {SECRET}", "system": "Be brief"}
    pieces = [event.text for event in events_of(folder) if isinstance(event, ev.TextMade)]
    assert "".join(pieces) == printed["output"]["text"]


def test_several_prompts(run: Teegpu, store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Hi\nHo\n")
    done = run("--prompts-file", tmp_path / "prompts", "--save-text", "-q")
    assert done.code == 0
    folder = only(store)
    assert folder.meta()["prompt"]["text"] == ["Hi", "Ho"]
    assert len(folder.document()["output"]) == 2
    assert folder.document()["phases"]["prefill"]["passes"] == 2


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
    document = folder.document()
    assert "give both the same --model" in document["error"]
    assert document["note"] == "wrong one"
    assert document["environment"]["cores"] >= 1
    assert done.err.startswith("teegpu: the server at")


def test_a_bug_tells_its_kind_only(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LookupError(SECRET)

    monkeypatch.setattr("teegpu.tee.runner.Session.generate", broken)
    done = run("--json", "Hi")
    assert done.code == 70
    assert done.document["error"] == f"LookupError: {SECRET}"
    assert only(store).document()["error"] == "LookupError"
    assert SECRET.encode() not in content(only(store))


def test_a_reader_that_goes_away(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, _: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        assert run("Hi").code == 141
    document = only(store).document()
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
        assert killed.document()["status"] == "running"
        one.kill()
        one.wait()
        assert killed.status == "interrupted"
        assert other.status == "running"
        document = killed.document()
        assert document["status"] == "interrupted"
        assert document["phases"]["prefill"]["rpc_calls"] >= 1
        assert document["phases"]["prefill"]["seconds"] > 0
        assert document["record"]["damage"] == []
        two.send_signal(signal.SIGINT)
        assert two.finish().code == 130
    assert other.status == "interrupted"
    assert other.document()["status"] == "interrupted"
    assert sorted(os.listdir(killed.path)) == ["events.msgpack", "lock", "meta.json"]


# A disk that does not do its part


def one_warning(done: Outcome) -> str:
    (told,) = [line for line in done.err.splitlines() if "record" in line]
    return told


def test_a_disk_that_is_full_in_the_middle(run: Teegpu, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 2000

    def full(file: int, data: memoryview) -> int:
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return os.write(file, data)

    monkeypatch.setattr(store_module, "EventWriter", functools.partial(EventWriter, write=full))
    done = run("Hi")
    assert done.code == 0
    assert len(done.out) > 2
    assert one_warning(done) == f"the record of this run is not whole: No space left on device in {store.root}"
    folder = only(store)
    assert folder.status == "complete"
    assert folder.document()["record"]["failure"] == "No space left on device"
    assert folder.document()["phases"]["decode"]["tokens"] == 11, "the sums are those of the runner itself"
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
    if options == ["-q"]:
        assert done.err == ""
        return
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
    assert "No such file or directory" in one_warning(done)


# Measuring it


def test_the_bench_of_recording(teegpu: Teegpu, model: ModelFolder, server: LocalServer, store: RunStore) -> None:
    done = teegpu(
        "bench", "recording", "--model", model.path, "--endpoint", server.address, "--pairs", 1, "--prompt-tokens", 8,
        "--decode-tokens", 2, "--format", "csv", "-q",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    header, *rows = done.out.splitlines()
    assert "overhead_median" in header
    assert [row.partition(",")[0] for row in rows] == ["prefill", "decode", "run"]
    assert store.all() == []


def test_the_bench_of_accounting(
    teegpu: Teegpu, model: ModelFolder, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEGPU_RUN_ENDPOINTS", server.address)
    options = ("--model", model.path, "--prompt-tokens", 12, "--decode-tokens", 2, "--chunk-tokens", 4)
    done = teegpu("bench", "accounting", *options, "--plan", "fused", "--transport", "pipelined", "--format", "md")
    assert done.code == 0
    assert "| fused pipelined, 3 chunks |" in done.out
    assert done.out.count("100.000%") >= 8
    assert "furthest from its wall time: fused pipelined" in done.out
    wrong = teegpu("bench", "accounting", *options, "--plan", "fusd")
    assert wrong.code == 2
    assert "--plan fusd is not one of local" in wrong.err
