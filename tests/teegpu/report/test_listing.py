"""The list of runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from rich.cells import cell_len

from teegpu.report.listing import Line, communication_share, entry, listing
from tests.teegpu.report.samples import HOSTILE, document

NOW = datetime(2026, 1, 4, 3, 4, 5, tzinfo=UTC)


def line(status: str = "complete", **changes: Any) -> Line:
    made = document(status=status, **changes)
    return Line(made["id"], status, made)


def shown(*runs: Line, width: int | None = None) -> list[str]:
    return [text.plain for text in listing(runs, NOW, width)]


def test_a_line_says_what_a_run_was() -> None:
    heading, run = shown(line())
    assert heading.split() == [
        "id", "age", "status", "model", "plan", "transport", "wire", "tokens", "TTFT", "TPOT", "comm.", "note",
    ]  # fmt: skip
    assert run == (
        "20260102-030405-abcdef  2 d  complete  smollm2-135m  fused / attention  pipelined+zstd  fp16  "
        "1,024 + 31  2.001 s  50 ms  62.0%  10GbE, jumbo frames"
    )


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_narrow_terminal_a_run_takes_more_lines(width: int) -> None:
    lines = shown(line(), line(note=""), width=width)
    assert max(map(cell_len, lines)) <= 80
    assert [text.split()[0] for text in lines] == [
        "id", "plan", "20260102-030405-abcdef", "fused", "10GbE,", "20260102-030405-abcdef", "fused",
    ]  # fmt: skip


def test_a_run_that_can_not_be_read() -> None:
    _, run = shown(Line("20260104-030335-abcdef", "unreadable", {}, "written by a newer teegpu"))
    assert run.split() == [
        "20260104-030335-abcdef", "30", "s", "unreadable", "–", "–", "–", "–", "–", "–", "–", "–",
        "written", "by", "a", "newer", "teegpu",
    ]  # fmt: skip


@pytest.mark.parametrize("record", [{"truncated": True}, {"failure": "disk full"}, {"damage": ["a block"]}])
def test_a_record_that_is_not_whole_is_marked(record: dict[str, Any]) -> None:
    _, run = shown(line(record=record))
    assert "  complete, cut  " in run


def test_a_run_as_json() -> None:
    found = entry(line(phases__decode={}, latency={}))
    assert found["prompt_tokens"] == 1024
    assert found["generated_tokens"] is None
    assert found["ttft_seconds"] is None
    assert found["decode_plan"] == "attention"
    assert "problem" not in found
    # all tokens that reached the user: also the first, which is the prefill's
    assert entry(line(generated_tokens=257))["generated_tokens"] == 257


def test_the_share_of_communication_is_that_of_all_phases() -> None:
    assert communication_share(document()) == pytest.approx((0.25 + 0.8 + 0.15 + 1.0) / 3.55)
    assert communication_share({}) is None


@pytest.mark.parametrize("started", ["", "yesterday", 7])
def test_a_run_that_does_not_say_when_it_began_has_its_id(started: object) -> None:
    assert line(started_at=started).age_seconds(NOW) == 2 * 86400
    assert Line("x", "complete", {}).age_seconds(NOW) is None


def test_a_time_without_a_zone_is_utc() -> None:
    assert line(started_at="2026-01-04T03:04:00").age_seconds(NOW) == 5


def test_hostile_strings_do_nothing() -> None:
    found = shown(line(note=HOSTILE, model={"name": HOSTILE}, settings={"transport": HOSTILE}))
    assert all(text.isprintable() for text in found)
