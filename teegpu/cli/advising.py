"""Advice for a run, with what the store knows of others: a run in the TEE alone tells what offloading is worth, one in
the clear what privacy costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from teegpu.errors import RecordError

if TYPE_CHECKING:
    from teegpu.metrics.store import RunStore


def advised(document: dict[str, Any], store: RunStore | None) -> dict[str, Any]:
    """``document`` with its advice, and where values were hidden with what it can be compared with; ``store`` is
    searched for runs that tell."""
    from teegpu.report import beside
    from teegpu.report.advice import advise, find_reference

    def others(*kinds: str) -> Iterator[Mapping[str, Any]]:
        return _runs(store, str(document.get("id")), kinds) if store is not None else iter(())

    if beside.wanted(document):
        document = document | {"beside": beside.beside(document, others(*beside.KINDS))}
    return document | {"advice": advise(document, find_reference(document, others(beside.LOCAL)))}


def _runs(store: RunStore, but: str, kinds: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Complete runs of these ``kinds`` (see ``beside.kind_of``), newest first. Their documents are read only where
    their settings fit."""
    from teegpu.report.beside import kind_of

    try:
        runs = store.all()
    except RecordError:
        return
    for run in runs:
        try:
            meta = run.meta()
            settings = meta.get("settings")
            fits = isinstance(settings, dict) and kind_of(settings) in kinds and meta.get("status") == "complete"
            if run.id == but or not fits:
                continue
            yield run.document()
        except RecordError:
            continue
