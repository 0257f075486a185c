"""``python -m teegpu.bench.worker``: measures one case, run by ``teegpu.bench.pool`` only.

Commands: ``{"do": "load", …}`` once, answered with what the case came to be; then ``{"do": "measure"}``, answered with
a sample each time. After a measurement ``{"do": "save", "path": …}`` writes the logits of its tokens, and ``compare``
compares those of the first one with what is written there (see ``bench.logits``). See ``teegpu.bench.child``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teegpu import facts, machine
from teegpu.bench import child
from teegpu.bench.cases import NO_KV_CACHE, NO_POSITION_CACHE, PACKED, from_values
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.model.folder import ModelFolder
from teegpu.record.events import DECODE, PREFILL
from teegpu.stats.document import limit
from teegpu.stats.linkestimate import LinkFigures
from teegpu.stats.summary import Summary
from teegpu.stats.totals import PhaseTotal
from teegpu.stats.traffic import chunk_count

if TYPE_CHECKING:
    import torch

    from teegpu.runner import Parts, Runner


@dataclass(frozen=True)
class Subject:
    """What is measured. ``logits`` are those of a run's tokens, (vocab,) each: the first run's, where all are alike."""

    measure: Callable[[], Sample]
    logits: Callable[[], Sequence[torch.Tensor]]


class Worker:
    """Handles the commands. ``load`` chooses what a measurement is."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._measured = False

    def handle(self, command: Mapping[str, Any]) -> dict[str, Any]:
        do = command["do"]
        if do == "load":
            facts, self._subject = load(command)
            return {"facts": facts}
        if self._subject is not None and do == "measure":
            self._measured = True
            return {"sample": self._subject.measure().to_json()}
        if self._subject is not None and self._measured and do in ("save", "compare"):
            return _compared(do, Path(command["path"]), self._subject.logits())
        raise UsageError(f"the process of a benchmark case can't do {json.dumps(do)} now")


def _compared(do: str, path: Path, seen: Sequence[torch.Tensor]) -> dict[str, Any]:
    import torch

    from teegpu.bench import logits

    if do == "save":
        logits.save(path, torch.stack(list(seen)))
        return {}
    return {"accuracy": logits.compare(path, seen)}


def load(command: Mapping[str, Any]) -> tuple[dict[str, Any], Subject]:
    """What ``command`` describes, ready to be measured: (facts for the record, the measurement).

    ``model``: name and path; ``prompt_tokens``, ``decode_tokens``; and either ``transformers``: dtype and threads, or
    ``settings``: every setting by its dotted key, and ``ways``, of ``cases.WAYS``.
    """
    folder = ModelFolder(command["model"]["name"], Path(command["model"]["path"]))
    prompt_tokens, decode_tokens = command["prompt_tokens"], command["decode_tokens"]
    if "transformers" in command:
        from teegpu.bench.baseline import Baseline

        chosen = command["transformers"]
        baseline = Baseline(folder, dtype=chosen["dtype"], threads=chosen["threads"])
        prompt = _prompt(folder, prompt_tokens)
        facts = {"threads": {"runner": chosen["threads"], "server": None}, "notes": []}
        return facts, Subject(lambda: baseline.measure(prompt, decode_tokens), lambda: list(baseline.logits))
    settings = from_values(command["settings"])
    return _load_runner(folder, settings, prompt_tokens, command.get("ways", ()))


def _prompt(folder: ModelFolder, tokens: int) -> list[int]:
    from teegpu.model import texts
    from teegpu.model.tokenizer import Tokenizer

    return texts.prompt_of(Tokenizer(folder), tokens)


def _parts(ways: Sequence[str]) -> Parts:
    from teegpu.bench import before
    from teegpu.runner import PARTS

    parts = PARTS
    if NO_KV_CACHE in ways:
        parts = replace(parts, engine=before.WholeContextEngine)
    if NO_POSITION_CACHE in ways:
        parts = replace(parts, rotary=before.AnglesAnew)
    return parts


