"""``auto`` in the place of a plan: what a profile, or a short probe at the start, predicts to be quickest.

Only time is weighed here. The wire dtype stays what the user set, and no plan is taken that shows the server more than
``metrics.chooser.AUTO_PLANS`` do. Beside an embedded server only plans that offload are considered: it is there to show
the split, and computes with the same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from teegpu import machine
from teegpu.errors import ConfigError
from teegpu.kernels import Matrix
from teegpu.metrics import chooser, profile
from teegpu.metrics.chooser import AUTO_PLANS, OFFLOADING_PLANS, Candidate
from teegpu.metrics.cost_model import CostModel, Settings
from teegpu.metrics.demand import LOCAL
from teegpu.metrics.profile import Profile, Server
from teegpu.metrics.rates import TURNS_SLOWDOWN, Rates
from teegpu.metrics.traffic import Shape
from teegpu.model.spec import ModelSpec
from teegpu.settings import AUTO
from teegpu.tee.calibrate import Calibration, Observed, Step, shape_of
from teegpu.units import about_seconds
from teegpu.wire.messages import Welcome

PROBE_SECONDS: Final = 0.25
"""What a probe may take; on a link so slow that single passes take longer, as long as these take."""

PROBE_LAYERS: Final = 2
PROBE_TOKENS: Final = 64
PROBE_MATRIX_BYTES: Final = 48 * 2**20
"""Larger than the cache, so that the product of one row reads memory, as it does in a model."""

ASSUMED_PROMPT_TOKENS: Final = 512
ASSUMED_DECODE_TOKENS: Final = 64
"""What is chosen for where the prompt is not known yet; half of the tokens that follow it is where decode is judged."""

SPARE_BYTES: Final = 512 * 2**20
"""Memory that the weights of ``local`` must leave free."""


@dataclass(frozen=True)
class Question:
    """What is to be chosen, and for what. A phase's plan is ``auto``, or given; ``prompt_tokens`` 0: not known.

    ``plans``: those that may be chosen; ``product_cost``: a factor on what a product costs, where it costs more than
    the rates say. ``local_fits``: whether the weights fit into this machine's memory."""

    prefill_plan: str
    decode_plan: str
    base: Settings
    chunk_tokens: int
    prompt_tokens: int
    embedded: bool
    local_fits: bool
    plans: Collection[str] = AUTO_PLANS

    @property
    def asks(self) -> bool:
        return AUTO in (self.prefill_plan, self.decode_plan)

    def candidates(self, plan: str) -> tuple[str, ...]:
        """The plans to weigh for a phase whose plan is ``plan``. Raises ``ConfigError`` where none is left."""
        if plan != AUTO:
            return (plan,)
        possible = OFFLOADING_PLANS if self.embedded else AUTO_PLANS
        left = tuple(
            name for name in possible if name in self.plans and (name != LOCAL or self.local_fits or len(possible) == 1)
        )
        if not left:
            raise ConfigError(
                f"the plan auto has nothing to choose from ({', '.join(possible)}): name a plan (run.prefill_plan, "
                "run.decode_plan)"
            )
        return left

    @property
    def weighs_local(self) -> bool:
        """Whether it depends on what the TEE alone would take."""
        asked = [plan for plan in (self.prefill_plan, self.decode_plan) if plan == AUTO]
        return any(LOCAL in self.candidates(plan) for plan in asked)


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and what was known. ``prefills`` and ``decodes`` are the candidates, quickest first; of a
    plan that was given there may be none. ``basis`` is ``profile`` or ``probe``, ``detail`` says which."""

    question: Question
    prefill_plan: str
    decode_plan: str
    chunk_tokens: int
    prefills: tuple[Candidate, ...]
    decodes: tuple[Candidate, ...]
    basis: str
    detail: str
    prompt_tokens: int

    @property
    def line(self) -> str:
        """One line for the user."""
        prefill = self.prefill_plan
        if prefill != LOCAL and self.question.base.overlaps and self.chunk_tokens < self.prompt_tokens:
            prefill += f" in chunks of {self.chunk_tokens}"
        told = [
            _told(self.prefills, self.prefill_plan, "to the first token"),
            _told(self.decodes, self.decode_plan, "for each after it"),
        ]
        predicted = ", ".join(part for part in told if part)
        return (
            f"auto: prefill {prefill}, decode {self.decode_plan} (by {self.detail}, for a prompt of "
            f"{self.prompt_tokens:,} tokens: {predicted})"
        )

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        asked = self.question
        return {
            "asked": {
                "prefill_plan": asked.prefill_plan,
                "decode_plan": asked.decode_plan,
                "chunk_tokens": asked.chunk_tokens,
            },
            "chosen": {
                "prefill_plan": self.prefill_plan,
                "decode_plan": self.decode_plan,
                "chunk_tokens": self.chunk_tokens,
            },
            "basis": self.basis,
            "reason": self.line,
            "prompt_tokens": self.prompt_tokens,
            "predicted": {
                "prefill_seconds": _quickest(self.prefills),
                "decode_step_seconds": _quickest(self.decodes),
            },
        }


def _quickest(ranked: Iterable[Candidate]) -> dict[str, float]:
    """The least seconds of each plan."""
    seconds: dict[str, float] = {}
    for candidate in ranked:
        seconds.setdefault(candidate.plan, candidate.seconds)
    return seconds


def _told(ranked: Sequence[Candidate], chosen: str, what: str) -> str:
    """``1.2 s to the first token (local 5.3 s)``: what was chosen, and the best of the others."""
    seconds = _quickest(ranked)
    if chosen not in seconds:
        return ""
    other = next((f" ({plan} {about_seconds(least)})" for plan, least in seconds.items() if plan != chosen), "")
    return f"{about_seconds(seconds[chosen])} {what}{other}"


def choose(question: Question, shape: Shape, rates: Rates, basis: str, detail: str) -> Choice:
    """Weighs the candidates. Raises ``ConfigError`` where the rates cover none of them."""
    model, base = CostModel(shape, rates), question.base
    tokens = question.prompt_tokens or ASSUMED_PROMPT_TOKENS
    prefills = chooser.prefills(
        model,
        base,
        tokens=tokens,
        plans=question.candidates(question.prefill_plan),
        chunk_tokens=question.chunk_tokens,
    )
    position = tokens + ASSUMED_DECODE_TOKENS // 2
    decodes = chooser.decodes(model, base, position=position, plans=question.candidates(question.decode_plan))
    prefill_plan, chunk_tokens = question.prefill_plan, question.chunk_tokens
    if prefill_plan == AUTO:
        taken = chooser.pick(_some(prefills, base)).settings
        prefill_plan, chunk_tokens = taken.plan, taken.chunk_tokens
    decode_plan = question.decode_plan
    if decode_plan == AUTO:
        decode_plan = chooser.pick(_some(decodes, base)).plan
    chunk_tokens = chunk_tokens or chooser.default_chunk(overlaps=base.overlaps and prefill_plan != LOCAL)
    return Choice(
        question, prefill_plan, decode_plan, chunk_tokens, tuple(prefills), tuple(decodes), basis, detail, tokens
    )


def _some(ranked: list[Candidate], base: Settings) -> list[Candidate]:
    if not ranked:
        raise ConfigError(
            f"the plan auto can't be decided for the wire dtype {base.wire_dtype}, of which the profile has nothing: "
            "name a plan (run.prefill_plan, run.decode_plan), or renew the profile with 'teegpu tune'"
        )
    return ranked


@dataclass(frozen=True)
class Place:
    """What a profile is found by, beside the model: ``endpoints`` and the emulated ``link`` as in the settings.
    ``shared_cores``: those that runner and server share, 0: none. ``borders``: the layers at which another group of
    servers begins."""

    endpoints: tuple[str, ...]
    link: str
    runner_threads: int
    shared_cores: int
    borders: tuple[int, ...] = ()


class Chooser:
    """Answers questions for the model ``spec`` with ``digest`` at ``place``, whose (first) server is ``welcome``."""

    def __init__(self, spec: ModelSpec, digest: str, place: Place, welcome: Welcome | None) -> None:
        self._spec = spec
        self._digest = digest
        self._place = place
        self._server = None if welcome is None else Server(welcome.device, welcome.dtype, welcome.threads)

    @property
    def borders(self) -> tuple[int, ...]:
        """The layers at which another group of servers begins."""
        return self._place.borders

    def choose(
        self, question: Question, calibration: Calibration | None, notify: Callable[[str], None]
    ) -> Choice | None:
        """By the stored profile where there is one that fits, else by a probe, which ``calibration`` makes; None where
        there is neither. ``notify`` is told of a profile that does not fit. Raises ``ConfigError``, and what requests
        do."""
        shape = shape_of(self._spec, self._place.borders)
        found, reason = self._stored()
        if reason:
            notify(reason)
        if found is not None:
            return choose(question, shape, found.rates, "profile", f"the profile of {found.created_at[:10]}")
        if calibration is None:
            return None
        return choose(question, shape, self._probe(question, calibration), "probe", "a probe")

    def _stored(self) -> tuple[Profile | None, str]:
        """The profile that fits, if there is one; else None and, where there is one that does not, why."""
        place = self._place
        path = profile.path_of(place.endpoints, place.link, self._digest)
        if not path.exists():
            return None, ""
        try:
            found = profile.read(path)
        except ConfigError as error:
            return None, str(error)
        reason = found.misfit(digest=self._digest, runner_threads=place.runner_threads, server=self._server)
        if reason:
            return None, f"the stored profile is not used, as {reason}: '{found.command}' renews it"
        return found, ""

    def _probe(self, question: Question, calibration: Calibration) -> Rates:
        """Rates from a few small passes over the connection and, where ``local`` is weighed, a few products."""
        until = time.perf_counter() + PROBE_SECONDS
        wire, most = question.base.wire_dtype, self._spec.max_positions
        many = min(PROBE_TOKENS, most)
        calibration.run(
            [
                Step("fused", wire, 1, start=min(PROBE_TOKENS, most - 1), repeats=3),
                Step("fused", wire, many, repeats=2),
            ],
            until=until,
        )
        observed = calibration.observed
        if question.weighs_local:
            measure_products(self._spec, observed)
        return self.rates(observed)

    def rates(self, observed: Observed) -> Rates:
        """What was observed, with what is known of this place."""
        place, cores = self._place, self._place.shared_cores
        if not cores or self._server is None:
            return Rates(observed.prices(), observed.link())
        link = observed.link()
        # Bytes that cross within a machine are copied by a thread on each side.
        moving = 1.0 / link.up_bytes_per_second + 1.0 / link.down_bytes_per_second
        found = Rates(
            observed.prices(),
            link,
            cores=cores,
            runner_share=min(1.0, place.runner_threads / cores),
            server_share=min(1.0, self._server.threads / cores),
            moving_seconds=moving if not place.link else 0.0,
        )
        return replace(found, slowdown=TURNS_SLOWDOWN) if found.takes_turns else found


def measure_products(spec: ModelSpec, observed: Observed) -> None:
    """Products of the plan ``local``, with matrices of the model's width that hold nothing: its own would have to be
    read from disk first."""
    outs = max(spec.hidden_size, min(PROBE_MATRIX_BYTES // (4 * spec.hidden_size), 4 * spec.intermediate_size))
    with torch.inference_mode():
        large = Matrix(torch.full((outs, spec.hidden_size), 0.5))
        small = Matrix(torch.full((spec.hidden_size, min(64, spec.hidden_size)), 0.5))
        for matrix, rows in ((large, 1), (large, PROBE_TOKENS), (small, 1)):
            source = torch.full((rows, matrix.shape[1]), 0.5)
            size = float(matrix.shape[0] * matrix.shape[1])
            for repeat in range(3):
                began = time.perf_counter()
                matrix.product(source)
                if repeat:
                    observed.add("tee/LINEAR", (1.0, size, rows * size), time.perf_counter() - began)


def local_bytes(spec: ModelSpec) -> int:
    """Memory that the matrices of the plan ``local`` take, in fp32."""
    matrices = (shape for name, shape in spec.weights.items() if len(shape) == 2 and name != "embed_tokens")
    return 4 * sum(rows * columns for rows, columns in matrices)


def local_fits(spec: ModelSpec) -> bool:
    """Whether the weights of ``local`` fit into the memory that is available to this process."""
    available = machine.available_bytes()
    return available is None or local_bytes(spec) + SPARE_BYTES <= available
