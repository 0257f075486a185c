"""The document ``teegpu.report/1``: its keys, and that it says what the summary says."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from teegpu.errors import RecordError
from teegpu.record import events as ev
from teegpu.record.store import RunStore
from teegpu.record.writer import RunWriter
from teegpu.stats.document import NOT_CONCLUDED, SCHEMA, document, phase, rebuild, recorded
from teegpu.stats.summary import Summary
from teegpu.stats.totals import PhaseTotal
from tests.teegpu.record.eventsamples import RUN
from tests.teegpu.stats.simulated import Speeds, run

MS = 1_000_000

PHASE_KEYS = {
    "tokens", "seconds", "tokens_per_second", "rpc_calls", "rpc_retries", "bytes_up", "bytes_down", "tee_seconds",
    "serialization_seconds", "wait_seconds", "network_seconds", "server_seconds", "gpu_seconds", "other_seconds",
    "communication_share", "busy", "ops", "layers", "outside_layers", "rpc_latency", "rpcs_per_token",
}  # fmt: skip


@pytest.fixture
def summary() -> Summary:
    made = Summary()
    made.add(
        [
            ev.PhaseBegan(0, ev.PREFILL),
            ev.Lap(0, 10 * MS, ev.TEE, "RMSNORM", 1, 0, 0),
            ev.Lap(10 * MS, 15 * MS, ev.SERIALIZATION, "ENCODE", 0, 0, 0),
            ev.Rpc(
                1,
                "q",
                0,
                0,
                15 * MS,
                35 * MS,
                10,
                30,
                20,
                60,
                0.25,
                0.001,
                0.0,
                0.004,
                0.0,
                {"LINEAR": (3, 0.004)},
                30,
                25,
            ),
            ev.Lap(15 * MS, 35 * MS, ev.WAIT, "WAIT", 0, 0, 1),
            ev.TokensMade(38 * MS, 1),
            ev.Lap(35 * MS, 40 * MS, ev.OTHER, "OTHER", -1, 0, 0),
            ev.PhaseEnded(40 * MS, ev.PREFILL, 8, 1),
            ev.PhaseBegan(40 * MS, ev.DECODE),
            ev.TokensMade(60 * MS, 1),
            ev.TokensMade(90 * MS, 1),
            ev.Speculated(3, 1),
            ev.Lap(40 * MS, 90 * MS, ev.TEE, "SILU", 1, 0, 0),
            ev.PhaseEnded(90 * MS, ev.DECODE, 2, 2),
        ]
    )
    return made


def made(summary: Summary, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "run_id": "20260101-000000-abcdef",
        "status": "complete",
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "model": {"name": "tiny"},
        "settings": {"prefill_plan": "fused"},
        "tee": {"kind": "none", "attested": False},
        "server": {"device": "cpu"},
        "outputs": (),
    }
    fields |= more
    return document(summary=summary, **fields)


def test_the_keys_of_a_document(summary: Summary) -> None:
    got = made(summary)
    assert got["schema"] == SCHEMA == "teegpu.report/1"
    assert list(got) == [
        "schema", "id", "status", "started_at", "note", "environment", "record", "model", "settings", "tee", "server",
        "outputs", "phases", "generated_tokens", "latency", "link", "memory", "endpoints", "limit", "advice",
    ]  # fmt: skip
    assert set(got["phases"]) == {"prefill", "decode"}
    for each in got["phases"].values():
        assert set(each) >= PHASE_KEYS
    assert set(got["latency"]) == {"ttft_seconds", "tpot_median_seconds", "tpot_p95_seconds"}
    assert set(got["limit"]) == {"link_seconds", "gpu_seconds", "tee_seconds", "bound_seconds", "ratio"}
    assert got["advice"] == []


def test_outputs_and_an_error(summary: Summary) -> None:
    assert made(summary, outputs=[{"text": ""}])["outputs"] == [{"text": ""}]
    assert made(summary, status="failed", error="the server is gone")["error"] == "the server is gone"
    assert made(summary)["outputs"] == []
    assert "error" not in made(summary)


def test_the_figures_of_a_phase(summary: Summary) -> None:
    prefill = made(summary)["phases"]["prefill"]
    assert (prefill["tokens"], prefill["passes"], prefill["rpc_calls"], prefill["rpc_retries"]) == (8, 1, 1, 0)
    assert (prefill["bytes_up"], prefill["bytes_down"]) == (10, 30)
    assert prefill["seconds"] == pytest.approx(0.04)
    assert prefill["tokens_per_second"] == pytest.approx(200.0)
    assert prefill["wait_seconds"] == pytest.approx(0.02)
    assert prefill["network_seconds"] == pytest.approx(0.015)
    assert prefill["server_seconds"] == pytest.approx(0.001)
    assert prefill["gpu_seconds"] == pytest.approx(0.004)
    assert prefill["communication_share"] == pytest.approx(0.5)
    assert prefill["compression"] == {
        "raw_bytes_up": 20,
        "raw_bytes_down": 60,
        "saved_bytes_up": 20 - prefill["bytes_up"],
        "saved_bytes_down": 60 - prefill["bytes_down"],
        "tried_bytes": 30,
        "compressed_bytes": 25,
        "seconds": 0.25,
    }
    assert prefill["ops"]["LINEAR"] == {"where": "gpu", "count": 3, "seconds": pytest.approx(0.004)}
    assert prefill["ops"]["RMSNORM"] == {"where": "tee", "count": 1, "seconds": pytest.approx(0.01)}
    assert [layer["layer"] for layer in prefill["layers"]] == [0, 1]
    assert set(prefill["layers"][0]) >= {
        "layer", "tee_seconds", "serialization_seconds", "network_seconds", "gpu_seconds",
    }  # fmt: skip
    assert made(summary)["phases"]["decode"]["speculation"] == {"drafted_tokens": 3, "accepted_tokens": 1}


def test_latency_and_limit(summary: Summary) -> None:
    got = made(summary)
    assert got["latency"]["ttft_seconds"] == pytest.approx(0.038)
    assert got["latency"]["tpot_median_seconds"] == pytest.approx(0.026)
    assert got["limit"]["gpu_seconds"] == pytest.approx(0.004)
    assert got["limit"]["tee_seconds"] == pytest.approx(0.06)
    assert got["limit"]["bound_seconds"] is None


def test_a_run_that_never_began_has_a_whole_document() -> None:
    got = made(Summary(), status="failed", error="no server")
    assert got["phases"]["prefill"] == got["phases"]["decode"] == phase(PhaseTotal())
    assert set(got["latency"].values()) == {None}
    assert got["phases"]["decode"]["tokens_per_second"] == 0.0


def test_the_link_is_the_given_one_where_there_is_one(summary: Summary) -> None:
    unknown = {"rtt_seconds": None, "bandwidth_up_bytes_per_second": None, "bandwidth_down_bytes_per_second": None}
    assert made(summary)["link"] == unknown | {"source": "unknown"}
    figures = {"rtt_seconds": 0.005, "bandwidth_up_bytes_per_second": 1e6, "bandwidth_down_bytes_per_second": 2e6}
    got = made(summary, settings={"link_figures": figures})
    assert got["link"] == figures | {"source": "given"}
    assert got["limit"]["link_seconds"] == pytest.approx(0.005 + 30 / 2e6)
    assert got["limit"]["bound_seconds"] == pytest.approx(0.005 + 30 / 2e6 + 0.004 + 0.06)
    assert got["limit"]["ratio"] == pytest.approx(0.09 / got["limit"]["bound_seconds"])


def test_the_limit_of_overlapped_chunks_is_the_largest_part() -> None:
    given = run(prompt=512, chunk_tokens=128, made=0, speeds=Speeds(rtt=0.005, up=125e6, down=125e6))
    prefill, limit = given["phases"]["prefill"], given["limit"]
    assert prefill["chunks"] == 4
    assert limit["link_seconds"] == pytest.approx(prefill["bytes_down"] / 125e6)
    assert limit["bound_seconds"] == pytest.approx(limit["link_seconds"])
    lock_step = run(prompt=512, chunk_tokens=512, transport="zmq", speeds=Speeds(rtt=0.005, up=125e6, down=125e6))
    limit = lock_step["limit"]
    carried = lock_step["phases"]["prefill"]["bytes_down"] / 125e6
    assert limit["link_seconds"] == pytest.approx(carried + 0.005 * lock_step["phases"]["prefill"]["rpc_calls"])
    parts = limit["link_seconds"] + limit["gpu_seconds"] + limit["tee_seconds"]
    assert limit["bound_seconds"] == pytest.approx(parts)
    for document_ in (given, lock_step):
        assert document_["limit"]["ratio"] >= 1.0


@pytest.mark.parametrize("plan", ["per-op", "batched", "attention", "fused"])
@pytest.mark.parametrize("transport", ["zmq", "pipelined"])
def test_no_run_is_below_its_limit(plan: str, transport: str) -> None:
    got = run(plan=plan, transport=transport, prompt=300, made=3, chunk_tokens=64)
    assert 1.0 <= got["limit"]["ratio"] < 3.0


def test_a_run_in_the_tee_alone_is_bound_by_the_tee() -> None:
    limit = run(plan="local", prompt=64, made=2)["limit"]
    assert (limit["link_seconds"], limit["gpu_seconds"]) == (0.0, 0.0)
    assert limit["ratio"] == pytest.approx(1.0, abs=0.01)


def test_servers_have_their_own_figures(summary: Summary) -> None:
    settings = {"endpoints": ["tcp://a:1", "tcp://b:1"]}
    got = made(summary, settings=settings)["endpoints"]
    assert got[0] == {"address": "tcp://a:1", "rpc_calls": 1, "bytes_up": 10, "bytes_down": 30, "retries": 0}
    assert got[1] == {"address": "tcp://b:1", "rpc_calls": 0, "bytes_up": 0, "bytes_down": 0, "retries": 0}
    assert made(summary)["endpoints"] == [got[0] | {"address": ""}]
    assert made(Summary())["endpoints"] == []


def test_a_stored_run_gives_the_document_that_it_ended_with(summary: Summary) -> None:
    whole = made(summary, note="10GbE", environment={"cpu": "x"}, record={"truncated": True})
    meta = {name: whole[name] for name in ("id", "started_at", "model", "settings", "tee", "server", "note")}
    meta |= {"schema": "teegpu.meta/1", "pid": 1, "environment": {"cpu": "x"}}
    assert rebuild(meta, summary, "complete", truncated=True) == whole
    broken = rebuild(meta, summary, "interrupted", damage=["3 blocks can't be read"], failure="disk full")
    assert broken["status"] == "interrupted"
    assert broken["record"] == {"truncated": False, "failure": "disk full", "damage": ["3 blocks can't be read"]}
    assert rebuild({}, Summary(), "interrupted")["phases"]["prefill"] == phase(PhaseTotal())


def test_a_document_is_json(summary: Summary) -> None:
    got = made(summary)
    assert json.loads(json.dumps(got, allow_nan=False)) == got


# Made of the record


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def create(store: RunStore, run_id: str, **meta: Any) -> RunWriter:
    known = {"started_at": "2026-05-01T12:00:00+00:00", "model": {"name": "m"}}
    return store.create(run_id, known | meta, events_bytes=1 << 20)


def changed(writer: RunWriter, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(writer.folder.path / "run.sqlite")) as connection, connection:
        connection.execute(sql)


def test_what_a_run_concluded_with_is_its_document(store: RunStore) -> None:
    writer = create(store, "one")
    writer(RUN)
    told = writer.finish({"schema": SCHEMA, "status": "complete", "phases": "as the run itself has them"})
    writer.close()
    assert recorded(writer.folder) == told


def test_a_run_that_does_not_conclude_is_made_of_its_events(store: RunStore) -> None:
    writer = create(store, "one", note="as it was", settings={"transport": "zmq"})
    writer(RUN[:4])
    writer.end()
    running = recorded(writer.folder)
    assert running["status"] == "running"
    writer.close()
    assert writer.folder.status == "interrupted"
    document = recorded(writer.folder)
    assert running["record"]["failure"] is None
    assert running | {"status": "interrupted", "record": running["record"] | {"failure": NOT_CONCLUDED}} == document
    assert (document["id"], document["note"], document["model"]["name"]) == ("one", "as it was", "m")
    prefill = document["phases"]["prefill"]
    assert prefill["seconds"] == pytest.approx(0.006)
    assert prefill["tee_seconds"] == pytest.approx(0.004)
    assert document["outputs"] == []


def test_a_clock_that_goes_backwards_breaks_nothing(store: RunStore) -> None:
    writer = create(store, "one")
    for event in (*RUN[:3], ev.Lap(1_000_000, 2_000_000, ev.TEE, "SILU", 0, 0, 0), ev.TokensMade(500_000, 1), RUN[4]):
        writer([event])
    writer.close()
    prefill = recorded(writer.folder)["phases"]["prefill"]
    parts = ("tee_seconds", "serialization_seconds", "wait_seconds", "other_seconds")
    assert sum(prefill[part] for part in parts) == pytest.approx(prefill["seconds"]) == pytest.approx(0.006)


def test_saved_text_of_a_run_that_was_killed(store: RunStore) -> None:
    one = create(store, "one")
    one([RUN[0], ev.TextMade(1, "Once "), ev.TextMade(2, "upon")])
    one.close()
    assert recorded(one.folder)["outputs"] == [{"text": "Once upon", "finish_reason": "interrupted"}]
    two = create(store, "two")
    two([RUN[0], ev.TextMade(1, "a"), RUN[0], ev.TextMade(2, "b")])
    two.close()
    assert [output["text"] for output in recorded(two.folder)["outputs"]] == ["a", "b"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5"])
def test_a_damaged_document_is_rebuilt(store: RunStore, content: str) -> None:
    writer = create(store, "one")
    writer(RUN)
    writer.finish({"schema": SCHEMA, "status": "complete"})
    writer.close()
    changed(writer, f"UPDATE run SET document = '{content}'")
    document = recorded(writer.folder)
    assert document["status"] == "complete"
    assert document["phases"]["prefill"]["tokens"] == 9
    assert document["record"]["damage"] == ["the document is damaged; these figures are made of the events"]


def test_events_without_what_they_are_of(store: RunStore) -> None:
    writer = create(store, "one")
    writer(RUN)
    writer.close()
    changed(writer, "UPDATE run SET meta = '{'")
    document = recorded(writer.folder)
    assert (document["id"], document["status"]) == ("one", "interrupted")
    assert document["phases"]["prefill"]["tokens"] == 9
    assert document["record"]["damage"] == ["run one: what was run is damaged in its record"]


def test_what_is_damaged_in_the_events_is_in_the_document(store: RunStore) -> None:
    writer = create(store, "one")
    for events in (RUN[:3], RUN[3:]):
        writer(events)
        writer.end()
        writer._round()
    writer.close()
    changed(writer, "UPDATE events SET block = zeroblob(40) WHERE id = 2")
    document = recorded(writer.folder)
    assert document["phases"]["prefill"]["seconds"] == pytest.approx(0.006)
    assert document["record"]["damage"] == ["block 2 of the events can't be read: it is damaged"]


def test_a_record_that_this_release_can_not_read_has_no_document(store: RunStore) -> None:
    writer = create(store, "one")
    writer.close()
    changed(writer, "PRAGMA user_version = 9")
    with pytest.raises(RecordError, match="newer teegpu"):
        recorded(writer.folder)
