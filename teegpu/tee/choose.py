"""Which plan and which chunk: what each would take here, measured on a few layers of the model, and which to take.

A ``Probe`` runs a prompt's first layers, and its first tokens where it is long, through what the run itself uses: the
decoder, the codec, the transport, the link, the server, and the threads of this very process. Passes over few layers
are subtracted from passes over more, so that what is there once (embedding, lm_head, filling the pipeline) is counted
once, and the rest for each layer. Nothing is modelled: a prediction is what was measured, multiplied.

The plan ``auto`` asks it for some tenths of a second, ``teegpu tune`` for longer, and ``stats.profile`` keeps what that
found. Only time is weighed: no plan is taken that shows the server more than ``fused`` and ``attention`` do
(``facts.Plan.offered``), and of plans that are about equally quick the one that shows least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from teegpu import facts, machine
from teegpu.errors import ConfigError
from teegpu.facts import AUTO, LOCAL, PLANS
from teegpu.kernels import Int8Matrix, Matrix
from teegpu.model.spec import ModelSpec
from teegpu.record.events import DECODE, PREFILL
from teegpu.stats.profile import Profile, Way
from teegpu.stats.traffic import chunk_edges, default_chunk
from teegpu.tee.engine import Engine
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.weights import TeeWeights
from teegpu.units import about_seconds

NEAR: Final = 1.03
"""Predictions that differ by less than this are taken for equal."""

PREFERENCE: Final = ("local", "fused", "attention", "batched", "per-op")
"""Of plans that are about equally quick, the first: what shows the server least, then fewest rounds."""

PROBE_SECONDS: Final = 0.5
"""What the plan ``auto`` may spend on asking; on a link so slow that single passes take longer, as long as these do."""

PROBE_SECONDS_EMBEDDED: Final = 0.1
"""The same beside an embedded server: only plans that offload are weighed, and the first word is waited for."""

AUTO_CHUNKS: Final = (256,)
TUNE_CHUNKS: Final = (64, 128, 256, 512)
"""Chunks that are tried beside a prompt in one piece. Where both sides share cores and the link is quick, overlapping
only makes them fight; elsewhere smaller ones fill the pipeline earlier, and cost more requests."""

WINDOW: Final = 1024
LEAST_WINDOW: Final = 512
"""Tokens of a long prompt that are run: its first and its last ones, for what attention over more positions adds. Fewer
than two chunks would not overlap, and say nothing of a prompt whose chunks do."""

LAYERS_WORTH: Final = 96 * 2**20
"""Bytes of fp32 matrices that a step of decode runs through: more than a cache holds, as in a pass over all layers."""
MOST_LAYERS: Final = 8

ASSUMED_PROMPT_TOKENS: Final = 512
ASSUMED_DECODE_TOKENS: Final = 64
"""What is chosen for where the prompt is not known yet; half of the tokens that follow it is where decode is judged."""

SPARE_BYTES: Final = 512 * 2**20
"""Memory that the weights of ``local`` must leave free."""


OpenEngine = Callable[[facts.Plan, int, int], Engine]
"""An engine of a plan, with chunks of so many tokens, over the first so many layers. It records nothing."""


# Measuring


@dataclass
class _Case:
    """One way, and the seconds of its passes by (layers, position of the first token)."""

    way: Way
    tokens: int
    layers: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    engines: dict[int, tuple[Engine, KVCache]] = field(default_factory=dict)
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)


class Probe:
    """Measures ``spec``'s model in engines that ``open_engine`` gives. ``whole``: all layers are run, as the first
    ones do not stand for the others (several groups of servers hold them)."""

    def __init__(self, spec: ModelSpec, open_engine: OpenEngine, *, whole: bool = False) -> None:
        self._spec = spec
        self._open = open_engine
        self._whole = whole
        self._random = torch.Generator().manual_seed(0)

    def prefills(self, ways: Iterable[Way], tokens: int, *, window: int = WINDOW, seconds: float) -> list[Way]:
        """``ways`` with what a prompt of ``tokens`` would take each, quickest first. Raises what requests do.

        ``seconds``: after so long no round of passes begins, but for the first."""
        length = min(tokens, window)
        starts = (0, tokens - length) if tokens > length else (0,)
        depths = (1, 3)
        cases = [_Case(way, tokens, self._depths(*depths), starts, length) for way in ways]
        return self._measured(cases, seconds, rounds=5)

    def decodes(self, ways: Iterable[Way], position: int, *, rows: int = 1, seconds: float) -> list[Way]:
        """``ways`` with what a step of decode (``rows`` tokens, where some are guessed) at ``position`` would take."""
        each = 4 * sum(
            shape[0] * shape[1]
            for name, shape in self._spec.weights.items()
            if name.startswith("layers.0.") and len(shape) == 2
        )
        depths = (1, 1 + max(2, min(MOST_LAYERS, -(-LAYERS_WORTH // max(1, each)))))
        start = max(0, min(position, self._spec.max_positions - rows))
        cases = [_Case(way, rows, self._depths(*depths), (start,), rows) for way in ways]
        return self._measured(cases, seconds, rounds=15)

    def window(self, plan: facts.Plan, tokens: int, passes: int, seconds: float) -> int:
        """How many of ``tokens`` can be run ``passes`` times over three layers in about ``seconds``."""
        few = min(64, tokens)
        case = _Case(Way(plan.name, 2 * few), few, self._depths(1, 3), (0,), few)
        for _ in range(2):
            self._round(case)
        layers = case.layers[-1]
        a_token = min(case.seconds[layers, 0]) / few
        return min(tokens, max(LEAST_WINDOW, min(WINDOW, int(seconds / max(1, passes) / a_token))))

    def _depths(self, low: int, high: int) -> tuple[int, ...]:
        layers = self._spec.layers
        return (layers,) if self._whole or high >= layers else (low, high)

    def _measured(self, cases: Sequence[_Case], seconds: float, rounds: int) -> list[Way]:
        until = time.perf_counter() + seconds
        for number in range(rounds + 1):
            # In turn, A B C A B C …, so that a machine that is slow for a moment is so for all of them.
            for case in cases:
                if number > 1 and time.perf_counter() > until:
                    break
                self._round(case)
                if not number:
                    case.seconds.clear()  # the first pass of a shape makes kernels and buffers
        found = [Way(case.way.plan, case.way.chunk_tokens, self._predicted(case)) for case in cases]
        return sorted(found, key=lambda way: way.seconds)

    def _round(self, case: _Case) -> None:
        for layers in case.layers:
            for start in case.starts:
                if layers not in case.engines:
                    engine = self._open(facts.plan(case.way.plan), case.way.chunk_tokens, layers)
                    case.engines[layers] = engine, self._filled(layers, max(case.starts))
                engine, cache = case.engines[layers]
                cache.advance(start)
                ids = torch.randint(0, self._spec.vocab_size, (start + case.length,), generator=self._random).tolist()
                began = time.perf_counter()
                with torch.inference_mode():
                    if case.way.chunk_tokens:
                        engine.read(cache, ids, chunk_edges(start, len(ids), case.way.chunk_tokens)[1:])
                    else:
                        engine.decode(cache, ids[start:])
                case.seconds.setdefault((layers, start), []).append(time.perf_counter() - began)

    def _filled(self, layers: int, positions: int) -> KVCache:
        """Keys and values of ``positions`` that hold nothing."""
        nothing = torch.zeros(positions, self._spec.kv_heads, self._spec.head_dim)
        cache = KVCache(replace(self._spec, layers=layers, layer_windows=self._spec.layer_windows[:layers]))
        cache.reserve(positions)
        for layer in range(layers):
            cache.write(layer, 0, nothing, nothing)
        return cache

    def _predicted(self, case: _Case) -> float:
        """Seconds of all layers. A prompt is as often the length that was run as it is longer; each of these lengths
        takes the mean of the first and the last, as attention grows by the position."""
        usual = {key: _usual(times, decode=not case.way.chunk_tokens) for key, times in case.seconds.items()}
        high, last = case.layers[-1], case.starts[-1]
        times = case.tokens / case.length
        if len(case.layers) == 1:
            return times * statistics.fmean(usual[high, start] for start in case.starts)
        low = case.layers[0]
        layer = {start: max(0.0, usual[high, start] - usual[low, start]) / (high - low) for start in case.starts}
        once = max(0.0, usual[low, last] - low * layer[last])
        return once + times * self._spec.layers * statistics.fmean(layer.values())


def _usual(times: Sequence[float], *, decode: bool) -> float:
    """A step of decode stands for many, a prefill for itself: of a few passes the quickest was disturbed least."""
    return statistics.median(times) if decode else min(times)


class BlankWeights:
    """Matrices of the model's shapes that hold nothing, for timing the plan ``local``: its own would have to be read
    from disk first, and kept."""

    def __init__(self, weights: TeeWeights) -> None:
        self.spec = weights.spec
        self._dtype, self._int8 = weights.product_dtype, weights.int8
        self._matrices: dict[tuple[str, ...], Matrix] = {}

    def matrix(self, names: tuple[str, ...]) -> Matrix:
        matrix = self._matrices.get(names)
        if matrix is None:
            shapes = [self.spec.weights[name] for name in names]
            size = (sum(shape[0] for shape in shapes), shapes[0][1])
            if self._int8:
                matrix = Int8Matrix(torch.ones(size, dtype=torch.int8), torch.full(size[:1], 0.01), self._dtype)
            else:
                matrix = Matrix(torch.full(size, 0.01, dtype=self._dtype))
            self._matrices[names] = matrix
        return matrix


# Choosing


def pick(ways: Sequence[Way]) -> Way:
    """The one to take: of those about as quick as the quickest, first by ``PREFERENCE``, then the usual chunk, then the
    quicker. Raises ``ValueError`` where there is none."""
    least = min(way.seconds for way in ways)
    near = [way for way in ways if way.seconds <= least * NEAR]
    usual = default_chunk(overlaps=True)
    return min(near, key=lambda way: (PREFERENCE.index(way.plan), way.chunk_tokens != usual, way.seconds))


@dataclass(frozen=True)
class Question:
    """What is to be chosen, and for what. A phase's plan is ``auto``, or given; ``chunk_tokens`` and ``prompt_tokens``
    0: not given, not known. ``overlaps``: whether chunks can be under way together. ``plans``: those that may be used,
    ``local_fits``: whether the weights fit into this machine's memory."""

    prefill_plan: str
    decode_plan: str
    chunk_tokens: int
    prompt_tokens: int
    overlaps: bool
    embedded: bool
    local_fits: bool
    plans: Collection[str] = tuple(PLANS)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens or ASSUMED_PROMPT_TOKENS

    @property
    def position(self) -> int:
        """Where decode is judged."""
        return self.tokens + ASSUMED_DECODE_TOKENS // 2

    def candidates(self, plan: str) -> tuple[str, ...]:
        """The plans to weigh for a phase whose plan is ``plan``. Beside an embedded server only those that offload: it
        is there to show the split, and computes with the same cores. Raises ``ConfigError`` where none is left."""
        if plan != AUTO:
            return (plan,)
        offered = [name for name, row in PLANS.items() if row.offered and not (self.embedded and not row.remote)]
        left = tuple(name for name in offered if name in self.plans and (name != LOCAL.name or self.local_fits))
        if not left:
            raise ConfigError(
                f"the plan auto has nothing to choose from ({', '.join(offered)}): name a plan (run.prefill_plan, "
                "run.decode_plan)"
            )
        return left

    def prefills(self, chunks: Sequence[int] = AUTO_CHUNKS) -> list[Way]:
        """The ways of prefill to weigh, without their seconds."""
        return prefill_ways(
            self.candidates(self.prefill_plan), self.tokens, chunks, given=self.chunk_tokens, overlaps=self.overlaps
        )

    def decodes(self) -> list[Way]:
        return [Way(plan, 0) for plan in self.candidates(self.decode_plan)]


