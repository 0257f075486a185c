"""A whole document and the events of a run, made up so that every figure can be checked by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType

from teegpu.record import events as ev

MS = 1_000_000

HOSTILE = "\x1b[31mred\x1b]0;title\x07 <script>alert(1)</script> [bold]x[/bold] `a`|b\n@all \u202egnp"


def on_terminal(blocks: Iterable[RenderableType], width: int) -> str:
    """What a terminal without colours shows, without the spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False, _environ={})
    with console.capture() as captured:
        for block in blocks:
            console.print(block)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def operations(*entries: tuple[str, str, int, float]) -> dict[str, Any]:
    return {name: {"where": where, "count": count, "seconds": seconds} for name, where, count, seconds in entries}


def layers(number: int, worst: int) -> list[dict[str, Any]]:
    """Equal layers, but ``worst`` takes three times as long."""
    return [
        {
            "layer": layer,
            "tee_seconds": 0.01 * (3 if layer == worst else 1),
            "serialization_seconds": 0.005 * (3 if layer == worst else 1),
            "network_seconds": 0.02 * (3 if layer == worst else 1),
            "server_seconds": 0.0,
            "gpu_seconds": 0.015 * (3 if layer == worst else 1),
        }
        for layer in range(number)
    ]


PREFILL: dict[str, Any] = {
    "tokens": 1024,
    "passes": 1,
    "seconds": 2.0,
    "tokens_per_second": 512.0,
    "rpc_calls": 60,
    "rpc_retries": 2,
    "rpcs_per_token": 60 / 1024,
    "rpc_latency": {"median_seconds": 0.05, "p95_seconds": 0.08, "max_seconds": 0.125},
    "bytes_up": 100 * 2**20,
    "bytes_down": 150 * 2**20,
    "tee_seconds": 0.5,
    "serialization_seconds": 0.25,
    "wait_seconds": 1.2,
    "network_seconds": 0.8,
    "server_seconds": 0.1,
    "gpu_seconds": 0.3,
    "other_seconds": 0.05,
    "communication_share": 0.525,
    "compression": {
        "raw_bytes_up": 120 * 2**20,
        "raw_bytes_down": 150 * 2**20,
        "saved_bytes_up": 20 * 2**20,
        "saved_bytes_down": 0,
        "tried_bytes": 120 * 2**20,
        "compressed_bytes": 100 * 2**20,
        "seconds": 0.04,
    },
    "speculation": {"drafted_tokens": 0, "accepted_tokens": 0},
    "busy": {
        "round_trip_seconds": 3.0,
        "network_seconds": 1.9,
        "queue_seconds": 0.2,
        "server_serialization_seconds": 0.1,
        "gpu_seconds": 0.9,
        "compression_seconds": 0.04,
    },
    "ops": operations(
        ("LINEAR", "gpu", 210, 0.75),
        ("LM_HEAD", "gpu", 1, 0.05),
        ("ADD", "gpu", 60, 0.1),
        ("RMSNORM", "tee", 61, 0.1),
        ("ROTARY", "tee", 30, 0.05),
        ("ATTENTION", "tee", 30, 0.2),
        ("SILU", "tee", 30, 0.05),
        ("KV_CACHE", "tee", 30, 0.03),
        ("ADD@tee", "tee", 30, 0.02),
    ),
    "layers": layers(30, 7),
}

DECODE: dict[str, Any] = PREFILL | {
    "tokens": 31,
    "passes": 31,
    "seconds": 1.55,
    "tokens_per_second": 20.0,
    "rpc_calls": 1891,
    "rpc_retries": 0,
    "rpcs_per_token": 61.0,
    "bytes_up": 2**20,
    "bytes_down": 2 * 2**20,
    "tee_seconds": 0.2,
    "serialization_seconds": 0.15,
    "wait_seconds": 1.2,
    "network_seconds": 1.0,
    "server_seconds": 0.05,
    "gpu_seconds": 0.15,
    "other_seconds": 0.0,
    "communication_share": 1.15 / 1.55,
    "compression": dict.fromkeys(PREFILL["compression"], 0),
    "busy": PREFILL["busy"] | {"network_seconds": 1.0, "gpu_seconds": 0.15},
    "ops": operations(("LINEAR", "gpu", 6510, 0.14), ("LM_HEAD", "gpu", 31, 0.01), ("RMSNORM", "tee", 1891, 0.2)),
    "layers": layers(30, 29),
}

