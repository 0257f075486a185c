"""``teegpu bench ladder``: what each step from one RPC a product to what teegpu does now brings on a machine and link.

The rungs are those of ``bench.rungs`` and cases that the user wrote (``bench.cases``), each a process; they take turns,
and transformers' tokens and logits in fp32 are what their output is held against. Beyond what every document has
(``bench.document``), this one has:

    settings.prompt_tokens, decode_tokens, repeats, max_seconds (null: no bound), check, link ("": none), endpoint ("":
             embedded servers), rungs (names), cases (the settings that each names, by label), base (the settings in
             force that have a part in it, by dotted key)
    reference.token_ids       transformers' in fp32, null without the check
    results[]                 one for each rung, in the ladder's order, whether it was measured yet or not:
      rung, label, track      its name, its name for people, and "prefill", "beside", "decode", "baseline" or "case"
      before, adds            the nearest measured rung below it ("": none), and what it adds to that
      expected_seconds        what the original document expected of the prefill; null for other models and prompts
      case.kind               "teegpu" or "transformers"
      case.prefill_plan, decode_plan, remote, speculate
      case.transport, wire_dtype       null without a server
      case.dtype              what the server was told to compute in; that of transformers
      case.chunk_tokens       as it was set; 0: chosen by the runner. ``chunk_tokens`` beside ``case``: what it came to
      case.codec              "packed" or "frames", null without a server
      case.kv_cache, position_cache    false where the rung does without
      case.decode_tokens      made after the first one; less than settings.decode_tokens on rungs that are slow
      server, threads, wire_dtype, notes    what the rung's process said of itself (see ``bench.worker``)
      accuracy                kl_nats, kl_nats_largest, top1_agreement over ``positions`` (see ``bench.logits``)
      repeats, cold           runs behind the figures after the warm-up; cold: none, the figures are the warm-up's
      prefill                 seconds {median, min, max}, ttft_seconds, rpc_calls, bytes_up, bytes_down,
                              communication_share, parts {…_seconds}, speed_up (over the first rung of the chain, or
                              the first case), speed_up_over_before, limit_seconds and ratio_to_limit (null where the
                              link is not known)
      decode                  the same, with seconds of all steps, seconds_per_step, seconds_per_token,
                              tokens_per_second, tpot_seconds, steps, tokens_per_step, rpc_calls_per_step,
                              bytes_up_per_step, bytes_down_per_step in place of the first five; absent where no more
                              than one token was made
      output                  tokens, agreeing_tokens, identical
      error                   why it could not be measured (further); absent else
      warm_up, samples        every run, as ``bench.samples.Sample`` has it

A key may be added; none of these changes its meaning.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import transports
from teegpu import endpoints
from teegpu.bench import document as doc
from teegpu.bench import figures
from teegpu.bench.cases import NO_KV_CACHE, NO_POSITION_CACHE, PACKED, TRANSFORMERS, Case
from teegpu.bench.figures import Step
from teegpu.bench.measure import WARM_UP, Notify, Progress, Workers, described, measure
from teegpu.bench.pool import Pool, Workload
from teegpu.bench.rungs import RUNGS, Rung, has_expected_shape
from teegpu.bench.samples import Measured
from teegpu.config import Config
from teegpu.errors import PromptError, TeegpuError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_limits
from teegpu.remote.handshake import ModelHandshake
from teegpu.wire.codec import Decoder
from transports.netem.spec import LinkSpec

_SECTIONS = ("run.", "server.", "link.", "compression.", "limits.")
"""Sections of the settings in force that have a part in the figures."""

REFERENCE = Case("reference", {}, "fp32")
"""Whose tokens and logits the output of every rung is held against."""


class LadderWorkers(Workers, Protocol):
    def save_logits(self, index: int, path: Path) -> None: ...


OpenPool = Callable[[Sequence[Case], Workload], "AbstractContextManager[LadderWorkers]"]


class LadderBenchmark:
    """Measures ``rungs``. ``base`` are the settings in force, its ``run.link`` the emulated link of all.

    A rung whose runs have taken ``max_seconds`` takes no more repeats. ``resume`` is a file with a document of the same
    measurement: what it has is kept. ``document`` gives what there is at any time. Raises ``UsageError`` for numbers
    that can't be and a file that is of something else, ``PromptError`` for more tokens than the model's context has,
    and what reading the model raises.
    """

    name = "ladder"

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        rungs: Sequence[Rung],
        *,
        prompt_tokens: int,
        decode_tokens: int,
        repeats: int,
        max_seconds: float = math.inf,
        check: bool = True,
        resume: Path | None = None,
        open_pool: OpenPool = Pool,
    ) -> None:
        if not max_seconds > 0.0:
            raise UsageError(f"--max-seconds {max_seconds:g} is not above 0")
        self._work = workload(folder, base, prompt_tokens, decode_tokens, repeats)
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._rungs = list(rungs)
        self._cases = [rung.case(base, prompt_tokens, decode_tokens) for rung in rungs]
        self._repeats = repeats
        self._max_seconds = max_seconds
        self._check = check
        self._resume = resume
        self._open_pool = open_pool
        self._started_at = doc.now()
        self._digest = ""
        self._reference: list[int] | None = None
        self._notes: list[str] = []
        self._measured = [
            Measured(rung.label, _described(rung, case, self._work))
            for rung, case in zip(self._rungs, self._cases, strict=True)
        ]

    @property
    def failures(self) -> list[str]:
        """One line for each rung that failed."""
        return [f"{each.label}: {each.error}" for each in self._measured if each.error]

    def run(self, notify: Notify = lambda _: None) -> None:
        """Measures everything. A rung that fails is left out from then on and has its error in the document."""
        with WeightStore(self._work.folder, self._work.spec) as store:
            self._digest = store.digest()
        if self._resume is not None:
            self._take_over(self._resume)
        self._meet_servers(notify)
        if not any(each.to_do(self._repeats, self._max_seconds) for each in self._measured):
            return
        # Some megabytes, where nobody else can read them: they say what the model would have gone on with.
        with tempfile.TemporaryDirectory(prefix="teegpu-") as folder:
            work = self._work
            if self._check:
                work = replace(work, reference=self._make_reference(Path(folder) / "reference.npy", notify))
            with self._open_pool(self._cases, work) as pool:
                measure(self._measured, pool, self._repeats, notify, max_seconds=self._max_seconds)

    def _meet_servers(self, notify: Notify) -> None:
        """Says hello to the servers that are there already, before hours are spent on others: each rung would find out
        by itself. Raises ``MismatchError`` for one with another model, and what an exchange with it does."""
        base, work = self._work.base, self._work
        for endpoint in endpoints.parse_all(base.run.endpoints) if base.run.endpoint else ():
            notify(Progress(0, len(self._cases) * (self._repeats + 1), "ladder", f"asking {endpoint.address}"))
            handshake = ModelHandshake(Decoder(wire_limits(base)), work.spec, self._digest)
            with transports.connect("zmq", endpoint.address, client_options(base, endpoint)) as client:
                reply = client.request(handshake.message, timeout_seconds=base.link.hello_timeout_seconds)
                handshake.check(reply, endpoint)

    def _make_reference(self, path: Path, notify: Notify) -> Path | None:
        """``path`` with the reference's logits, from a process that is gone before the first rung is loaded."""
        step = Progress(0, len(self._cases) * (self._repeats + 1), REFERENCE.label, "transformers in fp32")
        notify(step)
        try:
            with self._open_pool([REFERENCE], self._work) as pool:
                sample = pool.load(WARM_UP).warm_up
                pool.save_logits(WARM_UP, path)
        except TeegpuError as error:
            self._notes.append(f"outputs were not checked, because the reference failed: {error}")
            return None
        self._reference = sample.token_ids
        notify(Progress(step.done, step.total, step.label, step.stage, described(sample)))
        return path

    def _take_over(self, path: Path) -> None:
        """What the document in ``path`` has. Raises ``UsageError`` where it is of another measurement."""
        old = doc.read(path, self.name)
        if other := doc.difference(old, self.document("interrupted")):
            raise UsageError(
                f"--resume: {path} was measured with another {other}; give another --out, or leave --resume out to "
                "begin again"
            )
        try:
            for entry, measured in zip(old["results"], self._measured, strict=True):
                doc.take_over(entry, measured)
            self._reference = old["reference"]["token_ids"]
            self._started_at = str(old["started_at"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise doc.damaged(path) from None

    def document(self, status: str) -> dict[str, Any]:
        base, work = self._work.base, self._work
        steps = [
            Step(rung, measured, self._max_seconds) for rung, measured in zip(self._rungs, self._measured, strict=True)
        ]
        expected = has_expected_shape(work.spec, work.prompt_tokens)
        left_out = base.run.endpoint and any(rung.given is None for rung in self._rungs)
        packed = [rung.name for rung in RUNGS.values() if PACKED in rung.ways] if left_out else []
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=work.spec,
            digest=self._digest,
            settings={
                "prompt_tokens": work.prompt_tokens,
                "decode_tokens": work.decode_tokens,
                "repeats": self._repeats,
                "max_seconds": None if math.isinf(self._max_seconds) else self._max_seconds,
                "check": self._check,
                "link": str(self._link) if self._link is not None else "",
                "endpoint": base.run.endpoint,
                "rungs": [rung.name for rung in self._rungs],
                "cases": {rung.name: _given(rung.given) for rung in self._rungs if rung.given is not None},
                "base": {key: _plain(value) for key, value in base.values().items() if key.startswith(_SECTIONS)},
            },
            notes=self._notes + figures.notes(steps, repeats=self._repeats, left_out=packed, expected=expected),
            results=figures.results(steps, reference=self._reference, expected=expected),
            reference={"by": REFERENCE.label, "token_ids": self._reference},
        )


def _plain(value: object) -> object:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _given(case: Case) -> dict[str, Any]:
    """What the user's case names."""
    if case.baseline:
        return {"transformers": case.transformers_dtype, **case.given}
    return {key: _plain(value) for key, value in case.given.items()}


def _described(rung: Rung, case: Case, work: Workload) -> dict[str, Any]:
    """The rung's case for the document."""
    base, remote = work.base, case.remote(work.base)
    config = case.config(base, work.decode_tokens)
    return {
        "kind": TRANSFORMERS if case.baseline else "teegpu",
        "prefill_plan": case.prefill_plan(base),
        "decode_plan": case.decode_plan(base),
        "remote": remote,
        "transport": config.run.transport if remote else None,
        "wire_dtype": config.run.wire_dtype if remote else None,
        "codec": ("packed" if PACKED in rung.ways else "frames") if remote else None,
        "privacy": config.run.privacy,
        "chunk_tokens": config.run.chunk_tokens,
        "speculate": 0 if case.baseline else config.run.speculate,
        "dtype": case.transformers_dtype or (config.server.dtype if remote else "fp32"),
        "kv_cache": NO_KV_CACHE not in rung.ways,
        "position_cache": NO_POSITION_CACHE not in rung.ways,
        "decode_tokens": case.steps(work.decode_tokens),
    }


def workload(folder: ModelFolder, base: Config, prompt_tokens: int, decode_tokens: int, repeats: int) -> Workload:
    """What each case does. Raises ``UsageError`` for numbers that can't be, ``PromptError`` for more tokens than the
    model's context has, and what reading the model raises."""
    for flag, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--decode-tokens", decode_tokens, 0),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise UsageError(f"{flag} {value} is below the least, {least}")
    spec = read_spec(folder)
    if prompt_tokens + decode_tokens > spec.max_positions:
        raise PromptError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} are more than the context of "
            f"{spec.name}, which ends at {spec.max_positions}: give less"
        )
    return Workload(folder, spec, base, prompt_tokens, decode_tokens)
