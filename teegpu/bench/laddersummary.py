"""Samples of the ladder's rungs to the figures of its tables, and what is to be said beside them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from teegpu.bench import rungs as ladder
from teegpu.bench.rungs import Rung
from teegpu.bench.samples import Measured, PhaseSample, Sample, Spread
from teegpu.bench.summary import decode_figures, output_check, prefill_figures, ratio
from teegpu.units import human_bytes
from transports.linkspec import LinkSpec

Seconds = Callable[[Sample], float]


@dataclass(frozen=True)
class Step:
    """A rung, and what was measured of it. ``max_seconds`` is what its runs were to take together at most."""

    rung: Rung
    measured: Measured
    max_seconds: float

    @property
    def spent(self) -> bool:
        """Whether it has had all of its time."""
        return self.measured.spent_seconds() >= self.max_seconds

    @property
    def cold(self) -> bool:
        """Whether its only figure is that of the warm-up, which took all of the time that it was given."""
        return not self.measured.samples and self.measured.warm_up is not None and self.spent

    @property
    def runs(self) -> list[Sample]:
        """Those that its figures are of."""
        warm_up = self.measured.warm_up
        return [warm_up] if self.cold and warm_up is not None else self.measured.samples


def results(
    steps: Sequence[Step], *, reference: Sequence[int] | None, link: LinkSpec | None, expected: bool
) -> list[dict[str, Any]]:
    """One entry for each rung, as ``bench.ladder`` describes it.

    ``reference`` are the tokens that transformers makes in fp32, None where they are not known; ``expected``: whether
    what the original document expected is of this model and prompt."""
    return [_result(step, steps, reference, link, expected) for step in steps]


def _result(
    step: Step, steps: Sequence[Step], reference: Sequence[int] | None, link: LinkSpec | None, expected: bool
) -> dict[str, Any]:
    rung, measured = step.rung, step.measured
    below = _below(step, steps)
    entry: dict[str, Any] = {
        "label": rung.label,
        "rung": rung.name,
        "track": rung.track,
        "adds": rung.adds,
        "before": below.rung.name if below is not None else "",
        "expected_seconds": rung.expected_seconds if expected else None,
        "case": measured.case,
        **measured.facts,
        "repeats": len(measured.samples),
        "cold": step.cold,
    }
    if measured.error:
        entry["error"] = measured.error
    runs = step.runs
    if runs:
        link = link if rung.remote else None
        entry["prefill"] = prefill_figures(runs, None, link) | _prefill(step, below, steps)
        if runs[0].decode.tokens:
            entry["decode"] = decode_figures(runs, None, link) | _decode(step, below, steps)
        made = len(runs[0].token_ids)
        entry["output"] = output_check(runs, None if reference is None else reference[:made])
        entry["peak_memory_bytes"] = max(run.peak_memory_bytes for run in runs)
    entry["warm_up"] = measured.warm_up.to_json() if measured.warm_up is not None else None
    entry["samples"] = [sample.to_json() for sample in measured.samples]
    return entry


def _below(step: Step, steps: Sequence[Step]) -> Step | None:
    """The rung that ``step`` is compared with: the nearest one below it that has figures."""
    known = {other.rung.name: other for other in steps if other.runs}
    return known.get(ladder.before(step.rung, list(known)))


def _first(phase: str, steps: Sequence[Step]) -> Step | None:
    """The rung that speed-ups of a phase are over: the first of its chain with figures."""
    return next((step for step in steps if step.rung.track == phase and step.runs), None)


def _prefill(step: Step, below: Step | None, steps: Sequence[Step]) -> dict[str, Any]:
    def seconds(sample: Sample) -> float:
        return sample.prefill.seconds

    # The rungs of decode all do the same prefill, which is not what they are there for.
    first = None if step.rung.track == "decode" else _first("prefill", steps)
    return _over(step, first, below, seconds) | _limit(step, lambda sample: sample.prefill)


def _decode(step: Step, below: Step | None, steps: Sequence[Step]) -> dict[str, Any]:
    def per_token(sample: Sample) -> float:
        return sample.decode.seconds / max(1, sample.decode.tokens)

    own = "prefill" if step.rung.track in ("prefill", "beside") else "decode"
    return {
        "seconds_per_token": Spread.of(map(per_token, step.runs)).to_json(),
        "seconds_per_step": Spread.of(run.decode.seconds / max(1, run.decode.passes) for run in step.runs).to_json(),
        **_over(step, _first(own, steps), below, per_token),
        **_limit(step, lambda sample: sample.decode),
    }


def _over(step: Step, first: Step | None, below: Step | None, seconds: Seconds) -> dict[str, float | None]:
    def median(other: Step | None) -> float | None:
        return statistics.median(map(seconds, other.runs)) if other is not None else None

    own = statistics.median(map(seconds, step.runs))
    return {"speed_up": ratio(median(first), own), "speed_up_over_before": ratio(median(below), own)}


def _limit(step: Step, phase: Callable[[Sample], PhaseSample]) -> dict[str, float | None]:
    """What a run could not have gone below, and how far above it the median run is."""
    phases = [phase(run) for run in step.runs]
    limits = [each.limit_seconds for each in phases if each.limit_seconds]
    if not limits:
        return {"limit_seconds": None, "ratio_to_limit": None}
    ratios = [each.seconds / each.limit_seconds for each in phases if each.limit_seconds]
    return {"limit_seconds": statistics.median(limits), "ratio_to_limit": statistics.median(ratios)}


# What is to be said


def notes(steps: Sequence[Step], *, repeats: int, left_out: Sequence[str], expected: bool) -> list[str]:
    """What the figures do not say of themselves. ``left_out`` are rungs that can't be measured here; ``repeats`` is how
    many each was to have."""
    known = {step.rung.name: step for step in steps if step.runs}
    said: list[str] = []
    if left_out:
        said.append(f"not measured, because the server at the endpoint takes no packed tensors: {', '.join(left_out)}")
    if "zstd" in known:
        said.append(_compression(known["zstd"]))
    if "async" in known:
        said.append(
            "+ async: with batched projections each request of a layer needs the one before it, so none can be in "
            "flight together; per-op in lock step against per-op async, beside the chain, is what it brings by itself"
        )
    said += [
        f"{step.rung.label}: beside the chain, the one before it is {below.rung.label}"
        for step in known.values()
        if step.rung.track == "beside" and (below := _below(step, steps)) is not None
    ]
    said += [
        f"{step.rung.label}: the prompt is a single chunk, so nothing overlaps"
        for name in ("chunks", "int8")
        if (step := known.get(name)) is not None and not step.runs[0].prefill.overlapped
    ]
    short = [step for step in known.values() if len(step.measured.samples) < repeats and not step.measured.error]
    few = [f"{step.rung.label} ({len(step.runs)} of {repeats})" for step in short if step.spent and not step.cold]
    if few:
        said.append(f"fewer repeats, for want of time (--max-seconds): {'; '.join(few)}")
    cold = [step.rung.label for step in short if step.cold]
    if cold:
        said.append(
            f"the warm-up alone took the time that there was (--max-seconds), and is the figure: {'; '.join(cold)}"
        )
    if expected:
        said.append(
            "expected: by the document that this project started from, for this shape and prompt; it was never measured"
        )
    return said + list(dict.fromkeys(note for step in steps for note in step.measured.facts.get("notes", [])))


def _compression(step: Step) -> str:
    phase = step.runs[0].prefill
    sent = phase.bytes_up + phase.bytes_down
    if phase.raw_bytes <= sent:
        return (
            "+ zstd: nothing was compressed in the prefill, since that would have taken longer than sending, or every "
            "frame is below compression.min_bytes"
        )
    saved = phase.raw_bytes - sent
    share = saved / phase.raw_bytes
    return f"+ zstd: saved {human_bytes(saved)} of the prefill's {human_bytes(phase.raw_bytes)} ({share:.1%})"
