"""Predictions ranked, one chosen, and worlds on paper."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from teegpu.bench import tuned, whatif
from teegpu.bench.tuning import Wanted
from teegpu.errors import UsageError
from teegpu.stats.profile import Profile
from tests.teegpu.stats.profiles import measured, profile
from transports.errors import LinkSpecError

DEFAULTS = {"model": "llama-3-8b", "gpu": "h100", "tee": "32-core-avx512"}
ALL = (*measured(), *measured("pipelined+zstd", faster=1.02), *measured(wire="int8", faster=1.5))


def of_profile(made: Profile | None = None, *, local_fits: bool = True, **changes: Any) -> dict[str, Any]:
    wanted = Wanted(**{"prompt_tokens": 512, "decode_tokens": 64} | changes)
    made = made or profile(measured=ALL)
    return tuned.of_profile(made, wanted, "fp16", local_fits=local_fits, facts_of_it={"notes": ["seen"]})


def test_all_ways_are_ranked_and_nothing_lossy_is_chosen() -> None:
    made = of_profile()
    for phase in ("prefill", "decode"):
        seconds = [entry["seconds"] for entry in made[phase]]
        assert seconds == sorted(seconds)
        assert sum(entry["plan"] == "local" for entry in made[phase]) == 1
    assert made["prefill"][0]["lossy"]
    assert not made["choice"]["prefill"]["lossy"]
    assert made["choice"]["total_seconds"] == pytest.approx(0.9e-3 * 512 + 64 * 0.02)
    assert made["notes"] == ["seen"]
    lossy = of_profile(allow_lossy=True)["choice"]["settings"]
    assert lossy["run.wire_dtype"] == "int8"


def test_what_is_applied_is_no_plan_of_one_server_for_all() -> None:
    settings = of_profile()["choice"]["settings"]
    assert settings == {"run.prefill_plan": "auto", "run.decode_plan": "auto", "run.transport": "pipelined"}


def test_the_embedded_server_is_told_what_it_is() -> None:
    made = of_profile(profile(endpoints=(), measured=ALL))
    assert made["choice"]["decode"]["plan"] == "fused"
    assert any(note.startswith("all in the TEE (--plan local) would take") for note in made["notes"])
    crowded = of_profile(local_fits=False)
    assert crowded["choice"]["decode"]["plan"] == "fused"
    assert any("memory" in note for note in crowded["notes"])


def test_a_length_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="--prompt-tokens 9000' measures that"):
        of_profile(prompt_tokens=9000)


def test_what_following_it_took_is_shown_beside_it() -> None:
    made = of_profile()
    row = {"phase": "decode", "plan": "local", "chunk_tokens": None, "transport": None, "predicted_seconds": 0.047,
           "measured_seconds": 0.021}  # fmt: skip
    made["checked"] = [row | {"error_share": 0.047 / 0.021 - 1}, row | {"plan": "fused", "error_share": 0.1}]
    text = tuned.render(made, "table")
    (wrong,) = [line for line in text.splitlines() if "+124%" in line]
    assert wrong.endswith("wrong")
    assert "+10%" in text
    assert 'settings that go by it (--apply): run.prefill_plan = "auto"' in text


def worlds(*specs: str, tokens: int = 1024) -> dict[str, Any]:
    return whatif.document([whatif.parse(spec, DEFAULTS, "bf16") for spec in specs], tokens, 128)


def test_a_far_link_leaves_decode_in_the_tee_and_a_slow_one_prefill_too() -> None:
    near, far, slow = worlds(
        "rtt=0.2ms,bandwidth=100gbit", "rtt=20ms,bandwidth=10gbit", "rtt=20ms,bandwidth=100mbit"
    )["results"]  # fmt: skip
    assert near["choice"] == {"prefill": "fused", "decode": "fused"}
    assert far["choice"] == {"prefill": "fused", "decode": "local"}
    assert slow["choice"] == {"prefill": "local", "decode": "local"}
    assert far["break_even"]["decode_bytes_per_second"] is None
    least = slow["break_even"]["prefill_bytes_per_second"]
    assert least == pytest.approx(far["break_even"]["prefill_bytes_per_second"])
    assert 1.25e8 < least < 1.25e9


def test_more_servers_more_cores_and_faster_gpus_never_cost_time() -> None:
    def offloaded(spec: str) -> float:
        return float(worlds(f"rtt=0.2ms,bandwidth=100gbit,{spec}")["results"][0]["offloaded"]["prefill"]["seconds"])

    assert offloaded("servers=4") <= offloaded("servers=1")
    assert offloaded("gpu=b200") <= offloaded("gpu=l4")
    assert offloaded("tee=32-core-avx512") <= offloaded("tee=8-core-avx512")


def test_private_worlds_say_what_hiding_takes() -> None:
    link = "rtt=1ms,bandwidth=1gbit,model=tinyllama-1.1b"
    plain, two, pads = worlds(link, f"{link},privacy=two-server", f"{link},privacy=pads")["results"]
    assert {row["plan"] for row in (*two["prefill"], *pads["decode"])} == {"attention", "local"}
    sent = {
        each["privacy"]: next(
            row for row in each["prefill"] if (row["plan"], row["chunk_tokens"]) == ("attention", 256)
        )
        for each in (plain, two, pads)
    }
    # 4 bytes a value in place of 2; of two servers both answer
    assert sent["pads"]["down_seconds"] == pytest.approx(2 * sent["none"]["down_seconds"], rel=0.01)
    assert sent["two-server"]["down_seconds"] == pytest.approx(2 * sent["pads"]["down_seconds"], rel=0.01)
    assert sent["two-server"]["up_seconds"] == pytest.approx(sent["pads"]["up_seconds"], rel=0.01)
    outputs = 22 * (2048 + 2 * 256 + 2048 + 2 * 5632 + 2048)
    assert pads["pads_bytes"] == 4 * ((1024 + 128) * outputs + 129 * 32000)
    assert pads["pads_seconds"] > 0
    assert plain["pads_bytes"] is two["pads_bytes"] is None
    assert any("with pads" in note for note in worlds(f"{link},privacy=pads")["notes"])


def test_a_world_says_what_it_assumes_and_what_does_not_fit() -> None:
    made = worlds("model=llama-3-70b,tee=3tflops,gpu=400tflops")
    assert {"GPU 400tflops", "TEE 3tflops"} < {each["what"] for each in made["assumptions"]}
    assert made["notes"][0].startswith("all figures are predictions")
    assert any("does not fit into 1 × h100" in note for note in worlds("model=llama-3-70b")["notes"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpu=h1000", "did you mean 'h100'"),
        ("model=gpt-9", "unknown model"),
        ("rtt", "'rtt' has no value"),
        ("gpu=h100,gpu=h200", "given twice"),
        ("privacy=reference", "unknown privacy"),
        ("wifi=yes", "unknown key 'wifi'"),
        ("servers=0", "not a number from 1"),
        ("gpu=0tflops", "no speed"),
    ],
)
def test_a_world_that_can_not_be(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        whatif.parse(spec, DEFAULTS, "bf16")


def test_a_link_that_can_not_be() -> None:
    with pytest.raises(LinkSpecError):
        whatif.parse("rtt=5parsecs", DEFAULTS, "bf16")


@pytest.mark.parametrize("made", [of_profile(), worlds("rtt=1ms,bandwidth=1gbit", "gpu=b200")], ids=["tune", "worlds"])
def test_every_form(made: dict[str, Any]) -> None:
    assert json.loads(tuned.render(made, "json")) == json.loads(json.dumps(made))
    rows = list(csv.DictReader(io.StringIO(tuned.render(made, "csv"))))
    assert len(rows) == (len(made["results"]) if "results" in made else len(made["prefill"]) + len(made["decode"]))
    assert tuned.render(made, "md").count("| --- |") >= 2
    assert "predictions from" in tuned.render(made, "table").splitlines()[1]
