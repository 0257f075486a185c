"""Law 5 over real runs: for every plan and transport, in lock step and overlapped, the times add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from teegpu.bench.accounting import AccountingBenchmark
from teegpu.bench.cases import from_values
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer

Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(tiny_model: TinyModel) -> Iterator[list[Result]]:
    """Every case of the accounting, on a tiny model and a server in this process."""
    import torch

    folder = tiny_model("llama", num_hidden_layers=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    server = LocalServer(folder)
    try:
        values = {"run.endpoints": (server.address,), "run.threads": 1, "compression.min_bytes": 0}
        bench = AccountingBenchmark(folder, from_values(values), prompt_tokens=48, decode_tokens=3, chunk_tokens=12)
        bench.run()
        assert bench.failures == []
        yield bench.document("complete")["results"]
    finally:
        server.close()
        torch.set_num_threads(threads)


def phases(results: list[Result]) -> Iterator[tuple[str, Result]]:
    for entry in results:
        for phase in ("prefill", "decode"):
            yield f"{entry['label']}, {phase}", entry[phase]


def test_every_case_was_run(results: list[Result]) -> None:
    assert len(results) == 25
    assert sum("4 chunks" in entry["label"] for entry in results) == 8
    assert {entry["decode"]["requests"] > 0 for entry in results if entry["plan"] != "local"} == {True}


def test_the_parts_are_the_wall(results: list[Result]) -> None:
    for label, phase in phases(results):
        assert phase["wall_seconds"] > 0, label
        assert phase["sum_over_wall"] == pytest.approx(1.0, abs=0.01), label


def test_the_parts_of_the_layers_and_of_what_is_in_none_are_the_wall(results: list[Result]) -> None:
    for label, phase in phases(results):
        assert phase["layers_over_wall"] == pytest.approx(1.0, abs=0.01), label


def test_no_part_is_negative_and_the_wait_is_what_it_is_split_into(results: list[Result]) -> None:
    for label, phase in phases(results):
        split = [phase[f"{part}_seconds"] for part in ("network", "server", "gpu")]
        assert min(split) >= 0, label
        assert sum(split) == pytest.approx(phase["wait_seconds"], abs=1e-6), label


def test_in_lock_step_a_wait_is_never_more_than_the_requests_took(results: list[Result]) -> None:
    for label, phase in phases(results):
        if " zmq" in label:
            assert 0 < phase["wait_seconds"] <= phase["requests_seconds"] + 1e-6, label
