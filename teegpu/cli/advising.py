"""Advice for a run, with what the store knows of others: a run in the TEE alone tells what offloading is worth, one in
the clear what privacy costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from teegpu.errors import RecordError

if TYPE_CHECKING:
    from teegpu.record.store import RunStore


def advised(document: dict[str, Any], store: RunStore | None) -> dict[str, Any]:
    """``document`` with its advice, and where values were hidden with what it can be compared with; ``store`` is
    searched for runs that tell."""
    from teegpu.report import beside
    from teegpu.report.advice import advise, find_references

    def others(*kinds: str) -> Iterator[Mapping[str, Any]]:
        return _runs(store, str(document.get("id")), kinds) if store is not None else iter(())

    if beside.wanted(document):
        document = document | {"beside": beside.beside(document, others(*beside.KINDS))}
    return document | {"advice": advise(document, find_references(document, others(beside.LOCAL)))}


def _runs(store: RunStore, but: str, kinds: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Complete runs of these ``kinds`` (see ``beside.kind_of``), newest first. Their documents are read only where
    their settings fit."""
    from teegpu.report.beside import kind_of
    from teegpu.stats.document import recorded

    try:
        runs = store.all()
    except RecordError:
        return
    for run in runs:
        try:
            settings = run.meta().get("settings")
            if run.id == but or not isinstance(settings, dict) or kind_of(settings) not in kinds:
                continue
            if run.status == "complete":
                yield recorded(run)
        except RecordError:
            continue
