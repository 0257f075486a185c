"""A short part of ``make fuzz``: each target on real messages, and on what is left of them after some damage."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutation import damaged
from tests.fuzz.targets import TARGETS, seeds
from tests.fuzz.world import LIMITS, join, split

GOOD = {
    "any-message": {"Hello", "Health", "Execute", "Result", "Welcome", "Refusal", "HealthReport"},
    "welcome": {"taken"},
    "reply": {"taken"},
    "request": {"Welcome", "Result", "HealthReport"},
    "program": {"Result"},
    "framing": {"raw", "compressed", "refusal"},
    "compressed": {"taken"},
    "safetensors": {"taken"},
    "gguf": {"taken", "unfit"},
    "body": {"taken refused", "refused taken"},
    "config": {"taken"},
    "record": {"taken"},
    "block": {"taken"},
    "answer": {"taken", "failed"},
    "key": {"taken"},
    "endpoint": {"taken"},
    "evidence": {"taken"},
    "quote": {"taken"},
    "policy": {"taken"},
    "greeting": {"greeted", "went on"},
    "exchange": {"taken", "opened"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_real_messages_are_taken(name: str) -> None:
    found = [TARGETS[name](seed) for seed in seeds()[name]]
    good = [outcome for outcome in found if outcome in GOOD[name]]
    assert len(good) >= 0.8 * len(found)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_messages_are_taken_or_refused(name: str) -> None:
    outcomes: set[str] = set()

    # The same examples each time: it is ``make fuzz`` that looks for new ones.
    @settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds()[name]), st.data())
    def run(seed: bytes, data: st.DataObject) -> None:
        outcomes.add(TARGETS[name](damaged(seed, lambda most: data.draw(st.integers(0, most)))))

    run()
    assert len(outcomes) > 1  # damage gets through to more than one end


@settings(deadline=None, max_examples=60, database=None)
@given(st.data())
def test_the_frames_of_a_reply_in_another_order_or_number(data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(seeds()["reply"]))
    frames = data.draw(st.permutations(split(seed[2:])))
    frames = frames[: data.draw(st.integers(0, len(frames)))] + data.draw(st.lists(st.sampled_from(frames), max_size=3))
    assert TARGETS["reply"](seed[:2] + join(frames)) in ("taken", "refused")


@pytest.mark.parametrize("name", ["any-message", "reply", "framing", "compressed"])
def test_damage_takes_no_more_memory_than_a_message_may(name: str) -> None:
    chance = random.Random(7)
    tracemalloc.start()
    try:
        for _ in range(300):
            data = damaged(chance.choice(seeds()[name]), lambda most: chance.randint(0, most))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            TARGETS[name](data)
            assert tracemalloc.get_traced_memory()[1] - before < 4 * LIMITS.message_bytes
    finally:
        tracemalloc.stop()