def prefill_ways(
    plans: Iterable[str], tokens: int, chunks: Sequence[int], *, given: int = 0, overlaps: bool
) -> list[Way]:
    """``plans`` with each of ``chunks`` that is shorter than the prompt, and in one piece; with ``given`` alone where
    it is not 0."""
    found = []
    for plan in plans:
        together = overlaps and facts.plan(plan).remote
        piece = default_chunk(overlaps=False)
        sizes = [given] if given else [piece, *(size for size in chunks if together and size < tokens)]
        found += [Way(plan, size) for size in sizes]
    return found


@dataclass(frozen=True)
class Choice:
    """What was chosen, why, and what was known. ``prefills`` and ``decodes`` are quickest first. ``basis`` is
    ``profile`` or ``probe``, ``detail`` says which."""

    question: Question
    prefill_plan: str
    decode_plan: str
    chunk_tokens: int
    prefills: tuple[Way, ...]
    decodes: tuple[Way, ...]
    basis: str
    detail: str

    @property
    def line(self) -> str:
        """One line for the user."""
        tokens = self.question.tokens
        prefill = self.prefill_plan
        together = self.question.overlaps and facts.plan(self.prefill_plan).remote
        if together and self.chunk_tokens < tokens:
            prefill += f" in chunks of {self.chunk_tokens}"
        told = [
            _told(self.prefills, self.prefill_plan, "to the first token"),
            _told(self.decodes, self.decode_plan, "for each after it"),
        ]
        return (
            f"auto: prefill {prefill}, decode {self.decode_plan} (by {self.detail}, for a prompt of {tokens:,} tokens: "
            f"{', '.join(part for part in told if part)})"
        )

    def to_json(self) -> dict[str, Any]:
        """For the record: ``predicted`` has the least seconds of each plan that was weighed."""
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
            "prompt_tokens": asked.tokens,
            "predicted": {
                "prefill_seconds": _quickest(self.prefills),
                "decode_step_seconds": _quickest(self.decodes),
            },
        }


