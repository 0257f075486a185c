"""``teegpu bench accuracy``: what narrow wire and server dtypes cost, and the whole numbers of private runs, against
the logits of transformers in fp32.

Every position of each text counts. All variants go through a text together, chunk by chunk, so that only one chunk's
logits of two of them are held at a time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

import transports
from teegpu import facts, machine
from teegpu.bench import baseline, wholenumbers
from teegpu.bench import document as doc
from teegpu.bench.cases import from_values
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.errors import PromptError, UsageError, nearest
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_limits
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Products, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.handshake import check_digest, hello
from teegpu.settings import WIRE_DTYPES
from teegpu.tee.decoder import Decoder, Span, Step
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import LocalProducts
from teegpu.tee.rotary import Rotary
from teegpu.tee.weights import TeeWeights
from teegpu.wire import codec
from transports.base import Client

ALL_TEXTS = "all"
PLAN = "fused"
CHUNK_TOKENS = 128

Logits = Callable[[int, int], torch.Tensor]
"""(start, stop) → the logits of these positions of a text, (stop - start, vocab) in fp32; to be called in order."""


@dataclass(frozen=True)
class Variant:
    """What is compared: teegpu with a server and a wire dtype, or in ``whole_numbers``, as private and verified runs
    compute, or with ``int8`` weights in the plan local, row by row as they decode, or transformers (without any)."""

    label: str
    server_dtype: str
    wire_dtype: str | None = None
    whole_numbers: bool = False
    int8: bool = False

    @property
    def by_transformers(self) -> bool:
        return not (self.wire_dtype or self.whole_numbers or self.int8)


REFERENCE = Variant("transformers fp32 (reference)", "fp32")


INT8 = "int8 weights, decoded in the TEE"


def variants(*, bf16: bool, shielded: bool, int8: bool) -> list[Variant]:
    """Each wire dtype with a server in fp32; with ``bf16`` also a server, and transformers, in that; with ``shielded``
    also what private runs compute, with ``int8`` what int8 weights do."""
    chosen = [Variant(f"{wire} wire, fp32 server", "fp32", wire) for wire in WIRE_DTYPES]
    if bf16:
        chosen += [
            Variant("fp16 wire, bf16 server", "bf16", "fp16"),
            Variant("bf16 wire, bf16 server", "bf16", "bf16"),
            Variant("transformers bf16", "bf16"),
        ]
    if shielded:
        chosen.append(Variant(wholenumbers.LABEL, "int8", whole_numbers=True))
    if int8:
        chosen.append(Variant(INT8, "fp32", int8=True))
    return chosen


@dataclass(slots=True)
class Score:
    """Sums over positions. The last position of a text predicts a token that is not there: it has no ``surprise``."""

    kl_nats: float = 0.0
    largest_kl_nats: float = 0.0
    agreeing: int = 0
    positions: int = 0
    surprise_nats: float = 0.0
    predictions: int = 0

    def add(self, reference: torch.Tensor, own: torch.Tensor, following: torch.Tensor) -> None:
        """Takes log-probabilities of the same positions, (positions, vocab) in fp64.

        ``following`` are the tokens that come next in the text, one fewer than positions at its end.
        """
        divergence = (reference.exp() * (reference - own)).sum(-1)
        self.kl_nats += float(divergence.sum())
        self.largest_kl_nats = max(self.largest_kl_nats, float(divergence.max()))
        self.agreeing += int((reference.argmax(-1) == own.argmax(-1)).sum())
        self.positions += own.shape[0]
        count = following.shape[0]
        self.surprise_nats -= float(own[:count].gather(-1, following[:, None]).sum())
        self.predictions += count

    def __iadd__(self, other: Score) -> Score:
        self.kl_nats += other.kl_nats
        self.largest_kl_nats = max(self.largest_kl_nats, other.largest_kl_nats)
        self.agreeing += other.agreeing
        self.positions += other.positions
        self.surprise_nats += other.surprise_nats
        self.predictions += other.predictions
        return self

    def to_json(self) -> dict[str, float | int | None]:
        """Means over the positions: KL divergence from the reference in nats, top-1 agreement, perplexity."""
        return {
            "kl_nats": self.kl_nats / self.positions if self.positions else None,
            "kl_nats_largest": self.largest_kl_nats,
            "top1_agreement": self.agreeing / self.positions if self.positions else None,
            "perplexity": math.exp(self.surprise_nats / self.predictions) if self.predictions else None,
            "positions": self.positions,
        }


def chosen_texts(given: str) -> dict[str, str]:
    """The evaluation texts that ``given`` names: ``all``, or names with commas. Raises ``UsageError``."""
    known = texts.evaluation_texts()
    if given == ALL_TEXTS:
        return known
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"--texts: there is no text '{name}'{nearest(name, [*known, ALL_TEXTS])}; "
                             f"there are {', '.join(known)}, and {ALL_TEXTS}")  # fmt: skip
    if not names:
        raise UsageError(f"--texts names no text; there are {', '.join(known)}, and {ALL_TEXTS}")
    return {name: known[name] for name in names}


class AccuracyBenchmark:
    """Compares ``variants`` with transformers in fp32 over the first ``tokens`` tokens of each of ``chosen``.

    A text that is shorter counts as far as it goes. Raises ``UsageError`` and ``PromptError`` for a number of tokens
    that can't be, and what reading the model raises.
    """

    name = "accuracy"
    failures: tuple[str, ...] = ()

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        *,
        tokens: int,
        chosen: dict[str, str],
        bf16: bool = True,
        shielded: bool = True,
        int8: bool = True,
    ) -> None:
        self._folder = folder
        self._base = base
        self._spec = read_spec(folder)
        if tokens < 2:
            raise UsageError(f"--tokens {tokens} is below the least, 2")
        if tokens > self._spec.max_positions:
            raise PromptError(
                f"--tokens {tokens} is more than the context of {self._spec.name}, which ends at "
                f"{self._spec.max_positions}: give less"
            )
        self._tokens = tokens
        self._texts = chosen
        self._variants = variants(bf16=bf16, shielded=shielded, int8=int8)
        self._scores: dict[str, dict[str, Score]] = {}
        self._digest = ""
        self._started_at = doc.now()
        self._threads = machine.thread_split(embedded=True)

    def run(self, notify: Notify = lambda _: None) -> None:
        """Measures one text after the other. A text that was interrupted does not count."""
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads[0])
        try:
            with contextlib.ExitStack() as stack, torch.inference_mode():
                notify(Progress(0, len(self._texts), "models", "loading"))
                self._run(_Models(self._folder, self._base, self._variants, self._threads[1], stack), notify)
        finally:
            torch.set_num_threads(threads_before)

    def _run(self, models: _Models, notify: Notify) -> None:
        self._digest = models.digest
        started = time.perf_counter()
        for done, (name, text) in enumerate(self._texts.items()):
            left = (time.perf_counter() - started) / done * (len(self._texts) - done) if done else None
            notify(Progress(done, len(self._texts), name, "text", seconds_left=left))
            ids = torch.tensor(models.tokenizer.encode_raw(text)[: self._tokens])
            scores = compare(ids, models.open(ids), models.chunk_tokens(len(ids)))
            self._scores[name] = scores
            outcome = ", ".join(
                f"{variant.wire_dtype} KL {score.to_json()['kl_nats']:.1e}"
                for variant in self._variants
                if variant.wire_dtype and variant.server_dtype == "fp32" and (score := scores[variant.label])
            )
            each = (time.perf_counter() - started) / (done + 1)
            left = each * (len(self._texts) - done - 1)
            notify(Progress(done + 1, len(self._texts), name, "text", outcome, left))

    def document(self, status: str) -> dict[str, Any]:
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "tokens": self._tokens,
                "texts": list(self._texts),
                "plan": PLAN,
                "chunk_tokens": CHUNK_TOKENS,
                "threads": {"runner": self._threads[0], "server": self._threads[1]},
                "device": self._base.server.device,
            },
            notes=[f"{len(self._scores)} of {len(self._texts)} texts: {', '.join(self._scores) or 'none'}"],
            results=[self._result(variant) for variant in (*self._variants, REFERENCE)] if self._scores else [],
        )

    def _result(self, variant: Variant) -> dict[str, Any]:
        total = Score()
        by_text = {name: scores[variant.label] for name, scores in self._scores.items()}
        for score in by_text.values():
            total += score
        figures = {name: score.to_json() for name, score in by_text.items()}
        return {
            "label": variant.label,
            "wire_dtype": variant.wire_dtype,
            "server_dtype": None if variant.by_transformers or variant.int8 else variant.server_dtype,
            "whole_numbers": variant.whole_numbers,
            **total.to_json(),
            "kl_nats_worst_text": max(figure["kl_nats"] or 0.0 for figure in figures.values()),
            "texts": figures,
        }


def compare(ids: torch.Tensor, logits: dict[str, Logits], chunk_tokens: int) -> dict[str, Score]:
    """Every variant of ``logits`` against the one called ``REFERENCE.label``, over the text ``ids`` (tokens,)."""
    scores = {label: Score() for label in logits}
    edges = [*range(0, len(ids), chunk_tokens), len(ids)]
    for start, stop in pairwise(edges):
        following = ids[start + 1 : stop + 1]
        reference = _log_probabilities(logits[REFERENCE.label], start, stop)
        for label, make in logits.items():
            own = reference if label == REFERENCE.label else _log_probabilities(make, start, stop)
            scores[label].add(reference, own, following)
    return scores


def _log_probabilities(logits: Logits, start: int, stop: int) -> torch.Tensor:
    return torch.log_softmax(logits(start, stop).to(torch.float64), -1)


class _Models:
    """The reference, the servers and what the runner's side needs, loaded once; ``stack`` ends them."""

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        chosen: Sequence[Variant],
        server_threads: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self._variants = chosen
        self._base = base
        dtypes = list(dict.fromkeys(variant.server_dtype for variant in chosen if variant.wire_dtype))
        servers = {
            dtype: stack.enter_context(
                EmbeddedServer(folder, from_values(base.values() | {"server.dtype": dtype}), threads=server_threads)
            )
            for dtype in dtypes
        }
        # The servers load their weights meanwhile.
        whole = [REFERENCE, *(variant for variant in chosen if variant.by_transformers)]
        self._transformers = {variant.label: baseline.load(folder, variant.server_dtype) for variant in whole}
        self._spec = read_spec(folder)
        store = stack.enter_context(WeightStore(folder, self._spec))
        self.digest = store.digest()
        self.tokenizer = Tokenizer(folder)
        self._weights = TeeWeights(store, self._spec)
        self._rotary = Rotary(self._spec)
        self._whole_numbers = wholenumbers.products(store, self._spec)
        self._int8 = LocalProducts(TeeWeights(store, self._spec, int8=True), Recorder())
        self._connections: dict[str, Client] = {}
        for dtype, server in servers.items():
            server.wait()
            self._connections[dtype] = stack.enter_context(
                transports.connect("zmq", server.endpoint, client_options(base))
            )

    def chunk_tokens(self, tokens: int) -> int:
        """Where rotary angles depend on the whole length, a text goes in one piece, as the reference needs it to."""
        return tokens if self._rotary.depends_on_length else CHUNK_TOKENS

    def open(self, ids: torch.Tensor) -> dict[str, Logits]:
        """A fresh pass over ``ids`` for every variant, the reference among them."""
        self._rotary.prepare(len(ids))
        opened: dict[str, Logits] = {
            label: _transformers_logits(model, ids) for label, model in self._transformers.items()
        }
        for variant in self._variants:
            if variant.wire_dtype:
                gpu = self._remote(variant.server_dtype, variant.wire_dtype)
                opened[variant.label] = self._logits(PLAN, gpu, ids)
            elif variant.whole_numbers:
                opened[variant.label] = self._logits(wholenumbers.PLAN, self._whole_numbers, ids)
            elif variant.int8:
                opened[variant.label] = _row_by_row(self._logits(facts.LOCAL.name, self._int8, ids))
        return opened

    def _remote(self, server_dtype: str, wire_dtype: str) -> GpuClient:
        connection, limits = self._connections[server_dtype], wire_limits(self._base)
        welcome = hello(connection, codec.Decoder(limits), self._base.link.hello_timeout_seconds)
        check_digest(welcome, self._spec, self.digest, connection.endpoint)
        return GpuClient(connection, self._spec, wire_dtype=wire_dtype, recorder=Recorder(), limits=limits)

    def _logits(self, plan: str, products: Products, ids: torch.Tensor) -> Logits:
        decoder = Decoder(self._spec, self._weights, self._rotary, facts.plan(plan), products, Recorder())
        cache = KVCache(self._spec)
        cache.reserve(len(ids))

        def logits(start: int, stop: int) -> torch.Tensor:
            found = drive(decoder.forward(Step([Span(ids[start:stop], start, cache, "all")])))
            cache.advance(stop)
            if found is None:
                raise RuntimeError("a pass that was to give all logits gave none")
            return found

        return logits


def _row_by_row(logits: Logits) -> Logits:
    return lambda start, stop: torch.cat([logits(row, row + 1) for row in range(start, stop)])


def _transformers_logits(model: Any, ids: torch.Tensor) -> Logits:
    cache = baseline.new_cache(model)

    def logits(start: int, stop: int) -> torch.Tensor:
        given: torch.Tensor = model(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True).logits
        return given[0].to(torch.float32)

    return logits