def _load_runner(
    folder: ModelFolder, settings: Config, prompt_tokens: int, ways: Sequence[str]
) -> tuple[dict[str, Any], Subject]:
    from teegpu.bench.before import PackedClient
    from teegpu.bench.logits import Listening
    from teegpu.model import texts
    from teegpu.runner import Runner
    from teegpu.tee.sequence import Generation

    notes: list[str] = []
    # It is never closed: the process ends without ceremony, and with it the connection and the emulated link.
    runner = Runner(
        settings,
        folder,
        notify=notes.append,
        parts=_parts(ways),
        wrap=lambda _, client: PackedClient(client) if PACKED in ways else client,
    )
    prompt = texts.prompt_of(runner.tokenizer, prompt_tokens)
    document = runner.report("complete")
    facts = {
        # Whether it is embedded is for the benchmark to say, which started it.
        "server": {key: value for key, value in document["server"].items() if key != "embedded"},
        "threads": {"runner": runner.threads.runner, "server": document["server"].get("threads")},
        "chunk_tokens": runner.chunk_tokens,
        "wire_dtype": document["settings"]["wire_dtype"] if runner.welcome is not None else None,
        "notes": notes,
    }
    chunks = chunk_count(prompt_tokens, runner.chunk_tokens)
    seen: list[torch.Tensor] = []

    def measure() -> Sample:
        runner.restart_summary()
        sampler = Listening(runner.sampler(), 0 if seen else settings.run.max_tokens)
        made = runner.generate(prompt, sampler=sampler, on_token=lambda _: False, result=Generation(), ignore_end=True)
        runner.recorder.flush()
        seen.extend(sampler.seen)
        return _sample(runner, made.token_ids, chunks)

    return facts, Subject(measure, lambda: seen)


def _sample(runner: Runner, token_ids: list[int], chunks: int) -> Sample:
    summary: Summary = runner.summary
    prefill = summary.phases.get(PREFILL, PhaseTotal())
    decode = summary.phases.get(DECODE, PhaseTotal())
    overlaps = facts.transport(runner.config.run.transport).overlaps and runner.prefill_plan.remote and chunks > 1
    limits = phase_limits(summary, runner)
    return Sample(
        prefill=phase_sample(prefill, limits.get(PREFILL), overlapped=overlaps),
        decode=phase_sample(decode, limits.get(DECODE)),
        ttft_seconds=summary.ttft_seconds or 0.0,
        tpot_median_seconds=summary.tpot_percentile(0.5),
        token_ids=list(token_ids),
        peak_memory_bytes=machine.peak_memory_bytes(),
        drafted_tokens=decode.drafted_tokens,
        accepted_tokens=decode.accepted_tokens,
    )


def phase_limits(summary: Summary, runner: Runner) -> dict[str, float | None]:
    """What each phase can't go below, as a report says it of the whole run."""
    report = runner.report("complete")
    figures = LinkFigures.from_json(report["link"])
    found: dict[str, float | None] = {}
    for name, total in summary.phases.items():
        alone = Summary()
        alone.phases = {name: total}
        found[name] = limit(alone, report["settings"], report["model"], figures)["bound_seconds"]
    return found


def phase_sample(total: PhaseTotal, limit_seconds: float | None, *, overlapped: bool = False) -> PhaseSample:
    return PhaseSample(
        tokens=total.tokens,
        passes=total.passes,
        seconds=total.seconds,
        rpc_calls=total.rpc_calls,
        overlapped=overlapped,
        bytes_up=total.bytes_up,
        bytes_down=total.bytes_down,
        tee_seconds=total.tee_seconds,
        serialization_seconds=total.serialization_seconds,
        network_seconds=total.network_seconds,
        server_seconds=total.server_seconds,
        gpu_seconds=total.gpu_seconds,
        other_seconds=total.other_seconds,
        raw_bytes=total.raw_bytes_up + total.raw_bytes_down,
        limit_seconds=limit_seconds,
    )


if __name__ == "__main__":
    child.serve(Worker().handle)
