"""The rules of advice about computation: where it should take place, and with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from teegpu import facts, machine
from teegpu.report import advice_local, beside, look
from teegpu.report.advice_reading import LOCAL, Change, Reading, figure
from teegpu.report.advice_rules import Advice, Rule, percent, worth
from teegpu.units import human_bytes, human_seconds

LARGEST: Final = 0.5
"""A part that takes this share of the run is what the run is bound by."""

LATENCY_SHARE: Final = 0.4
"""Of decode, from which on its round trips are worth a word about guessing tokens."""

GAIN_OF_THREADS: Final = 0.5
"""The share of the TEE's own work that more threads divide among them; the rest is bound by memory, or too small."""

NEAR_THE_LIMIT: Final = 1.1


def threads(run: Reading) -> Iterator[Advice]:
    """Runner and server on one machine with more threads than cores."""
    runner, server, cores = run.runner_threads, run.server_threads, run.cores
    if not (run.remote and run.same_machine and run.server_on_cpu and min(runner, server, cores) > 0):
        return
    if not machine.oversubscribed(runner, server, cores, shared=run.takes_turns):
        return
    computed = sum(phase.tee_seconds for phase in run.phases) + _computing(run)
    saving = min(computed, run.seconds) * (1.0 - cores / (runner + server))
    if not worth(run, saving):
        return
    ours, theirs = machine.thread_split(True, cores)
    text = (
        f"The runner ({runner} threads) and the server ({server}) share {cores} cores, and take them away from each "
        f"other in the middle of a product. {ours} and {theirs} threads would save at least this much, often several "
        "times."
    )
    settings = {"run.threads": str(ours), "server.threads": str(theirs)}
    evidence = {"runner_threads": runner, "server_threads": server, "cores": cores, "computing_seconds": computed}
    yield Advice("threads-oversubscribed", text, settings, saving, evidence)


def serialization(run: Reading) -> Iterator[Advice]:
    """int8 on a link that is quick enough for fp16: quantising costs more than the bytes."""
    spent = sum(phase.serialization_seconds for phase in run.phases)
    if run.wire != facts.INT8.name or not spent:
        return
    saving = run.saving(Change(wire=facts.FP16.name))
    if saving is not None and worth(run, saving):
        text = (
            f"Serialization took {human_seconds(spent)}, {percent(spent, run.seconds)} of the run, most of it for "
            "int8. This link carries fp16 in less than that, and fp16 is more accurate."
        )
        evidence = {"serialization_seconds": spent, "network_seconds": sum(p.network_seconds for p in run.phases)}
        yield Advice("serialization-bound", text, {"run.wire_dtype": facts.FP16.name}, saving, evidence)


def tee(run: Reading) -> Iterator[Advice]:
    """The TEE's own work, where cores for it are idle."""
    spent = sum(phase.tee_seconds for phase in run.phases)
    if not run.remote or run.same_machine or spent < LARGEST * run.seconds:
        return
    used, cores = run.runner_threads, run.cores
    if not 0 < used < cores:
        return
    saving = GAIN_OF_THREADS * spent * (1.0 - used / cores)
    if worth(run, saving):
        text = (
            f"The TEE's own work (attention, norms, SiLU) took {human_seconds(spent)}, {percent(spent, run.seconds)} "
            f"of the run, on {used} of {cores} cores. The estimate is that half of it goes faster with all of them."
        )
        evidence = {"tee_seconds": spent, "runner_threads": used, "cores": cores}
        yield Advice("tee-bound", text, {"run.threads": str(cores)}, saving, evidence)


def _computing(run: Reading) -> float:
    """The server's computation: all of it where it overlaps with other work, else what was waited for."""
    return sum(phase.busy_gpu_seconds if phase.overlaps else phase.gpu_seconds for phase in run.phases)


def gpu(run: Reading) -> Iterator[Advice]:
    """The server's computation."""
    spent = _computing(run)
    if not run.remote or spent < LARGEST * run.seconds:
        return
    device, dtype = run.server.get("device", "server"), run.server.get("dtype", "")
    # On a processor it depends on its instructions whether a narrower dtype is quicker; on CUDA it always is.
    saving = spent / 2 if dtype == "fp32" and str(device).startswith("cuda") else 0.0
    settings = {"server.dtype": "bf16"} if saving else {}
    text = (
        f"The link is not your problem: the server computed for {human_seconds(spent)} of {human_seconds(run.seconds)} "
        f"({device}, {dtype}). "
    )
    text += "In bf16 it would take half of that or less." if saving else "A faster server is what would help."
    if not saving or worth(run, saving):
        yield Advice("gpu-bound", text, settings, saving, {"gpu_seconds": spent, "seconds": run.seconds})


