"""Law 5 over real runs: for every plan and transport, in lock step and overlapped, the times add up.

The wall times are taken apart from the parts: a phase's from its begin and end, the run's by the caller's own clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from teegpu import facts
from teegpu.bench.cases import from_values
from teegpu.facts import Plan, Transport
from teegpu.model.folder import ModelFolder
from teegpu.record.events import DECODE, PREFILL, Event, PhaseBegan, PhaseEnded
from teegpu.runner import Runner
from teegpu.stats.totals import PhaseTotal
from teegpu.tee.sequence import Generation
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer

PROMPT, CHUNK = list(range(40, 88)), 12

PARTS = ("tee_seconds", "serialization_seconds", "network_seconds", "server_seconds", "gpu_seconds", "other_seconds")
"""The exclusive parts of a phase. Network, server and gpu are the wait, as exposed."""


@dataclass
class Run:
    """``walls``: seconds of each phase between its begin and its end; ``seconds`` those that the caller waited."""

    plan: Plan
    transport: Transport
    chunks: int
    seconds: float = 0.0
    walls: dict[str, float] = field(default_factory=dict)
    phases: dict[str, PhaseTotal] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.plan.name} {self.transport.name}, {self.chunks} chunks"

    def log(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, PhaseBegan):
                self.walls[event.phase] = -event.at_ns / 1e9
            elif isinstance(event, PhaseEnded):
                self.walls[event.phase] += event.at_ns / 1e9


def cases() -> Iterator[Run]:
    """Each plan over each transport with the prompt in one piece, and where a transport can overlap also in chunks."""
    yield Run(facts.LOCAL, facts.ZMQ, 1)
    for plan in facts.PLANS.values():
        for transport in facts.TRANSPORTS.values():
            if plan.remote and transport.sockets:
                yield Run(plan, transport, 1)
                if transport.overlaps:
                    yield Run(plan, transport, len(PROMPT) // CHUNK)


def measure(run: Run, folder: ModelFolder, address: str) -> None:
    values = {
        "run.endpoints": (address,) if run.plan.remote else (),
        "run.prefill_plan": run.plan.name,
        "run.decode_plan": run.plan.name,
        "run.transport": run.transport.name,
        "run.chunk_tokens": len(PROMPT) // run.chunks,
        "run.threads": 1,
        "run.max_tokens": 4,
        "run.prefix_cache_mib": 0,
        "run.wire_dtype": "fp16",
    }
    with Runner(from_values(values), folder) as runner:

        def generate(prompt: list[int]) -> float:
            began = time.perf_counter()
            runner.generate(
                prompt, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
            )
            runner.recorder.flush()
            return time.perf_counter() - began

        generate(PROMPT[:16])  # the first of anything takes longer
        runner.restart_summary()
        runner.recorder.log = run.log
        run.seconds = generate(PROMPT)
        run.phases = dict(runner.summary.phases)


@pytest.fixture(scope="module")
def runs(tiny_model: TinyModel) -> Iterator[list[Run]]:
    """Every case, on a tiny model and a server in this process."""
    folder = tiny_model("llama", num_hidden_layers=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    server = LocalServer(folder)
    try:
        made = list(cases())
        for run in made:
            measure(run, folder, server.address)
        yield made
    finally:
        server.close()
        torch.set_num_threads(threads)


def phases(runs: list[Run]) -> Iterator[tuple[str, float, PhaseTotal]]:
    for run in runs:
        for phase in (PREFILL, DECODE):
            yield f"{run}, {phase}", run.walls[phase], run.phases[phase]


def test_every_case_was_run(runs: list[Run]) -> None:
    assert len(runs) == 1 + 4 * (4 + 2)
    assert {run.phases[DECODE].rpc_calls > 0 for run in runs if run.plan.remote} == {True}


def test_the_parts_are_the_wall(runs: list[Run]) -> None:
    for label, wall, total in phases(runs):
        assert wall > 0, label
        assert sum(getattr(total, part) for part in PARTS) == pytest.approx(wall, rel=0.01), label


def test_the_parts_of_the_layers_and_of_what_is_in_none_are_the_wall(runs: list[Run]) -> None:
    for label, wall, total in phases(runs):
        by_layer = sum(getattr(each, part) for each in (*total.layers.values(), total.outside) for part in PARTS)
        assert by_layer == pytest.approx(wall, rel=0.01), label


def test_the_phases_are_most_of_what_the_caller_waited(runs: list[Run]) -> None:
    for run in runs:
        assert 0.5 * run.seconds < sum(run.walls.values()) <= run.seconds, str(run)


def test_no_part_is_negative_and_the_wait_is_what_it_is_split_into(runs: list[Run]) -> None:
    for label, _, total in phases(runs):
        assert min(getattr(total, part) for part in PARTS) >= 0, label
        split = total.network_seconds + total.server_seconds + total.gpu_seconds
        assert split == pytest.approx(total.wait_seconds, abs=1e-6), label


def test_in_lock_step_a_wait_is_never_more_than_the_requests_took(runs: list[Run]) -> None:
    for label, _, total in phases([run for run in runs if run.plan.remote and not run.transport.overlaps]):
        assert 0 < total.wait_seconds <= total.busy.round_trip_seconds + 1e-6, label