def _quickest(ways: Iterable[Way]) -> dict[str, float]:
    """The least seconds of each plan."""
    seconds: dict[str, float] = {}
    for way in sorted(ways, key=lambda way: way.seconds):
        seconds.setdefault(way.plan, way.seconds)
    return seconds


def _told(ways: Sequence[Way], chosen: str, what: str) -> str:
    """``1.2 s to the first token (local 5.3 s)``: what was chosen, and the best of the others."""
    seconds = _quickest(ways)
    if chosen not in seconds:
        return ""
    other = next((f" ({plan} {about_seconds(least)})" for plan, least in seconds.items() if plan != chosen), "")
    return f"{about_seconds(seconds[chosen])} {what}{other}"


def choose(question: Question, prefills: Sequence[Way], decodes: Sequence[Way], basis: str, detail: str) -> Choice:
    """Weighs what was measured."""
    taken = pick(prefills)
    decode = pick(decodes)
    return Choice(question, taken.plan, decode.plan, taken.chunk_tokens, tuple(prefills), tuple(decodes), basis, detail)


def by_probe(question: Question, probe: Probe) -> Choice:
    """Measures for some tenths of a second, and chooses. Raises what requests do."""
    prefills = question.prefills()
    remote = next((facts.plan(way.plan) for way in prefills if facts.plan(way.plan).remote), LOCAL)
    # Of each way two passes that count for nothing and two that do; a window's end is run too where there is one.
    seconds = PROBE_SECONDS_EMBEDDED if question.embedded else PROBE_SECONDS
    window = probe.window(remote, question.tokens, 4 * len(prefills), seconds)
    measured = probe.prefills(prefills, question.tokens, window=window, seconds=seconds)
    steps = probe.decodes(question.decodes(), question.position, seconds=seconds / 2)
    return choose(question, measured, steps, "probe", "a probe")


