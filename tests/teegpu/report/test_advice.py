"""Advice: for each rule a run where it speaks and one where it does not; what it says; its order and silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from teegpu.report.advice import advise, find_references
from teegpu.report.advice_rules import MIN_SHARE
from teegpu.settings import SETTINGS
from teegpu.stats.document import document
from teegpu.stats.summary import Summary
from tests.teegpu.stats.simulated import SMALL, Speeds, run

FAST = {"rtt": 2e-4, "up": 3e9, "down": 3e9}
SLOW = {"rtt": 0.02, "up": 25e6, "down": 25e6}
BESIDE = {"device": "cpu", "dtype": "fp32", "threads": 1, "embedded": True}
TWO_CORES = {"threads": {"runner": 1, "server": 1, "cores": 2}}

Document = dict[str, Any]


def wall(made: Document) -> float:
    return sum(phase["seconds"] for phase in made["phases"].values())


def compressing(*, saved: float, seconds: float, speeds: Speeds) -> Document:
    """A run in lock step whose frames shrank by ``saved`` and whose codec took ``seconds`` of serialization."""
    made = run(transport="zmq+zstd", chunk_tokens=2048, speeds=speeds, ratio=1 - saved)
    phase = made["phases"]["prefill"]
    phase["compression"]["seconds"] = seconds
    phase["serialization_seconds"] += seconds
    phase["seconds"] += seconds
    return made


def local_run(seconds_a_token: float, tokens: int = 64, made: int = 20, **more: Any) -> Document:
    return run(plan="local", prompt=tokens, made=made, speeds=Speeds(tee=seconds_a_token / SMALL.layers)) | more


def probed(step: float) -> dict[str, Any]:
    """The settings of a run that measured, before it began, what the TEE alone takes."""
    predicted = {"prefill_seconds": {"local": 10 * step}, "decode_step_seconds": {"local": step}}
    return {"auto": {"prompt_tokens": 64, "predicted": predicted}}


def stalled(seconds: float) -> Document:
    """A run in which one request took so long."""
    made = copy.deepcopy(run(plan="attention", transport="zmq", prompt=64, made=20, speeds=Speeds(rtt=5e-3)))
    phase = made["phases"]["decode"]
    phase["rpc_latency"]["max_seconds"] = seconds
    for name in ("seconds", "network_seconds"):
        phase[name] += seconds
    return made


def drafted(accepted: int) -> Document:
    """A run in which a draft model took as long as ten steps."""
    made = copy.deepcopy(
        run(prompt=64, made=20, speeds=Speeds(rtt=0.02), settings={"speculate": 4, "draft_model": "x"})
    )
    phase = made["phases"]["decode"]
    took = 10 * phase["seconds"] / phase["passes"]
    phase["ops"]["DRAFT"] = {"count": phase["passes"], "seconds": took}
    phase["speculation"] = {"drafted_tokens": 40, "accepted_tokens": accepted}
    for name in ("seconds", "tee_seconds"):
        phase[name] += took
    return made


SPEAKS: dict[str, Callable[[], tuple[Document, Document]]] = {
    # rule: a run where it must speak, one where it must not
    "plan-rounds": lambda: (
        run(plan="attention", transport="zmq", prompt=64, made=20, speeds=Speeds(rtt=0.02)),
        run(plan="fused", transport="zmq", prompt=64, made=20, speeds=Speeds(rtt=0.02)),
    ),
    "plan-scores": lambda: (
        run(plan="batched", transport="zmq", chunk_tokens=2048),
        run(plan="attention", transport="zmq", chunk_tokens=2048),
    ),
    "wire-dtype": lambda: (run(wire="fp32"), run(wire="fp32", speeds=Speeds(**FAST, gpu=5e-5))),
    "wire-int8": lambda: (run(wire="fp16"), run(wire="fp16", speeds=Speeds(**FAST))),
    "compression-off": lambda: (
        compressing(saved=0.02, seconds=0.2, speeds=Speeds(**FAST)),
        compressing(saved=0.3, seconds=0.2, speeds=Speeds(**SLOW)),
    ),
    "compression-on": lambda: (run(speeds=Speeds(**SLOW)), run(speeds=Speeds(rtt=1e-3, up=1.25e9, down=1.25e9))),
    "overlap": lambda: (run(transport="zmq", chunk_tokens=2048), run(transport="zmq", chunk_tokens=2048, prompt=100)),
    "chunk-too-small": lambda: (
        run(transport="zmq", chunk_tokens=16, prompt=96, speeds=Speeds(rtt=0.02)),
        run(transport="zmq", chunk_tokens=128, prompt=96, speeds=Speeds(rtt=0.02)),
    ),
    "chunk-too-large": lambda: (run(chunk_tokens=512), run(chunk_tokens=64)),
    "server-queue": lambda: (run(prompt=64, made=20, speeds=Speeds(queue=0.01)), run(prompt=64, made=20)),
    "threads-oversubscribed": lambda: (
        run(
            server=BESIDE | {"threads": 4},
            settings={"threads": {"runner": 4, "server": 4, "cores": 4}},
            speeds=Speeds(**FAST, tee=2e-5, gpu=5e-5),
        ),
        run(server=BESIDE | {"threads": 2}, settings={"threads": {"runner": 2, "server": 2, "cores": 4}}),
    ),
    "serialization-bound": lambda: (
        run(wire="int8", prompt=32, made=30, speeds=Speeds(**FAST, encode=0.2, server_encode=0.1)),
        run(wire="int8", speeds=Speeds(**SLOW)),
    ),
    "tee-bound": lambda: (
        run(speeds=Speeds(tee=1e-4), settings={"threads": {"runner": 2, "server": None, "cores": 16}}),
        run(speeds=Speeds(tee=1e-4), settings={"threads": {"runner": 16, "server": None, "cores": 16}}),
    ),
    "gpu-bound": lambda: (run(speeds=Speeds(**FAST, gpu=1e-4)), run()),
    "stall": lambda: (stalled(5.0), stalled(0.1)),
    "decode-local": lambda: (
        run(prompt=64, made=20, settings=probed(2e-3)),
        run(prompt=64, made=20, settings=probed(2.0)),
    ),
    "decode-speculate": lambda: (
        run(prompt=64, made=20, speeds=Speeds(rtt=0.02)),
        run(prompt=64, made=20, speeds=Speeds(rtt=0.02), settings={"speculate": 4}),
    ),
    "draft-off": lambda: (drafted(accepted=2), drafted(accepted=15)),
    "offloading-does-not-pay": lambda: (
        run(prompt=64, made=20, settings=probed(2e-3), speeds=Speeds(**SLOW)),
        run(prompt=64, made=20, server=BESIDE, settings=TWO_CORES, speeds=Speeds(**SLOW)),
    ),
    "at-the-limit": lambda: (
        run(speeds=Speeds(gpu=1e-4)),
        run(transport="zmq", chunk_tokens=2048, wire="int8"),
    ),
}


@cache
def runs(rule: str) -> tuple[Document, Document]:
    """The two runs of a rule: made when they are asked for, since collecting the tests should cost nothing. They are
    shared, so tests must not change them."""
    return SPEAKS[rule]()


def by_id(made: Document, *references: Document) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in advise(made, references)}


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_speaks_where_it_must(rule: str) -> None:
    made, _ = runs(rule)
    if rule in ("decode-local", "chunk-too-small"):  # a better one stands in its place unless it is the only one
        made = copy.deepcopy(made)
        made["phases"]["prefill"] |= {"rpc_calls": 0} if rule == "decode-local" else {}
    found = by_id(made)
    entry = found.get(rule) or _hidden(made, rule)
    if rule == "stall":
        assert next(iter(found)) == rule
    assert entry["text"].endswith((".", ")"))
    assert entry["evidence"]
    assert 0 <= entry["predicted_saving_seconds"] < wall(made)
    for setting in entry["settings"]:
        assert setting in SETTINGS, setting


def _hidden(made: Document, rule: str) -> dict[str, Any]:
    """The advice of a rule that another one, which saves more with the same setting, stands before."""
    from teegpu.report import advice, advice_compute, advice_rules
    from teegpu.report.advice_reading import Reading

    rules = (*advice_rules.RULES, *advice_compute.rules(()))
    told = [advice._entry(each) for rule_ in rules for each in rule_(Reading(made))]
    entry = next((entry for entry in told if entry["id"] == rule), None)
    assert entry is not None, [entry["id"] for entry in told]
    better = [other for other in advise(made, ()) if other["settings"].keys() & entry["settings"].keys()]
    assert better
    assert better[0]["predicted_saving_seconds"] >= entry["predicted_saving_seconds"]
    return entry


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_is_silent_where_it_must_be(rule: str) -> None:
    _, made = runs(rule)
    with pytest.raises((AssertionError, StopIteration)):
        _hidden(made, rule)
    assert rule not in by_id(made)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("plan-rounds", {"run.decode_plan": "fused"}),
        ("plan-scores", {"run.prefill_plan": "fused"}),
        ("wire-dtype", {"run.wire_dtype": "bf16"}),
        ("wire-int8", {"run.wire_dtype": "int8"}),
        ("compression-off", {"run.transport": "zmq"}),
        ("compression-on", {"run.transport": "pipelined+zstd"}),
        ("overlap", {"run.transport": "pipelined"}),
        ("threads-oversubscribed", {"run.threads": "2", "server.threads": "2"}),
        ("serialization-bound", {"run.wire_dtype": "fp16"}),
        ("tee-bound", {"run.threads": "16"}),
        ("gpu-bound", {}),
        ("draft-off", {"run.draft_model": ""}),
        ("offloading-does-not-pay", {"run.prefill_plan": "local", "run.decode_plan": "local"}),
        ("at-the-limit", {}),
    ],
)
def test_advice_names_the_settings_to_change(rule: str, settings: dict[str, str]) -> None:
    entry = by_id(runs(rule)[0])[rule]
    assert entry["settings"] == settings
    assert (entry["setting"], entry["value"]) == next(iter(settings.items()), ("", ""))


# What following it brings, in runs that are simulated with the setting changed


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("overlap", {"transport": "zmq", "chunk_tokens": 2048}, {"transport": "pipelined", "chunk_tokens": 256}),
        ("plan-scores", {"plan": "batched", "transport": "zmq", "chunk_tokens": 2048}, {"plan": "fused"}),
        ("wire-dtype", {"wire": "fp32"}, {"wire": "fp16"}),
        ("wire-int8", {"speeds": Speeds(**SLOW)}, {"wire": "int8"}),
        ("chunk-too-large", {"chunk_tokens": 512}, {"chunk_tokens": 64}),
        ("wire-dtype", {"wire": "fp32", "transport": "zmq", "chunk_tokens": 2048, "made": 6}, {"wire": "fp16"}),
    ],
)
def test_the_saving_is_about_what_was_predicted(rule: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    made = run(**before)
    entry = by_id(made)[rule]
    saved = wall(made) - wall(run(**{**before, **after}))
    assert entry["predicted_saving_seconds"] == pytest.approx(saved, rel=0.35)


def test_what_the_link_gave_is_enough_without_being_told() -> None:
    given = run(transport="zmq", chunk_tokens=2048, made=4)
    measured = run(transport="zmq", chunk_tokens=2048, made=4, measured_link=True)
    assert measured["link"]["source"] == "measured"
    for rule, entry in by_id(given).items():
        told = by_id(measured)[rule]
        assert told["predicted_saving_seconds"] == pytest.approx(entry["predicted_saving_seconds"], rel=0.1)


def test_overlap_promises_less_where_both_sides_take_turns_with_the_cores() -> None:
    def saving(bandwidth: float, *, shared: bool) -> float:
        threads = {"runner": 2, "server": 2, "cores": 2, "shared": shared}
        speeds = Speeds(rtt=1e-3, up=bandwidth, down=bandwidth, tee=1e-5, gpu=3e-5)
        server = BESIDE | {"threads": 2}
        made = run(transport="zmq", chunk_tokens=2048, server=server, settings={"threads": threads}, speeds=speeds)
        entry = by_id(made).get("overlap")
        return float(entry["predicted_saving_seconds"]) if entry else 0.0

    assert 0 < saving(3e8, shared=True) < 0.6 * saving(3e8, shared=False)
    assert saving(1e9, shared=False) > 0
    assert saving(1e9, shared=True) == 0


# Order and silence


def test_what_saves_most_comes_first_and_no_setting_twice() -> None:
    made = run(plan="batched", wire="fp32", transport="zmq", chunk_tokens=2048, made=6, speeds=Speeds(rtt=0.01))
    entries = advise(made)
    savings = [entry["predicted_saving_seconds"] for entry in entries]
    assert len(entries) >= 4
    assert savings == sorted(savings, reverse=True)
    changed = [setting for entry in entries for setting in entry["settings"]]
    assert len(changed) == len(set(changed))
    for entry in entries:
        saving = entry["predicted_saving_seconds"]
        assert saving == 0 or saving >= MIN_SHARE * wall(made)


def test_advice_is_json_and_always_the_same() -> None:
    made = run(plan="batched", wire="fp32", transport="zmq", chunk_tokens=2048)
    assert json.loads(json.dumps(advise(made), allow_nan=False)) == advise(copy.deepcopy(made))


def test_a_run_without_a_link_gets_no_advice_about_it() -> None:
    assert advise(run(plan="local", prompt=64, made=5)) == []


@pytest.mark.parametrize("gone", ["settings", "model", "server", "link", "limit", "phases", "environment"])
def test_a_document_with_parts_missing_raises_nothing(gone: str) -> None:
    for made, _ in map(runs, SPEAKS):
        less = copy.deepcopy(made)
        del less[gone]
        advise(less)
        less[gone] = None
        advise(less)


def test_nothing_is_predicted_from_a_run_with_an_outage() -> None:
    made = run(plan="attention", transport="zmq", prompt=64, made=20, speeds=Speeds(rtt=0.02))
    assert len(advise(made)) > 1
    made["phases"]["decode"]["rpc_retries"] = 2
    (only,) = advise(made)
    assert (only["id"], only["setting"], only["predicted_saving_seconds"]) == ("retries", "", 0.0)
    assert only["evidence"] == {"rpc_retries": {"prefill": 0, "decode": 2}}


@pytest.mark.parametrize("plan", ["per-op", "batched", "attention", "fused"])
@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_ended_inside_of_its_prompt_is_advised_without_a_fault(plan: str, status: str) -> None:
    made = run(plan=plan, transport="zmq", prompt=64, made=20, speeds=Speeds(rtt=0.02)) | {"status": status}
    made["phases"] = {"prefill": made["phases"]["prefill"] | {"tokens": 0, "passes": 0}}
    assert "plan-rounds" not in by_id(made)


def test_a_run_that_never_began_gets_no_advice() -> None:
    nothing = document(
        run_id="x", status="failed", started_at="", model={}, settings={}, tee={}, server={}, summary=Summary(),
        outputs=(),
    )  # fmt: skip
    assert advise(nothing) == []
    assert advise({}) == []


def test_a_run_that_the_formulas_do_not_explain_gets_no_predictions() -> None:
    made = run(speeds=Speeds(**SLOW))
    made["phases"]["prefill"]["seconds"] *= 3
    assert not {"wire-int8", "compression-on"} & set(by_id(made))


# What the TEE alone would take


def test_an_earlier_local_run_tells_what_offloading_is_worth() -> None:
    made = run(prompt=64, made=20, server={"device": "cuda"})
    assert "offloading-does-not-pay" not in by_id(made)
    quick, slow = local_run(1e-3), local_run(1.0)
    entry = by_id(made, quick)["offloading-does-not-pay"]
    assert entry["predicted_saving_seconds"] == pytest.approx(wall(made) - wall(quick), rel=0.02)
    assert "earlier run" in entry["text"]
    assert "MiB for the weights" in entry["text"]
    assert not {"offloading-does-not-pay", "decode-local"} & set(by_id(made, slow))


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"digest": "e" * 64}},
        {"environment": {"cpu": "another one"}},
        {"settings": {"prefill_plan": "fused", "decode_plan": "local"}},
        {"status": "interrupted"},
        {"environment": {"load": {"cores": 2, "other_cores": 2.0, "stolen_cores": 0.5}}},
    ],
)
def test_a_run_of_another_kind_is_no_reference(other: dict[str, Any]) -> None:
    made, quick = run(prompt=64, made=20, server={"device": "cuda"}), local_run(1e-3)
    assert find_references(made, [quick]) == [quick]
    unlike = quick | {
        name: (quick[name] | value if isinstance(value, dict) else value) for name, value in other.items()
    }
    assert find_references(made, [unlike]) == []
    assert find_references(made, [unlike, quick]) == [quick]


def test_a_reference_of_a_far_shorter_prompt_says_nothing() -> None:
    made = run(prompt=512, made=20, server={"device": "cuda"})
    assert "offloading-does-not-pay" not in by_id(made, local_run(1e-5, tokens=16))


def test_of_several_local_runs_the_middle_one_counts() -> None:
    made = run(prompt=64, made=20, server={"device": "cuda"})
    runs = [local_run(seconds) for seconds in (1e-3, 5.0, 1.1e-3)]
    entry = by_id(made, *runs)["offloading-does-not-pay"]
    assert entry["evidence"]["local_seconds"] == pytest.approx(wall(runs[2]), rel=0.02)
    assert "the middle one of 3 earlier runs" in entry["text"]


def test_a_local_run_without_decode_tells_nothing_of_decode() -> None:
    made = run(prompt=64, made=20, server=BESIDE, settings=TWO_CORES)
    assert not {"decode-local", "offloading-does-not-pay"} & set(by_id(made, local_run(1e-3, made=1)))


def test_where_nothing_was_measured_nothing_is_said_of_the_tee_alone() -> None:
    made = run(prompt=64, made=20, server=BESIDE, settings=TWO_CORES, speeds=Speeds(**SLOW))
    assert not {"decode-local", "offloading-does-not-pay"} & set(by_id(made))


def test_what_the_run_measured_itself_goes_before_earlier_runs() -> None:
    made = run(prompt=64, made=20, settings=probed(2e-3), speeds=Speeds(**SLOW))
    entry = by_id(made, local_run(5.0))["offloading-does-not-pay"]
    assert entry["evidence"]["local_seconds"] == pytest.approx(20e-3 + 2e-3 * made["phases"]["decode"]["passes"])
    assert "what this run measured before it began" in entry["text"]


def test_an_embedded_server_is_never_taken_for_one_that_others_use() -> None:
    queued = run(prompt=64, made=20, speeds=Speeds(queue=0.01))
    queued["server"] |= {"embedded": True}
    assert "server-queue" not in by_id(queued)


def test_a_server_that_keeps_more_is_sent_fp16() -> None:
    made = run(wire="fp32", server={"device": "cuda", "dtype": "fp32"})
    assert by_id(made)["wire-dtype"]["settings"] == {"run.wire_dtype": "fp16"}


def test_fused_is_named_where_it_halves_the_rounds() -> None:
    made = run(plan="attention", transport="zmq", prompt=64, made=20, settings=probed(2e-3), speeds=Speeds(rtt=5e-3))
    assert "With fused, which has half the rounds, about" in _hidden(made, "decode-local")["text"]


def test_a_stall_is_named_first_and_is_in_nothing_else() -> None:
    usual, still = by_id(stalled(0.02)), by_id(stalled(5.0))
    assert next(iter(still)) == "stall"
    assert "5" in still["stall"]["text"]
    for rule, entry in usual.items():
        assert still[rule]["predicted_saving_seconds"] == pytest.approx(entry["predicted_saving_seconds"], rel=0.1)


def test_int8_is_never_advised_without_its_price() -> None:
    for made, _ in map(runs, SPEAKS):
        for entry in advise(made):
            if entry["settings"].get("run.wire_dtype") == "int8":
                assert "lossy" in entry["text"]
                assert "KL" in entry["text"]
