"""``teegpu bench accounting``: do the times add up? For each plan and transport, the sum of a phase's exclusive parts
over its wall time, and the same by layer.

The wall times are taken apart from the parts: a phase's from its begin and end, the run's by the caller's own clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from teegpu import machine
from teegpu.bench import document as doc
from teegpu.bench.cases import LOCAL, Case
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.errors import PromptError, TeegpuError, UsageError
from teegpu.metrics.events import DECODE, PREFILL, Event, PhaseBegan, PhaseEnded
from teegpu.metrics.summary import PhaseTotal
from teegpu.metrics.traffic import chunk_count
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.settings import PLANS, TRANSPORTS, Value
from teegpu.tee.embedded_server import EmbeddedServer
from teegpu.tee.generate import Generation
from teegpu.tee.runner import Runner

REMOTE_PLANS = tuple(plan for plan in PLANS if plan != LOCAL)
LINKED_TRANSPORTS = tuple(transport for transport in TRANSPORTS if transport != "inprocess")

PARTS = ("tee", "serialization", "network", "server", "gpu", "other")
"""The exclusive parts of a phase. Network, server and gpu are the wait, as exposed."""


def cases(plans: Sequence[str], transports: Sequence[str], prompt_tokens: int, chunk_tokens: int) -> list[Case]:
    """Each plan over each transport with the prompt in one piece, and where a transport can overlap also in chunks."""
    made = [Case(LOCAL, {"run.prefill_plan": LOCAL, "run.decode_plan": LOCAL})] if LOCAL in plans else []
    for plan in plans:
        if plan == LOCAL:
            continue
        for transport in transports:
            given: dict[str, Value] = {
                "run.prefill_plan": plan,
                "run.decode_plan": plan,
                "run.transport": transport,
                "run.chunk_tokens": prompt_tokens,
            }
            made.append(Case(f"{plan} {transport}", given))
            if transport.startswith("pipelined") and chunk_tokens < prompt_tokens:
                chunks = chunk_count(prompt_tokens, chunk_tokens)
                label = f"{plan} {transport}, {chunks} chunks"
                made.append(Case(label, given | {"run.chunk_tokens": chunk_tokens}))
    return made


class AccountingBenchmark:
    """Runs each of ``cases(plans, transports, …)`` once, over ``base.run.link``; the server is one for all.

    Raises ``UsageError`` for what can't be measured, ``PromptError`` for more tokens than the model's context has, and
    what reading the model raises.
    """

    name = "accounting"

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        *,
        prompt_tokens: int,
        decode_tokens: int,
        chunk_tokens: int,
        plans: Sequence[str] = PLANS,
        transports: Sequence[str] = LINKED_TRANSPORTS,
    ) -> None:
        for flag, value in (
            ("--prompt-tokens", prompt_tokens),
            ("--decode-tokens", decode_tokens),
            ("--chunk-tokens", chunk_tokens),
        ):
            if value < 1:
                raise UsageError(f"{flag} {value} is below the least, 1")
        for flag, chosen, known in (("--plan", plans, PLANS), ("--transport", transports, LINKED_TRANSPORTS)):
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise UsageError(f"{flag} {unknown[0]} is not one of {', '.join(known)}")
        self._folder = folder
        self._spec = read_spec(folder)
        if prompt_tokens + decode_tokens > self._spec.max_positions:
            raise PromptError(
                f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} are more than the context of "
                f"{self._spec.name}, which ends at {self._spec.max_positions}: give less"
            )
        self._base = base
        self._prompt_tokens = prompt_tokens
        self._decode_tokens = decode_tokens
        self._cases = cases(plans, transports, prompt_tokens, chunk_tokens)
        self._results: list[dict[str, Any]] = []
        self._digest = ""
        self._started_at = doc.now()

    @property
    def failures(self) -> list[str]:
        """One line for each case that failed."""
        return [f"{entry['label']}: {entry['error']}" for entry in self._results if "error" in entry]

    def run(self, notify: Notify = lambda _: None) -> None:
        runner_threads, server_threads = machine.thread_split(embedded=True)
        threads_before = torch.get_num_threads()
        server = None
        try:
            if any(case.remote(self._base) for case in self._cases) and not self._base.run.endpoints:
                threads = self._base.server.threads or server_threads
                server = EmbeddedServer(self._folder, self._base, threads=threads)
                server.wait()
            for number, case in enumerate(self._cases):
                notify(Progress(number, len(self._cases), case.label, "once"))
                given = dict(case.given) | {"run.threads": self._base.run.threads or runner_threads}
                if server is not None:
                    given["run.endpoints"] = (server.endpoint,)
                entry = self._case(Case(case.label, given))
                self._results.append(entry)
                outcome = f"failed: {entry['error']}" if "error" in entry else f"sum {entry['worst']:.3%} of the wall"
                notify(Progress(number + 1, len(self._cases), case.label, "once", outcome))
        finally:
            torch.set_num_threads(threads_before)
            if server is not None:
                server.close()

    def _case(self, case: Case) -> dict[str, Any]:
        plan = case.prefill_plan(self._base)
        told = {"label": case.label, "plan": plan, "transport": case.given.get("run.transport")}
        try:
            with Runner(case.config(self._base, self._decode_tokens), self._folder) as runner:
                self._digest = runner.digest
                prompt = texts.prompt_of(runner.tokenizer, self._prompt_tokens)
                self._generate(runner, prompt[: min(16, len(prompt))])  # the first of anything takes longer
                walls = PhaseWalls()
                runner.restart_summary()
                runner.recorder.log = walls
                wall = self._generate(runner, prompt)
                phases = {
                    name: accounted(runner.summary.phases.get(name, PhaseTotal()), walls.seconds.get(name, 0.0))
                    for name in (PREFILL, DECODE)
                }
        except TeegpuError as error:
            return told | {"error": str(error)}
        ratios = [phase[key] for phase in phases.values() for key in ("sum_over_wall", "layers_over_wall")]
        return (
            told
            | phases
            | {
                "run": {"wall_seconds": wall, "phases_over_wall": sum(walls.seconds.values()) / wall},
                "worst": max((ratio for ratio in ratios if ratio is not None), key=lambda ratio: abs(ratio - 1)),
            }
        )

    def _generate(self, runner: Runner, prompt: Sequence[int]) -> float:
        """Seconds."""
        sampler = runner.sampler()
        started = time.perf_counter()
        runner.generate(prompt, sampler=sampler, on_token=lambda _: False, result=Generation(), ignore_end=True)
        runner.recorder.flush()
        return time.perf_counter() - started

    def document(self, status: str) -> dict[str, Any]:
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "prompt_tokens": self._prompt_tokens,
                "decode_tokens": self._decode_tokens,
                "link": self._base.run.link,
                "wire_dtype": self._base.run.wire_dtype,
            },
            notes=self._notes(),
            results=self._results,
        )

    def _notes(self) -> list[str]:
        done = [entry for entry in self._results if "error" not in entry]
        if not done:
            return []
        worst = max(done, key=lambda entry: abs(entry["worst"] - 1))
        least = min(done, key=lambda entry: entry["run"]["phases_over_wall"])
        share = f"{least['run']['phases_over_wall']:.2%}"
        return [
            f"furthest from its wall time: {worst['label']}, {worst['worst']:.4%}",
            f"the phases are at least {share} of the time that the caller waited ({least['label']})",
            "requests: the sum of their round trips, which is no part of the wall where several are in flight",
        ]


class PhaseWalls:
    """A recorder's log that knows of phases only: their wall time by name, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began_ns = 0

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, PhaseBegan):
                self._began_ns = event.at_ns
            elif isinstance(event, PhaseEnded):
                self.seconds[event.phase] = self.seconds.get(event.phase, 0.0) + (event.at_ns - self._began_ns) / 1e9


def accounted(total: PhaseTotal, wall_seconds: float) -> dict[str, Any]:
    """The parts of a phase, and what they and those of its layers sum to, as fractions of ``wall_seconds``."""
    parts = {f"{part}_seconds": float(getattr(total, f"{part}_seconds")) for part in PARTS}
    by_layer = sum(getattr(each, part) for each in (*total.layers.values(), total.outside) for part in parts)
    return {
        "wall_seconds": wall_seconds,
        **parts,
        "wait_seconds": total.wait_seconds,
        "sum_over_wall": sum(parts.values()) / wall_seconds if wall_seconds else None,
        "layers_over_wall": by_layer / wall_seconds if wall_seconds else None,
        "requests": total.rpc_calls,
        "requests_seconds": total.busy.round_trip_seconds,
    }
