"""``teegpu bench``: results to stdout or a file, progress to stderr, and what is left after an interrupt."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench.measure import Notify, Progress
from teegpu.bench.plans import PlanBenchmark
from teegpu.cli import bench
from teegpu.cli.benchprogress import line, shown
from teegpu.errors import ModelError, TeegpuError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, ServerFor, Start, Teegpu


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", vocab_size=1000)


@pytest.fixture
def server(server_for: ServerFor, model: ModelFolder) -> LocalServer:
    return server_for(model)


@pytest.fixture
def plans(teegpu: Teegpu, model: ModelFolder) -> Teegpu:
    def call(*args: object) -> Outcome:
        return teegpu("bench", "plans", "--model", model.path, "--prompt-tokens", 24, "--decode-tokens", 3, *args)

    return call


def one_line(done: Outcome) -> str:
    (told,) = done.err.splitlines()
    assert told.startswith("teegpu: ")
    return told.removeprefix("teegpu: ")


# The real thing


def test_plans_side_by_side(plans: Teegpu, scratch: Path, nothing_left: Callable[[], None]) -> None:
    """An embedded server in fp32 behind a link, and transformers."""
    cases = ["fused,transport=pipelined,wire=fp32,dtype=fp32,chunk=8", "transformers"]
    options = [argument for case in cases for argument in ("--case", case)]
    done = plans("--repeats", 2, "--format", "json", "--link", "rtt=100us", *options)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["schema"] == "teegpu.bench/1"
    assert document["status"] == "complete"
    fused, transformers = document["results"]
    for entry in document["results"]:
        assert entry["output"] == {"tokens": 4, "agreeing_tokens": 4, "identical": True}
        assert len(entry["samples"]) == 2
        assert entry["peak_memory_bytes"] > 2**20
    # five for the last of three chunks, four for the others, which end where their keys and values are stored
    assert fused["chunk_tokens"] == 8
    assert fused["prefill"]["rpc_calls"] == 5 + 2 * 3
    assert fused["prefill"]["rounds"] == fused["decode"]["rpc_calls_per_step"] == 5
    assert fused["prefill"]["link_floor_seconds"] == pytest.approx(5 * 1e-4)
    assert fused["server"]["dtype"] == "fp32"
    assert transformers["prefill"]["rpc_calls"] == transformers["prefill"]["bytes_down"] == 0
    assert transformers["prefill"]["link_floor_seconds"] is None
    nothing_left()
    lines = done.err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("[1/6] fused pipelined fp32, server fp32, chunk 8, warm-up: prefill ")
    assert " left" in lines[0]
    assert lines[-1].startswith("[6/6] transformers fp32, repeat 2 of 2: prefill ")


def test_an_interrupt_prints_what_is_done_and_leaves_nothing(
    start: Start, model: ModelFolder, scratch: Path, nothing_left: Callable[[], None], server: LocalServer
) -> None:
    process = start(
        "bench", "plans", "--model", model.path, "--prompt-tokens", 16, "--decode-tokens", 1, "--repeats", 100_000,
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
        (["--device", "cpuu"], "server.device"),
    ],
)
def test_flags_that_can_not_be(plans: Teegpu, options: list[str], told: str) -> None:
    done = plans(*options)
    assert done.code == 2
    assert told in one_line(done)
    assert done.out == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["accuracy", "--texts", "alcie"], "did you mean 'alice'?"),
        (["accuracy", "--tokens", "1"], "--tokens 1 is below the least, 2"),
        (["overhead", "--rounds", "0"], "--rounds 0 is below the least, 1"),
        (["overhead", "--transport", "zqm"], "did you mean 'zmq'?"),
        (["overhead", "--transport", "inprocess"], "use zmq or pipelined"),
        (["codec", "--activations", "score"], "did you mean 'scores'?"),
        (["codec", "--level", "0"], "--level 0 is not between 1 and 19"),
        (["replay", "--tokens", "1"], "--tokens 1 is below the least, 80"),
    ],
)
def test_flags_of_the_others(teegpu: Teegpu, model: ModelFolder, options: list[str], told: str) -> None:
    done = teegpu("bench", *options, "--model", model.path)
    assert done.code == 2
    assert told in one_line(done)


def test_a_prompt_that_is_longer_than_the_context(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("bench", "plans", "--model", model.path)
    assert done.code == 3
    assert "which ends at 256: give less" in one_line(done)


class FakeBenchmark:
    """Ends as it is told, with one result or none."""

    name = "plans"

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
    bench._conduct(benchmark, bench._Output("json", out, quiet=False))


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
    assert bench._Output("", tmp_path / "x.csv", quiet=True).form == "csv"
    assert bench._Output("", None, quiet=True).form == "table"


def test_progress_lines() -> None:
    step = Progress(3, 48, "fused zmq auto", "repeat 1 of 5", "prefill 1.394 s", 100.0)
    assert line(step) == "[3/48] fused zmq auto, repeat 1 of 5: prefill 1.394 s; about 2 min left"
    assert line(Progress(48, 48, "a", "b", "c", 0.0)) == "[48/48] a, b: c"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with shown() as notify:
        notify(Progress(0, 2, "fused", "warm-up"))
        notify(Progress(1, 2, "fused", "warm-up", "prefill 1.000 s", 5.0))
    err = capsys.readouterr().err
    assert "[1/2] fused, warm-up: prefill 1.000 s; about 5 s left" in err
    assert "0/2" in err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(quiet=True) as notify:
        notify(Progress(1, 2, "fused", "warm-up", "prefill 1.000 s"))
    assert capsys.readouterr().err == ""


def test_the_commands_use_the_benchmarks_that_they_name(
    teegpu: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the flags of ``plans`` come to, without measuring it."""
    seen: list[PlanBenchmark] = []
    monkeypatch.setattr(bench, "_conduct", lambda benchmark, _: seen.append(benchmark))
    done = teegpu(
        "bench", "plans", "--model", model.path, "--prompt-tokens", 9, "--decode-tokens", 2, "--link", "rtt=1ms",
        "--case", "default", "--case", "transformers,dtype=bf16",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = seen[0].document("complete")
    assert document["settings"]["prompt_tokens"] == 9
    assert document["settings"]["link"] == "rtt=1ms,bandwidth=unlimited"
    assert [entry["label"] for entry in document["results"]][-2:] == ["transformers fp32", "transformers bf16"]


@pytest.mark.parametrize(("breaches", "code"), [([], 0), (["the server's memory grew by 20.0%"], 9)])
def test_a_soak_over_its_bounds_fails_after_its_result(
    teegpu: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch, breaches: list[str], code: int
) -> None:
    from teegpu.bench.soak import SoakBenchmark

    seen: list[Any] = []
    monkeypatch.setattr(bench, "_conduct", lambda benchmark, _: seen.append(benchmark))
    monkeypatch.setattr(SoakBenchmark, "breaches", breaches)
    done = teegpu("bench", "soak", "--model", model.path, "--clients", 12, "--minutes", 0.5)
    assert done.code == code
    assert (one_line(done) if code else "") == "".join(breaches)
    settings = seen[0].document("complete")["settings"]
    assert (settings["clients"], settings["greedy"], settings["seconds"]) == (12, 3, 30.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--clients", 0], "--clients 0 is below"), (["--minutes", 0], "--minutes 0 is not above"),
     (["--clients", 2, "--greedy", 3], "--greedy 3 is not between 0 and the 2 clients")],
)  # fmt: skip
def test_a_soak_that_can_not_be(teegpu: Teegpu, model: ModelFolder, options: list[object], told: str) -> None:
    done = teegpu("bench", "soak", "--model", model.path, *options)
    assert done.code == 2
    assert told in one_line(done)


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["transports", "--transport", "zmqq"], "did you mean 'zmq'?"),
        (["transports", "--over", "ipc", "--link", "rtt=1ms"], "leave out one of --over and --link"),
        (["transports", "--link", "rtt=-1ms"], "rtt=-1ms is not a time"),
        (["curve", "--size", "0"], "--size 0 is not between 1 byte"),
    ],
)
def test_transports_that_can_not_be_measured(teegpu: Teegpu, options: list[str], told: str) -> None:
    done = teegpu("bench", *options)
    assert done.code == 2
    assert told in one_line(done)
