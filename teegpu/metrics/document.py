"""The JSON document ``teegpu.report/1``: what ``run --json`` prints, and every later report is made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from teegpu.metrics.events import DECODE, PREFILL
from teegpu.metrics.summary import PhaseTotal, Summary

SCHEMA = "teegpu.report/1"


def document(
    *,
    run_id: str,
    status: str,
    started_at: str,
    model: dict[str, Any],
    settings: dict[str, Any],
    tee: dict[str, Any],
    server: dict[str, Any],
    summary: Summary,
    output: dict[str, Any] | None,
    error: str | None = None,
) -> dict[str, Any]:
    """The document. ``status`` is ``complete``, ``interrupted`` or ``failed`` (then ``error`` says why)."""
    return {
        "schema": SCHEMA,
        "id": run_id,
        "status": status,
        **({"error": error} if error else {}),
        "started_at": started_at,
        "model": model,
        "settings": settings,
        "tee": tee,
        "server": server,
        **({"output": output} if output is not None else {}),
        "phases": {name: phase(summary.phases.get(name, PhaseTotal())) for name in (PREFILL, DECODE)},
        "latency": {
            "ttft_seconds": summary.ttft_seconds,
            "tpot_median_seconds": summary.tpot_percentile(0.5),
            "tpot_p95_seconds": summary.tpot_percentile(0.95),
        },
        "limit": limit(summary),
        "advice": [],
    }


def limit(summary: Summary) -> dict[str, float | None]:
    """What the run could not have gone below. None where the link's speed would have to be known, which is not yet
    measured: ``link_seconds``, and with it the bound and the run's ratio to it."""
    return {
        "link_seconds": None,
        "gpu_seconds": sum(total.busy.gpu_seconds for total in summary.phases.values()),
        "tee_seconds": sum(total.tee_seconds for total in summary.phases.values()),
        "bound_seconds": None,
        "ratio": None,
    }


def phase(total: PhaseTotal) -> dict[str, Any]:
    """One phase as the document has it: sums in seconds and bytes, operations, layers."""
    return {
        "tokens": total.tokens,
        "passes": total.passes,
        "seconds": total.seconds,
        "tokens_per_second": total.tokens_per_second,
        "rpc_calls": total.rpc_calls,
        "rpc_retries": 0,  # a request that fails ends the run
        "bytes_up": total.bytes_up,
        "bytes_down": total.bytes_down,
        "tee_seconds": total.tee_seconds,
        "serialization_seconds": total.serialization_seconds,
        "wait_seconds": total.wait_seconds,
        "network_seconds": total.network_seconds,
        "server_seconds": total.server_seconds,
        "gpu_seconds": total.gpu_seconds,
        "other_seconds": total.other_seconds,
        "communication_share": total.communication_share,
        "compression": {
            "raw_bytes_up": total.raw_bytes_up,
            "raw_bytes_down": total.raw_bytes_down,
            "saved_bytes_up": total.raw_bytes_up - total.bytes_up,
            "saved_bytes_down": total.raw_bytes_down - total.bytes_down,
            "tried_bytes": total.tried_bytes,
            "compressed_bytes": total.compressed_bytes,
            "seconds": total.busy.compression_seconds,
        },
        "speculation": {"drafted_tokens": total.drafted_tokens, "accepted_tokens": total.accepted_tokens},
        "busy": asdict(total.busy),
        "ops": {name: asdict(op) for name, op in total.ops.items()},
        "layers": [{"layer": layer, **asdict(sums)} for layer, sums in sorted(total.layers.items())],
    }
