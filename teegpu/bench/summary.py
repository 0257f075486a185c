"""Samples to the figures of the tables: medians and spread, speed-ups, the link's limit, the output check. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from teegpu.bench.samples import Measured, PhaseSample, Sample, Spread, agreement, floor_seconds
from transports.linkspec import LinkSpec

PER_OP = "per-op"


def results(
    cases: Sequence[Measured], *, reference: Sequence[int] | None, link: LinkSpec | None
) -> list[dict[str, Any]]:
    """One entry for each case, in order, as the document has it.

    ``reference`` are the tokens that transformers makes in fp32, None where they are not known. Speed-ups are over the
    first case whose plan is ``per-op`` in both phases and which has samples.
    """
    plain = next((case for case in cases if case.samples and _plans(case) == (PER_OP, PER_OP)), None)
    return [_result(case, plain, reference, link) for case in cases]


def bounds(cases: Sequence[Measured]) -> list[str]:
    """What the products alone say of the prefills that were measured: how quick any plan can be on these cores, and how
    far a server that is busy with them all the time would still have to go."""
    found = []
    plain = next((case for case in cases if case.samples and _plans(case)[0] == PER_OP), None)
    local = next((case for case in cases if case.samples and _is_local(case)), None)
    if local is not None:
        products = _products(local)
        seconds = _median_seconds(local.samples, "prefill") or 0.0
        text = (
            f"products alone take {products:.3f} s of local's prefill of {seconds:.3f} s: on these cores, in local's "
            f"dtype, no prefill takes less than {products / seconds:.2f} × of local"
        )
        if plain is not None and (base := _median_seconds(plain.samples, "prefill")):
            text += f", or is more than {base / products:.1f} × as fast as {plain.label}"
        found.append(text)
    for case in cases:
        if case.samples and case.samples[0].prefill.overlapped and (products := _products(case)):
            seconds = _median_seconds(case.samples, "prefill") or 0.0
            threads = (case.facts.get("threads") or {}).get("server")
            found.append(
                f"{case.label}: the server's products take {products:.3f} s of the prefill's {seconds:.3f} s, on "
                f"{threads} thread{'s' * (threads != 1)}"
            )
    return found


def _is_local(case: Measured) -> bool:
    return not case.case["remote"] and _plans(case)[0] == "local" and _products(case) > 0


def _products(case: Measured) -> float:
    return statistics.median(sample.prefill.products_seconds for sample in case.samples)


def _plans(case: Measured) -> tuple[str, str]:
    return case.case["prefill_plan"], case.case["decode_plan"]


def _result(
    measured: Measured, plain: Measured | None, reference: Sequence[int] | None, link: LinkSpec | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": measured.label, "case": measured.case, **measured.facts}
    if measured.error:
        entry["error"] = measured.error
    samples = measured.samples
    if samples:
        baseline = plain.samples if plain is not None else None
        entry["prefill"] = prefill_figures(samples, baseline, link if measured.case["remote"] else None)
        if samples[0].decode.tokens:
            entry["decode"] = decode_figures(samples, baseline, link if measured.case["remote"] else None)
        entry["output"] = output_check(samples, reference)
        entry["peak_memory_bytes"] = max(sample.peak_memory_bytes for sample in samples)
    entry["warm_up"] = measured.warm_up.to_json() if measured.warm_up is not None else None
    entry["samples"] = [sample.to_json() for sample in samples]
    return entry


def prefill_figures(samples: Sequence[Sample], plain: Sequence[Sample] | None, link: LinkSpec | None) -> dict[str, Any]:
    phases = [sample.prefill for sample in samples]
    seconds = Spread.of(phase.seconds for phase in phases)
    return {
        "seconds": seconds.to_json(),
        "tokens_per_second": Spread.of(phase.tokens_per_second for phase in phases).to_json(),
        "ttft_seconds": Spread.of(sample.ttft_seconds for sample in samples).to_json(),
        "rpc_calls": phases[0].rpc_calls,
        "bytes_up": phases[0].bytes_up,
        "bytes_down": phases[0].bytes_down,
        "communication_share": statistics.median(phase.communication_share for phase in phases),
        "parts": _parts(phases),
        "products_seconds": statistics.median(phase.products_seconds for phase in phases),
        "speed_up": ratio(_median_seconds(plain, "prefill"), seconds.median),
        **_limit(phases, seconds.median, link),
    }


def decode_figures(samples: Sequence[Sample], plain: Sequence[Sample] | None, link: LinkSpec | None) -> dict[str, Any]:
    phases = [sample.decode for sample in samples]
    seconds = Spread.of(phase.seconds for phase in phases)
    passes = max(1, phases[0].passes)
    tpot = [sample.tpot_median_seconds for sample in samples if sample.tpot_median_seconds is not None]
    return {
        "seconds": seconds.to_json(),
        "tokens_per_second": Spread.of(phase.tokens_per_second for phase in phases).to_json(),
        "tpot_seconds": Spread.of(tpot).to_json() if tpot else None,
        "steps": phases[0].passes,
        "tokens_per_step": phases[0].tokens / passes,
        "rpc_calls_per_step": phases[0].rpc_calls / passes,
        "bytes_up_per_step": phases[0].bytes_up / passes,
        "bytes_down_per_step": phases[0].bytes_down / passes,
        "communication_share": statistics.median(phase.communication_share for phase in phases),
        "parts": _parts(phases),
        "speed_up": ratio(_median_seconds(plain, "decode"), seconds.median),
        **_limit(phases, seconds.median, link),
    }


def _parts(phases: Sequence[PhaseSample]) -> dict[str, float]:
    """Median seconds of each exclusive part. Medians of parts need not add up to the median of the whole."""
    return {
        name: statistics.median(values)
        for name, values in (
            ("tee_seconds", [phase.tee_seconds for phase in phases]),
            ("serialization_seconds", [phase.serialization_seconds for phase in phases]),
            ("network_seconds", [phase.network_seconds for phase in phases]),
            ("server_seconds", [phase.server_seconds for phase in phases]),
            ("gpu_seconds", [phase.gpu_seconds for phase in phases]),
            ("other_seconds", [phase.other_seconds for phase in phases]),
        )
    }


def _median_seconds(samples: Sequence[Sample] | None, phase: Literal["prefill", "decode"]) -> float | None:
    if not samples:
        return None
    return statistics.median((sample.prefill if phase == "prefill" else sample.decode).seconds for sample in samples)


def ratio(above: float | None, below: float) -> float | None:
    return above / below if above is not None and below else None


def _limit(phases: Sequence[PhaseSample], seconds: float, link: LinkSpec | None) -> dict[str, float | int | None]:
    """The link's least time for the median sample's bytes, and how far above it the median is."""
    if link is None:
        return {"rounds": phases[0].rounds, "link_floor_seconds": None, "ratio_to_floor": None}
    floor = statistics.median(
        floor_seconds(
            phase,
            up_bytes_per_second=link.up_bytes_per_second,
            down_bytes_per_second=link.down_bytes_per_second,
            rtt_seconds=link.rtt_seconds,
        )
        for phase in phases
    )
    return {"rounds": phases[0].rounds, "link_floor_seconds": floor, "ratio_to_floor": ratio(seconds, floor)}


def output_check(samples: Sequence[Sample], reference: Sequence[int] | None) -> dict[str, Any]:
    """How the tokens compare with the reference's: the worst of the repeats."""
    made = len(samples[0].token_ids)
    if reference is None:
        return {"tokens": made, "agreeing_tokens": None, "identical": None}
    agreeing = min(agreement(sample.token_ids, reference) for sample in samples)
    return {"tokens": made, "agreeing_tokens": agreeing, "identical": agreeing == len(reference) == made}


def verdict(output: Mapping[str, Any]) -> str:
    """``identical``, ``first 7 of 33``, or ``not checked``."""
    if output["identical"] is None:
        return "not checked"
    return "identical" if output["identical"] else f"first {output['agreeing_tokens']} of {output['tokens']}"
