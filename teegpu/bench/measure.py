"""Cases measured in turn, A B C A B C …, so that what drifts hits all alike; with an estimate of the time left.

Pure but for the clock that it is given.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from teegpu.bench.samples import Measured, Sample
from teegpu.errors import TeegpuError

WARM_UP = 0
"""The round in which every case is loaded and warmed up; the repeats are counted from 1."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A step that begins (``outcome`` empty) or has ended (``outcome`` says how). ``seconds_left`` is None as long as
    nothing is known to estimate it from."""

    done: int
    total: int
    label: str
    stage: str
    outcome: str = ""
    seconds_left: float | None = None


Notify = Callable[[Progress], None]


class Ready(Protocol):
    """A case that was loaded: what it said of itself, and its first run."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def warm_up(self) -> Sample: ...


class Workers(Protocol):
    """Where cases are measured, by their index."""

    def load(self, index: int) -> Ready: ...

    def sample(self, index: int) -> Sample: ...

    def release(self, index: int) -> None:
        """The case will not be asked for again."""


class TimeLeft:
    """Estimates what is left from what each case took so far.

    Of a case that was only warmed up it knows the run's own seconds, without the loading; a case of which nothing is
    known is taken for the mean of the others.
    """

    def __init__(self, cases: int, repeats: int) -> None:
        self._warm_up: list[float | None] = [None] * cases
        self._repeat: list[float | None] = [None] * cases
        self._left = [repeats] * cases

    def warmed_up(self, index: int, seconds: float, run_seconds: float, repeats: int | None = None) -> None:
        """``repeats``: how many are left after it; None: all."""
        self._warm_up[index] = seconds
        self._repeat[index] = run_seconds
        if repeats is not None:
            self._left[index] = repeats

    def repeated(self, index: int, seconds: float) -> None:
        self._repeat[index] = seconds
        self._left[index] -= 1

    def given_up(self, index: int) -> None:
        self._left[index] = 0
        self._warm_up[index] = self._warm_up[index] or 0.0
        self._repeat[index] = self._repeat[index] or 0.0

    def seconds(self) -> float | None:
        """The estimate, or None before anything was measured."""
        warm_ups = [seconds for seconds in self._warm_up if seconds is not None]
        runs = [seconds for seconds in self._repeat if seconds is not None]
        if not runs:
            return None
        unknown_warm_up, unknown_run = statistics.fmean(warm_ups), statistics.fmean(runs)
        total = unknown_warm_up * self._warm_up.count(None)
        for left, seconds in zip(self._left, self._repeat, strict=True):
            total += left * (unknown_run if seconds is None else seconds)
        return total


def measure(
    cases: Sequence[Measured],
    workers: Workers,
    repeats: int,
    notify: Notify = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
    max_seconds: float = math.inf,
) -> None:
    """Fills ``cases``: a warm-up of each in turn, then ``repeats`` samples of each in turn.

    A case that fails keeps its error and is left out from then on. Whatever interrupts this leaves in ``cases`` what
    there was, and samples that are there already count: a case that has all of its own is not even loaded. A case whose
    runs, the warm-up among them, have taken ``max_seconds`` takes no more repeats.
    """
    wanted = [index for index, case in enumerate(cases) if case.to_do(repeats, max_seconds)]
    left = TimeLeft(len(wanted), repeats)
    total = sum(1 + repeats - len(cases[index].samples) for index in wanted)
    done = 0
    for turn in range(repeats + 1):
        stage = "warm-up" if turn == WARM_UP else f"repeat {turn} of {repeats}"
        for place, index in enumerate(wanted):
            case = cases[index]
            if turn != WARM_UP and len(case.samples) >= turn:
                continue  # it was there already
            if turn != WARM_UP and not case.to_do(repeats, max_seconds):
                done += 1
                continue
            notify(Progress(done, total, case.label, stage, seconds_left=left.seconds()))
            started = clock()
            try:
                if turn == WARM_UP:
                    ready = workers.load(index)
                    sample = ready.warm_up
                    case.facts, case.warm_up = ready.facts, case.warm_up if case.samples else sample
                    affordable = _affordable(case, sample.seconds, repeats, max_seconds)
                    left.warmed_up(place, clock() - started, sample.seconds, affordable)
                else:
                    sample = workers.sample(index)
                    case.samples.append(sample)
                    left.repeated(place, clock() - started)
                outcome = described(sample)
            except TeegpuError as error:
                case.error = str(error)
                left.given_up(place)
                outcome = f"failed: {error}"
            if not case.to_do(repeats, max_seconds):
                workers.release(index)
            done += 1
            notify(Progress(done, total, case.label, stage, outcome, left.seconds()))


def _affordable(case: Measured, run_seconds: float, repeats: int, max_seconds: float) -> int:
    """How many repeats ``case`` will still take, where each takes ``run_seconds``."""
    missing = repeats - len(case.samples)
    room = max_seconds - case.spent_seconds()
    return missing if math.isinf(room) or not run_seconds else max(0, min(missing, math.ceil(room / run_seconds)))


def described(sample: Sample) -> str:
    """``prefill 1.394 s, decode 31.2 tokens/s``."""
    text = f"prefill {sample.prefill.seconds:.3f} s"
    if sample.decode.tokens:
        text += f", decode {sample.decode.tokens_per_second:,.1f} tokens/s"
    return text


def duration(seconds: float) -> str:
    """``about 40 s``, ``about 3 min``, ``about 1 h 10 min``: as exact as an estimate can be."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes // 60} h {minutes % 60} min"
