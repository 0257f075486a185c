"""The lines that end a run."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from teegpu.record import events as ev
from teegpu.report.brief import brief
from teegpu.stats.document import document
from teegpu.stats.summary import Summary

MS = 1_000_000


def phase(name: str, start_ms: int, passes: int, tokens: int, rpc_bytes: tuple[int, int] | None) -> list[ev.Event]:
    """A phase of 100 ms per pass, half of each waiting for one request."""
    events: list[ev.Event] = [ev.PhaseBegan(start_ms * MS, name)]
    for number in range(passes):
        at = start_ms + 100 * number
        events.append(ev.Lap(at * MS, (at + 50) * MS, ev.TEE, "RMSNORM", 0, 0, 0))
        if rpc_bytes:
            up, down = rpc_bytes
            sent, received = (at + 50) * MS, (at + 100) * MS
            events.append(ev.Rpc(number, "q", 0, 0, sent, received, up, down, up, down, 0.0, 0.0, 0.0, 0.025, 0.0, {}))
            events.append(ev.Lap(sent, received, ev.WAIT, "WAIT", 0, 0, number))
        events.append(ev.TokensMade((at + 100) * MS, 1))
    end = start_ms + 100 * passes
    return [*events, ev.PhaseEnded(end * MS, name, tokens, passes)]


def make(
    *, decode_passes: int = 3, rpc_bytes: tuple[int, int] | None = (1536, 20 * 2**20), **changes: Any
) -> dict[str, Any]:
    summary = Summary()
    summary.add(phase(ev.PREFILL, 0, 1, 36, rpc_bytes))
    if decode_passes:
        summary.add(phase(ev.DECODE, 100, decode_passes, decode_passes, rpc_bytes))
    summary.add(changes.pop("events", []))
    settings = {"prefill_plan": "fused", "decode_plan": "fused", "transport": "pipelined", "wire_dtype": "fp16"}
    values: dict[str, Any] = {
        "run_id": "1",
        "status": "complete",
        "started_at": "now",
        "model": {"name": "smollm2-135m"},
        "settings": settings | changes.pop("settings", {}),
        "tee": {},
        "server": {"device": "cpu"},
        "summary": summary,
        "outputs": [],
    }
    return document(**(values | changes))


def test_it_shows_the_phases_with_their_figures() -> None:
    assert brief(make()).plain.splitlines() == [
        "smollm2-135m · fused · pipelined · fp16 · TTFT 100 ms · TPOT 100 ms median, 100 ms p95",
        "         tokens  seconds  tokens/s  RPC calls       up      down  communication",
        "prefill      36    0.100     360.0          1  1.5 KiB  20.0 MiB          25.0%",
        "decode        3    0.300      10.0          3  4.5 KiB  60.0 MiB          25.0%",
    ]


def test_it_fits_80_columns_in_an_ordinary_run() -> None:
    assert max(cell_len(line) for line in brief(make(), 80).plain.splitlines()) <= 80


def test_figures_of_any_size_stay_aligned() -> None:
    lines = brief(make(rpc_bytes=(3, 123 * 2**30))).plain.splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    assert "123.00 GiB" in lines[1]


def test_on_a_narrow_terminal_columns_become_rows() -> None:
    lines = brief(make(), 40).plain.splitlines()
    assert lines[:3] == [
        "smollm2-135m · fused · pipelined · fp16", "TTFT 100 ms", "TPOT 100 ms median, 100 ms p95",
    ]  # fmt: skip
    assert lines[3:] == [
        "                prefill    decode",
        "tokens               36         3",
        "seconds           0.100     0.300",
        "tokens/s          360.0      10.0",
        "RPC calls             1         3",
        "up              1.5 KiB   4.5 KiB",
        "down           20.0 MiB  60.0 MiB",
        "communication     25.0%     25.0%",
    ]


@pytest.mark.parametrize("width", [10, 33, 40, 60, 79, 80, 200, None])
def test_nothing_is_cut_off_however_narrow_it_is(width: int | None) -> None:
    name = "organisation/a-model-with-a-very-long-name-of-the-kind-that-people-like-to-give-Instruct-v0.3"
    text = brief(make(model={"name": name}), width).plain
    assert name in text
    for figure in ("0.100", "0.300", "360.0", "20.0 MiB", "25.0%", "TTFT 100 ms"):
        assert figure in text
    assert "…" not in text


def test_two_plans() -> None:
    assert " · fused / local · " in brief(make(settings={"decode_plan": "local"})).plain


def test_without_a_server_nothing_is_said_of_a_link() -> None:
    text = brief(make(server={}, rpc_bytes=None)).plain
    assert text.splitlines()[0] == "smollm2-135m · fused · TTFT 100 ms · TPOT 100 ms median, 100 ms p95"
    assert text.splitlines()[2].split() == ["prefill", "36", "0.100", "360.0", "0", "0", "B", "0", "B", "0.0%"]


def test_an_emulated_link_is_named() -> None:
    assert " · link rtt=5ms · " in brief(make(settings={"link": "rtt=5ms"})).plain


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_was_not_completed_says_so_first(status: str) -> None:
    assert brief(make(status=status)).plain.startswith(f"{status} · smollm2-135m · ")


def test_a_phase_that_did_not_take_place_has_no_line() -> None:
    lines = brief(make(decode_passes=0)).plain.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["tokens", "prefill"]


def test_a_run_without_any_phase_has_no_table() -> None:
    assert brief(make(summary=Summary(), status="failed")).plain == "failed · smollm2-135m · fused · pipelined · fp16"


def test_reused_tokens_of_several_prompts() -> None:
    answers = [{"prompt_tokens": 1000, "reused_tokens": 0}, {"prompt_tokens": 500, "reused_tokens": 480}]
    assert brief(make(outputs=answers)).plain.endswith("\n480 of 1,500 prompt tokens reused from the prompt before")


def test_accepted_guesses() -> None:
    events = [ev.PhaseBegan(0, ev.DECODE), ev.Speculated(8, 6), ev.PhaseEnded(0, ev.DECODE, 6, 0)]
    assert brief(make(events=events)).plain.endswith("\n6 of 8 guessed tokens accepted, 3.00 tokens per step")
    narrow = brief(make(events=events), 30).plain.splitlines()
    assert narrow[-2:] == ["6 of 8 guessed tokens", "accepted, 3.00 tokens per step"]


def test_advice_and_where_there_is_more() -> None:
    advised = make()
    advised["advice"] = [
        {
            "id": "decode-local",
            "text": "Decode took 745 ms a token, 78% of it network. In the TEE alone it would take 0.1 s.",
            "settings": {"run.decode_plan": "local", "run.check_finite": False},
            "predicted_saving_seconds": 9.337,
        },
        {"id": "another", "text": "Another."},
    ]
    lines = brief(advised, details="teegpu report last").plain.splitlines()
    assert lines[-2:] == [
        "advice: Decode took 745 ms a token, 78% of it network: "
        "run.decode_plan = local, run.check_finite = false saves about 9.3 s",
        "details: teegpu report last",
    ]


def test_strings_from_elsewhere_do_nothing_to_the_terminal() -> None:
    assert "\x1b" not in brief(make(model={"name": "\x1b[2J"}, settings={"transport": "\x1b]0;x"})).plain
