"""``teegpu bench``: its commands, results to stdout or a file, progress to stderr, what is left after an interrupt."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench import pool
from teegpu.bench.ladder import LadderBenchmark
from teegpu.bench.measure import Notify, Progress
from teegpu.cli import bench, benchcommon
from teegpu.cli.benchcommon import line, progress
from teegpu.errors import ModelError, TeegpuError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, ServerFor, Start, Teegpu


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ladder(teegpu: Teegpu, model: ModelFolder) -> Teegpu:
    def call(*args: object) -> Outcome:
        return teegpu("bench", "ladder", "--model", model.path, "--prompt-tokens", 24, "--decode-tokens", 3, *args)

    return call


def one_line(done: Outcome) -> str:
    (told,) = done.err.splitlines()
    assert told.startswith("teegpu: ")
    return told.removeprefix("teegpu: ")


# The real thing


def test_packed_frames_and_no_cache_make_the_tokens_of_transformers(
    ladder: Teegpu, teegpu: Teegpu, scratch: Path, nothing_left: Callable[[], None]
) -> None:
    """The first rungs of both chains, which need a server each, behind a link."""
    out = Path("x.json")
    done = ladder("--rungs", "per-op,no-kv-cache", "--repeats", 1, "--link", "rtt=100us,bandwidth=1gbit", "--out", out)
    assert done.code == 0, done.err
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["status"]) == ("ladder", "complete")
    packed, whole = document["results"]
    for entry in (packed, whole):
        assert entry["output"]["identical"] is True
        assert entry["accuracy"]["top1_agreement"] == 1.0
        assert entry["accuracy"]["kl_nats"] < 1e-9
    # 9 a layer, embedding and lm_head: packed in one frame each, and a copy of every tensor in it
    assert packed["prefill"]["rpc_calls"] == 9 * 2 + 2
    assert packed["prefill"]["limit_seconds"] > 20 * 1e-4
    assert packed["prefill"]["ratio_to_limit"] > 1.0
    # each step sends the whole context: 25 tokens, then 26, each at least 24 times what one token is
    assert (whole["decode"]["steps"], whole["decode"]["rpc_calls_per_step"]) == (2, 5)
    assert whole["decode"]["bytes_up_per_step"] > whole["prefill"]["bytes_up"]
    assert packed["decode"]["bytes_up_per_step"] < packed["prefill"]["bytes_up"]
    nothing_left()
    # and what is shown of the file
    shown = teegpu("bench", "ladder", "--from", out, "--plot", "x.svg", "--phase", "decode")
    assert shown.code == 0, shown.err
    assert "per-op, packed in msgpack" in shown.out
    assert "without caches" in Path("x.svg").read_text()
    assert (
        "| 1 Gbit/s, 100 µs | 1 Gbit/s, 100 µs |"
        in teegpu("bench", "ladder", "--from", out, "--from", out, "--format", "md").out
    )
    assert teegpu("bench", "ladder", "--from", out, "--format", "csv").out.startswith("label,rung,")


@pytest.mark.extra
def test_an_interrupt_keeps_what_is_done_and_resume_goes_on(
    start: Start,
    teegpu: Teegpu,
    model: ModelFolder,
    scratch: Path,
    nothing_left: Callable[[], None],
    server: LocalServer,
) -> None:
    command = [
        "bench", "ladder", "--model", model.path, "--prompt-tokens", 16, "--decode-tokens", 1, "--rungs", "chunks",
        "--endpoint", server.address, "--no-check", "--out", "x.json",
    ]  # fmt: skip
    process = start(*command, "--repeats", 100_000)
    while "repeat 2 of" not in process.line():
        pass
    # kept after each step, so that not even a kill would lose it
    assert json.loads(Path("x.json").read_text())["results"][0]["repeats"] >= 1
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.code == 130
    assert "Traceback" not in done.err
    document = json.loads(Path("x.json").read_text())
    repeats = document["results"][0]["repeats"]
    assert (document["status"], repeats >= 2) == ("interrupted", True)
    nothing_left()
    again = teegpu(*command, "--resume", "--repeats", repeats + 1)
    assert again.code == 0, again.err
    document = json.loads(Path("x.json").read_text())
    assert (document["status"], document["results"][0]["repeats"]) == ("complete", repeats + 1)
    assert "[2/2] + chunks that overlap" in again.err


@pytest.mark.extra
def test_cases_side_by_side(ladder: Teegpu, scratch: Path, nothing_left: Callable[[], None]) -> None:
    """An embedded server in fp32 behind a link, and transformers."""
    cases = ["fused,transport=pipelined,wire=fp32,dtype=fp32,chunk=8", "transformers"]
    options = [argument for case in cases for argument in ("--case", case)]
    done = ladder(
        "--repeats", 2, "--format", "json", "--link", "rtt=100us,bandwidth=1gbit", "--plot", "x.svg", *options
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["schema"], document["status"]) == ("teegpu.bench/1", "complete")
    fused, transformers = document["results"]
    for entry in document["results"]:
        assert entry["output"] == {"tokens": 4, "agreeing_tokens": 4, "identical": True}
        assert len(entry["samples"]) == 2
        assert entry["peak_memory_bytes"] > 2**20
    # five for the last of three chunks, four for the others, which end where their keys and values are stored
    assert fused["chunk_tokens"] == 8
    assert fused["prefill"]["rpc_calls"] == 5 + 2 * 3
    assert fused["decode"]["rpc_calls_per_step"] == 5
    assert fused["decode"]["limit_seconds"] > 3 * 5 * 1e-4
    assert fused["server"]["dtype"] == "fp32"
    assert transformers["prefill"]["rpc_calls"] == transformers["prefill"]["bytes_down"] == 0
    assert transformers["prefill"]["limit_seconds"] is None
    nothing_left()
    lines = done.err.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("[0/6] reference, transformers in fp32: prefill ")
    assert lines[1].startswith("[1/6] fused pipelined fp32, server fp32, chunk 8, warm-up: prefill ")
    assert " left" in lines[1]
    assert lines[6].startswith("[6/6] transformers fp32, repeat 2 of 2: prefill ")
    assert lines[7] == "written to x.svg"
    assert "fused pipelined fp32" in Path("x.svg").read_text()


def test_an_interrupt_prints_what_is_done_and_leaves_nothing(
    start: Start, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None], server: LocalServer
) -> None:
    process = start(
        "bench", "ladder", "--model", model.path, "--prompt-tokens", 16, "--decode-tokens", 1, "--repeats", 100_000,
        "--case", "fused,transport=zmq", "--endpoint", server.address, "--no-check", "--format", "csv",
    )  # fmt: skip
    while "repeat 1 of" not in process.line():
        pass
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.code == 130
    (row,) = csv.DictReader(io.StringIO(done.out))
    assert row["label"] == "fused zmq auto"
    assert float(row["prefill_seconds_median"]) > 0
    assert row["output_identical"] == ""
    assert "Traceback" not in done.err
    nothing_left()


# Flags and files


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--case", "fused,wier=fp16"], "unknown key 'wier', did you mean 'wire'?"),
        (["--case", "fussed"], "unknown plan 'fussed', did you mean 'fused'?"),
        (["--format", "jsn"], "did you mean 'json'?"),
        (["--link", "rtt=5parsecs", "--case", "fused"], "rtt"),
        (["--repeats", "0"], "--repeats 0 is below the least, 1"),
        (["--out", "nowhere/result.json"], "there is no folder nowhere that can be written to"),
        (["--out", "."], "it is a folder"),
        (["--device", "cpuu"], "--device"),
    ],
)
def test_flags_that_can_not_be(ladder: Teegpu, options: list[str], told: str) -> None:
    done = ladder(*options)
    assert done.code == 2
    assert told in one_line(done)
    assert done.out == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rungs", "fussed"], "there is no rung 'fussed', did you mean 'fused'?; there are per-op, batched"),
        (["--link", "rtt=5parsecs"], "rtt=5parsecs is not a time"),
        (["--link", "rt=5ms"], "unknown key 'rt', did you mean 'rtt'?"),
        (["--link", "bandwidth=0mbit"], "bandwidth must be at least 1kbit"),
        (["--phase", "prefil", "--plot", "x.svg"], "did you mean 'prefill'?"),
        (["--from", "x.json", "--case", "fused"], "--from shows what was measured: leave --case out"),
        (["--from", "a.json", "--from", "b.json", "--format", "csv"], "--format csv is for one result"),
        (["--resume"], "--resume goes on with a result in JSON"),
        (["--resume", "--out", "x.md"], "name its file with --out FILE.json"),
        (["--repeats", "0"], "--repeats 0 is below the least, 1"),
        (["--max-seconds", "-1"], "--max-seconds -1 is not above 0"),
        (["--endpoint", "tcp://127.0.0.1:1", "--rungs", "per-op"], "it needs a server that packs tensors in msgpack"),
    ],
)  # fmt: skip
def test_flags_of_the_ladder_that_can_not_be(ladder: Teegpu, options: list[str], told: str) -> None:
    done = ladder(*options)
    assert done.code == 2
    assert told in one_line(done)
    assert done.out == ""


def test_a_server_of_another_model_ends_it_before_anything_is_measured(
    ladder: Teegpu, server_for: ServerFor, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "Child", lambda *_: pytest.fail("a rung was started"))
    other = server_for(tiny_model("llama", vocab_size=1000, seed=1))
    done = ladder("--endpoint", other.address, "--no-check")
    assert done.code == 5
    assert "give both the same --model" in one_line(done)


def test_a_file_of_another_measurement_is_refused_and_left_as_it_is(ladder: Teegpu, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    whole: dict[str, Any] = {"schema": "teegpu.bench/1", "benchmark": "ladder", "status": "interrupted"}
    text = json.dumps(whole | {"machine": {}, "versions": {}, "settings": {}, "notes": [], "results": []})
    path.write_text(text)
    done = ladder("--resume", "--out", path, "--rungs", "local")
    assert done.code == 2
    assert f"--resume: {path} was measured with another model" in one_line(done)
    assert path.read_text() == text


def test_resume_without_a_file_begins_one(ladder: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LadderBenchmark] = []
    monkeypatch.setattr(bench, "conduct", lambda benchmark, *_, **__: seen.append(benchmark))
    assert ladder("--resume", "--out", "x.json", "--max-seconds", 60, "--no-check").code == 0
    settings = seen[0].document("complete")["settings"]
    assert (settings["max_seconds"], settings["check"], len(settings["rungs"])) == (60.0, False, 18)


def test_files_that_are_no_results(teegpu: Teegpu) -> None:
    Path("x.json").write_text("{}")
    done = teegpu("bench", "ladder", "--from", "x.json")
    assert (done.code, done.out) == (2, "")
    assert "x.json is no result of 'teegpu bench'" in one_line(done)
    Path("x.json").write_text(
        json.dumps({"schema": "teegpu.bench/1", "benchmark": "ladder", "status": "complete", "machine": {},
                    "versions": {}, "settings": {}, "notes": [], "results": [{}]})
    )  # fmt: skip
    done = teegpu("bench", "ladder", "--from", "x.json")
    assert (done.code, done.out) == (2, "")
    assert "x.json is a result of 'teegpu bench' that is damaged" in one_line(done)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["accuracy", "--texts", "alcie"], "did you mean 'alice'?"),
        (["accuracy", "--tokens", "1"], "--tokens 1 is below the least, 2"),
    ],
)
def test_flags_of_the_others(teegpu: Teegpu, model: ModelFolder, options: list[str], told: str) -> None:
    done = teegpu("bench", *options, "--model", model.path)
    assert done.code == 2
    assert told in one_line(done)


def test_a_prompt_that_is_longer_than_the_context(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("bench", "ladder", "--model", model.path)
    assert done.code == 3
    assert "which ends at 256: give less" in one_line(done)


class FakeBenchmark:
    """Ends as it is told, with one result or none."""

    name = "ladder"

    def __init__(
        self, error: BaseException | None = None, *, measured: bool = True, failures: Sequence[str] = ()
    ) -> None:
        self.failures = failures
        self._error = error
        self._measured = measured

    def run(self, notify: Notify) -> None:
        notify(Progress(0, 1, "fused", "warm-up"))
        notify(Progress(1, 1, "fused", "warm-up", "prefill 1.000 s"))
        if self._error is not None:
            raise self._error

    def document(self, status: str) -> dict[str, Any]:
        return {"status": status, "results": [{"samples": [1] if self._measured else []}]}


def conduct(benchmark: FakeBenchmark, out: Path | None = None) -> None:
    benchcommon.conduct(benchmark, benchcommon.Output("json", out, quiet=False))


def test_a_result_goes_to_stdout_and_progress_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    conduct(FakeBenchmark())
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "complete"
    assert err == "[1/1] fused, warm-up: prefill 1.000 s\n"


def test_cases_that_failed_make_the_command_fail_after_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TeegpuError, match="1 of 1 case failed: fused: no server"):
        conduct(FakeBenchmark(failures=["fused: no server"]))
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text("the one before")
    with pytest.raises(KeyboardInterrupt):
        conduct(FakeBenchmark(KeyboardInterrupt(), measured=False), path)
    assert path.read_text() == "the one before"
    assert "interrupted before anything was measured" in capsys.readouterr().err
    conduct(FakeBenchmark(), path)
    out, err = capsys.readouterr()
    assert json.loads(path.read_text())["status"] == "complete"
    assert out == ""
    assert err.splitlines()[-1] == f"written to {path}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ModelError("no"), "failed")])
def test_what_was_measured_before_the_end_is_not_lost(
    error: BaseException, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)):
        conduct(FakeBenchmark(error))
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_a_failure_before_anything_was_measured_prints_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError):
        conduct(FakeBenchmark(ModelError("no"), measured=False))
    assert capsys.readouterr().out == ""


def test_the_file_s_name_says_the_format(tmp_path: Path) -> None:
    assert benchcommon.Output("", tmp_path / "x.csv", quiet=True).form == "csv"
    assert benchcommon.Output("", None, quiet=True).form == "table"


def test_progress_lines() -> None:
    step = Progress(3, 48, "fused zmq auto", "repeat 1 of 5", "prefill 1.394 s", 100.0)
    assert line(step) == "[3/48] fused zmq auto, repeat 1 of 5: prefill 1.394 s; about 2 min left"
    assert line(Progress(48, 48, "a", "b", "c", 0.0)) == "[48/48] a, b: c"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress() as notify:
        notify(Progress(0, 2, "fused", "warm-up"))
        notify(Progress(1, 2, "fused", "warm-up", "prefill 1.000 s", 5.0))
    err = capsys.readouterr().err
    assert "[1/2] fused, warm-up: prefill 1.000 s; about 5 s left" in err
    assert "0/2" in err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as notify:
        notify(Progress(1, 2, "fused", "warm-up", "prefill 1.000 s"))
    assert capsys.readouterr().err == ""


def test_what_the_flags_come_to(ladder: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LadderBenchmark] = []
    monkeypatch.setattr(bench, "conduct", lambda benchmark, *_, **__: seen.append(benchmark))
    done = ladder("--link", "rtt=1ms", "--case", "default", "--case", "transformers,dtype=bf16", "--rungs", "fused")
    assert done.code == 0, done.err
    document = seen[0].document("complete")
    assert document["settings"]["prompt_tokens"] == 24
    assert document["settings"]["link"] == "rtt=1ms,bandwidth=unlimited"
    labels = [entry["label"] for entry in document["results"]]
    assert labels[0] == "+ fused"
    assert labels[-2:] == ["transformers fp32", "transformers bf16"]


# The link


def test_the_link_to_a_server_needs_no_model(teegpu: Teegpu, server: LocalServer) -> None:
    done = teegpu(
        "bench", "link", "--endpoint", server.address, "--rounds", 5, "--transfers", 1, "--format", "json", "--quiet"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["model"] is None
    assert document["server"]["dtype"] == "fp32"
    assert document["measured_link"]["spec"].startswith("rtt=")
    assert done.err == ""


def test_the_link_to_a_server_of_another_model(teegpu: Teegpu, server: LocalServer, tiny_model: TinyModel) -> None:
    done = teegpu("bench", "link", "--endpoint", server.address, "--model", tiny_model("llama").path, "--quiet")
    assert done.code == 5
    assert "give both the same --model" in one_line(done)


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--endpoint", "tcp://127.0.0.1:1"], 4, "no server answers at tcp://127.0.0.1:1"),
        (["--endpoint", "localhost:5555"], 2, "is not an address"),
        (["--endpoint", "tcp://127.0.0.1:1", "--link", "rt=5ms"], 2, "did you mean 'rtt'?"),
        (["--endpoint", "tcp://127.0.0.1:1", "--client-key", "me"], 2, "link.server_key is not"),
        (["--endpoint", "tcp://127.0.0.1:1", "--rounds", "0"], 2, "--rounds 0 is below the least, 1"),
    ],
)
def test_links_that_can_not_be_measured(
    teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, told: str
) -> None:
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "0.2")
    done = teegpu("bench", "link", "--quiet", *options)
    assert done.code == code
    assert told in one_line(done)
    assert done.out == ""
