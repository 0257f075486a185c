"""What auto weighs, takes and says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from teegpu.errors import ConfigError
from teegpu.metrics import profile as profiles
from teegpu.metrics.cost_model import Settings
from teegpu.model.reader import read_spec
from teegpu.tee import auto
from teegpu.tee.auto import Chooser, Place, Question, choose
from teegpu.wire.messages import Welcome
from tests.conftest import TinyModel
from tests.teegpu.metrics.tuning import SHAPE, profile, rates

QUESTION = Question(
    "auto", "auto", Settings("auto", "fp16", "pipelined", 0), 0, 1024, embedded=False, local_fits=True
)  # fmt: skip
FAR = rates(rtt=0.02, bandwidth=1.25e9, tee_flop=4e-10, server_flop=2e-12, request=5e-5)


def test_candidates() -> None:
    assert QUESTION.candidates("auto") == ("local", "fused", "attention")
    assert QUESTION.candidates("batched") == ("batched",)
    assert replace(QUESTION, embedded=True).candidates("auto") == ("fused", "attention")
    assert replace(QUESTION, local_fits=False).candidates("auto") == ("fused", "attention")
    assert replace(QUESTION, plans=("attention", "local")).candidates("auto") == ("local", "attention")
    with pytest.raises(ConfigError, match="nothing to choose from"):
        replace(QUESTION, embedded=True, plans=("local",)).candidates("auto")
    assert QUESTION.weighs_local
    assert not replace(QUESTION, prefill_plan="local", decode_plan="local").weighs_local


def test_a_choice_and_its_words() -> None:
    made = choose(QUESTION, SHAPE, FAR, "probe", "a probe")
    assert (made.prefill_plan, made.decode_plan) == ("fused", "local")
    assert made.line.startswith("auto: prefill fused in chunks of ")
    assert "decode local (by a probe, for a prompt of 1,024 tokens: " in made.line
    kept = made.to_json()
    assert kept["asked"] == {"prefill_plan": "auto", "decode_plan": "auto", "chunk_tokens": 0}
    assert kept["chosen"]["chunk_tokens"] == made.chunk_tokens > 0
    assert kept["predicted"]["decode_step_seconds"]["fused"] > kept["predicted"]["decode_step_seconds"]["local"]


def test_what_was_given_is_kept() -> None:
    made = choose(replace(QUESTION, decode_plan="batched", chunk_tokens=99), SHAPE, FAR, "probe", "a probe")
    assert (made.decode_plan, made.chunk_tokens) == ("batched", 99)
    lock_step = replace(QUESTION, base=replace(QUESTION.base, transport="zmq"))
    assert choose(lock_step, SHAPE, FAR, "probe", "a probe").chunk_tokens == 2048


def test_products_that_cost_more_are_offloaded_less() -> None:
    near = rates(tee_flop=1e-10, server_flop=2e-11)
    plain = choose(QUESTION, SHAPE, near, "probe", "a probe")
    dear = choose(replace(QUESTION, base=replace(QUESTION.base, product_cost=50.0)), SHAPE, near, "probe", "a probe")
    assert (plain.prefill_plan, dear.prefill_plan) == ("fused", "local")


def test_rates_that_cover_nothing() -> None:
    question = replace(QUESTION, embedded=True, base=replace(QUESTION.base, wire_dtype="int8"))
    known = {place: price for place, price in FAR.prices.items() if "int8" not in place}
    with pytest.raises(ConfigError, match="wire dtype int8"):
        choose(question, SHAPE, replace(FAR, prices=known), "profile", "x")


def test_a_profile_is_used_where_it_fits_and_told_of_where_not(tiny_model: TinyModel) -> None:
    spec = read_spec(tiny_model("llama"))
    welcome = Welcome(0, "", "", "", "", {}, "cuda", "bf16", 8, 0, {}, (0, 1))
    place = Place(("tcp://10.0.0.1:5555",), "", 2, 0)
    chooser = Chooser(spec, "d" * 64, place, welcome)
    told: list[str] = []

    class NoProbe:
        def run(self, *_: object, **__: object) -> int:
            raise LookupError

    with pytest.raises(LookupError):  # without a profile there is a probe
        chooser.choose(QUESTION, NoProbe(), told.append)  # type: ignore[arg-type]
    profiles.write(profile())
    made = chooser.choose(QUESTION, NoProbe(), told.append)  # type: ignore[arg-type]
    assert (made.basis, told) == ("profile", [])
    assert "by the profile of 2026-01-02" in made.line
    profiles.write(profile(version="0.0.1"))
    with pytest.raises(LookupError):
        chooser.choose(QUESTION, NoProbe(), told.append)  # type: ignore[arg-type]
    assert told[0].startswith("the stored profile is not used, as it was made by teegpu 0.0.1")
    assert "'teegpu tune --model smollm2-135m --endpoint tcp://10.0.0.1:5555' renews it" in told[0]
    profiles.path_of(place.endpoints, "", "d" * 64).write_text("{")
    with pytest.raises(LookupError):
        chooser.choose(QUESTION, NoProbe(), told.append)  # type: ignore[arg-type]
    assert "can't be used" in told[1]


def test_memory_of_local(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(tiny_model("llama"))
    assert auto.local_bytes(spec) == 4 * (2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64) + 272 * 32)
    for available, fits in ((None, True), (auto.SPARE_BYTES, False), (2 * auto.SPARE_BYTES, True)):
        monkeypatch.setattr(auto.machine, "available_bytes", lambda available=available: available)
        assert auto.local_fits(spec) is fits
