"""The JSON document ``teegpu.report/1``: what ``run --json`` prints, and every later report is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from teegpu import facts
from teegpu.errors import RecordError
from teegpu.record.events import DECODE, PREFILL, Event, PhaseBegan, TextMade
from teegpu.record.run import INTERRUPTED, RUNNING, RunFolder
from teegpu.stats import linkestimate
from teegpu.stats.linkestimate import LinkFigures
from teegpu.stats.predict import Link, limit_seconds
from teegpu.stats.summary import Summary
from teegpu.stats.totals import PhaseTotal
from teegpu.stats.traffic import together

SCHEMA = "teegpu.report/1"

NOT_CONCLUDED = "the run did not conclude it: it was killed, or could write no more"
"""What is wrong with the record of a run that has ended without a word; why, nobody could write down."""

_READ_EVENTS = 8192


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
    outputs: Sequence[Mapping[str, Any]],
    error: str | None = None,
    note: str = "",
    processor_seconds: Mapping[str, float] | None = None,
    environment: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document. ``status`` is ``complete``, ``interrupted`` or ``failed`` (then ``error`` says why); ``outputs``
    has an entry for each prompt that was begun.

    ``processor_seconds``: the runner's, of each phase. ``record`` says what is missing from the run's record:
    ``truncated``, ``failure``, ``damage``. Advice is added by who asks for it.
    """
    figures = linkestimate.figures(settings.get("link_figures"), summary.link.measured())
    kept = record or {}
    return {
        "schema": SCHEMA,
        "id": run_id,
        "status": status,
        **({"error": error} if error else {}),
        "started_at": started_at,
        "note": note,
        "environment": dict(environment or {}),
        "record": {
            "truncated": bool(kept.get("truncated", False)),
            "failure": kept.get("failure"),
            "damage": list(kept.get("damage", ())),
        },
        "model": model,
        "settings": settings,
        "tee": tee,
        "server": server,
        "outputs": list(outputs),
        "phases": {
            name: phase(summary.phases.get(name, PhaseTotal()), (processor_seconds or {}).get(name))
            for name in (PREFILL, DECODE)
        },
        "generated_tokens": summary.generated_tokens,
        "latency": _latency(summary),
        **({"requests": summary.requests.to_json()} if summary.requests else {}),
        "link": figures.to_json(),
        "memory": {
            "runner_peak_bytes": summary.memory.runner_bytes or None,
            "server_bytes": summary.memory.server_bytes or None,
        },
        "endpoints": endpoints(summary, settings.get("endpoints", ())),
        "limit": limit(summary, settings, model, figures),
        "advice": [],
    }


def _latency(summary: Summary) -> dict[str, float | None]:
    """Of one prompt; of many, what half of the requests were within."""
    requests = summary.requests
    if requests:
        return {
            "ttft_seconds": requests.ttft.quantile(0.5),
            "tpot_median_seconds": requests.itl.quantile(0.5),
            "tpot_p95_seconds": requests.itl.quantile(0.95),
        }
    return {
        "ttft_seconds": summary.ttft_seconds,
        "tpot_median_seconds": summary.tpot_percentile(0.5),
        "tpot_p95_seconds": summary.tpot_percentile(0.95),
    }


def rebuild(
    meta: Mapping[str, Any],
    summary: Summary,
    status: str,
    *,
    outputs: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
    **record: Any,
) -> dict[str, Any]:
    """The document of a run from its stored ``meta`` and a ``summary`` that has taken its events. ``record`` as in
    ``document``."""
    return document(
        run_id=str(meta.get("id", "")),
        status=status,
        started_at=str(meta.get("started_at", "")),
        model=dict(meta.get("model") or {}),
        settings=dict(meta.get("settings") or {}),
        tee=dict(meta.get("tee") or {}),
        server=dict(meta.get("server") or {}),
        summary=summary,
        outputs=outputs,
        error=error,
        note=str(meta.get("note") or ""),
        environment=meta.get("environment"),
        record=record,
    )


def recorded(run: RunFolder) -> dict[str, Any]:
    """The document that ``run`` concluded with, or one made of what there is of it. Raises ``RecordError`` for a record
    that this release can't read."""
    damage, failure = [], None
    status = run.status  # before the rest: it can't be running and then be without its end
    try:
        document = run.document()
    except ValueError:
        damage.append("the document is damaged; these figures are made of the events")
    else:
        if document is not None:
            return document
        if status != RUNNING:
            failure = NOT_CONCLUDED
    summary = Summary()
    texts: list[list[str]] = []
    with contextlib.closing(run.events()) as reader:
        while events := reader.read(_READ_EVENTS):
            summary.add(events)
            _gather_text(events, texts)
    try:
        meta = run.meta()
    except RecordError as error:
        damage.append(str(error))
        meta = {"id": run.id}
    outputs = [{"text": "".join(pieces), "finish_reason": INTERRUPTED} for pieces in texts if pieces]
    return rebuild(
        meta,
        summary,
        status,
        outputs=outputs,
        truncated=reader.truncated,
        failure=failure,
        damage=[*damage, *reader.damage],
    )


