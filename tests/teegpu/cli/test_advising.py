"""Which other run advice may look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teegpu.cli.advising import advised
from teegpu.record.store import RunStore
from tests.teegpu.report import samples


def put(store: RunStore, run_id: str, plan: str, *, finish: bool = True) -> None:
    made = samples.document(id=run_id, settings__prefill_plan=plan, settings__decode_plan=plan)
    writer = store.create(run_id, {"settings": made["settings"], "started_at": made["started_at"]}, events_bytes=2**20)
    if finish:
        writer.finish(made)
    writer.close()


def test_the_newest_complete_run_in_the_tee_alone_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    for run_id, plan in (("a", "local"), ("b", "local"), ("c", "fused")):
        put(store, run_id, plan)
    put(store, "d", "local", finish=False)
    put(store, "me", "local")
    offered: list[str] = []

    def find(document: Any, others: Any) -> None:
        offered.extend(other["id"] for other in others)

    monkeypatch.setattr("teegpu.report.advice.find_references", find)
    found = advised(samples.document(id="me", advice=[]), store)
    assert offered == ["b", "a"]
    assert isinstance(found["advice"], list)


def test_without_a_store_there_is_still_advice() -> None:
    assert isinstance(advised(samples.document(advice=[]), None)["advice"], list)
