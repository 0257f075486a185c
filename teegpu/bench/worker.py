"""``python -m teegpu.bench.worker``: measures one case, run by ``teegpu.bench.pool`` only.

Commands: ``{"do": "load", …}`` once, answered with what the case came to be; then ``{"do": "measure"}``, answered with
a sample each time. See ``teegpu.bench.child``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teegpu import machine
from teegpu.bench import serving
from teegpu.bench.cases import from_values
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.metrics.events import DECODE, PREFILL
from teegpu.metrics.summary import PhaseTotal, Summary
from teegpu.model.folder import ModelFolder
from teegpu.tee.plans import Plan

if TYPE_CHECKING:
    from teegpu.tee.runner import Runner

Measure = Callable[[], Sample]


class Worker:
    """Handles the commands. ``load`` chooses what a measurement is."""

    def __init__(self) -> None:
        self._measure: Measure | None = None

    def handle(self, command: Mapping[str, Any]) -> dict[str, Any]:
        if command["do"] == "load":
            facts, self._measure = load(command)
            return {"facts": facts}
        if command["do"] == "measure" and self._measure is not None:
            return {"sample": self._measure().to_json()}
        raise UsageError(f"the process of a benchmark case can't do {json.dumps(command['do'])} now")


def load(command: Mapping[str, Any]) -> tuple[dict[str, Any], Measure]:
    """What ``command`` describes, ready to be measured: (facts for the record, the measurement).

    ``model``: name and path; ``prompt_tokens``, ``decode_tokens``; and either ``transformers``: dtype and threads, or
    ``settings``: every setting by its dotted key.
    """
    folder = ModelFolder(command["model"]["name"], Path(command["model"]["path"]))
    prompt_tokens, decode_tokens = command["prompt_tokens"], command["decode_tokens"]
    if "transformers" in command:
        from teegpu.bench.baseline import Baseline

        chosen = command["transformers"]
        baseline = Baseline(folder, dtype=chosen["dtype"], threads=chosen["threads"])
        prompt = _prompt(folder, prompt_tokens)
        facts = {"threads": {"runner": chosen["threads"], "server": None}, "notes": []}
        return facts, lambda: baseline.measure(prompt, decode_tokens)
    return _load_runner(folder, from_values(command["settings"]), prompt_tokens)


def _prompt(folder: ModelFolder, tokens: int) -> list[int]:
    from teegpu.model import texts
    from teegpu.model.tokenizer import Tokenizer

    return texts.prompt_of(Tokenizer(folder), tokens)


def _load_runner(folder: ModelFolder, settings: Config, prompt_tokens: int) -> tuple[dict[str, Any], Measure]:
    from teegpu.model import texts
    from teegpu.tee.generate import Generation
    from teegpu.tee.runner import Runner

    notes: list[str] = []
    # It is never closed: the process ends without ceremony, and with it the connection and the emulated link.
    runner = Runner(settings, folder, notify=notes.append)
    prompt = texts.prompt_of(runner.tokenizer, prompt_tokens)
    document = runner.report("complete")
    facts = {
        # Whether it is embedded is for the benchmark to say, which started it.
        "server": {key: value for key, value in document["server"].items() if key != "embedded"},
        "threads": {"runner": runner.threads.runner, "server": document["server"].get("threads")},
        "chunk_tokens": runner.chunk_tokens,
        "notes": notes,
    }
    chunks = -(-prompt_tokens // runner.chunk_tokens)

    def measure() -> Sample:
        runner.restart_summary()
        made = runner.generate(
            prompt, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
        )
        runner.recorder.flush()
        return _sample(runner, made.token_ids, chunks)

    return facts, measure


def _sample(runner: Runner, token_ids: list[int], chunks: int) -> Sample:
    summary: Summary = runner.summary
    layers = runner.spec.layers
    prefill = summary.phases.get(PREFILL, PhaseTotal())
    decode = summary.phases.get(DECODE, PhaseTotal())
    overlaps = runner.config.run.transport.startswith("pipelined")
    return Sample(
        prefill=phase_sample(prefill, runner.prefill_plan, layers, overlaps=overlaps, chunks=chunks),
        decode=phase_sample(decode, runner.decode_plan, layers, overlaps=overlaps, chunks=1),
        ttft_seconds=summary.ttft_seconds or 0.0,
        tpot_median_seconds=summary.tpot_percentile(0.5),
        token_ids=list(token_ids),
        peak_memory_bytes=machine.peak_memory_bytes(),
        drafted_tokens=decode.drafted_tokens,
        accepted_tokens=decode.accepted_tokens,
    )


def phase_sample(total: PhaseTotal, plan: Plan, layers: int, *, overlaps: bool, chunks: int) -> PhaseSample:
    """A phase's totals. In lock step each RPC is a round. A transport that ``overlaps`` has requests that do not need
    each other in flight at once: the projections of one input, which then take the rounds of one that merges them, and
    the chunks of a prompt, which then take the rounds of one chunk."""
    rounds = total.rpc_calls
    if overlaps and plan.remote:
        rounds = total.passes * replace(plan, merged=True).rpc_calls(layers)
    return PhaseSample(
        tokens=total.tokens,
        passes=total.passes,
        seconds=total.seconds,
        rpc_calls=total.rpc_calls,
        rounds=rounds,
        overlapped=overlaps and plan.remote and chunks > 1,
        bytes_up=total.bytes_up,
        bytes_down=total.bytes_down,
        tee_seconds=total.tee_seconds,
        serialization_seconds=total.serialization_seconds,
        network_seconds=total.network_seconds,
        server_seconds=total.server_seconds,
        gpu_seconds=total.gpu_seconds,
        other_seconds=total.other_seconds,
    )


if __name__ == "__main__":
    serving.serve(Worker().handle)