DOCUMENT: dict[str, Any] = {
    "schema": "teegpu.report/1",
    "id": "20260102-030405-abcdef",
    "status": "complete",
    "started_at": "2026-01-02T03:04:05.000+00:00",
    "model": {
        "name": "smollm2-135m",
        "digest": "0123456789abcdef" * 4,
        "architecture": "llama",
        "layers": 30,
        "hidden_size": 576,
        "parameters": 134515008,
    },
    "settings": {
        "prefill_plan": "fused",
        "decode_plan": "attention",
        "transport": "pipelined+zstd",
        "wire_dtype": "fp16",
        "chunk_tokens": 128,
        "endpoints": ["tcp://10.0.0.2:5555"],
        "link": "",
        "threads": {"runner": 2, "server": None, "cores": 2},
        "speculate": 0,
    },
    "tee": {"kind": "tdx", "attested": False},
    "server": {"device": "cuda:0", "dtype": "bf16", "version": "0.1.0", "threads": 8, "embedded": False},
    "note": "10GbE, jumbo frames",
    "environment": {
        "machine": "x86_64",
        "cpu": "Some CPU",
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "system": "Linux 6.1",
        "python": "3.12.1",
        "torch": "2.11.0",
        "teegpu": "0.1.0",
    },
    "record": {"truncated": False, "failure": None, "damage": []},
    "link": {
        "rtt_seconds": 0.005,
        "bandwidth_up_bytes_per_second": 125e6,
        "bandwidth_down_bytes_per_second": 125e6,
        "source": "measured",
    },
    "memory": {"runner_peak_bytes": 2**30, "server_bytes": 2**31},
    "endpoints": [
        {"address": "tcp://10.0.0.2:5555", "rpc_calls": 1000, "bytes_up": 2**20, "bytes_down": 2**21, "retries": 2},
        {"address": "tcp://10.0.0.3:5555", "rpc_calls": 951, "bytes_up": 2**20, "bytes_down": 2**21, "retries": 0},
    ],
    "phases": {"prefill": PREFILL, "decode": DECODE},
    "latency": {"ttft_seconds": 2.001, "tpot_median_seconds": 0.05, "tpot_p95_seconds": 0.0625},
    "limit": {"link_seconds": 2.0, "gpu_seconds": 1.05, "tee_seconds": 0.7, "bound_seconds": 2.5, "ratio": 1.42},
    "advice": [
        {
            "id": "decode-local",
            "text": "Decoding in the TEE avoids 61 round trips a token.",
            "setting": "run.decode_plan",
            "value": "local",
            "predicted_saving_seconds": 0.8,
            "evidence": {"rtt_seconds": 0.005},
        },
        {"id": "near-limit", "text": "The prefill is within 10 % of its limit.", "setting": "", "value": None},
    ],
}


def document(**changes: Any) -> dict[str, Any]:
    """A copy; ``changes`` are dotted paths with ``__`` for the dots: ``phases__decode__seconds=1``, ``note=""``."""
    made = copy.deepcopy(DOCUMENT)
    for path, value in changes.items():
        *folders, name = path.split("__")
        place = made
        for folder in folders:
            place = place[folder]
        place[name] = value
    return made


def rpc(request_id: int, sent_ms: float, received_ms: float, layer: int = 0, chunk: int = 0) -> ev.Rpc:
    """A tenth of its time each for queue, decode and encode, half for computing; three times the bytes down as up."""
    seconds = (received_ms - sent_ms) / 1e3
    return ev.Rpc(
        request_id, "q+k+v", layer, chunk, round(sent_ms * MS), round(received_ms * MS), 100, 300, 100, 300,
        0.0, seconds / 10, seconds / 10, seconds / 2, seconds / 10, {"LINEAR": (3, seconds / 2)},
    )  # fmt: skip


def lap(start_ms: float, end_ms: float, part: str, op: str, layer: int = 0, request_id: int = 0) -> ev.Lap:
    return ev.Lap(round(start_ms * MS), round(end_ms * MS), part, op, layer, 0, request_id)


def events() -> list[ev.Event]:
    """A prefill of 100 ms with three requests in flight at once, and a decode of two steps of 50 ms."""
    return [
        ev.PhaseBegan(1000 * MS, ev.PREFILL, 12, 3),
        lap(1000, 1010, ev.TEE, "EMBEDDING", -1),
        lap(1010, 1012, ev.SERIALIZATION, "ENCODE", 0),
        lap(1012, 1015, ev.SERIALIZATION, "SEND", 0, 1),
        lap(1015, 1020, ev.SERIALIZATION, "SEND", 0, 2),
        lap(1020, 1025, ev.SERIALIZATION, "SEND", 0, 3),
        rpc(1, 1015, 1055),
        lap(1025, 1055, ev.WAIT, "WAIT", 0, 1),
        lap(1055, 1060, ev.SERIALIZATION, "DECODE", 0),
        rpc(2, 1020, 1065, 1),
        lap(1060, 1065, ev.WAIT, "WAIT", 1, 2),
        rpc(3, 1025, 1064, 1),
        lap(1065, 1065, ev.WAIT, "WAIT", 1, 3),
        lap(1065, 1090, ev.TEE, "ATTENTION", 1),
        ev.Retried(1070 * MS, 3, 1, 0, 0, "ConnectionLostError"),
        ev.TokensMade(1091 * MS, 1),
        lap(1090, 1100, ev.OTHER, "OTHER", -1),
        ev.PhaseEnded(1100 * MS, ev.PREFILL, 12, 1),
        ev.PhaseBegan(1200 * MS, ev.DECODE, 2),
        *(
            event
            for start, request in ((1200, 4), (1250, 5))
            for event in (
                lap(start, start + 10, ev.TEE, "RMSNORM"),
                lap(start + 10, start + 15, ev.SERIALIZATION, "SEND", 0, request),
                rpc(request, start + 15, start + 45),
                lap(start + 15, start + 45, ev.WAIT, "WAIT", 0, request),
                lap(start + 45, start + 50, ev.SERIALIZATION, "DECODE"),
                ev.TokensMade((start + 50) * MS, 1),
            )
        ),
        ev.Sampled(1260 * MS, 2**30, 2**31, 1.0),
        ev.Noted(1270 * MS, "the server was slow"),
        ev.PhaseEnded(1300 * MS, ev.DECODE, 2, 2),
    ]
