"""Each script of ``benchmarks`` on a tiny model: it runs to its end, and its figures add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guards, paired, ranks, replay, rpc, soak, transports
from teegpu.record import events as ev
from tests.conftest import TinyModel

Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def run(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """``run(script, flags…)`` → what it printed, and its document."""
    monkeypatch.chdir(tmp_path)

    def call(script: Any, *flags: object, model: bool = True) -> tuple[str, dict[str, Any]]:
        own = ["--model", str(tiny_model("llama").path)] if model else []
        script.main([*own, "--out", str(tmp_path / "x.json"), *map(str, flags)])
        return capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())

    return call


def test_recording(run: Run) -> None:
    out, document = run(paired, "record", "--pairs", 1, "--prompt-tokens", 16, "--decode-tokens", 3)
    assert "| prefill |" in out
    assert "the recorder's thread used" in out
    ((without, with_it),) = document["results"][-1]["samples"]
    assert without["events"] == 0 < with_it["events"]
    assert with_it["cpu_seconds"] > 0


def test_watching(run: Run) -> None:
    out, document = run(paired, "watch", "--pairs", 1, "--prompt-tokens", 16, "--decode-tokens", 3)
    assert "the monitor (120×40" in out
    ((_, watched),) = document["results"][-1]["samples"]
    assert watched["bytes"] > 2**20


@pytest.mark.extra
def test_replay(run: Run) -> None:
    out, document = run(replay, "--hours", 0.01, "--tokens", 200, "--speed", 0)
    assert "with the run's report on the screen" in out
    assert all(reading["resident_bytes"] > 2**20 for reading in document["results"])


def test_a_long_run_is_a_short_one_again_and_again() -> None:
    """Three passes of 10 ms become 4 repetitions of two passes in 8 s: requests go on counting, times are stretched."""
    events: list[ev.Event] = [ev.PhaseBegan(0, ev.DECODE, 3, 1)]
    for number in range(3):
        events += [ev.Lap(number * 10**7, (number + 1) * 10**7, ev.TEE, "SILU", 0, 0, number + 1),
                   ev.TokensMade((number + 1) * 10**7, 1)]  # fmt: skip
    begin, *repetitions, (ended,) = replay.LongRun.of(events).events(8, 8.0)
    assert begin[0] == ev.PhaseBegan(0, ev.DECODE, 8, 1)
    assert len(repetitions) == 4
    laps = [event for events in repetitions for event in events if isinstance(event, ev.Lap)]
    assert [lap.request_id for lap in laps] == list(range(2, 10))
    assert [lap.end_ns - lap.start_ns for lap in laps] == [10**9] * 8
    assert [lap.start_ns for lap in laps] == [10**7 + number * 10**9 for number in range(8)]
    assert ended == ev.PhaseEnded(10**7 + 8 * 10**9, ev.DECODE, 9, 9)


def test_an_rpc_s_parts_add_up_to_its_overhead(run: Run) -> None:
    out, document = run(rpc, "--rounds", 5)
    assert "a decode step" in out
    assert {entry["part"] for entry in document["results"]} == {key for key, _ in rpc.PARTS}
    trips = [
        rpc.Trip(10.0, 1.0, 7.0, 0.5, 0.25, 0.25, 3.0, 0.5, 2.0),
        rpc.Trip(12.0, 1.0, 8.0, 0.5, 0.0, 0.0, 3.0, 0.0, 2.0),
    ]
    found = rpc.parts(trips)
    own = ("encode", "decode", "runner_rest", "queue", "server_decode", "server_encode", "transport")
    for place in range(2):
        assert sum(found[key][place] for key in own) == pytest.approx(found["overhead"][place])


def test_transports(run: Run) -> None:
    out, document = run(transports, "--rounds", 1, "--size", 1024, "--over", "ipc", model=False)
    assert "1.0 KiB, pipelined, keys" in out
    ways = {(entry["transport"], entry["keys"]) for entry in document["results"]}
    assert len(ways) == 2 * 5
    assert all(entry["bytes_per_second"]["median"] > 0 for entry in document["results"])


def test_a_soak(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_SAMPLES", 4)
    monkeypatch.setattr(soak, "MAX_UNFAIRNESS", 1e9)  # two seconds say nothing of fairness
    out, document = run(soak, "--clients", 4, "--minutes", 0.03)
    assert "over its bound" not in out
    assert all(entry["programs"] > 0 for entry in document["results"][:-1])


def test_what_a_soak_holds_is_seen() -> None:
    assert soak.growth([1] * 9) is None
    assert soak.growth([50, 50, 100, 100, 100, 100, 100, 100, 120, 120]) == pytest.approx(0.2)
    found = soak.breaches([], [100] * 8 + [120] * 2, 3, 1)
    assert ["memory grew by 20.0%" in found[0], "3 descriptors" in found[1], "exit code 1" in found[2]] == [True] * 3


def test_guards(run: Run) -> None:
    out, document = run(guards, "--rounds", 2, "--connections", 2)
    assert "| both | all |" in out
    shares = [result["share"] for result in document["results"]]
    assert {result["side"] for result in document["results"]} == {"runner", "server"}
    assert all(share > 0 for share in shares)


def test_ranks(run: Run) -> None:
    out, document = run(ranks, "--rows", 2, "--seconds", 0.01)
    assert "| fused after MLP | 2 |" in out
    assert [entry["metrics"]["rows"] for entry in document["results"]] == [2] * 6
    assert all(len(entry["samples"]) >= 3 for entry in document["results"])
