"""Runs side by side, and thresholds."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from rich.cells import cell_len

from teegpu.errors import UsageError
from teegpu.report.comparison import Condition, comparison, failures, warnings
from teegpu.report.measures import MEASURES, Measure, find, relative_change
from teegpu.report.sidebyside import compared, compared_csv, compared_markdown, letter
from tests.teegpu.report.samples import HOSTILE, document, on_terminal


def other(**changes: Any) -> dict[str, Any]:
    """A run whose decoding is slower and whose TTFT is better."""
    usual = {
        "id": "20260102-040000-fedcba",
        "latency": {"ttft_seconds": 1.5, "tpot_median_seconds": 0.055, "tpot_p95_seconds": 0.0625},
        "phases__decode__tokens_per_second": 18.0,
        "phases__decode__rpc_calls": 1000,
    }
    return document(**(usual | changes))


def judged(*conditions: str, runs: list[dict[str, Any]] | None = None) -> list[str]:
    documents = runs or [document(), other()]
    return failures(comparison(documents, conditions))


# Figures


def test_a_figure_may_be_named_in_three_ways() -> None:
    documents = [document()]
    assert find("tpot_median_seconds", documents).path == "latency.tpot_median_seconds"
    assert find("latency.ttft_seconds", documents).path == "latency.ttft_seconds"
    assert find("decode.rpc_calls", documents).path == "phases.decode.rpc_calls"
    assert find("phases.prefill.layers.7.gpu_seconds", documents).value(documents[0]) == pytest.approx(0.045)
    assert find("phases.prefill.ops.LINEAR.seconds", documents).value(documents[0]) == 0.75


def test_a_figure_that_no_run_has_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no figure of these runs is called 'tpot_seconds', did you mean 'tpot_"):
        find("tpot_seconds", [document()])
    with pytest.raises(UsageError, match=r"did you mean 'decode\.rpc_calls'"):
        find("decode.rpc_call", [document()])


def test_a_figure_that_is_known_but_missing_is_found() -> None:
    assert find("limit.ratio", [{}]).value({}) is None


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("latency.ttft_seconds", 0.1, "worse"),
        ("latency.ttft_seconds", -0.1, "better"),
        ("phases.decode.tokens_per_second", 0.1, "better"),
        ("phases.decode.tokens_per_second", -0.1, "worse"),
        ("phases.decode.tokens", 0.1, ""),
        ("model.parameters", 0.1, ""),
        ("latency.ttft_seconds", 0.0004, "same"),
        ("latency.ttft_seconds", None, ""),
    ],
)
def test_which_way_is_better(path: str, change: float | None, told: str) -> None:
    assert Measure(path, "").verdict(change) == told


def test_every_measure_of_a_whole_document_is_there() -> None:
    assert [measure.path for measure in MEASURES if measure.value(document()) is None] == []


def test_changes() -> None:
    assert relative_change(2.0, 3.0) == 0.5
    assert relative_change(0, 0) == 0
    assert relative_change(0, 1) == float("inf")
    assert relative_change(None, 1) is None
    assert relative_change(1, None) is None


# Thresholds


@pytest.mark.parametrize(
    "condition",
    [
        "tpot_median_seconds>5%",
        "tpot_median_seconds > 5 %",
        "tpot_median_seconds>=9.99%",
        "ttft_seconds>1.4",
        "ttft_seconds<1.6",
        "ttft_seconds<-20%",
        "decode.tokens_per_second<-5%",
        "phases.decode.rpc_calls<=1000",
        "phases.decode.rpc_calls>1e2",
    ],
)
def test_conditions_that_are_met_fail(condition: str) -> None:
    assert len(judged(condition)) == 1


@pytest.mark.parametrize(
    "condition",
    ["tpot_median_seconds>11%", "ttft_seconds>5%", "ttft_seconds>1.5", "ttft_seconds<1.5", "tpot_p95_seconds>0%",
     "decode.tokens_per_second<-10.1%"],
)  # fmt: skip
def test_conditions_that_are_not_met_pass(condition: str) -> None:
    assert judged(condition) == []


def test_a_failure_says_what_was_found() -> None:
    assert judged("tpot_median_seconds>5%", "ttft_seconds>1.4", "ttft_seconds>9") == [
        "tpot_median_seconds>5%: 20260102-040000-fedcba has 55 ms, +10.0% to the 50 ms of 20260102-030405-abcdef",
        "ttft_seconds>1.4: 20260102-040000-fedcba has 1.500 s",
    ]


def test_each_run_after_the_first_is_judged() -> None:
    assert len(judged("ttft_seconds>0.1", runs=[document(), other(), document(id="c")])) == 2


def test_from_nothing_to_something() -> None:
    runs = [document(phases__decode__rpc_retries=0), other(phases__decode__rpc_retries=3)]
    assert "+∞" in judged("decode.rpc_retries>50%", runs=runs)[0]


def test_a_figure_that_is_missing_where_it_is_needed_fails() -> None:
    missing = other(latency={"ttft_seconds": 1.0})
    assert judged("tpot_median_seconds>5%", runs=[document(), missing])[0].endswith("fedcba has no such figure")
    assert judged("tpot_median_seconds>5%", runs=[missing, document(id="b")])[0].endswith("fedcba has no such figure")
    assert judged("tpot_median_seconds>1", runs=[missing, document(id="b")]) == []


@pytest.mark.parametrize(
    "text", ["", "ttft_seconds", "ttft_seconds>", "ttft_seconds>x", ">5%", "a==1", "a>5%%", "a>1e999"]
)
def test_conditions_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--fail-if"):
        Condition.parse(text, [document()])


# Warnings


def test_like_runs_have_no_warning() -> None:
    assert warnings([document(), other()]) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__name": "qwen"}, "models differ: smollm2-135m, qwen"),
        ({"model__digest": "f" * 64}, "digest of the model differ: 0123456789ab, ffffffffffff"),
        ({"phases__prefill__tokens": 512}, "prompt lengths differ: 1,024 tokens, 512 tokens"),
        ({"phases__decode__tokens": 9}, "generated lengths differ: 31 tokens, 9 tokens"),
        ({"environment__cpu": "Other"}, "machines differ: Some CPU 2 cores, Other 2 cores"),
        ({"server": {"device": "cpu"}}, "servers differ: server cuda:0 bf16 8 threads, server cpu"),
        ({"settings__link": "rtt=5ms"}, "links differ: real, rtt=5ms"),
        ({"status": "interrupted"}, "20260102-040000-fedcba is interrupted: its figures are of a part"),
        ({"record": {"failure": "disk full"}}, "20260102-040000-fedcba: recording ended early: disk full"),
    ],
)
def test_what_makes_runs_hard_to_compare(changes: dict[str, Any], told: str) -> None:
    assert warnings([document(), other(**changes)]) == [told]


def test_a_run_without_a_server_may_be_compared_with_one_that_has_it() -> None:
    assert warnings([document(), other(server={}, settings__link="rtt=5ms")]) == []


# How it looks


def table(width: int, *documents: dict[str, Any], conditions: tuple[str, ...] = ()) -> str:
    runs = list(documents)
    return on_terminal(compared(comparison(runs, conditions), width), width)


def test_two_runs() -> None:
    shown = table(80, document(), other(), conditions=("tpot_median_seconds>5%", "ttft_seconds>5%"))
    assert "A: 20260102-030405-abcdef · smollm2-135m" in shown
    lines = {line.strip().split("  ")[0]: line.split() for line in shown.splitlines()}
    assert lines["TTFT"][1:] == ["2.001", "s", "1.500", "s", "-501", "ms", "-25.0%", "better"]
    assert lines["TPOT, median"][2:] == ["50", "ms", "55", "ms", "+5", "ms", "+10.0%", "worse"]
    assert lines["TPOT, p95"][-2:] == ["0.0%", "same"]
    assert lines["RPC calls"][-2:] == ["-47.1%", "better"]
    assert "FAILED tpot_median_seconds>5%" in shown
    assert "passed ttft_seconds>5% (20260102-040000-fedcba)" in shown


def test_runs_that_computed_nothing() -> None:
    empty = document(phases={}, latency={}, link={}, memory={}, limit={}, generated_tokens=0, endpoints=[])
    shown = table(80, empty, empty)
    assert "! nothing was computed in any of them" in shown
    assert "against" not in shown
    assert "nothing was computed" in compared_markdown(comparison([empty, empty]))


@pytest.mark.parametrize("width", [60, 73, 74, 80, 100])
def test_it_fits(width: int) -> None:
    shown = table(width, document(), other())
    assert max(map(cell_len, shown.splitlines())) <= width
    assert "…" not in shown
    assert ("difference" in shown) == (width >= 74)


def test_three_runs_stand_side_by_side_and_each_against_the_first() -> None:
    shown = table(80, document(), other(), other(id="c"))
    assert "All runs" in shown
    assert "B against A" in shown
    assert "C against A" in shown


def test_json_csv_and_markdown() -> None:
    runs = [document(), other(phases__decode__rpc_retries=3, note=HOSTILE)]
    made = comparison(runs, ["ttft_seconds>9"])
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    figures = {figure["figure"]: figure for figure in made["figures"]}
    assert figures["latency.ttft_seconds"]["values"] == [2.001, 1.5]
    assert figures["phases.decode.rpc_retries"]["changes"] == [0.0, None]
    assert made["thresholds"][0]["failed"] is False
    rows = list(csv.DictReader(io.StringIO(compared_csv(made))))
    ttft = [row for row in rows if row["figure"] == "latency.ttft_seconds"]
    assert [row["value"] for row in ttft] == ["2.001", "1.5"]
    assert [row["verdict"] for row in ttft] == ["", "better"]
    shown = compared_markdown(made)
    assert "| TTFT | 2.001 s | 1.500 s | -501 ms | -25.0% better |" in shown
    assert "\x1b" not in shown


def test_letters() -> None:
    assert [letter(0), letter(25), letter(26)] == ["A", "Z", "#27"]
