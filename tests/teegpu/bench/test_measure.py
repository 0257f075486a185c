"""The order of measurements, failures on the way, and the time left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from teegpu.bench.measure import Progress, TimeLeft, described, duration, measure
from teegpu.bench.samples import Measured, PhaseSample, Sample
from teegpu.errors import ModelError


def sample(seconds: float) -> Sample:
    return Sample(PhaseSample(10, 1, seconds), PhaseSample(4, 4, seconds), seconds, 0.1, [1], 1)


@dataclass
class Ready:
    facts: dict[str, Any]
    warm_up: Sample


@dataclass
class FakeWorkers:
    """``fails`` maps (index, round) to an error; each run takes ``index + 1`` seconds of ``now``, a load 10 more."""

    fails: dict[tuple[int, int], BaseException] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    now: float = 0.0
    rounds: dict[int, int] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)

    def release(self, index: int) -> None:
        self.released.append("ABC"[index])

    def load(self, index: int) -> Ready:
        self.now += 10.0
        return Ready({"index": index}, self.sample(index))

    def sample(self, index: int) -> Sample:
        turn = self.rounds[index] = self.rounds.get(index, -1) + 1
        self.asked.append(f"{'ABC'[index]}{turn}")
        if (index, turn) in self.fails:
            raise self.fails[index, turn]
        self.now += index + 1
        return sample((index + 1) / 2)


def cases(count: int = 3) -> list[Measured]:
    return [Measured("ABC"[index], {}) for index in range(count)]


def test_cases_take_turns_after_a_warm_up_of_each() -> None:
    measured, workers = cases(), FakeWorkers()
    measure(measured, workers, repeats=2)
    assert workers.asked == ["A0", "B0", "C0", "A1", "B1", "C1", "A2", "B2", "C2"]
    assert [len(case.samples) for case in measured] == [2, 2, 2]
    assert [case.facts["index"] for case in measured] == [0, 1, 2]
    assert all(case.warm_up is not None for case in measured)


def test_a_case_that_fails_is_left_out_from_then_on() -> None:
    measured, steps = cases(), []
    workers = FakeWorkers({(1, 1): ModelError("gone")})
    measure(measured, workers, 2, steps.append)
    assert workers.asked == ["A0", "B0", "C0", "A1", "B1", "C1", "A2", "C2"]
    assert measured[1].error == "gone"
    assert [step.outcome for step in steps if step.label == "B" and step.outcome][-1] == "failed: gone"
    assert steps[-1].done == steps[-1].total == 9


def test_a_case_that_can_not_be_loaded_does_not_stop_the_others() -> None:
    measured = cases(2)
    measure(measured, FakeWorkers({(0, 0): ModelError("no")}), 1)
    assert measured[0].error == "no"
    assert measured[0].warm_up is None
    assert len(measured[1].samples) == 1


def test_an_interrupt_leaves_what_was_done() -> None:
    measured = cases(2)
    with pytest.raises(KeyboardInterrupt):
        measure(measured, FakeWorkers({(1, 1): KeyboardInterrupt()}), 3)
    assert [len(case.samples) for case in measured] == [1, 0]


def test_every_step_is_told_with_the_time_left() -> None:
    steps: list[Progress] = []
    workers = FakeWorkers()
    measure(cases(2), workers, 2, steps.append, clock=lambda: workers.now)
    assert [(step.done, step.label, step.stage, bool(step.outcome)) for step in steps[:4]] == [
        (0, "A", "warm-up", False),
        (1, "A", "warm-up", True),
        (1, "B", "warm-up", False),
        (2, "B", "warm-up", True),
    ]
    assert steps[0].seconds_left is None
    # after A's warm-up of 11 s, a run of which took 1 s: B's warm-up, and two runs of each
    assert steps[1].seconds_left == pytest.approx(11 + 2 * 1 + 2 * 1)
    # after both: two runs of A (1 s) and of B (2 s)
    assert steps[3].seconds_left == pytest.approx(2 * 1 + 2 * 2)
    assert steps[-1].seconds_left == 0.0


def test_a_case_that_was_given_up_takes_no_more_time() -> None:
    left = TimeLeft(cases=2, repeats=3)
    assert left.seconds() is None
    left.warmed_up(0, 20.0, 2.0)
    left.given_up(1)
    assert left.seconds() == pytest.approx(6.0)
    left.repeated(0, 4.0)
    assert left.seconds() == pytest.approx(8.0)


def test_samples_that_are_there_already_count() -> None:
    measured, workers = cases(), FakeWorkers()
    measured[0].samples = [sample(0.5), sample(0.5)]
    first = measured[0].warm_up = sample(9.0)
    measured[1].samples, measured[1].warm_up = [sample(0.5)], first
    steps: list[Progress] = []
    measure(measured, workers, 2, steps.append)
    # A is not loaded at all; B has a warm-up, for its process is another one, and its second repeat
    assert workers.asked == ["B0", "C0", "C1", "B1", "C2"]
    assert [len(case.samples) for case in measured] == [2, 2, 2]
    assert measured[0].warm_up is measured[1].warm_up is first
    assert (steps[0].done, steps[-1].done, steps[-1].total) == (0, 5, 5)


def test_a_case_that_has_taken_its_time_takes_no_more_repeats() -> None:
    measured, workers, steps = cases(), FakeWorkers(), list[Progress]()
    # runs of A take 1 s, of B 2 s, of C 3 s, in both phases together
    measure(measured, workers, 3, steps.append, max_seconds=3.0)
    assert workers.asked == ["A0", "B0", "C0", "A1", "B1", "A2"]
    assert [len(case.samples) for case in measured] == [2, 1, 0]
    assert workers.released == ["C", "B", "A"]
    assert (steps[-1].total, steps[-1].seconds_left) == (12, 0.0)


def test_the_time_left_knows_of_the_time_that_a_case_may_take() -> None:
    steps: list[Progress] = []
    workers = FakeWorkers()
    measure(cases(2), workers, 9, steps.append, clock=lambda: workers.now, max_seconds=3.0)
    # after both warm-ups A has 2 s left of its 3 s, so two runs of 1 s, and B 1 s, so one run of 2 s
    assert steps[3].seconds_left == pytest.approx(2 * 1 + 1 * 2)


def test_words_for_samples_and_durations() -> None:
    assert described(sample(0.5)) == "prefill 0.500 s, decode 8.0 tokens/s"
    assert described(Sample(PhaseSample(1, 1, 0.5), PhaseSample(0, 0, 0.0), 0.5, None, [1], 1)) == "prefill 0.500 s"
    assert [duration(seconds) for seconds in (0.2, 40, 100, 4200, 7300)] == [
        "about 1 s",
        "about 40 s",
        "about 2 min",
        "about 70 min",
        "about 2 h 2 min",
    ]
