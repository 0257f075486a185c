"""What a probe measures and multiplies, and what auto weighs, takes and says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from teegpu import facts
from teegpu.errors import ConfigError
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.stats.profile import Way
from teegpu.tee import choose
from teegpu.tee.choose import Probe, Question, by_profile, pick
from teegpu.tee.kv_cache import KVCache
from tests.conftest import TinyModel
from tests.teegpu.stats.profiles import measured, profile

QUESTION = Question("auto", "auto", 0, 1024, overlaps=True, embedded=False, local_fits=True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


Cost = Callable[[str, int, int, int], float]
"""Seconds of a pass: (plan, layers, tokens, position of the first)."""


class FakeEngine:
    """Steps that take what they are told to, on a clock that stands still otherwise. The first one of a shape takes a
    second more."""

    def __init__(self, clock: Clock, plan: str, layers: int, cost: Cost) -> None:
        self._clock, self._plan, self._layers, self._cost = clock, plan, layers, cost
        self._warm: set[int] = set()

    def read(self, cache: KVCache, tokens: list[int], edges: list[int]) -> None:
        assert edges[-1] == len(tokens)
        self._passed(cache, len(tokens) - cache.length)

    def decode(self, cache: KVCache, ids: list[int]) -> None:
        self._passed(cache, len(ids))

    def _passed(self, cache: KVCache, tokens: int) -> None:
        assert not torch.isnan(cache.read(0, 0, cache.length)[0]).any()
        self._clock.now += self._cost(self._plan, self._layers, tokens, cache.length)
        self._clock.now += 0.0 if tokens in self._warm else 1.0
        self._warm.add(tokens)


@pytest.fixture
def spec(tiny_model: TinyModel) -> ModelSpec:
    return replace(read_spec(tiny_model("llama")), layers=30, layer_windows=(None,) * 30, max_positions=100_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(choose, "time", made)
    return made


def probe(clock: Clock, spec: ModelSpec, cost: Cost, *, whole: bool = False) -> Probe:
    return Probe(spec, lambda plan, _, layers: FakeEngine(clock, plan.name, layers, cost), whole=whole)  # type: ignore[arg-type, return-value]


def attention_in(tokens: int, start: int) -> float:
    """The positions that so many tokens see, half of the last one's left out."""
    return tokens * (start + tokens / 2)


def test_what_is_there_once_is_counted_once_and_the_rest_for_each_layer(clock: Clock, spec: ModelSpec) -> None:
    def cost(plan: str, layers: int, tokens: int, start: int) -> float:
        own = {"fused": 1e-5, "local": 3e-5}[plan]
        return 0.2 + layers * (own * tokens + 1e-9 * attention_in(tokens, start))

    found = probe(clock, spec, cost).prefills([Way("local", 2048), Way("fused", 256)], 512, seconds=0.1)
    assert [(way.plan, way.chunk_tokens) for way in found] == [("fused", 256), ("local", 2048)]
    for way in found:
        assert way.seconds == pytest.approx(cost(way.plan, 30, 512, 0))


@pytest.mark.parametrize("tokens", [1025, 8192, 20_000])
def test_of_a_long_prompt_the_first_and_the_last_tokens_are_run(clock: Clock, spec: ModelSpec, tokens: int) -> None:
    longest = 0

    def cost(_: str, layers: int, tokens: int, start: int) -> float:
        nonlocal longest
        longest = max(longest, tokens)
        return 0.1 + layers * (1e-5 * tokens + 1e-8 * attention_in(tokens, start))

    (way,) = probe(clock, spec, cost).prefills([Way("fused", 256)], tokens, seconds=0.1)
    assert longest == 1024
    assert way.seconds == pytest.approx(cost("fused", 30, tokens, 0), rel=1e-6)


def test_a_step_of_decode_is_at_its_position_and_has_its_guesses(clock: Clock, spec: ModelSpec) -> None:
    seen = set()

    def cost(_: str, layers: int, tokens: int, start: int) -> float:
        seen.add((layers, tokens, start))
        return 0.001 + layers * 1e-3

    (way,) = probe(clock, spec, cost).decodes([Way("fused", 0)], 700, rows=3, seconds=1.0)
    assert way.seconds == pytest.approx(0.031)
    assert seen == {(1, 3, 700), (9, 3, 700)}


def test_several_groups_of_servers_are_run_whole(clock: Clock, spec: ModelSpec) -> None:
    def cost(_: str, layers: int, tokens: int, start: int) -> float:
        assert layers == 30
        return 0.5

    both = probe(clock, spec, cost, whole=True)
    assert both.prefills([Way("fused", 256)], 64, seconds=0.1)[0].seconds == pytest.approx(0.5)
    assert both.decodes([Way("fused", 0)], 64, seconds=0.1)[0].seconds == pytest.approx(0.5)


