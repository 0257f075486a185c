"""Advice for a run that served several at once: what holds its requests up. No seconds are predicted: they depend on
what comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from teegpu.report import look
from teegpu.report.advice_compute import drafting
from teegpu.report.advice_reading import Phase, Reading, figure
from teegpu.report.advice_rules import Advice, percent
from teegpu.units import human_bytes, human_seconds, plural

WAITED_SHARE: Final = 0.1
"""Of the steps' time: less of it with others in line is a rush now and then."""

LIMIT_SHARE: Final = 0.4
"""Of decode's time: a part that takes as much decides how long a step takes."""

DISTURBED_TIMES: Final = 3.0

FREE_GROWTH: Final = 1.25
"""A step of twice the sequences that takes no more than this times as long."""


def advise(run: Reading) -> list[Advice]:
    """What to change first, first."""
    return [*_room(run), *_disturbed(run), *drafting(run), *_limit(run)]


def _room(run: Reading) -> Iterator[Advice]:
    """Requests that wait although more could be computed at once."""
    requests, capacity = look.mapping(run.document, "requests"), look.mapping(run.settings, "capacity")
    seconds, waited = figure(requests, "step_seconds"), figure(requests, "waited_seconds")
    sequences, most = figure(capacity, "sequences"), figure(requests, "most_running")
    gave_way = figure(requests, "gave_way")
    evidence = {"waited_seconds": waited, "gave_way": int(gave_way), "most_running": int(most)}
    often = seconds and waited >= WAITED_SHARE * seconds
    if gave_way or (often and most < sequences):
        kv = figure(capacity, "kv_bytes")
        text = (
            f"Keys and values are the limit: {human_bytes(kv)} held {most:.0f} sequences of {sequences:.0f} at once"
            + (f", and {plural(gave_way, 'time')} one gave way and was read again" if gave_way else "")
            + ". With more memory fewer wait."
        )
        yield Advice("serving-kv", text, {"api.kv_mib": str(int(2 * kv) >> 20)}, 0.0, evidence)
    elif often:
        text = (
            f"Requests were in line for {percent(waited, seconds)} of the time that was worked, with all "
            f"{sequences:.0f} sequences taken."
        )
        growth = _growth(run)
        if growth is not None and growth <= FREE_GROWTH:
            text += f" Twice as many took {growth:.2f} times as long a step, so more at once cost little."
            yield Advice("serving-sequences", text, {"api.sequences": f"{2 * sequences:.0f}"}, 0.0, evidence)
        else:
            text += " More at once would make each slower: this needs a second endpoint."
            yield Advice("serving-full", text, {}, 0.0, evidence)


def _growth(run: Reading) -> float | None:
    """How much longer a step of the most sequences took than one of half as many."""
    batches = {figure(batch, "upto"): batch for batch in look.entries(run.document, "requests", "batches")}
    most = max(batches, default=0.0)
    if most / 2 not in batches:
        return None
    large, small = (
        figure(batches[upto], "seconds") / max(1.0, figure(batches[upto], "steps")) for upto in (most, most / 2)
    )
    return large / small if small else None


def _disturbed(run: Reading) -> Iterator[Advice]:
    """Those that generate wait while prompts are read."""
    requests = look.mapping(run.document, "requests")
    usual, worst = figure(requests, "itl_seconds", "p50"), figure(requests, "itl_seconds", "p99")
    tokens = figure(run.settings, "capacity", "step_tokens")
    if usual and worst > DISTURBED_TIMES * usual and tokens >= 16 and figure(run.prefill.data, "seconds"):
        text = (
            f"One token in a hundred came {human_seconds(worst)} after the one before, where {human_seconds(usual)} is "
            f"usual: up to {tokens:.0f} tokens of prompts are read in a step meanwhile. Fewer disturb less."
        )
        evidence = {"itl_p50_seconds": usual, "itl_p99_seconds": worst}
        yield Advice("serving-chunks", text, {"api.step_tokens": f"{tokens / 2:.0f}"}, 0.0, evidence)


def _limit(run: Reading) -> Iterator[Advice]:
    """What a step's time goes to."""
    phase = next((phase for phase in run.phases if phase.name == "decode"), None)
    if phase is None or not phase.seconds:
        return
    for name, seconds, text in _costs(phase):
        if seconds >= LIMIT_SHARE * phase.seconds:
            told = f"{percent(seconds, phase.seconds)} of the time in which tokens are made {text}"
            yield Advice(f"serving-limit-{name}", told, {}, 0.0, {f"{name}_seconds": seconds})
            return


def _costs(phase: Phase) -> list[tuple[str, float, str]]:
    return sorted(
        (
            ("link", phase.network_seconds, "is the link: a round trip is shared by all that run, so more at once cost "
             "it little."),
            ("attention", phase.op_seconds("ATTENTION", "SOFTMAX"), "is attention in the TEE, which grows with each "
             "sequence and its length: it takes more of the TEE's cores, or fewer sequences."),
            ("gpu", phase.gpu_seconds, "is the server's products: more at once cost them little on a GPU, and much "
             "on a CPU."),
        ),
        key=lambda cost: -cost[1],
    )  # fmt: skip