def by_profile(question: Question, profile: Profile, transport: str, wire_dtype: str) -> Choice | None:
    """What ``profile`` has of this transport and wire dtype; None where that is nothing, or of other lengths, or lacks
    a way that is asked for."""
    prefills = _known(profile.ways(PREFILL, transport, wire_dtype, question.tokens), question.prefills(TUNE_CHUNKS))
    decodes = _known(profile.ways(DECODE, transport, wire_dtype, question.position), question.decodes())
    if prefills is None or decodes is None:
        return None
    return choose(question, prefills, decodes, "profile", f"the profile of {profile.created_at[:10]}")


def _known(found: Sequence[Way], wanted: Sequence[Way]) -> list[Way] | None:
    """Of ``found`` those that are ``wanted``; None where all ways of a plan are missing."""
    asked = {(way.plan, way.chunk_tokens) for way in wanted}
    left = [way for way in found if (way.plan, way.chunk_tokens) in asked]
    return left if {way.plan for way in wanted} == {way.plan for way in left} else None


def local_bytes(spec: ModelSpec, value_bytes: int = 4) -> int:
    """Memory that the matrices of the plan ``local`` take, at ``value_bytes`` for each value."""
    matrices = (shape for name, shape in spec.weights.items() if len(shape) == 2 and name != "embed_tokens")
    return value_bytes * sum(rows * columns for rows, columns in matrices)


def local_fits(spec: ModelSpec, value_bytes: int = 4) -> bool:
    """Whether the weights of ``local`` fit into the memory that is available to this process."""
    available = machine.available_bytes()
    return available is None or local_bytes(spec, value_bytes) + SPARE_BYTES <= available
