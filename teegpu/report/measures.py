"""The figures that two runs are compared by: their names, how they are written, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teegpu.errors import UsageError, nearest
from teegpu.report import facts, look
from teegpu.units import count, fixed, human_bytes, human_seconds, percent, times

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"

SAME = 0.0005
"""A change below this is ``same``: it would be printed as 0.0 %."""

_NEUTRAL = frozenset({"tokens", "passes", "drafted_tokens", "layer", "count", "tried_bytes", "compressed_bytes"})


@dataclass(frozen=True)
class Measure:
    """``path`` is dotted, as in the document."""

    path: str
    label: str

    @property
    def better(self) -> str:
        """``LOWER``, ``HIGHER`` or ``NEITHER``."""
        leaf = self.path.rpartition(".")[2]
        if leaf in ("tokens_per_second", "accepted_tokens") or leaf.startswith("saved_bytes"):
            return HIGHER
        judged = self.path.startswith(("phases.", "latency.", "limit.", "memory."))
        return LOWER if judged and leaf not in _NEUTRAL else NEITHER

    @property
    def shown(self) -> Callable[[float], str]:
        leaf = self.path.rpartition(".")[2]
        if leaf.endswith("seconds"):
            return human_seconds
        if leaf.endswith("_share"):
            return percent
        if "bytes" in leaf:
            return lambda value: f"-{human_bytes(-value)}" if value < 0 else human_bytes(value)
        if leaf == "ratio":
            return times
        return fixed(2) if leaf in ("tokens_per_second", "rpcs_per_token") else count

    def value(self, document: look.Document) -> float | None:
        found = dict(look.numbers(document)) if ".layers." in self.path else {}
        return found.get(self.path, look.number(document, *self.path.split(".")))

    def verdict(self, change: float | None) -> str:
        """``better``, ``worse``, ``same``; empty where neither way is better."""
        if change is None:
            return ""
        if abs(change) < SAME:
            return "same"
        if self.better == NEITHER:
            return ""
        return "better" if (change > 0) == (self.better == HIGHER) else "worse"


_OF_PHASE = {
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
    "rpc_calls": "RPC calls",
    "rpcs_per_token": "RPCs per token",
    "rpc_retries": "retries",
    "rpc_latency.median_seconds": "RPC latency, median",
    "rpc_latency.p95_seconds": "RPC latency, p95",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down",
    "tee_seconds": "TEE compute",
    "gpu_seconds": "GPU compute",
    "network_seconds": "network",
    "serialization_seconds": "serialization",
    "server_seconds": "server overhead",
    "other_seconds": "other",
    "communication_share": "communication share",
}

MEASURES: tuple[Measure, ...] = (
    Measure("latency.ttft_seconds", "TTFT"),
    Measure("latency.tpot_median_seconds", "TPOT, median"),
    Measure("latency.tpot_p95_seconds", "TPOT, p95"),
    *(
        Measure(f"phases.{name}.{path}", f"{name} {label}")
        for name in facts.PHASES
        for path, label in _OF_PHASE.items()
    ),
    Measure("limit.bound_seconds", "limit"),
    Measure("limit.ratio", "ratio to the limit"),
    Measure("memory.runner_peak_bytes", "runner's peak memory"),
    Measure("memory.server_bytes", "server's memory"),
)
"""What ``compare`` shows, in its order."""


def find(name: str, documents: Sequence[look.Document]) -> Measure:
    """The measure that ``name`` means: a path (``phases.decode.rpc_calls``), one without ``phases.``
    (``decode.rpc_calls``), or a short name of a latency (``tpot_median_seconds``).

    Any number of a document may be named. Raises ``UsageError`` that names the nearest.
    """
    known = {measure.path: measure for measure in MEASURES}
    for document in documents:
        for path, _ in look.numbers(document):
            known.setdefault(path, Measure(path, path.removeprefix("phases.")))
    for candidate in (name, f"latency.{name}", f"phases.{name}"):
        if candidate in known:
            return known[candidate]
    # suggestions leave the long tails of layers out: nobody means them by mistake
    names = [path.removeprefix("latency.").removeprefix("phases.") for path in known if ".layers." not in path]
    raise UsageError(f"--fail-if: no figure of these runs is called '{name}'{nearest(name, names)}")


def relative_change(reference: float | None, value: float | None) -> float | None:
    """0.05: 5 % more than the reference. Infinite where the reference is 0 and the value is not."""
    if reference is None or value is None:
        return None
    if reference == 0:
        return 0.0 if value == 0 else math.copysign(math.inf, value)
    return (value - reference) / abs(reference)


def signed_percent(change: float) -> str:
    """``+5.0%``, ``0.0%``; from nothing to something is ``+∞``."""
    if not math.isfinite(change):
        return "+∞" if change > 0 else "-∞"
    return f"{change:+.1%}" if abs(change) >= SAME else "0.0%"