def _gather_text(events: Iterable[Event], texts: list[list[str]]) -> None:
    """Adds to ``texts`` the pieces of what was generated; each prompt has a list of its own."""
    for event in events:
        if isinstance(event, PhaseBegan) and event.phase == PREFILL:
            texts.append([])
        elif isinstance(event, TextMade):
            if not texts:
                texts.append([])
            texts[-1].append(event.text)


def endpoints(summary: Summary, addresses: Sequence[str]) -> list[dict[str, Any]]:
    """What each server did, in the order of the settings; one that did nothing has zeros. The server that a run starts
    for itself has an empty address."""
    count = max(len(addresses), max(summary.endpoints, default=-1) + 1) if addresses else len(summary.endpoints)
    listed = range(count) if addresses else sorted(summary.endpoints)
    rows = []
    for index in listed:
        address = addresses[index] if index < len(addresses) else ""
        total = summary.endpoints.get(index)
        figures = asdict(total) if total is not None else dict.fromkeys(_ENDPOINT_KEYS, 0)
        rows.append({"address": address, **figures})
    return rows


_ENDPOINT_KEYS = ("rpc_calls", "bytes_up", "bytes_down", "retries")


def limit(
    summary: Summary, settings: Mapping[str, Any], model: Mapping[str, Any], figures: LinkFigures
) -> dict[str, float | None]:
    """What the run could not have gone below (see ``metrics.predict``), phase by phase, and its ratio to that.

    ``link_seconds``, and with it the bound and the ratio, are None where requests were sent and nothing is known of the
    link. Where parts overlap the bound is less than their sum.
    """
    link = Link.of(figures)
    carried = waited = gpu = tee = bound = wall = 0.0
    known = True
    for name, total in summary.phases.items():
        gpu += total.busy.gpu_seconds
        tee += total.tee_seconds
        wall += total.seconds
        carrying = waiting = 0.0
        overlaps = overlapping(total.chunks, settings)
        if total.rpc_calls and link is None:
            known = False
        elif link is not None:
            carrying = link.carrying_seconds(total.bytes_up, total.bytes_down / _links(settings))
            waiting = rounds(name, total, settings, model) * link.rtt_seconds
        carried += max(carrying, waiting) if overlaps else carrying
        waited += 0.0 if overlaps else waiting
        bound += limit_seconds(
            carrying=carrying,
            waiting=waiting,
            gpu=total.busy.gpu_seconds,
            tee=total.tee_seconds,
            overlaps=overlaps and bool(total.rpc_calls),
        )
    return {
        "link_seconds": carried + waited if known else None,
        "gpu_seconds": gpu,
        "tee_seconds": tee,
        "bound_seconds": bound if known and bound > 0.0 else None,
        "ratio": wall / bound if known and bound > 0.0 else None,
    }


def overlapping(chunks: int, settings: Mapping[str, Any]) -> bool:
    """Whether a phase of ``chunks`` had several of them under way at once."""
    return chunks > 1 and _transport_overlaps(settings)


def rounds(name: str, total: PhaseTotal, settings: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    """The round trips of a phase that could not be had at the same time: its RPC calls in lock step, those of one chunk
    where chunks or projections were under way together."""
    calls = total.rpc_calls // _links(settings)
    if not _transport_overlaps(settings):
        return calls
    layers = model.get("layers")
    at_once = together(str(settings.get(f"{name}_plan", "")), layers) if isinstance(layers, int) else 0
    return min(calls, max(1, total.passes) * at_once) if at_once else calls


def _transport_overlaps(settings: Mapping[str, Any]) -> bool:
    """A record of another release may name a transport that this one does not know."""
    transport = facts.TRANSPORTS.get(str(settings.get("transport", "")))
    return transport is not None and transport.overlaps


def _links(settings: Mapping[str, Any]) -> int:
    """Over how many links each product is asked for at the same time. What goes up goes over one of them, but for
    seeds."""
    privacy = facts.PRIVACY.get(str(settings.get("privacy", "")))
    return max(1, privacy.servers) if privacy is not None else 1


def phase(total: PhaseTotal, processor_seconds: float | None = None) -> dict[str, Any]:
    """One phase as the document has it: sums in seconds and bytes, operations, layers. ``processor_seconds``: those of
    the runner's threads."""
    return {
        "tokens": total.tokens,
        "passes": total.passes,
        "chunks": total.chunks,
        "seconds": total.seconds,
        **({} if processor_seconds is None else {"processor_seconds": processor_seconds}),
        "tokens_per_second": total.tokens_per_second,
        "rpc_calls": total.rpc_calls,
        "rpc_retries": total.rpc_retries,
        "rpcs_per_token": total.rpcs_per_token,
        "rpc_latency": {
            "median_seconds": total.latencies.quantile(0.5),
            "p95_seconds": total.latencies.quantile(0.95),
            "max_seconds": total.latencies.max_seconds if total.latencies.count else None,
        },
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
        "outside_layers": asdict(total.outside),
    }
