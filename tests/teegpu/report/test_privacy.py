"""What a report says of privacy and verification, and that no advice lowers them."""

from __future__ import annotations

from typing import Any

import pytest

from teegpu.report import beside, facts
from teegpu.report.advice import advise
from teegpu.report.listing import Line, listing
from teegpu.report.privacy import privacy_grid
from teegpu.report.sections import sections
from tests.teegpu.report.samples import document, operations


def shielded(mode: str = "two-server", *, verify: bool = True, **settings: Any) -> dict[str, Any]:
    made = document(phases__prefill__rpc_retries=0, phases__decode__rpc_retries=0)
    made["settings"] |= {"privacy": mode, "verify": verify, "wire_dtype": "int32", "prefill_plan": "attention"}
    made["settings"] |= {"decode_plan": "attention", **settings}
    made["phases"]["prefill"]["ops"] |= operations(
        ("FIXED_POINT", "tee", 240, 0.02), ("MASK", "tee", 120, 0.03), ("UNMASK", "tee", 120, 0.05),
        ("VERIFY", "tee", 120, 0.1),
    )  # fmt: skip
    return made


def cells(made: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    grid = privacy_grid(made)
    assert grid is not None
    return {row.cells[0].strip(): row.cells[1:] for row in grid.rows}


def test_the_cost_of_both_is_in_rows() -> None:
    found = cells(shielded())
    assert found["Fixed point"][0] == "20 ms"
    assert found["Privacy, in the TEE"][0] == "100 ms (5.0%)"
    assert found["Verification"][0] == "100 ms (5.0%)"
    assert "Pads, read" not in found
    assert "Privacy: two-server, verified" in [section.title for section in sections(shielded())]


def test_a_plain_run_has_no_such_section() -> None:
    assert privacy_grid(document()) is None
    plain = document()
    plain["settings"] |= {"privacy": "none", "verify": True}
    grid = privacy_grid(plain)
    assert grid is not None
    assert grid.title == "Privacy: verified"
    assert grid.notes == ()


@pytest.mark.parametrize(
    ("mode", "verify", "told"),
    [
        ("none", False, ""),
        ("none", True, "verified"),
        ("pads", True, "pads, verified"),
        ("reference", False, "reference"),
    ],
)
def test_what_is_said_of_it(mode: str, verify: bool, told: str) -> None:
    made = shielded(mode, verify=verify)
    assert facts.privacy(made) == told
    assert (told in facts.setup(made)) == bool(told)


def test_the_list_of_runs_shows_the_mode() -> None:
    from datetime import UTC, datetime

    text = "\n".join(line.plain for line in listing([Line("1", "complete", shielded())], datetime.now(UTC)))
    assert "attention (two-server)" in text


def other(kind: str, tokens: int = 1024, **changes: Any) -> dict[str, Any]:
    made = document()
    made["id"] = f"run-{kind}"
    plan = "local" if kind == "local" else "fused"
    made["settings"] |= {"privacy": "none", "prefill_plan": plan, "decode_plan": plan}
    made["phases"]["prefill"]["tokens"] = tokens
    return made | changes


def test_it_is_compared_with_runs_in_the_clear_and_in_the_tee_alone() -> None:
    made = shielded()
    found = beside.beside(made, [shielded("pads"), other("none", tokens=512), other("none"), other("local")])
    assert found["none"]["id"] == "run-none"
    assert found["none"]["prefill_seconds"] == pytest.approx(2 * other("none")["phases"]["prefill"]["seconds"])
    assert found["local"]["id"] == "run-local"
    rows = cells(made | {"beside": found})
    assert rows["In the clear took"][0] == "4.000 s"
    assert rows["All in the TEE took"][0] == "2.000 s"
    grid = privacy_grid(made | {"beside": found})
    assert grid is not None
    assert any("run-none" in note for note in grid.notes)


def test_what_can_t_be_compared_is_left_out() -> None:
    made = shielded()
    failed, longer = other("none", status="failed"), other("none", tokens=100_000)
    elsewhere = other("none", model=document()["model"] | {"digest": "another"})
    assert beside.beside(made, [failed, longer, elsewhere]) == {}
    assert not beside.wanted(document())
    grid = privacy_grid(made)
    assert grid is not None
    assert "No run in the clear" in grid.notes[0]


def test_no_advice_lowers_privacy() -> None:
    """Whatever would be quicker: neither a plan that can't be hidden nor another encoding is proposed."""
    for mode in ("two-server", "pads"):
        found = advise(shielded(mode), [other("local")])
        assert found
        for advice in found:
            assert not advice["settings"].keys() & {"run.privacy", "run.verify", "run.wire_dtype"}
            plans = {advice["settings"].get(f"run.{phase}_plan") for phase in facts.PHASES}
            assert plans <= {None, "local", "attention"}


def test_all_in_the_tee_is_advised_where_it_is_quicker() -> None:
    quick = other("local")
    quick["phases"]["decode"]["tokens"] = quick["phases"]["decode"]["tokens"] or 1
    for phase in quick["phases"].values():
        phase["seconds"] = 0.2
    told = {advice["id"]: advice["text"] for advice in advise(shielded(), [quick])}
    assert "servers would get nothing at all to see" in told["offloading-does-not-pay"]


def with_processor_seconds(made: dict[str, Any], prefill: float | None, decode: float | None) -> dict[str, Any]:
    for name, seconds in (("prefill", prefill), ("decode", decode)):
        made["phases"][name] |= {"processor_seconds": seconds, "tokens": made["phases"][name]["tokens"] or 1}
    return made


def test_leverage_is_the_processor_time_of_all_in_the_tee_over_the_runs() -> None:
    made, local = with_processor_seconds(shielded(), 2.0, 1.0), with_processor_seconds(other("local"), 5.0, 0.5)
    made |= {"beside": beside.beside(made, [local])}
    assert beside.leverage(made, ["prefill"]) == pytest.approx(2.5)
    assert beside.leverage(made) == pytest.approx(5.5 / 3.0)
    assert cells(made)["Leverage"] == ("2.50×", "0.50×")
    assert "no-leverage" not in {advice["id"] for advice in advise(made)}
    shorter = with_processor_seconds(other("local", tokens=512), 5.0, 0.5)
    made |= {"beside": beside.beside(made, [shorter])}
    assert beside.leverage(made, ["prefill"]) == pytest.approx(5.0)  # by the token


def test_a_mode_without_leverage_is_told_so_in_one_line() -> None:
    made, local = with_processor_seconds(shielded(), 2.0, 1.0), with_processor_seconds(other("local"), 1.0, 0.5)
    made |= {"beside": beside.beside(made, [local])}
    told = {advice["id"]: advice for advice in advise(made)}["no-leverage"]
    assert told["settings"] == {}
    assert told["text"].startswith("two-server has a leverage of 0.50 here")
    assert "\n" not in told["text"]


def test_nothing_is_said_of_leverage_where_a_phase_is_not_known() -> None:
    for theirs, ours in (((None, 0.5), (2.0, 1.0)), ((1.0, 0.5), (2.0, None))):
        made = with_processor_seconds(shielded(), *ours)
        made |= {"beside": beside.beside(made, [with_processor_seconds(other("local"), *theirs)])}
        assert beside.leverage(made) is None
        assert "no-leverage" not in {advice["id"] for advice in advise(made)}
    assert beside.leverage(shielded()) is None