def test_a_pass_that_was_disturbed_does_not_decide(clock: Clock, spec: ModelSpec) -> None:
    calls = 0

    def cost(_: str, layers: int, tokens: int, start: int) -> float:
        nonlocal calls
        calls += 1
        return layers * 1e-3 * (50 if calls % 7 == 0 else 1)

    found = probe(clock, spec, cost)
    assert found.prefills([Way("fused", 256)], 64, seconds=10.0)[0].seconds == pytest.approx(0.03)
    assert found.decodes([Way("fused", 0)], 64, seconds=10.0)[0].seconds == pytest.approx(0.03)


def test_fewer_tokens_are_run_where_they_take_long(clock: Clock, spec: ModelSpec) -> None:
    slow = probe(clock, spec, lambda _, layers, tokens, __: layers * tokens * 1e-3)
    quick = probe(clock, spec, lambda _, layers, tokens, __: layers * tokens * 1e-7)
    assert slow.window(facts.FUSED, 4096, 20, 0.5) == choose.LEAST_WINDOW
    assert quick.window(facts.FUSED, 4096, 20, 0.5) == choose.WINDOW
    assert quick.window(facts.FUSED, 500, 20, 0.5) == 500


def test_candidates() -> None:
    assert set(QUESTION.candidates("auto")) == {"local", "attention", "fused"}
    assert QUESTION.candidates("batched") == ("batched",)
    assert set(replace(QUESTION, embedded=True).candidates("auto")) == {"attention", "fused"}
    assert set(replace(QUESTION, local_fits=False).candidates("auto")) == {"attention", "fused"}
    assert set(replace(QUESTION, plans=("attention", "local")).candidates("auto")) == {"local", "attention"}
    with pytest.raises(ConfigError, match="nothing to choose from"):
        replace(QUESTION, embedded=True, plans=("local",)).candidates("auto")


def test_chunks_are_tried_where_they_can_overlap() -> None:
    def sizes(question: Question) -> set[tuple[str, int]]:
        return {(way.plan, way.chunk_tokens) for way in question.prefills()}

    given = replace(QUESTION, plans=("fused", "local"))
    assert sizes(given) == {("fused", 256), ("fused", 2048), ("local", 2048)}
    assert sizes(replace(given, overlaps=False)) == {("fused", 2048), ("local", 2048)}
    assert sizes(replace(given, prompt_tokens=200)) == {("fused", 2048), ("local", 2048)}
    assert sizes(replace(given, chunk_tokens=99)) == {("fused", 99), ("local", 99)}


def test_of_what_is_about_equal_the_one_that_shows_least_is_taken() -> None:
    assert pick([Way("fused", 0, 1.0), Way("local", 0, 1.02)]).plan == "local"
    assert pick([Way("fused", 0, 1.0), Way("local", 0, 1.04)]).plan == "fused"
    assert pick([Way("attention", 0, 1.0), Way("fused", 0, 1.01)]).plan == "fused"
    assert pick([Way("fused", 64, 1.0), Way("fused", 256, 1.01)]).chunk_tokens == 256


def test_a_choice_and_its_words() -> None:
    made = by_profile(QUESTION, profile(), "pipelined", "fp16")
    assert made is not None
    assert (made.prefill_plan, made.decode_plan, made.chunk_tokens) == ("fused", "local", 256)
    assert made.line == (
        "auto: prefill fused in chunks of 256, decode local (by the profile of 2026-01-02, for a prompt of 1,024 "
        "tokens: 920 ms to the first token (attention 1.1 s), 20 ms for each after it (fused 50 ms))"
    )
    kept = made.to_json()
    assert kept["asked"] == {"prefill_plan": "auto", "decode_plan": "auto", "chunk_tokens": 0}
    assert kept["predicted"]["decode_step_seconds"] == {"local": 0.02, "fused": 0.05, "attention": 0.055}


def test_a_profile_that_does_not_say_enough_is_not_gone_by() -> None:
    assert by_profile(QUESTION, profile(), "zmq", "fp16") is None
    assert by_profile(replace(QUESTION, prompt_tokens=9000), profile(), "pipelined", "fp16") is None
    assert by_profile(replace(QUESTION, decode_plan="batched"), profile(), "pipelined", "fp16") is None
    assert by_profile(replace(QUESTION, chunk_tokens=99), profile(), "pipelined", "fp16") is None
    assert by_profile(QUESTION, profile(measured=measured(wire="int8")), "pipelined", "fp16") is None


def test_memory_of_local(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(tiny_model("llama"))
    assert choose.local_bytes(spec) == 4 * (2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64) + 272 * 32)
    for available, fits in ((None, True), (choose.SPARE_BYTES, False), (2 * choose.SPARE_BYTES, True)):
        monkeypatch.setattr(choose.machine, "available_bytes", lambda available=available: available)
        assert choose.local_fits(spec) is fits
