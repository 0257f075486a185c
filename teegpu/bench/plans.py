"""``teegpu bench plans``: plans, transports and wire dtypes side by side in one run, transformers beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from teegpu.bench import document as doc
from teegpu.bench import summary
from teegpu.bench.cases import TRANSFORMERS, Case
from teegpu.bench.measure import WARM_UP, Notify, Progress, Workers, described, measure
from teegpu.bench.pool import Pool, Workload
from teegpu.bench.samples import Measured, Sample
from teegpu.config import Config
from teegpu.errors import PromptError, TeegpuError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from transports.linkspec import LinkSpec

REFERENCE = Case("reference", {}, "fp32")
"""Whose tokens the output of every case is held against."""

OpenPool = Callable[[Sequence[Case], Workload], "AbstractContextManager[Workers]"]


class PlanBenchmark:
    """Measures ``cases``. ``base`` are the settings in force, its ``run.link`` the emulated link of all cases.

    ``check`` compares each case's tokens with those of transformers in fp32. ``document`` gives what there is at any
    time, so an interrupted ``run`` loses nothing. Raises ``UsageError`` for numbers that can't be, ``PromptError`` for
    more tokens than the model's context has, and what reading the model raises.
    """

    name = "plans"

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        cases: Sequence[Case],
        *,
        prompt_tokens: int,
        decode_tokens: int,
        repeats: int,
        check: bool = True,
        open_pool: OpenPool = Pool,
    ) -> None:
        self._work = workload(folder, base, prompt_tokens, decode_tokens, repeats)
        self._link = LinkSpec.parse(base.run.link) if base.run.link else None
        self._cases = list(cases)
        self._repeats = repeats
        self._check = check
        self._open_pool = open_pool
        self._started_at = doc.now()
        self._digest = ""
        self._reference: list[int] | None = None
        self._notes: list[str] = []
        self._measured = [Measured(case.label, _described(case, base)) for case in self._cases]

    @property
    def failures(self) -> list[str]:
        """One line for each case that failed."""
        return [f"{case.label}: {case.error}" for case in self._measured if case.error]

    def run(self, notify: Notify = lambda _: None) -> None:
        """Measures everything. A case that fails is left out from then on and has its error in the document."""
        with WeightStore(self._work.folder, self._work.spec) as store:
            self._digest = store.digest()
        if self._check and not any(_is_reference(case) for case in self._cases):
            self._make_reference(notify)
        with self._open_pool(self._cases, self._work) as pool:
            measure(self._measured, pool, self._repeats, notify)

    def _make_reference(self, notify: Notify) -> None:
        """The reference's tokens, from a process that is gone before the first case is loaded."""
        step = Progress(0, len(self._cases) * (self._repeats + 1), REFERENCE.label, "transformers in fp32")
        notify(step)
        try:
            with self._open_pool([REFERENCE], self._work) as pool:
                sample = pool.load(WARM_UP).warm_up
        except TeegpuError as error:
            self._notes.append(f"outputs were not checked, because the reference failed: {error}")
            return
        self._reference = sample.token_ids
        notify(Progress(step.done, step.total, step.label, step.stage, described(sample)))

    def document(self, status: str) -> dict[str, Any]:
        base, work = self._work.base, self._work
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
                "link": str(self._link) if self._link is not None else "",
                "endpoint": base.run.endpoint,
                "base": {key: value for key, value in base.values().items() if not key.startswith("sampling.")},
            },
            notes=self._notes + self._case_notes() + summary.bounds(self._measured),
            results=summary.results(self._measured, reference=self._known_reference(), link=self._link),
            reference={"by": "transformers fp32", "token_ids": self._known_reference()},
        )

    def _known_reference(self) -> list[int] | None:
        if not self._check or self._reference is not None:
            return self._reference
        samples: list[Sample | None] = [
            measured.warm_up for case, measured in zip(self._cases, self._measured, strict=True) if _is_reference(case)
        ]
        return next((sample.token_ids for sample in samples if sample is not None), None)

    def _case_notes(self) -> list[str]:
        notes = [f"{case.label}: {note}" for case in self._measured for note in case.facts.get("notes", [])]
        return list(dict.fromkeys(notes))


def _is_reference(case: Case) -> bool:
    return case.transformers_dtype == REFERENCE.transformers_dtype


def _described(case: Case, base: Config) -> dict[str, Any]:
    """The case for the document: its plans and the settings that it names."""
    remote = case.remote(base)
    config = case.config(base, 0)
    return {
        "prefill_plan": case.prefill_plan(base),
        "decode_plan": case.decode_plan(base),
        "remote": remote,
        "transport": config.run.transport if remote else None,
        "wire_dtype": config.run.wire_dtype if remote else None,
        "speculate": 0 if case.baseline else config.run.speculate,
        "dtype": case.transformers_dtype or (config.server.dtype if remote else "fp32"),
        "kind": TRANSFORMERS if case.baseline else "teegpu",
        "given": dict(case.given),
    }


def workload(folder: ModelFolder, base: Config, prompt_tokens: int, decode_tokens: int, repeats: int) -> Workload:
    """What each case does. Raises ``UsageError`` for numbers that can't be, ``PromptError`` for more tokens than the
    model's context has, and what reading the model raises."""
    _check_numbers(prompt_tokens, decode_tokens, repeats)
    spec = read_spec(folder)
    if prompt_tokens + decode_tokens > spec.max_positions:
        raise PromptError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} are more than the context of "
            f"{spec.name}, which ends at {spec.max_positions}: give less"
        )
    return Workload(folder, spec, base, prompt_tokens, decode_tokens)


def _check_numbers(prompt_tokens: int, decode_tokens: int, repeats: int) -> None:
    for flag, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--decode-tokens", decode_tokens, 0),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise UsageError(f"{flag} {value} is below the least, {least}")
