"""Which figures of a benchmark's document its tables show, and how; and its columns in CSV, units in their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from teegpu.bench.summary import verdict

Entry = Mapping[str, Any]
Look = Callable[[Entry], Any]


@dataclass(frozen=True)
class Column:
    """``value`` finds a figure in an entry of the results (None: there is none), ``shown`` writes it for people."""

    heading: str
    value: Look
    shown: Callable[[Any], str] = str


def at(*path: str) -> Look:
    """The value at ``path``; None where a part of it is missing."""

    def look(entry: Entry) -> Any:
        value: Any = entry
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return look


def spread(*path: str) -> Look:
    """(least, largest) of the spread at ``path``."""
    find = at(*path)

    def look(entry: Entry) -> Any:
        found = find(entry)
        return None if found is None else (found["min"], found["max"])

    return look


def _output(entry: Entry) -> str | None:
    return verdict(entry["output"]) if entry.get("output") else None


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _between(digits: int) -> Callable[[tuple[float, float]], str]:
    return lambda pair: f"{pair[0]:,.{digits}f}–{pair[1]:,.{digits}f}"


def _count(value: float) -> str:
    """A whole number as such, else one decimal (calls a step, with speculation)."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f}"


def _kib(value: float) -> str:
    return f"{value / 2**10:,.1f}"


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3f}"


_CASE = Column("case", at("label"))
_SERVER = Column("server", at("server", "dtype"))

_PREFILL = (
    _CASE,
    _SERVER,
    Column("RPC calls", at("prefill", "rpc_calls"), _count),
    Column("MiB up", at("prefill", "bytes_up"), _mib),
    Column("MiB down", at("prefill", "bytes_down"), _mib),
    Column("seconds", at("prefill", "seconds", "median"), _fixed(3)),
    Column("min–max", spread("prefill", "seconds"), _between(3)),
    Column("speed-up", at("prefill", "speed_up"), _times),
    Column("communication", at("prefill", "communication_share"), _percent),
    Column("link's floor", at("prefill", "link_floor_seconds"), _fixed(3)),
    Column("× floor", at("prefill", "ratio_to_floor"), _times),
)
_DECODE = (
    _CASE,
    Column("RPC calls", at("decode", "rpc_calls_per_step"), _count),
    Column("KiB up", at("decode", "bytes_up_per_step"), _kib),
    Column("KiB down", at("decode", "bytes_down_per_step"), _kib),
    Column("tokens/s", at("decode", "tokens_per_second", "median"), _fixed(1)),
    Column("min–max", spread("decode", "tokens_per_second"), _between(1)),
    Column("speed-up", at("decode", "speed_up"), _times),
    Column("communication", at("decode", "communication_share"), _percent),
    Column("× floor", at("decode", "ratio_to_floor"), _times),
)
_OUTPUT = (
    _CASE,
    Column("greedy tokens as transformers fp32", _output),
    Column("runner's peak MiB", at("peak_memory_bytes"), _mib),
)
_ACCURACY = (
    Column("variant", at("label")),
    Column("KL, nats", at("kl_nats"), _tiny),
    Column("worst text", at("kl_nats_worst_text"), _tiny),
    Column("top-1 agreement", at("top1_agreement"), lambda value: f"{value:.4f}"),
    Column("perplexity", at("perplexity"), lambda value: f"{value:.4f}"),
    Column("positions", at("positions"), _count),
)
_OVERHEAD = (
    Column("milliseconds", at("label")),
    Column("median", at("seconds", "median"), _milliseconds),
    Column("p95", at("seconds", "p95"), _milliseconds),
    Column("min", at("seconds", "min"), _milliseconds),
)

TABLES: dict[str, tuple[tuple[str, tuple[Column, ...]], ...]] = {
    "plans": (("Prefill", _PREFILL), ("Decode, per step", _DECODE), ("Output", _OUTPUT)),
    "accuracy": (("Against transformers in fp32", _ACCURACY),),
    "overhead": (("One RPC of a decode step", _OVERHEAD),),
}
"""For each benchmark its tables: title and columns. What no entry has a figure for is left out."""

SHEETS: dict[str, dict[str, Look]] = {
    "plans": {
        "label": at("label"),
        "prefill_plan": at("case", "prefill_plan"),
        "decode_plan": at("case", "decode_plan"),
        "transport": at("case", "transport"),
        "wire_dtype": at("case", "wire_dtype"),
        "dtype": at("case", "dtype"),
        "server_dtype": at("server", "dtype"),
        "runner_threads": at("threads", "runner"),
        "server_threads": at("threads", "server"),
        "chunk_tokens": at("chunk_tokens"),
        "prefill_rpc_calls": at("prefill", "rpc_calls"),
        "prefill_bytes_up": at("prefill", "bytes_up"),
        "prefill_bytes_down": at("prefill", "bytes_down"),
        "prefill_seconds_median": at("prefill", "seconds", "median"),
        "prefill_seconds_min": at("prefill", "seconds", "min"),
        "prefill_seconds_max": at("prefill", "seconds", "max"),
        "prefill_speed_up_over_per_op": at("prefill", "speed_up"),
        "prefill_communication_share": at("prefill", "communication_share"),
        "prefill_link_floor_seconds": at("prefill", "link_floor_seconds"),
        "prefill_ratio_to_floor": at("prefill", "ratio_to_floor"),
        "decode_rpc_calls_per_step": at("decode", "rpc_calls_per_step"),
        "decode_bytes_up_per_step": at("decode", "bytes_up_per_step"),
        "decode_bytes_down_per_step": at("decode", "bytes_down_per_step"),
        "decode_tokens_per_second_median": at("decode", "tokens_per_second", "median"),
        "decode_tokens_per_second_min": at("decode", "tokens_per_second", "min"),
        "decode_tokens_per_second_max": at("decode", "tokens_per_second", "max"),
        "decode_speed_up_over_per_op": at("decode", "speed_up"),
        "decode_communication_share": at("decode", "communication_share"),
        "decode_link_floor_seconds": at("decode", "link_floor_seconds"),
        "decode_ratio_to_floor": at("decode", "ratio_to_floor"),
        "output_tokens": at("output", "tokens"),
        "output_agreeing_tokens": at("output", "agreeing_tokens"),
        "output_identical": at("output", "identical"),
        "peak_memory_bytes": at("peak_memory_bytes"),
        "error": at("error"),
    },
    "accuracy": {
        "label": at("label"),
        "wire_dtype": at("wire_dtype"),
        "server_dtype": at("server_dtype"),
        "kl_nats": at("kl_nats"),
        "kl_nats_worst_text": at("kl_nats_worst_text"),
        "top1_agreement": at("top1_agreement"),
        "perplexity": at("perplexity"),
        "positions": at("positions"),
    },
    "overhead": {
        "part": at("part"),
        "seconds_median": at("seconds", "median"),
        "seconds_p95": at("seconds", "p95"),
        "seconds_min": at("seconds", "min"),
    },
}
"""For each benchmark the columns of its CSV: name and value."""
