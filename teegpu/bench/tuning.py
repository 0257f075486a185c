"""What ``teegpu tune`` measures: what each way to run the model takes here, over each transport and wire dtype that may
be taken, at several lengths.

It asks the same ``tee.choose.Probe`` as the plan ``auto``, for longer, and ``stats.profile`` keeps the answers.
``followed`` runs what was predicted for real, and puts both side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from teegpu import __version__, facts
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.record.events import DECODE, PREFILL
from teegpu.remote.servers import split_threads
from teegpu.runner import Runner
from teegpu.stats.profile import Measured, Profile, Server, Way, fingerprint
from teegpu.tee.choose import TUNE_CHUNKS, Probe, local_fits, prefill_ways
from teegpu.tee.sequence import Generation
from transports.addresses import is_local

SECONDS: Final = 4.0
"""For each transport and wire dtype, over all lengths; single passes over a slow link may take longer."""

LENGTHS: Final = (16, 64, 256)
"""Tokens of prompts that are measured beside the one that was asked for, so that the profile tells of others too."""

LOSSY: Final = ("bf16", "int8")
"""Wire dtypes that are never proposed without ``--allow-lossy``, but where the servers round to bf16 anyway."""

FOLLOWED_TOKENS: Final = 24
"""Tokens after the first of a run that follows a prediction: enough for a median."""


@dataclass(frozen=True)
class Wanted:
    """What is to be predicted: a prompt and the tokens after it."""

    prompt_tokens: int
    decode_tokens: int
    allow_lossy: bool = False

    @property
    def position(self) -> int:
        """Where decode is judged."""
        return self.prompt_tokens + self.decode_tokens // 2


def _told(notify: Notify, step: Progress, line: str) -> None:
    """What goes on in ``step``, while it does."""
    notify(replace(step, stage=line))


class Tuning:
    """Measures ``folder``'s model with the servers of ``base``, or an embedded one where it names none.

    What is sent is random and may be seen: privacy and verification are left out, and a run with them asks its own
    probe. ``run`` gives the profile; ``facts`` says what was measured, and how long it took. Raises what a run raises,
    and ``UsageError`` for settings that can't be measured.
    """

    def __init__(self, folder: ModelFolder, base: Config, wanted: Wanted) -> None:
        if not facts.transport(base.run.transport).sockets:
            raise UsageError("the transport inprocess has no server to measure: use zmq or pipelined")
        run = replace(base.run, prefix_cache_mib=0, max_tokens=1, privacy="none", verify="off")
        self._base = replace(base, run=run)
        self._folder = folder
        self._wanted = wanted
        self._notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def run(self, notify: Notify = lambda _: None) -> Profile:
        began = time.perf_counter()
        threads_before = torch.get_num_threads()
        try:
            profile = self._measure(notify)
        finally:
            torch.set_num_threads(threads_before)
        self.facts |= {"seconds": time.perf_counter() - began, "notes": list(dict.fromkeys(self._notes))}
        return profile

    def _measure(self, notify: Notify) -> Profile:
        measured: list[Measured] = []
        profile: Profile | None = None
        ways = list(self._ways())
        for number, (transport, wire) in enumerate(ways):
            what = f"{transport} {wire}".replace(" auto", "")
            step = Progress(number, len(ways), "tune", what)
            notify(step)
            with self._runner(transport, wire, "fused", tell=partial(_told, notify, step)) as runner:
                notify(step)
                tokens = sorted({min(length, runner.spec.max_positions - 1) for length in self._lengths()})
                found = self._measured(runner, transport, tokens, alone=not number)
                measured += found
                profile = profile or self._profile(runner)
            best = min((way for row in found for way in row.ways if row.tokens == tokens[-1]), key=_seconds)
            notify(Progress(number + 1, len(ways), "tune", what, f"{best.seconds * 1e3:,.0f} ms with {best.plan}"))
        if profile is None:
            raise RuntimeError("no transport was measured")
        local = [row for row in measured if row.transport == ""]
        return replace(profile, measured=tuple(_joined(measured, local)))

    def _ways(self) -> Iterator[tuple[str, str]]:
        """(transport, setting of the wire dtype) to measure; compression only where there is a link that it could
        relieve."""
        run = self._base.run
        given = facts.transport(run.transport)
        names = [given.overlapping.name, *([] if given.overlaps else [given.name])]
        far = run.link or not all(is_local(endpoint.partition("#")[0]) for endpoint in run.endpoints)
        if far and not given.compresses:
            names.append(given.overlapping.compressing.name)
        wires = [run.wire_dtype, *(wire for wire in LOSSY if self._wanted.allow_lossy and wire != run.wire_dtype)]
        for name in names:
            for wire in wires:
                yield name, wire

    def _lengths(self) -> list[int]:
        prompt = self._wanted.prompt_tokens
        return [*(length for length in LENGTHS if length < prompt), prompt]

    def _runner(
        self,
        transport: str,
        wire: str,
        plan: str,
        chunk_tokens: int = 0,
        decode_plan: str = "",
        tell: Callable[[str], object] = lambda _: None,
    ) -> Runner:
        def note(line: str) -> None:
            self._notes.append(line)
            tell(line)

        run = replace(
            self._base.run,
            transport=transport,
            wire_dtype=wire,
            prefill_plan=plan,
            decode_plan=decode_plan or plan,
            chunk_tokens=chunk_tokens or self._base.run.chunk_tokens,
        )
        return Runner(replace(self._base, run=run), self._folder, notify=note)

    def _measured(self, runner: Runner, transport: str, lengths: Sequence[int], *, alone: bool) -> list[Measured]:
        """What the ways take over this runner's connections; ``alone``: all in the TEE too, of which transport and wire
        dtype are empty."""
        offered = [name for name, plan in facts.PLANS.items() if plan.offered and plan.remote]
        given, overlaps = self._base.run.chunk_tokens, facts.transport(transport).overlaps
        each = SECONDS / len(lengths)
        probe = runner.probe()
        found: list[Measured] = []
        for tokens in lengths:
            position = min(tokens + self._wanted.decode_tokens // 2, runner.spec.max_positions - 1)
            ways = prefill_ways(offered, tokens, TUNE_CHUNKS, given=given, overlaps=overlaps)
            rows = [(PREFILL, tokens, ways), (DECODE, position, [Way(plan, 0) for plan in offered])]
            for phase, length, wanted in rows:
                taken = self._asked(probe, phase, wanted, length, each * (0.7 if phase == PREFILL else 0.3))
                found.append(Measured(phase, transport, runner.wire_dtype, length, tuple(taken)))
            if alone and local_fits(runner.spec):
                local = Way(facts.LOCAL.name, 0)
                threads = torch.get_num_threads()
                torch.set_num_threads(split_threads(self._base, lambda _: None).runner)
                (own,) = prefill_ways([local.plan], tokens, (), given=given, overlaps=False)
                for phase, length, way in ((PREFILL, tokens, own), (DECODE, position, local)):
                    found.append(
                        Measured(phase, "", "", length, tuple(self._asked(probe, phase, [way], length, each / 4)))
                    )
                torch.set_num_threads(threads)
        return found

    def _asked(self, probe: Probe, phase: str, ways: Sequence[Way], tokens: int, seconds: float) -> list[Way]:
        if phase == PREFILL:
            return probe.prefills(ways, tokens, seconds=seconds)
        return probe.decodes(ways, tokens, rows=1 + self._base.run.speculate, seconds=seconds)

    def _profile(self, runner: Runner) -> Profile:
        return Profile(
            self._base.run.endpoints,
            str(runner.link or ""),
            runner.spec.name,
            runner.digest,
            fingerprint(),
            __version__,
            runner.threads.runner,
            runner.profiled_server or Server("", "", 0),
            doc.now(),
            (),
        )

    # Following the predictions

    def followed(self, document: dict[str, Any], notify: Notify = lambda _: None) -> list[dict[str, Any]]:
        """The best prediction of each plan in ``document`` beside a run that follows it: three prompts one after the
        other in a process that is warm, of whose figures the usual one counts."""
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for phase in (PREFILL, DECODE):
            for row in document[phase]:
                best.setdefault((row["plan"], phase), row)
        plans = sorted({plan for plan, _ in best})
        found = []
        for number, plan in enumerate(plans):
            notify(Progress(number, len(plans), "check", plan))
            first, step = best[plan, PREFILL], best[plan, DECODE]
            seconds = self._run_for_real(plan, first, step)
            for phase, row in ((PREFILL, first), (DECODE, step)):
                told, took = row["seconds"], seconds[phase]
                found.append({
                    "phase": phase, "plan": plan, "chunk_tokens": row["chunk_tokens"], "transport": row["transport"],
                    "predicted_seconds": told, "measured_seconds": took, "error_share": told / took - 1.0,
                })  # fmt: skip
            notify(Progress(number + 1, len(plans), "check", plan, f"{seconds[PREFILL] * 1e3:,.0f} ms"))
        return found

    def _run_for_real(self, plan: str, first: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
        transport = first["transport"] or step["transport"] or self._base.run.transport
        wire = first["wire_dtype"] or self._base.run.wire_dtype
        base = self._base
        tokens = min(FOLLOWED_TOKENS, max(1, self._wanted.decode_tokens)) + 1
        self._base = replace(
            base, run=replace(base.run, max_tokens=tokens, link="" if plan == "local" else base.run.link)
        )
        try:
            with self._runner(transport, wire, plan, first["chunk_tokens"] or 0) as runner:
                prompt = texts.prompt_of(runner.tokenizer, self._wanted.prompt_tokens)
                taken: dict[str, list[float]] = {PREFILL: [], DECODE: []}
                for _ in range(4):
                    runner.restart_summary()
                    runner.generate(
                        prompt, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
                    )
                    for phase, times in taken.items():
                        total = runner.summary.phases[phase]
                        times.append(total.seconds / max(1, total.passes))
        finally:
            self._base = base
        return {phase: statistics.median(times[1:]) for phase, times in taken.items()}


def _seconds(way: Way) -> float:
    return way.seconds


def _joined(measured: Sequence[Measured], local: Sequence[Measured]) -> Iterator[Measured]:
    """``measured`` with what all in the TEE takes in each row, whatever its transport and wire dtype are."""
    own = {(row.phase, row.tokens): row.ways for row in local}
    for row in measured:
        if row.transport:
            ways = (*row.ways, *own.get((row.phase, row.tokens), ()))
            yield replace(row, ways=tuple(sorted(ways, key=_seconds)))
