"""``teegpu bench ladder``, ``show`` and ``plot`` as their user meets them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench import pool
from teegpu.bench.ladder import LadderBenchmark
from teegpu.cli import benchladder
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
def ladder(teegpu: Teegpu, model: ModelFolder) -> Teegpu:
    def call(*args: object) -> Outcome:
        return teegpu("bench", "ladder", "--model", model.path, "--prompt-tokens", 24, "--decode-tokens", 3, *args)

    return call


def one_line(done: Outcome) -> str:
    (told,) = done.err.splitlines()
    assert told.startswith("teegpu: ")
    return told.removeprefix("teegpu: ")


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
    # and what is made of the file
    shown = teegpu("bench", "show", out)
    assert shown.code == 0
    assert "per-op, packed in msgpack" in shown.out
    assert teegpu("bench", "show", out, out, "--format", "md").out.count("| rung |") == 2 * 4
    assert teegpu("bench", "show", out, "--format", "csv").out.startswith("rung,label,")
    drawn = teegpu("bench", "plot", out, "--phase", "decode", "--out", "x.svg")
    assert drawn.code == 0, drawn.err
    assert "without caches" in Path("x.svg").read_text()


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rungs", "fussed"], "there is no rung 'fussed', did you mean 'fused'?; there are per-op, batched"),
        (["--link", "rtt=5parsecs"], "rtt=5parsecs is not a time"),
        (["--link", "rt=5ms"], "unknown key 'rt', did you mean 'rtt'?"),
        (["--link", "bandwidth=0mbit"], "bandwidth must be at least 1kbit"),
        (["--resume"], "--resume goes on with a result in JSON"),
        (["--resume", "--out", "x.md"], "name its file with --out FILE.json"),
        (["--repeats", "0"], "--repeats 0 is below the least, 1"),
        (["--max-seconds", "-1"], "--max-seconds -1 is not above 0"),
        (["--endpoint", "tcp://127.0.0.1:1", "--rungs", "per-op"], "it needs a server that packs tensors in msgpack"),
    ],
)  # fmt: skip
def test_flags_that_can_not_be(ladder: Teegpu, options: list[str], told: str) -> None:
    done = ladder(*options)
    assert done.code == 2
    assert told in one_line(done)
    assert done.out == ""


def test_a_prompt_that_is_longer_than_the_context(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("bench", "ladder", "--model", model.path)
    assert done.code == 3
    assert "which ends at 256: give less" in one_line(done)


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
    monkeypatch.setattr(benchladder, "conduct", lambda benchmark, *_, **__: seen.append(benchmark))
    assert ladder("--resume", "--out", "x.json", "--max-seconds", 60, "--no-check").code == 0
    settings = seen[0].document("complete")["settings"]
    assert (settings["max_seconds"], settings["check"], len(settings["rungs"])) == (60.0, False, 18)


@pytest.mark.parametrize("command", ["show", "plot"])
def test_files_that_are_no_results(teegpu: Teegpu, command: str) -> None:
    Path("x.json").write_text("{}")
    done = teegpu("bench", command, "x.json")
    assert (done.code, done.out) == (2, "")
    assert "x.json is no result of 'teegpu bench'" in one_line(done)
    Path("x.json").write_text(
        json.dumps({"schema": "teegpu.bench/1", "benchmark": "ladder", "status": "complete", "machine": {},
                    "versions": {}, "settings": {}, "notes": [], "results": [{}]})
    )  # fmt: skip
    done = teegpu("bench", command, "x.json")
    assert (done.code, done.out) == (2, "")
    assert "x.json is a result of 'teegpu bench' that is damaged" in one_line(done)


def test_more_results_than_a_format_can_hold(teegpu: Teegpu) -> None:
    done = teegpu("bench", "show", "a.json", "b.json", "--format", "csv")
    assert done.code == 2
    assert "--format csv is for one result" in one_line(done)