def decode_in_the_tee(run: Reading, references: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    """Decode waits for round trips: where the TEE can do it alone, it should."""
    phase = run.decode
    if not phase.remote or not phase.tokens:
        return
    local = advice_local.estimate(run, phase, references)
    if local is None or not worth(run, phase.seconds - local.seconds):
        return
    a_token, alone = (human_seconds(seconds / phase.tokens) for seconds in (phase.seconds, local.seconds))
    text = (
        f"Decode took {a_token} a token, {percent(phase.network_seconds, phase.seconds)} of it network. In the TEE "
        f"alone a token would take about {alone} (from {local.basis}){_memory(run)}."
    )
    fused = run.saving(Change(plan=facts.FUSED.name), phase.name) if phase.plan != facts.FUSED.name else None
    if fused is not None and worth(run, fused):
        text += (
            f" With fused, which has half the rounds, about {human_seconds((phase.seconds - fused) / phase.tokens)}."
        )
    evidence = {
        "seconds_per_token": phase.seconds / phase.tokens,
        "local_seconds_per_token": local.seconds / phase.tokens,
        "rpcs_per_token": phase.rpc_calls / phase.tokens,
        "network_seconds": phase.network_seconds,
    }
    yield Advice("decode-local", text, {"run.decode_plan": LOCAL}, phase.seconds - local.seconds, evidence)


def speculation(run: Reading) -> Iterator[Advice]:
    """What a guessed token saves. How many guesses will be right, nobody knows before."""
    phase, link = run.decode, run.link
    if not phase.remote or not phase.passes or link is None or figure(run.settings, "speculate") > 0:
        return
    waited = phase.rpc_calls * link.rtt_seconds
    if waited < LATENCY_SHARE * phase.seconds or not worth(run, waited):
        return
    each = human_seconds(phase.seconds / phase.passes)
    text = (
        f"Each token waits {human_seconds(waited / phase.passes)} for round trips. Guessing tokens from the text "
        f"verifies several in the rounds of one: each guess that is right saves {each}."
    )
    evidence = {"rtt_seconds": link.rtt_seconds, "rpc_calls": int(phase.rpc_calls), "seconds": phase.seconds}
    yield Advice("decode-speculate", text, {"run.speculate": "4"}, 0.0, evidence)


def drafting(run: Reading) -> Iterator[Advice]:
    """Whether the draft model takes longer than its guesses save. Which guesses were its own is not told apart from
    those of the text so far: it is given all of them."""
    phase = run.decode
    took = phase.op_seconds("DRAFT")
    if not took or not phase.passes:
        return
    guesses = look.mapping(phase.data, "speculation")
    drafted, accepted = (figure(guesses, f"{name}_tokens") for name in ("drafted", "accepted"))
    step = (phase.seconds - took) / phase.passes
    saving = took - accepted * step
    if not worth(run, saving):
        return
    text = (
        f"The draft model took {human_seconds(took)}. {accepted:,.0f} of {drafted:,.0f} guesses were right, which "
        f"saved {human_seconds(accepted * step)} at most, {human_seconds(step)} each: it does not pay here."
    )
    evidence = {"draft_seconds": took, "drafted_tokens": int(drafted), "accepted_tokens": int(accepted)}
    yield Advice("draft-off", text, {"run.draft_model": ""}, saving, evidence)


def offloading(run: Reading, references: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    """Whether all of it in the TEE would have been quicker."""
    total = 0.0
    basis = ""
    for phase in run.phases:
        if not phase.seconds:
            continue
        if phase.plan == LOCAL:
            total += phase.seconds
            continue
        local = advice_local.estimate(run, phase, references)
        if local is None:
            return
        total += local.seconds
        basis = local.basis
    if not run.remote or not worth(run, run.seconds - total):
        return
    text = (
        f"Offloading does not pay here: all in the TEE would take about {human_seconds(total)} (from {basis}), "
        f"{_hidden(run)}this run took {human_seconds(run.seconds)}{_memory(run)}."
    )
    settings = {f"run.{phase.name}_plan": LOCAL for phase in run.phases if phase.seconds and phase.plan != LOCAL}
    evidence = {"local_seconds": total, "seconds": run.seconds}
    yield Advice("offloading-does-not-pay", text, settings, run.seconds - total, evidence)


def leverage(run: Reading) -> Iterator[Advice]:
    """A private run that takes more of the TEE's processors than all in the TEE would."""
    found = beside.leverage(run.document)
    if not beside.wanted(run.document) or found is None or found > 1.0:
        return
    text = (
        f"{run.privacy} has a leverage of {found:.2f} here: the TEE's processors work longer for it than for all of "
        "the model in the TEE. It is worth it above 1: with a larger model, longer prompts, or more sequences at once."
    )
    yield Advice("no-leverage", text, {}, 0.0, {"leverage": found})


def _hidden(run: Reading) -> str:
    return "" if run.privacy == "none" else "and servers would get nothing at all to see; "


def _memory(run: Reading) -> str:
    """What ``local`` costs: the TEE then holds the weights."""
    parameters = figure(run.document, "model", "parameters")
    return f"; it needs {human_bytes(4 * parameters)} for the weights there" if parameters else ""


def at_the_limit(run: Reading) -> Iterator[Advice]:
    """Nothing left to gain without another link, server or plan."""
    ratio = figure(run.document, "limit", "ratio")
    if not run.remote or not 0.0 < ratio <= NEAR_THE_LIMIT:
        return
    parts = {name: figure(run.document, "limit", f"{name}_seconds") for name in ("link", "gpu", "tee")}
    largest = max(parts, key=lambda name: parts[name])
    what = {"link": "the link", "gpu": "the server's computation", "tee": "the TEE's computation"}[largest]
    text = (
        f"This run is within {max(1.0, (ratio - 1) * 100):.0f}% of what its bytes, rounds and computations allow. Most "
        f"of it is {what}, {human_seconds(parts[largest])}: only less of that, or a faster one, would help."
    )
    yield Advice("at-the-limit", text, {}, 0.0, {"ratio": ratio, **{f"{k}_seconds": v for k, v in parts.items()}})


def rules(references: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The rules of this module; ``references`` are stored runs in the TEE alone."""
    return (
        threads, serialization, tee, gpu, leverage, partial(decode_in_the_tee, references=references), speculation,
        drafting, partial(offloading, references=references),
    )  # fmt: skip
