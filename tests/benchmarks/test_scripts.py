"""Each script of ``benchmarks`` on a tiny model: it runs to its end, and its figures add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drafting, fleet, gpu, guards, keyed, paired, ranks, replay, rpc, serving, soak, transports
from benchmarks.harness import Script
from teegpu.errors import TeegpuError, UsageError
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
    assert "1.0 KiB, bare zmq, CURVE" in out
    ways = {(entry["transport"], entry["keys"]) for entry in document["results"]}
    assert len(ways) == 2 * 5
    assert all(entry["bytes_per_second"]["median"] > 0 for entry in document["results"])


def test_keys(run: Run) -> None:
    out, document = run(keyed, "--pairs", 1, "--prompt-tokens", 16, "--decode-tokens", 3)
    assert "| prefill |" in out
    assert all(entry["ratio"] > 0 for entry in document["results"])


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


TINY = ["--device", "cpu", "--shape", "layers=2,hidden=64,intermediate=96,heads=4,kv_heads=2,vocab=300"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_device_brings(run: Run) -> None:
    """On a CPU, with a tiny model: all parts but the recorded programs."""
    flags = ["--rows", 1, 8, "--batches", 1, 3, "--prompt-tokens", 24, "--decode-tokens", 3, "--seconds", 290]
    out, document = run(gpu, *TINY, *flags, model=False)
    assert document["status"] == "complete", document["notes"]
    compared = [result for result in document["results"] if "ways" in result]
    assert [(result["matrix"], result["rows"]) for result in compared] == [
        (matrix, rows)
        for matrix in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj", "lm_head")
        for rows in (1, 8)
    ]
    assert all(result["ways"]["float64"]["exact"] for result in compared)
    assert "| lm_head | 8 |" in out
    done = [result for result in document["results"] if "batch" in result]
    assert [(result["part"], result["batch"]) for result in done] == [(mode, n) for mode in gpu.MODES for n in (1, 3)]
    for result in done:
        assert result["prompt_tokens"] == 24 // gpu.MODES[result["part"]].cut
        assert result["decode_tokens"] == (1 if result["part"] == "pads" else 3) * result["batch"]
        assert min(result["prefill_seconds"], result["decode_tokens_per_second"]) > 0
        assert (result["offline_seconds"] > 0) == (result["part"] == "pads")
    assert f"two-server, batch 3: {24} prompt tokens in" in out


def test_parts_for_which_there_is_no_time_are_told_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_END_SECONDS", 0.0)
    _, document = run(gpu, *TINY, "--seconds", 0.2, model=False)
    assert document["status"] == "failed"
    first, second = document["notes"]
    assert first == "products: ended after 0 s with 0 results"
    assert second.startswith("no model of shape")
    assert document["results"] == []


def test_a_part_that_fails_is_told_of(tmp_path: Path) -> None:
    script = Script("", model=False)
    script.parse(["--out", str(tmp_path / "x.json")])
    parts = gpu.Parts(script, 60)
    parts.run(gpu.PRODUCTS, ["--device", "nowhere"])
    (note,) = json.loads((tmp_path / "x.json").read_text())["notes"]
    assert note.startswith("products: failed after 0 results (RuntimeError: ")


def test_a_way_that_is_not_exact_is_marked() -> None:
    ways = {"bf16 itself": {"seconds": [1.0]}, "float64": {"seconds": [2.0], "exact": True}}
    ways |= {"int8": {"seconds": [3.0], "exact": False}, "gemv": {"error": "none"}}
    _, row = gpu.table([{"part": gpu.PRODUCTS, "matrix": "x", "rows": 1, "ways": ways, "chosen": "float64"}])
    assert row == ["x", "1", "1000.000", "2.00 ×", "3.00 ×*", "–", "–", "–", "–", "–", "float64"]


@pytest.mark.extra
def test_serving(run: Run) -> None:
    """What was measured in pieces is one result; that of another measurement is no piece of it."""
    flags = [
        "clients",
        "--clients",
        "1,2",
        "--repeats",
        1,
        "--prompt-tokens",
        2,
        "--max-tokens",
        4,
        "--other-cores",
        99,
    ]
    for pieces in (1, 2):
        out, document = run(serving, *flags, "--add")
        assert f"| 2 | {pieces} |" in out
        assert [sample["completed"] for sample in document["results"]] == [1, 2] * pieces
    with pytest.raises(UsageError, match="of another measurement"):
        run(serving, *flags, "--link", "rtt=1ms", "--add")


@pytest.mark.extra
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["arrival", "--long-tokens", 20], "while the prompt is read"),
        (["memory", "--count", 200], "growth after warming up: +"),
        (["own"], "between two steps"),
        (["gone"], "in decode, not streaming"),
        (["alone"], "| run | 1 |"),
    ],
)
def test_the_other_parts_of_serving(flags: list[object], told: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "GOING", {"decode": (2, 0.2)})
    for bound in ("MAX_GROWTH", "MAX_TIMES", "MAX_OWN"):  # a tiny model on a busy machine says nothing of them
        monkeypatch.setattr(serving, bound, 1e9)
    out, _ = run(serving, *flags, "--repeats", 1, "--prompt-tokens", 2, "--other-cores", 99)
    assert told in out
    assert serving.OVER not in out


@pytest.mark.extra
def test_drafting(run: Run) -> None:
    """All layers of the model guess what it says itself, but for rounding; a part of them is a model, too."""
    out, document = run(
        drafting, "--layers", "1,2", "--repeats", 1, "--prompt-tokens", 8, "--decode-tokens", 12, "--guesses", 2
    )
    assert "| no guesses |" in out
    by_name = {result["case"]: result["samples"][0] for result in document["results"]}
    assert by_name["no guesses"]["tokens_a_step"] == 1
    whole = by_name["and a model of 2 layers"]
    assert whole["tokens_a_step"] > 1
    assert 0 < whole["accepted"] <= whole["drafted"]
    assert by_name["and a model of 1 layers"]["draft_seconds"] > 0


def test_bounds_of_serving_are_seen() -> None:
    def over(told: tuple[list[list[str]], list[str]]) -> bool:
        return any(note.startswith(serving.OVER) for note in told[1])

    def arrival(seconds: float) -> dict[str, Any]:
        return {"prompt_tokens": 9, "read_seconds": 1.0, "before_seconds": [0.1, 0.1], "during_seconds": [0.1, seconds]}

    assert [over(serving.told_of_arrival([arrival(seconds)])) for seconds in (0.1, 0.9)] == [False, True]
    readings = [{"requests": n, "failed": 0, "resident_bytes": 100 + (n >= 8)} for n in range(10)]
    assert not over(serving.told_of_memory([{"readings": readings}]))
    readings[8]["resident_bytes"] = readings[9]["resident_bytes"] = 110
    assert over(serving.told_of_memory([{"readings": readings}]))
    rows = ((1, 1, 1),)
    events = [
        ev.Stepped(20, 10, rows, 1, 0, 0), ev.Arrived(25, 7, 4, 9), ev.Stepped(40, 30, ((7, 4, 1),), 2, 0, 0),
        ev.Stepped(60, 50, ((7, 1, 1),), 2, 0, 0), ev.Stepped(80, 70, ((7, 1, 1),), 2, 0, 0), ev.Left(90, 7, "abort"),
    ]  # fmt: skip
    client = {"where": "decode", "stream": True, "sent_ns": 22, "gone_ns": 45}
    (freed,) = serving.gone_of_events({"clients": [client]}, events)["clients"]
    assert (freed["freed_seconds"], freed["steps_after"]) == (45e-9, 2)
    with pytest.raises(TeegpuError, match="at another moment"):
        serving.gone_of_events({"clients": [client | {"where": "prefill"}]}, events)
    own = {"began_ns": 0, "ended_ns": 99, "loop_seconds": 1e-9, "text_seconds": [0.0]}
    found = serving.own_of_events(own, events)
    assert found["between_seconds"] == [10e-9] * 3
    assert over(serving.told_of_own([found]))


@pytest.mark.extra
def test_a_killed_group(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(fleet, "BACK_SECONDS", 1e9)  # two seconds say nothing of throughput
    out, document = run(fleet, "--replicas", 2, "--runners", 2, "--seconds", 2)
    (result,) = document["results"]
    assert (result["failed"], result["different_answers"], len(result["follow_seconds"])) == (0, 0, 2)
    assert "| throughput is back after |" in out


def test_when_throughput_is_back() -> None:
    """10 tokens a second, 2 from 10 s on, 10 from 14 s on: the first window that is whole again ends at 17 s."""
    times = sorted([i / 10 for i in range(100)] + [10 + i / 2 for i in range(8)] + [14 + i / 10 for i in range(100)])
    assert fleet.rate(times, 0, 10) == pytest.approx(10, rel=0.01)
    assert fleet.back(times, 10.0, 10.0) == pytest.approx(7 - 0.1 * fleet.WINDOW_SECONDS, abs=0.25)
    assert fleet.back(times[:108], 10.0, 10.0) == float("inf")
