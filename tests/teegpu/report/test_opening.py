"""The three lines that a report opens with."""

from __future__ import annotations

import pytest

from teegpu.report.brief import brief
from teegpu.report.exports import as_markdown, as_plain
from teegpu.report.opening import opening
from teegpu.report.page import page
from teegpu.report.parts import breakdown
from teegpu.report.tables import header
from teegpu.units import human_seconds
from tests.teegpu.report.samples import document


def test_three_lines_that_agree_with_the_tables() -> None:
    sample = document()
    lines = dict(opening(sample))
    assert list(lines) == ["Verdict", "Largest cost", "To do"]
    phases = {name: breakdown(phase) for name, phase in sample["phases"].items()}
    sums = {
        f"{what} in {name}": seconds
        for name, parts in phases.items()
        for what, seconds in {
            "communication": sum(item.exposed for item in parts.communication),
            "GPU compute": sum(item.exposed for item in parts.gpu),
            "TEE compute": sum(item.exposed for item in parts.tee),
            "server overhead": parts.server.exposed,
        }.items()
    }
    assert lines["Largest cost"].startswith(f"{max(sums, key=lambda key: sums[key])}, ")
    assert lines["To do"].startswith(sample["advice"][0]["setting"])


def test_nothing_to_do_is_said_of_a_complete_run_alone() -> None:
    assert dict(opening(document(advice=[])))["To do"].startswith("nothing")
    assert "To do" not in dict(opening(document(advice=[], status="interrupted")))


def test_a_record_that_is_not_whole_has_no_clean_verdict() -> None:
    broken = document(record={"truncated": True, "failure": None, "damage": []})
    assert "not whole" in dict(opening(broken))["Verdict"]
    assert "not whole" not in dict(opening(document()))["Verdict"]


def test_a_run_of_which_nothing_was_measured_has_none() -> None:
    assert opening({}) == opening(document(phases={})) == []


@pytest.mark.parametrize("label", ["Verdict", "Largest cost", "To do"])
def test_every_format_for_people_has_them(label: str) -> None:
    sample = document()
    assert label in as_plain([header(sample)], 100)
    assert label in as_markdown(sample)
    assert label in page(sample)


@pytest.mark.parametrize(
    ("load", "told"),
    [
        ({"cores": 2, "other_cores": 1.2, "stolen_cores": 0.0}, "others used 1.2 of its 2 cores"),
        ({"cores": 2, "other_cores": 0.1, "stolen_cores": 0.5}, "its host withheld 0.5 of 2 cores"),
        ({"cores": 2, "other_cores": 0.2, "stolen_cores": 0.05}, ""),
        ({"cores": 64, "other_cores": 40.0, "stolen_cores": 0.0}, ""),  # this run may use two of them
        ({}, ""),
    ],
)
def test_a_busy_machine_is_part_of_the_verdict(load: dict[str, float], told: str) -> None:
    sample = document()
    verdict = dict(opening(document(environment=sample["environment"] | {"load": load})))["Verdict"]
    assert told in verdict
    assert ("busy" in verdict) is bool(told)


def test_what_was_predicted_stands_beside_what_it_took() -> None:
    sample = document()
    phases, settings = sample["phases"], sample["settings"]
    plans = {name: settings[f"{name}_plan"] for name in phases}
    tokens = phases["prefill"]["tokens"]
    auto = {
        "prompt_tokens": tokens / 2,  # half as long a prompt: this one takes twice that
        "predicted": {
            "prefill_seconds": {plans["prefill"]: 0.5, "another": 9.0},
            "decode_step_seconds": {plans["decode"]: 0.25},
        },
    }
    told = document(settings=settings | {"auto": auto})
    took = [human_seconds(phases[name]["seconds"] / phases[name]["passes"]) for name in ("prefill", "decode")]
    each = human_seconds(1.0 / phases["prefill"]["passes"])
    line = dict(opening(told))["Predicted"]
    assert line == f"{each} to the first token, took {took[0]}; 250 ms each after it, took {took[1]}"
    assert f"predicted: {line}" in brief(told).plain
    assert "Predicted" not in dict(opening(sample))
