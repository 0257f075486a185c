"""The report of a run that served several at once, and what it advises."""

from __future__ import annotations

from typing import Any

import pytest

from teegpu.report.advice import advise
from teegpu.report.exports import PLAIN_WIDTH, as_csv, as_plain
from teegpu.report.opening import opening
from teegpu.report.page import page
from teegpu.report.tables import tables
from tests.teegpu.report.samples import document

SPREAD = {"p50": 0.05, "p95": 0.06, "p99": 0.07, "max": 0.5}
REQUESTS: dict[str, Any] = {
    "arrived": 12, "open": 1, "ended": {"stop": 6, "length": 2, "abort": 2, "error": 1}, "prompt_tokens": 900,
    "reused_tokens": 300, "made_tokens": 480, "gave_way": 0, "steps": 100, "step_seconds": 6.0, "waited_seconds": 0.0,
    "most_running": 8, "most_waiting": 3, "most_kv_bytes": 1 << 29,
    **dict.fromkeys(("queue_seconds", "ttft_seconds", "itl_seconds", "e2e_seconds"), SPREAD),
    "batches": [{"upto": 4, "steps": 50, "seconds": 2.0, "tokens": 200},
                {"upto": 8, "steps": 50, "seconds": 2.2, "tokens": 400}],
}  # fmt: skip
CAPACITY = {"sequences": 8, "waiting": 256, "kv_bytes": 1 << 30, "prefix_bytes": 0, "step_tokens": 128}


def served(**changes: Any) -> dict[str, Any]:
    made = document()
    made["settings"] = {**made["settings"], "capacity": CAPACITY}
    made["requests"] = REQUESTS | changes
    return made | {"advice": []}


def test_what_requests_waited_for_comes_first() -> None:
    lines = as_plain(tables(served()), PLAIN_WIDTH)
    text = " ".join(lines.split("\n"))
    assert lines.index("Requests\n") < lines.index("Prefill:")
    assert "8 ran at once at most, of 8; 3 were in line; keys and values took 512.0 MiB of 1.00 GiB" in text
    assert "300 of 900 prompt tokens were still known" in text
    assert (
        "12 requests arrived, 2 ended by abort, 1 ended by error, 2 ended by length, 6 ended by stop, 1 are under"
        in text
    )
    (line,) = (line for line in lines.splitlines() if line.startswith("  5 to 8"))
    assert line.split()[3:] == ["50", "44", "ms", "181.8"]
    verdict = dict(opening(served()))["Verdict"]
    assert verdict.startswith(
        "11 requests answered, 2 of them given up, 1 of them failed; 480 tokens in 6.000 s of work"
    )
    assert "first token within 60 ms for 95 %" in verdict
    assert "Steps that only generate" in page(served())
    assert "requests.itl_seconds.p95,0.06" in as_csv(served())


@pytest.mark.parametrize(
    ("changes", "capacity", "name", "setting"),
    [
        ({"waited_seconds": 2.0}, {}, "serving-sequences", ("api.sequences", "16")),
        ({"waited_seconds": 2.0, "batches": []}, {}, "serving-full", ("", "")),
        ({"waited_seconds": 2.0, "most_running": 5}, {}, "serving-kv", ("api.kv_mib", "2048")),
        ({"gave_way": 3}, {}, "serving-kv", ("api.kv_mib", "2048")),
        ({"itl_seconds": SPREAD | {"p99": 0.3}}, {}, "serving-chunks", ("api.step_tokens", "64")),
    ],
)
def test_advice_on_what_is_in_the_way(
    changes: dict[str, Any], capacity: dict[str, Any], name: str, setting: tuple[str, str]
) -> None:
    first = advise(served(**changes))[0]
    assert (first["id"], (first["setting"], first["value"])) == (name, setting)


@pytest.mark.parametrize(
    ("part", "name"),
    [("network", "serving-limit-link"), ("gpu", "serving-limit-gpu"), ("tee", "serving-limit-attention")],
)
def test_advice_names_what_limits_a_step(part: str, name: str) -> None:
    made = served()
    phase = dict(made["phases"]["decode"])
    for each in ("network", "gpu", "tee"):
        phase[f"{each}_seconds"] = phase["seconds"] * (0.8 if each == part else 0.05)
    share = phase["tee_seconds"]
    phase["ops"] = {"ATTENTION": {"where": "tee", "count": 1, "seconds": share}}
    made["phases"] = made["phases"] | {"decode": phase}
    assert [one["id"] for one in advise(made)] == [name]


def test_a_run_of_one_prompt_gets_none_of_it() -> None:
    text = as_plain(tables(document()), PLAIN_WIDTH)
    assert "Requests" not in text
    assert not any(entry["id"].startswith("serving") for entry in advise(document()))
