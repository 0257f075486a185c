"""``teegpu bench shield``: what privacy and verification cost the runner a token, by mode and operation.

The products of the first layers and of lm_head are masked, answered (which is not timed), checked and unmasked as in a
run; what a layer took is multiplied by the layers of the model. The products themselves, as the plan ``local`` computes
them in fp32, stand beside it: offloading pays for a runner that has less to do than that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from teegpu import machine
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.samples import Spread
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.kernels import Matrix
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.ring import SEED_BYTES, RingMatrix, Seed
from teegpu.tee.shield import fixedpoint, lwe, padstore, sealed
from teegpu.tee.shield.exchanges import Check
from teegpu.tee.shield.facts import FactTable, Product, products, quantised
from teegpu.tee.shield.masks import Mask
from teegpu.tee.shield.padmaker import PadMaker
from teegpu.tee.shield.pads import PadSource
from teegpu.tee.shield.padsegment import LEAF_TOKENS
from teegpu.tee.shield.samplers import SIGMA
from teegpu.tee.shield.setup import keys_for
from teegpu.tee.shield.wrapping import multiply

MODES: Final = ("two-server", "pads", "lwe")
LOCAL: Final = "local"
TOTAL: Final = "all of it"
OFFLINE: Final = "offline"
CHUNK, STEP = "chunk", "step"

_WORK: Final = {"pads": "PADS", "lwe": "HINT"}


@dataclass
class _Timed:
    """Seconds of one operation in one mode: by phase, one value for each repeat."""

    mode: str
    operation: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {CHUNK: [], STEP: []})
    once: float | None = None
    """Seconds for the whole model, of what is done but once."""


class _Clock:
    """Adds up what each operation takes in one pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._scale = 1.0

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        self._scale = scale
        yield

    @contextlib.contextmanager
    def of(self, operation: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[operation] = self.seconds.get(operation, 0.0) + (time.perf_counter() - began) * self._scale


class _Share:
    """The mask of two servers: its correction is the other server's answer, which costs nothing here."""

    def __init__(self, rows: int, columns: int, matrix: RingMatrix) -> None:
        self.operand = Seed(os.urandom(SEED_BYTES), (rows, columns)).expand()
        self._matrix = matrix

    def correction(self) -> torch.Tensor:
        return self._matrix.product(self.operand)


class ShieldBenchmark:
    """``rows`` tokens in a chunk of a prompt; a step of decoding has one. Of the model's layers so many are measured.

    Raises ``UsageError`` for what can't be measured, ``ModelError``, and ``ShieldError``.
    """

    name = "shield"
    failures: tuple[str, ...] = ()

    def __init__(
        self, folder: ModelFolder, base: Config, *, rows: int, repeats: int, layers: int, modes: Sequence[str] = MODES
    ) -> None:
        for what, value in (("--rows", rows), ("--repeats", repeats), ("--layers", layers)):
            if value < 1:
                raise UsageError(f"{what} {value} is less than 1")
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown:
            raise UsageError(f"--mode {unknown[0]} is none of {', '.join(MODES)}")
        self._folder = folder
        self._base = base
        self._rows = rows
        self._repeats = repeats
        self._modes = tuple(modes)
        self._whole = read_spec(folder)
        measured = min(layers, self._whole.layers)
        self._spec = replace(self._whole, layers=measured, layer_windows=self._whole.layer_windows[:measured])
        self._scale = self._whole.layers / measured
        self._threads = base.run.threads or machine.available_cores()
        self._timed: dict[tuple[str, str], _Timed] = {}
        self._digest = ""
        self._bytes: dict[str, float] = {}
        self._pads: PadSource | None = None
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        machine.keep_freed_memory()
        try:
            with contextlib.ExitStack() as stack, torch.inference_mode():
                self._run(stack, notify)
        finally:
            torch.set_num_threads(threads_before)

    def _run(self, stack: contextlib.ExitStack, notify: Notify) -> None:
        spec = self._spec
        total = 1 + 2 * len(self._modes)
        store = stack.enter_context(WeightStore(self._folder, self._whole))
        self._digest = store.digest()
        notify(Progress(0, total, "the model", "quantising its weights"))
        facts = FactTable.make(store, spec)
        matrices = {product: RingMatrix(quantised(store, spec, product)[0]) for product in products(spec)}
        made = {loader: loader.make(store, spec, self._base.shield.checks) for loader in map(keys_for, self._modes)}
        self._measure_local(store)
        notify(Progress(1, total, "the model", "quantising its weights", "done"))
        for number, mode in enumerate(self._modes):
            notify(Progress(1 + 2 * number, total, mode, "what is made ahead"))
            take = self._ahead(stack, store, mode, matrices)
            notify(Progress(2 + 2 * number, total, mode, "what is made ahead", "done"))
            for _ in range(self._repeats):
                for phase in (CHUNK, STEP):
                    clock = _Clock()
                    self._pass(clock, mode, take, facts, matrices, made[keys_for(mode)], phase)
                    self._keep(mode, clock, phase)
            cost = self._timed[mode, TOTAL].seconds[CHUNK]
            notify(Progress(3 + 2 * number, total, mode, "runs", f"{min(cost) * 1e3:.2f} ms a token in a chunk"))

    # What is made ahead

    def _ahead(
        self, stack: contextlib.ExitStack, store: WeightStore, mode: str, matrices: dict[Product, RingMatrix]
    ) -> Callable[[Product, int], Mask]:
        """Makes what ``mode`` needs, and gives what masks are taken from."""
        spec = self._spec
        if mode == "two-server":
            return lambda product, rows: _Share(rows, spec.weights[product[0]][1], matrices[product])
        if mode == "pads":
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-bench-")))
            maker = PadMaker(store, spec, self._digest, data, self._folder.name)
            # Its ledger is among the user's own, as everywhere; it goes with the pool.
            key = sealed.SealKey.load()
            folder = padstore.pool_folder(data, self._digest)
            stack.callback(_destroy, folder, key)
            chunks = self._repeats * (self._rows + LEAF_TOKENS + 1)
            maker.run(chunks, self._repeats + LEAF_TOKENS, lambda _, __: None)
            body, head = (maker.made.per_token(kind) or 0.0 for kind in ("body", "head"))
            self._offline(mode, [body * self._scale], [body * self._scale + head])
            self._bytes |= {
                "pad_bytes_per_token": padstore.token_bytes(self._whole, "body"),
                "head_pad_bytes_per_token": padstore.token_bytes(self._whole, "head"),
            }
            source = self._pads = PadSource(padstore.Pool(folder, self._digest, spec, key))
            stack.callback(source.close)
            return source.take
        began: dict[bool, float] = {True: 0.0, False: 0.0}
        hints = {}
        for product, _ in matrices.items():
            started = time.perf_counter()
            weight, _ = quantised(store, spec, product)
            matrix = lwe.public_matrix(self._digest, weight.shape[1])
            hints[product] = multiply(weight.to(torch.int32), matrix)
            began[product == padstore.HEAD] += time.perf_counter() - started
        self._timed[mode, OFFLINE] = _Timed(mode, OFFLINE, once=began[False] * self._scale + began[True])
        self._bytes["hint_bytes"] = lwe.hint_bytes(self._whole)
        return lwe.LweSource(self._digest, spec, hints).take

    def _offline(self, mode: str, chunk: list[float], step: list[float]) -> None:
        timed = self._timed[mode, OFFLINE] = _Timed(mode, OFFLINE)
        timed.seconds = {CHUNK: chunk, STEP: step}

    # One pass

    def _pass(
        self,
        clock: _Clock,
        mode: str,
        take: Callable[[Product, int], Mask],
        facts: FactTable,
        matrices: dict[Product, RingMatrix],
        keys: Check,
        phase: str,
    ) -> None:
        """As a run does it: see ``shield.exchanges`` and ``shield.products``."""
        rows = self._rows if phase == CHUNK else 1
        noise = SIGMA if mode == "lwe" else 0.0
        if mode == "pads" and self._pads is not None:
            # Once for a pass, whatever the layers.
            with clock.scaled(1.0), clock.of("CLAIM"):
                self._pads.reserve(next(iter(matrices)), rows)
        for product, matrix in matrices.items():
            if product == padstore.HEAD and phase == CHUNK:
                continue  # nearly no token of a prompt has logits
            known = facts.of(product)
            sizes = [self._spec.weights[name][0] for name in product]
            values = torch.randn(rows, known.columns, generator=torch.Generator().manual_seed(0))
            with clock.scaled(1.0 if product == padstore.HEAD else self._scale):
                with clock.of("FIXED_POINT"):
                    whole, step = fixedpoint.encode(values, known, noise)
                with clock.of("MASK"):
                    mask = take(product, rows)
                    masked = whole + mask.operand
                answer = [part.contiguous() for part in matrix.product(masked).split(sizes, dim=-1)]
                if mode in _WORK:
                    with clock.of(_WORK[mode]):
                        correction = mask.correction()
                else:
                    correction = mask.correction()
                wrong: list[int] = []
                if noise:  # the product of the values themselves is not had: what is masked is checked
                    with clock.of("VERIFY"):
                        received = answer[0] if len(answer) == 1 else torch.cat(answer, dim=-1)
                        wrong = keys.wrong_rows(product, masked, received)
                with clock.of("UNMASK"):
                    for part, into in zip(answer, correction.split(sizes, dim=-1), strict=True):
                        torch.sub(part, into, out=into)
                if not noise:
                    with clock.of("VERIFY"):
                        wrong = keys.wrong_rows(product, whole, correction)
                if wrong:
                    raise RuntimeError(f"a right product of {product} did not pass")
                with clock.of("FIXED_POINT"):
                    fixedpoint.decode(correction, step, known)

    def _keep(self, mode: str, clock: _Clock, phase: str) -> None:
        rows = self._rows if phase == CHUNK else 1
        for operation, seconds in {**clock.seconds, TOTAL: sum(clock.seconds.values())}.items():
            timed = self._timed.setdefault((mode, operation), _Timed(mode, operation))
            timed.seconds[phase].append(seconds / rows)

    def _measure_local(self, store: WeightStore) -> None:
        """The products in fp32, in the layout that the plan ``local`` uses."""
        timed = self._timed[LOCAL, "LINEAR"] = _Timed(LOCAL, "LINEAR")
        sums = {CHUNK: [0.0] * self._repeats, STEP: [0.0] * self._repeats}
        for product in products(self._spec):
            matrix = Matrix(torch.cat([store.load(name, torch.float32) for name in product]))
            scale = 1.0 if product == padstore.HEAD else self._scale
            for phase, rows in ((CHUNK, self._rows), (STEP, 1)):
                if product == padstore.HEAD and phase == CHUNK:
                    continue
                values = torch.randn(rows, matrix.shape[1])
                matrix.product(values)
                for number in range(self._repeats):
                    began = time.perf_counter()
                    matrix.product(values)
                    sums[phase][number] += (time.perf_counter() - began) * scale / rows
        timed.seconds = sums

    # What came of it

    def document(self, status: str) -> dict[str, Any]:
        results = [self._entry(timed) for timed in self._timed.values() if timed.once or timed.seconds[CHUNK]]
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._whole,
            digest=self._digest,
            settings={
                "rows": self._rows,
                "repeats": self._repeats,
                "layers_measured": self._spec.layers,
                "checks": self._base.shield.checks,
                "threads": self._threads,
                **self._bytes,
            },
            notes=self._notes() if results else [],
            results=results,
        )

    def _entry(self, timed: _Timed) -> dict[str, Any]:
        entry: dict[str, Any] = {"label": f"{timed.mode}: {timed.operation}", "mode": timed.mode}
        entry["operation"] = timed.operation
        for phase, values in timed.seconds.items():
            if values:
                entry[f"{phase}_seconds_per_token"] = Spread.of(values).to_json()
        if timed.once is not None:
            entry["seconds_once"] = timed.once
        return entry

    def _notes(self) -> list[str]:
        spec: ModelSpec = self._whole
        notes = [
            f"chunk: a token of {self._rows} in one chunk, lm_head apart; step: the only token of a decode step, "
            "lm_head included",
            f"measured on {self._spec.layers} of {spec.layers} layers and multiplied; threads: {self._threads}; "
            f"{self._base.shield.checks} checks",
            "local: the products themselves in fp32, all in the TEE; offline: what is made ahead, for pads W·r for "
            "each token, for lwe the hints once",
        ]
        if "pad_bytes_per_token" in self._bytes:
            body, head = self._bytes["pad_bytes_per_token"], self._bytes["head_pad_bytes_per_token"]
            notes.append(f"pads on disk: {body:,.0f} bytes a token, and {head:,.0f} where its logits are wanted")
        if "hint_bytes" in self._bytes:
            notes.append(f"hints on disk and in memory: {self._bytes['hint_bytes']:,.0f} bytes")
        return notes


def _destroy(folder: Path, key: sealed.SealKey) -> None:
    with contextlib.suppress(FileNotFoundError):
        padstore.destroy(folder, key)
