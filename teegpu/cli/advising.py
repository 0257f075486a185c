"""Advice for a run, with what the store knows of others: a run in the TEE alone tells what offloading is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from teegpu.errors import RecordError

if TYPE_CHECKING:
    from teegpu.metrics.store import RunStore

LOCAL = "local"


def advised(document: dict[str, Any], store: RunStore | None) -> dict[str, Any]:
    """``document`` with its advice; ``store`` is searched for a run to compare it with."""
    from teegpu.report.advice import advise, find_reference

    others = _local_runs(store, str(document.get("id"))) if store is not None else ()
    return document | {"advice": advise(document, find_reference(document, others))}


def _local_runs(store: RunStore, but: str) -> Iterator[Mapping[str, Any]]:
    """Complete runs of the plan ``local``, newest first. Their documents are read only where their settings fit."""
    try:
        runs = store.all()
    except RecordError:
        return
    for run in runs:
        try:
            if run.id == but or not _is_local(run.meta()):
                continue
            yield run.document()
        except RecordError:
            continue


def _is_local(meta: Mapping[str, Any]) -> bool:
    settings = meta.get("settings")
    plans = [settings.get(f"{phase}_plan") for phase in ("prefill", "decode")] if isinstance(settings, dict) else []
    return plans == [LOCAL, LOCAL] and meta.get("status") == "complete"
