"""Samples of the ladder's rungs to the figures of its tables, and what must be said beside them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from teegpu.bench import rungs as ladder
from teegpu.bench.rungs import Rung, Track
from teegpu.bench.samples import Measured, PhaseSample, Sample, Spread, agreement
from teegpu.units import human_bytes

Phase = Literal["prefill", "decode"]

_PARTS = ("tee_seconds", "serialization_seconds", "network_seconds", "server_seconds", "gpu_seconds", "other_seconds")


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


def results(steps: Sequence[Step], *, reference: Sequence[int] | None, expected: bool) -> list[dict[str, Any]]:
    """One entry for each rung, as ``bench.ladder`` describes it.

    ``reference`` are the tokens that transformers makes in fp32, None where they are not known; ``expected``: whether
    what the original document expected is of this model and prompt."""
    return [_result(step, steps, reference, expected) for step in steps]


def _result(step: Step, steps: Sequence[Step], reference: Sequence[int] | None, expected: bool) -> dict[str, Any]:
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
        # The rungs of decode all do the same prefill, which is not what they are there for.
        first = None if rung.track == "decode" else _first("case" if rung.track == "case" else "prefill", steps)
        entry["prefill"] = _prefill(runs) | _common(step, "prefill", first, below)
        if runs[0].decode.tokens:
            first = _first({"beside": "prefill", "baseline": "decode"}.get(rung.track, rung.track), steps)
            entry["decode"] = _decode(runs) | _common(step, "decode", first, below)
        entry["output"] = output_check(runs, reference)
        entry["peak_memory_bytes"] = max(run.peak_memory_bytes for run in runs)
    entry["warm_up"] = measured.warm_up.to_json() if measured.warm_up is not None else None
    entry["samples"] = [sample.to_json() for sample in measured.samples]
    return entry


def _below(step: Step, steps: Sequence[Step]) -> Step | None:
    """The rung that ``step`` is compared with: the nearest one below it that has figures."""
    known = {other.rung.name: other for other in steps if other.runs}
    return known.get(ladder.before(step.rung, list(known)))


def _first(track: Track | str, steps: Sequence[Step]) -> Step | None:
    """The rung that speed-ups are over: the first of its chain with figures."""
    return next((step for step in steps if step.rung.track == track and step.runs), None)


def _prefill(runs: Sequence[Sample]) -> dict[str, Any]:
    phase = runs[0].prefill
    return {
        "seconds": Spread.of(run.prefill.seconds for run in runs).to_json(),
        "ttft_seconds": Spread.of(run.ttft_seconds for run in runs).to_json(),
        "rpc_calls": phase.rpc_calls,
        "bytes_up": phase.bytes_up,
        "bytes_down": phase.bytes_down,
    }


def _decode(runs: Sequence[Sample]) -> dict[str, Any]:
    phase = runs[0].decode
    passes = max(1, phase.passes)
    tpot = [run.tpot_median_seconds for run in runs if run.tpot_median_seconds is not None]
    return {
        "seconds": Spread.of(run.decode.seconds for run in runs).to_json(),
        "seconds_per_token": Spread.of(_seconds(run, "decode") for run in runs).to_json(),
        "seconds_per_step": Spread.of(run.decode.seconds / max(1, run.decode.passes) for run in runs).to_json(),
        "tokens_per_second": Spread.of(run.decode.tokens_per_second for run in runs).to_json(),
        "tpot_seconds": Spread.of(tpot).to_json() if tpot else None,
        "steps": phase.passes,
        "tokens_per_step": phase.tokens / passes,
        "rpc_calls_per_step": phase.rpc_calls / passes,
        "bytes_up_per_step": phase.bytes_up / passes,
        "bytes_down_per_step": phase.bytes_down / passes,
    }


def _common(step: Step, phase: Phase, first: Step | None, below: Step | None) -> dict[str, Any]:
    """Medians of parts need not add up to the median of the whole."""
    phases: list[PhaseSample] = [getattr(run, phase) for run in step.runs]
    limits = [each.limit_seconds for each in phases if each.limit_seconds]
    ratios = [each.seconds / each.limit_seconds for each in phases if each.limit_seconds]
    own = _median(step, phase)
    return {
        "communication_share": statistics.median(each.communication_share for each in phases),
        "parts": {part: statistics.median(getattr(each, part) for each in phases) for part in _PARTS},
        "speed_up": _ratio(_median(first, phase), own),
        "speed_up_over_before": _ratio(_median(below, phase), own),
        "limit_seconds": statistics.median(limits) if limits else None,
        "ratio_to_limit": statistics.median(ratios) if ratios else None,
    }


def _seconds(run: Sample, phase: Phase) -> float:
    """What is compared: of prefill all of it, of decode a token."""
    return run.prefill.seconds if phase == "prefill" else run.decode.seconds / max(1, run.decode.tokens)


def _median(step: Step | None, phase: Phase) -> float | None:
    return statistics.median(_seconds(run, phase) for run in step.runs) if step is not None else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def output_check(runs: Sequence[Sample], reference: Sequence[int] | None) -> dict[str, Any]:
    """How the tokens compare with the first ones of the reference: the worst of the repeats."""
    made = len(runs[0].token_ids)
    if reference is None:
        return {"tokens": made, "agreeing_tokens": None, "identical": None}
    agreeing = min(agreement(run.token_ids, reference) for run in runs)
    return {"tokens": made, "agreeing_tokens": agreeing, "identical": agreeing == made}


# What must be said


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
        return "+ zstd: nothing was compressed in the prefill, since that would have taken longer than sending"
    saved = phase.raw_bytes - sent
    share = saved / phase.raw_bytes
    return f"+ zstd: saved {human_bytes(saved)} of the prefill's {human_bytes(phase.raw_bytes)} ({share:.1%})"
