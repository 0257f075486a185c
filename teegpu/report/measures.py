"""The figures that two runs are compared by: their names, how they are written, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teegpu.errors import UsageError, nearest
from teegpu.report import look
from teegpu.units import count, fixed, human_bytes, human_seconds, percent, times

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"


@dataclass(frozen=True)
class Measure:
    """``path`` is dotted, as in the document. ``better``: ``LOWER``, ``HIGHER`` or ``NEITHER``."""

    path: str
    label: str

    @property
    def better(self) -> str:
        leaf = self.path.rpartition(".")[2]
        if leaf in ("tokens_per_second", "accepted_tokens") or leaf.startswith("saved_bytes"):
            return HIGHER
        if leaf in _NEUTRAL or not self.path.startswith(("phases.", "latency.", "limit.", "memory.")):
            return NEITHER
        return LOWER

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


_NEUTRAL = frozenset({"tokens", "passes", "drafted_tokens", "layer", "count", "tried_bytes", "compressed_bytes"})


def _of_phase(name: str) -> list[Measure]:
    labels = {
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
    return [Measure(f"phases.{name}.{path}", f"{name} {label}") for path, label in labels.items()]


MEASURES: tuple[Measure, ...] = (
    Measure("latency.ttft_seconds", "TTFT"),
    Measure("latency.tpot_median_seconds", "TPOT, median"),
    Measure("latency.tpot_p95_seconds", "TPOT, p95"),
    *_of_phase("prefill"),
    *_of_phase("decode"),
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
    names = [_short(path) for path in known if ".layers." not in path]
    raise UsageError(f"--fail-if: no figure of these runs is called '{name}'{nearest(name, names)}")


def _short(path: str) -> str:
    return path.removeprefix("latency.").removeprefix("phases.")
