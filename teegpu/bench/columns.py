"""Which figures of a benchmark's document its tables show, and how; and its columns in CSV, units in their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from teegpu.bench.summary import verdict
from teegpu.units import count, fixed, human_bytes, percent, times

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


def _between(digits: int) -> Callable[[tuple[float, float]], str]:
    return lambda pair: f"{pair[0]:,.{digits}f}–{pair[1]:,.{digits}f}"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f}"


def _kib(value: float) -> str:
    return f"{value / 2**10:,.1f}"


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3f}"


def _giga(value: float) -> str:
    return f"{value / 1e9:,.2f}"


def _nanoseconds(value: float) -> str:
    return f"{value * 1e9:.3f}"


_CASE = Column("case", at("label"))
_SERVER = Column("server", at("server", "dtype"))

_PREFILL = (
    _CASE,
    _SERVER,
    Column("RPC calls", at("prefill", "rpc_calls"), count),
    Column("MiB up", at("prefill", "bytes_up"), _mib),
    Column("MiB down", at("prefill", "bytes_down"), _mib),
    Column("seconds", at("prefill", "seconds", "median"), fixed(3)),
    Column("min–max", spread("prefill", "seconds"), _between(3)),
    Column("speed-up", at("prefill", "speed_up"), times),
    Column("communication", at("prefill", "communication_share"), percent),
    Column("link's floor", at("prefill", "link_floor_seconds"), fixed(3)),
    Column("× floor", at("prefill", "ratio_to_floor"), times),
)
_DECODE = (
    _CASE,
    Column("RPC calls", at("decode", "rpc_calls_per_step"), count),
    Column("KiB up", at("decode", "bytes_up_per_step"), _kib),
    Column("KiB down", at("decode", "bytes_down_per_step"), _kib),
    Column("tokens/s", at("decode", "tokens_per_second", "median"), fixed(1)),
    Column("min–max", spread("decode", "tokens_per_second"), _between(1)),
    Column("speed-up", at("decode", "speed_up"), times),
    Column("communication", at("decode", "communication_share"), percent),
    Column("× floor", at("decode", "ratio_to_floor"), times),
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
    Column("positions", at("positions"), count),
)
_OVERHEAD = (
    Column("milliseconds", at("label")),
    Column("median", at("seconds", "median"), _milliseconds),
    Column("p95", at("seconds", "p95"), _milliseconds),
    Column("min", at("seconds", "min"), _milliseconds),
)

_CURVE = (
    Column("bytes each way", at("label")),
    Column("ms a round trip", at("round_trip", "median"), _milliseconds),
    Column("p95", at("round_trip", "p95"), _milliseconds),
    Column("min", at("round_trip", "min"), _milliseconds),
    Column("+ ms", at("cost", "round_trip_seconds"), _milliseconds),
    Column("MB/s each way", at("bytes_per_second", "median"), lambda value: f"{value / 1e6:,.1f}"),
    Column("min–max", spread("bytes_per_second"), lambda pair: f"{pair[0] / 1e6:,.1f}–{pair[1] / 1e6:,.1f}"),
    Column("of that without", at("cost", "throughput_ratio"), percent),
)
_ROUND_TRIP = (
    Column("milliseconds", at("label")),
    Column("median", at("rtt_seconds", "median"), _milliseconds),
    Column("p95", at("rtt_seconds", "p95"), _milliseconds),
    Column("min", at("rtt_seconds", "min"), _milliseconds),
)
_BANDWIDTH = (
    Column("message", at("label")),
    Column("Mbit/s", at("bytes_per_second", "median"), lambda value: f"{value * 8 / 1e6:,.1f}"),
    Column("min–max", spread("bytes_per_second"), lambda pair: f"{pair[0] * 8 / 1e6:,.1f}–{pair[1] * 8 / 1e6:,.1f}"),
    Column("MB/s", at("bytes_per_second", "median"), lambda value: f"{value / 1e6:,.1f}"),
    Column("ms on the link", at("network_seconds", "median"), _milliseconds),
    Column("ms in the server", at("server_seconds", "median"), _milliseconds),
)
_DTYPES = (
    Column("activations", at("activations")),
    Column("wire dtype", at("wire_dtype")),
    Column("values", at("values"), count),
    Column("bytes", at("bytes_share"), percent),
    Column("encode GB/s", at("encode", "bytes_per_second"), _giga),
    Column("ns/value", at("encode", "seconds_per_value"), _nanoseconds),
    Column("decode GB/s", at("decode", "bytes_per_second"), _giga),
    Column("ns/value", at("decode", "seconds_per_value"), _nanoseconds),
    Column("RMS error", at("deviation", "relative_rms"), _tiny),
    Column("largest", at("deviation", "largest"), _tiny),
)
_ZSTD = (
    Column("activations", at("activations")),
    Column("wire dtype", at("wire_dtype")),
    Column("shuffle", at("shuffled"), lambda value: "yes" if value else "no"),
    Column("level", at("level"), count),
    Column("after ÷ before", at("zstd", "ratio"), fixed(3)),
    Column("compress GB/s", at("zstd", "compress_bytes_per_second"), _giga),
    Column("decompress GB/s", at("zstd", "decompress_bytes_per_second"), _giga),
    Column("pays below Mbit/s", at("zstd", "break_even_bytes_per_second"), lambda value: f"{value * 8 / 1e6:,.0f}"),
)
_SHIELD = (
    Column("milliseconds a token", at("label")),
    Column("in a chunk", at("chunk_seconds_per_token", "median"), _milliseconds),
    Column("min–max", spread("chunk_seconds_per_token"), lambda pair: f"{pair[0] * 1e3:.3f}–{pair[1] * 1e3:.3f}"),
    Column("in a step", at("step_seconds_per_token", "median"), _milliseconds),
    Column("min–max", spread("step_seconds_per_token"), lambda pair: f"{pair[0] * 1e3:.3f}–{pair[1] * 1e3:.3f}"),
    Column("once, s", at("seconds_once"), fixed(1)),
)
_REPLAY = (
    Column("of the replay", at("label")),
    Column("monitor's MiB", at("resident_bytes"), _mib),
    Column("more than in the first part", at("grown_bytes"), lambda value: f"{value / 2**20:+,.1f}"),
)
_SOAK = (
    Column("client", at("label")),
    Column("programs", at("programs"), count),
    Column("per second", at("programs_per_second"), lambda value: f"{value:.1f}"),
    Column("server s", at("server_seconds"), lambda value: f"{value:.2f}"),
    Column("queue median, ms", at("queue_seconds", "median"), _milliseconds),
    Column("queue p95, ms", at("queue_seconds", "p95"), _milliseconds),
    Column("refused", at("refusals"), count),
    Column("connections", at("reconnects"), count),
    Column("errors", at("errors"), count),
)

_RECORDING = (
    Column("seconds", at("label")),
    Column("not recorded", at("off_seconds", "median"), fixed(3)),
    Column("min–max", spread("off_seconds"), _between(3)),
    Column("recorded", at("on_seconds", "median"), fixed(3)),
    Column("min–max", spread("on_seconds"), _between(3)),
    Column("overhead", at("overhead", "median"), lambda value: f"{value:+.2%}"),
    Column("of pairs", spread("overhead"), lambda pair: f"{pair[0]:+.1%} to {pair[1]:+.1%}"),
    Column("slower pairs", at("slower_pairs"), count),
)


_WATCHING = tuple(
    replace(column, heading={"not recorded": "alone", "recorded": "watched"}.get(column.heading, column.heading))
    for column in _RECORDING
)


def _on(tracks: str, look: Look) -> Look:
    """``look`` for rungs of the ladder on these tracks, with commas; nothing for others."""
    wanted = tracks.split(",")
    return lambda entry: look(entry) if entry.get("track") in wanted else None


def _repeats(entry: Entry) -> str | None:
    if "prefill" not in entry:
        return None
    return "warm-up" if entry.get("cold") else str(entry["repeats"])


def _ladder(phase: str, tracks: str, *columns: Column) -> tuple[Column, ...]:
    figures = (
        *columns,
        Column("repeats", _repeats),
        Column("speed-up", at(phase, "speed_up"), times),
        Column("over the one before", at(phase, "speed_up_over_before"), times),
        Column("communication", at(phase, "communication_share"), percent),
        Column("× limit", at(phase, "ratio_to_limit"), times),
    )
    return (Column("rung", at("label")), *(replace(column, value=_on(tracks, column.value)) for column in figures))


_LADDER_PREFILL = _ladder(
    "prefill",
    "prefill,beside,baseline",
    Column("RPC calls", at("prefill", "rpc_calls"), count),
    Column("MiB up", at("prefill", "bytes_up"), _mib),
    Column("MiB down", at("prefill", "bytes_down"), _mib),
    Column("seconds", at("prefill", "seconds", "median"), fixed(3)),
    Column("min–max", spread("prefill", "seconds"), _between(3)),
    Column("expected", at("expected_seconds"), fixed(0)),
)
_PER_TOKEN = (
    Column("steps", at("decode", "steps"), count),
    Column("RPC calls a step", at("decode", "rpc_calls_per_step"), count),
    Column("KiB up", at("decode", "bytes_up_per_step"), _kib),
    Column("KiB down", at("decode", "bytes_down_per_step"), _kib),
    Column("ms a token", at("decode", "seconds_per_token", "median"), lambda value: f"{value * 1e3:,.1f}"),
    Column(
        "min–max",
        spread("decode", "seconds_per_token"),
        lambda pair: f"{pair[0] * 1e3:,.1f}–{pair[1] * 1e3:,.1f}",
    ),
)
_LADDER_OUTPUT = (
    Column("rung", at("label")),
    Column("greedy tokens as transformers fp32", _output),
    Column("KL, nats", at("accuracy", "kl_nats"), _tiny),
    Column("top-1", at("accuracy", "top1_agreement"), lambda value: f"{value:.3f}"),
    Column("positions", at("accuracy", "positions"), count),
    Column("runner's peak MiB", at("peak_memory_bytes"), _mib),
)


def _accounts(phase: str) -> tuple[Column, ...]:
    return (
        _CASE,
        Column("wall s", at(phase, "wall_seconds"), fixed(3)),
        Column("TEE", at(phase, "tee_seconds"), fixed(3)),
        Column("serialization", at(phase, "serialization_seconds"), fixed(3)),
        Column("network", at(phase, "network_seconds"), fixed(3)),
        Column("server", at(phase, "server_seconds"), fixed(3)),
        Column("GPU", at(phase, "gpu_seconds"), fixed(3)),
        Column("other", at(phase, "other_seconds"), fixed(3)),
        Column("sum ÷ wall", at(phase, "sum_over_wall"), _exactly),
        Column("layers ÷ wall", at(phase, "layers_over_wall"), _exactly),
        Column("requests", at(phase, "requests_seconds"), fixed(3)),
    )


def _exactly(value: float) -> str:
    return f"{value:.3%}"


def _of_size(size: int) -> tuple[Column, ...]:
    """The columns of a table that shows the ways of one size only."""
    columns = (
        Column("transport", at("label")),
        Column("ms a round trip", at("round_trip", "median"), _milliseconds),
        Column("p95", at("round_trip", "p95"), _milliseconds),
        Column("min", at("round_trip", "min"), _milliseconds),
        Column("+ ms to bare", at("to_bare", "round_trip_seconds"), _milliseconds),
        Column("in flight", at("requests_in_flight"), count),
        Column("MB/s each way", at("bytes_per_second", "median"), lambda value: f"{value / 1e6:,.1f}"),
        Column("min–max", spread("bytes_per_second"), lambda pair: f"{pair[0] / 1e6:,.1f}–{pair[1] / 1e6:,.1f}"),
        Column("of bare", at("to_bare", "throughput_ratio"), percent),
        Column("bytes on the link", at("link_share"), percent),
    )
    return tuple(
        replace(column, value=_where(lambda entry: entry["bytes"] == size, column.value)) for column in columns
    )


def _entries_with(part: str, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """``columns`` for the entries that have ``part``, which other entries leave empty."""
    return tuple(replace(column, value=_where(lambda entry: part in entry, column.value)) for column in columns)


def _where(holds: Callable[[Entry], bool], look: Look) -> Look:
    return lambda entry: look(entry) if holds(entry) else None


def _transports(document: Entry) -> Tables:
    return tuple((f"{human_bytes(size)} each way", _of_size(size)) for size in document["settings"]["sizes"])


Tables = tuple[tuple[str, tuple[Column, ...]], ...]

TABLES: dict[str, Tables | Callable[[Entry], Tables]] = {
    "plans": (("Prefill", _PREFILL), ("Decode, per step", _DECODE), ("Output", _OUTPUT)),
    "ladder": (
        ("Prefill", _LADDER_PREFILL),
        ("Decode", _ladder("decode", "decode,baseline", *_PER_TOKEN)),
        ("Decode on the rungs of the prefill", _ladder("decode", "prefill,beside", *_PER_TOKEN)),
        ("Output", _LADDER_OUTPUT),
    ),
    "accuracy": (("Against transformers in fp32", _ACCURACY),),
    "soak": (("Clients", _SOAK),),
    "overhead": (("One RPC of a decode step", _OVERHEAD),),
    "curve": (("What keys cost", _CURVE),),
    "link": (("Round trip", _ROUND_TRIP), ("Bandwidth", _BANDWIDTH)),
    "transports": _transports,
    "codec": (("Wire dtypes", _entries_with("encode", _DTYPES)), ("zstd", _entries_with("zstd", _ZSTD))),
    "shield": (("What the runner does beyond a plain run", _SHIELD),),
    "replay": (("The monitor's memory", _REPLAY),),
    "recording": (("What a record costs", _RECORDING),),
    "watch": (("What watching costs", _WATCHING),),
    "accounting": (("Prefill", _accounts("prefill")), ("Decode", _accounts("decode"))),
}
"""For each benchmark its tables (title and columns), or what makes them of its document. What no entry has a figure for
is left out."""

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
    "ladder": {
        "rung": at("rung"),
        "label": at("label"),
        "track": at("track"),
        "before": at("before"),
        "repeats": at("repeats"),
        "cold": at("cold"),
        **{
            key: at("case", key)
            for key in (
                "prefill_plan",
                "decode_plan",
                "transport",
                "wire_dtype",
                "codec",
                "speculate",
                "kv_cache",
                "position_cache",
            )
        },
        "chunk_tokens": at("chunk_tokens"),
        "server_dtype": at("server", "dtype"),
        "runner_threads": at("threads", "runner"),
        "server_threads": at("threads", "server"),
        "prefill_rpc_calls": at("prefill", "rpc_calls"),
        "prefill_bytes_up": at("prefill", "bytes_up"),
        "prefill_bytes_down": at("prefill", "bytes_down"),
        "prefill_seconds_median": at("prefill", "seconds", "median"),
        "prefill_seconds_min": at("prefill", "seconds", "min"),
        "prefill_seconds_max": at("prefill", "seconds", "max"),
        "prefill_seconds_expected": at("expected_seconds"),
        "decode_steps": at("decode", "steps"),
        "decode_rpc_calls_per_step": at("decode", "rpc_calls_per_step"),
        "decode_bytes_up_per_step": at("decode", "bytes_up_per_step"),
        "decode_bytes_down_per_step": at("decode", "bytes_down_per_step"),
        "decode_seconds_per_step_median": at("decode", "seconds_per_step", "median"),
        "decode_seconds_per_token_median": at("decode", "seconds_per_token", "median"),
        "decode_seconds_per_token_min": at("decode", "seconds_per_token", "min"),
        "decode_seconds_per_token_max": at("decode", "seconds_per_token", "max"),
        **{
            f"{phase}_{key}": at(phase, key)
            for phase in ("prefill", "decode")
            for key in (
                "speed_up",
                "speed_up_over_before",
                "communication_share",
                "limit_seconds",
                "ratio_to_limit",
            )
        },
        "output_tokens": at("output", "tokens"),
        "output_agreeing_tokens": at("output", "agreeing_tokens"),
        "output_identical": at("output", "identical"),
        "kl_nats": at("accuracy", "kl_nats"),
        "top1_agreement": at("accuracy", "top1_agreement"),
        "peak_memory_bytes": at("peak_memory_bytes"),
        "error": at("error"),
    },
    "accuracy": {
        "label": at("label"),
        "wire_dtype": at("wire_dtype"),
        "server_dtype": at("server_dtype"),
        "privacy": at("privacy"),
        "kl_nats": at("kl_nats"),
        "kl_nats_worst_text": at("kl_nats_worst_text"),
        "top1_agreement": at("top1_agreement"),
        "perplexity": at("perplexity"),
        "positions": at("positions"),
    },
    "recording": {
        "part": at("part"),
        "off_seconds_median": at("off_seconds", "median"),
        "off_seconds_min": at("off_seconds", "min"),
        "off_seconds_max": at("off_seconds", "max"),
        "on_seconds_median": at("on_seconds", "median"),
        "on_seconds_min": at("on_seconds", "min"),
        "on_seconds_max": at("on_seconds", "max"),
        "overhead_median": at("overhead", "median"),
        "overhead_min": at("overhead", "min"),
        "overhead_max": at("overhead", "max"),
        "slower_pairs": at("slower_pairs"),
        "pairs": at("pairs"),
    },
    "watch": {
        "part": at("part"),
        "off_seconds_median": at("off_seconds", "median"),
        "off_seconds_min": at("off_seconds", "min"),
        "off_seconds_max": at("off_seconds", "max"),
        "on_seconds_median": at("on_seconds", "median"),
        "on_seconds_min": at("on_seconds", "min"),
        "on_seconds_max": at("on_seconds", "max"),
        "overhead_median": at("overhead", "median"),
        "overhead_min": at("overhead", "min"),
        "overhead_max": at("overhead", "max"),
        "slower_pairs": at("slower_pairs"),
        "pairs": at("pairs"),
    },
    "accounting": {
        "label": at("label"),
        "plan": at("plan"),
        "transport": at("transport"),
        **{
            f"{phase}_{key}": at(phase, key)
            for phase in ("prefill", "decode")
            for key in (
                "wall_seconds",
                "tee_seconds",
                "serialization_seconds",
                "network_seconds",
                "server_seconds",
                "gpu_seconds",
                "other_seconds",
                "wait_seconds",
                "sum_over_wall",
                "layers_over_wall",
                "requests",
                "requests_seconds",
            )
        },
        "phases_over_wall": at("run", "phases_over_wall"),
        "error": at("error"),
    },
    "curve": {
        "bytes": at("bytes"),
        "encrypted": at("encrypted"),
        "round_trip_seconds_median": at("round_trip", "median"),
        "round_trip_seconds_p95": at("round_trip", "p95"),
        "round_trip_seconds_min": at("round_trip", "min"),
        "bytes_per_second_median": at("bytes_per_second", "median"),
        "bytes_per_second_min": at("bytes_per_second", "min"),
        "bytes_per_second_max": at("bytes_per_second", "max"),
        "round_trip_ratio": at("cost", "round_trip_ratio"),
        "throughput_ratio": at("cost", "throughput_ratio"),
    },
    "link": {
        "part": at("part"),
        "bytes": at("bytes"),
        "rtt_seconds_median": at("rtt_seconds", "median"),
        "rtt_seconds_p95": at("rtt_seconds", "p95"),
        "rtt_seconds_min": at("rtt_seconds", "min"),
        "bytes_per_second_median": at("bytes_per_second", "median"),
        "bytes_per_second_min": at("bytes_per_second", "min"),
        "bytes_per_second_max": at("bytes_per_second", "max"),
        "network_seconds_median": at("network_seconds", "median"),
        "server_seconds_median": at("server_seconds", "median"),
    },
    "transports": {
        "transport": at("transport"),
        "over": at("over"),
        "encrypted": at("encrypted"),
        "bytes": at("bytes"),
        "round_trip_seconds_median": at("round_trip", "median"),
        "round_trip_seconds_p95": at("round_trip", "p95"),
        "round_trip_seconds_min": at("round_trip", "min"),
        "requests_in_flight": at("requests_in_flight"),
        "bytes_per_second_median": at("bytes_per_second", "median"),
        "bytes_per_second_min": at("bytes_per_second", "min"),
        "bytes_per_second_max": at("bytes_per_second", "max"),
        "link_share": at("link_share"),
        "round_trip_ratio_to_bare": at("to_bare", "round_trip_ratio"),
        "throughput_ratio_to_bare": at("to_bare", "throughput_ratio"),
    },
    "shield": {
        "mode": at("mode"),
        "operation": at("operation"),
        **{
            f"{phase}_seconds_per_token_{figure}": at(f"{phase}_seconds_per_token", figure)
            for phase in ("chunk", "step")
            for figure in ("median", "min", "max")
        },
        "seconds_once": at("seconds_once"),
    },
    "codec": {
        "activations": at("activations"),
        "wire_dtype": at("wire_dtype"),
        "level": at("level"),
        "shuffled": at("shuffled"),
        "values": at("values"),
        "bytes_share": at("bytes_share"),
        "encode_bytes_per_second": at("encode", "bytes_per_second"),
        "encode_seconds_per_value": at("encode", "seconds_per_value"),
        "decode_bytes_per_second": at("decode", "bytes_per_second"),
        "decode_seconds_per_value": at("decode", "seconds_per_value"),
        "deviation_relative_rms": at("deviation", "relative_rms"),
        "deviation_largest": at("deviation", "largest"),
        "zstd_ratio": at("zstd", "ratio"),
        "zstd_compress_bytes_per_second": at("zstd", "compress_bytes_per_second"),
        "zstd_decompress_bytes_per_second": at("zstd", "decompress_bytes_per_second"),
        "zstd_break_even_bytes_per_second": at("zstd", "break_even_bytes_per_second"),
    },
    "replay": {
        "part": at("part"),
        "resident_bytes": at("resident_bytes"),
        "grown_bytes": at("grown_bytes"),
    },
    "soak": {
        "label": at("label"),
        "kind": at("kind"),
        "programs": at("programs"),
        "programs_per_second": at("programs_per_second"),
        "server_seconds": at("server_seconds"),
        "queue_seconds_median": at("queue_seconds", "median"),
        "queue_seconds_p95": at("queue_seconds", "p95"),
        "refusals": at("refusals"),
        "reconnects": at("reconnects"),
        "errors": at("errors"),
    },
    "overhead": {
        "part": at("part"),
        "seconds_median": at("seconds", "median"),
        "seconds_p95": at("seconds", "p95"),
        "seconds_min": at("seconds", "min"),
    },
}
"""For each benchmark the columns of its CSV: name and value."""
