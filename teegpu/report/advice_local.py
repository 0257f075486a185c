"""What a run would have taken in the TEE alone, as far as that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from teegpu.metrics.events import DECODE
from teegpu.report.advice_reading import LOCAL, Phase, Reading

NONE: Final = "none"
TWO_SERVER: Final = "two-server"
RING_COST: Final = 2.2
"""The least that a product in the ring cost against one in fp32, over SmolLM2's matrices and 1 to 1,024 rows, on one
core with AVX2: so the TEE alone is rather said to be slower than it is."""

SHIELD_OPS: Final = ("FIXED_POINT", "MASK", "PADS", "HINT", "UNMASK", "VERIFY")
"""The TEE's operations that there are for privacy and verification alone."""

ALIKE: Final = 4.0
"""A stored run tells of a prompt that is at most so many times longer or shorter than its own."""

NARROW_DECODE: Final = 2.0
"""A step of decode reads every weight once, so in fp32 it takes at most twice what it takes in bf16 or fp16."""


@dataclass(frozen=True, slots=True)
class LocalEstimate:
    """``seconds`` of a phase in the TEE alone, and ``basis``: how that is known."""

    seconds: float
    basis: str


def estimate(reading: Reading, phase: Phase, reference: Mapping[str, Any] | None) -> LocalEstimate | None:
    """``phase`` in the TEE alone: from ``reference``, a stored run of the same model on the same machine, or from the
    run's own times where the server computes on this machine's processor. None where neither tells."""
    if reference is not None and (told := _from_reference(reading, phase, reference)) is not None:
        return told
    return _from_server(reading, phase)


def _from_reference(reading: Reading, phase: Phase, reference: Mapping[str, Any]) -> LocalEstimate | None:
    other = Reading(reference)
    if not alike(reading.document, reference):
        return None
    known = other.decode if phase.name == DECODE else other.prefill
    if known.plan != LOCAL or not known.tokens or not known.seconds or not phase.tokens:
        return None
    apart = reading.prompt_tokens / max(1, other.prompt_tokens)
    if not 1 / ALIKE <= apart <= ALIKE:
        return None
    # By the token: what attention adds for a longer context is left out, and that of a shorter one counted.
    return LocalEstimate(known.seconds / known.tokens * phase.tokens, "an earlier run on this machine")


def _from_server(reading: Reading, phase: Phase) -> LocalEstimate | None:
    """The server's products would take the TEE as long, on the same processor and in the same dtype, less what products
    in the ring cost more, and each of two servers computed the same. What is masked and verified would not be. The TEE
    computes
    in fp32: for decode, which is bound by reading the weights, that costs at most twice the time; for prefill, which is
    bound by arithmetic, a processor may be quicker in bf16 by any factor, so nothing is said."""
    if not (reading.same_machine and reading.server_on_cpu and phase.remote):
        return None
    dtype = reading.server.get("dtype")
    if dtype == "fp32":
        slower = 1.0
    elif dtype in ("bf16", "fp16") and phase.name == DECODE:
        slower = NARROW_DECODE
    else:
        return None
    if reading.privacy != NONE:
        slower /= RING_COST * (2 if reading.privacy == TWO_SERVER else 1)
    fewer = reading.server_threads / reading.cores if reading.cores else 1.0
    tee = phase.tee_seconds - phase.op_seconds(*SHIELD_OPS)
    seconds = tee + phase.other_seconds + phase.busy_gpu_seconds * slower * max(1.0, fewer)
    return LocalEstimate(seconds, "the server's own times on the same processor")


def alike(document: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Whether ``reference`` ran the same model on a machine like that of ``document``."""
    ours, theirs = _machine(document), _machine(reference)
    return ours[0] is not None and ours == theirs


def _machine(document: Mapping[str, Any]) -> tuple[Any, ...]:
    environment, settings = document.get("environment") or {}, document.get("settings") or {}
    cores = environment.get("cores") or (settings.get("threads") or {}).get("cores")
    digest = (document.get("model") or {}).get("digest")
    return digest or None, environment.get("machine"), environment.get("cpu"), cores


def find_reference(document: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first of ``others`` (newest first) that tells what ``document`` would have taken in the TEE alone."""
    for other in others:
        settings = other.get("settings") or {}
        local = settings.get("prefill_plan") == settings.get("decode_plan") == LOCAL
        if local and other.get("status") == "complete" and alike(document, other):
            return other
    return None
