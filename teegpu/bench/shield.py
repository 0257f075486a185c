"""``teegpu bench shield``: what privacy and verification cost the runner a token, by mode and operation.

The products of the first layers and of lm_head are masked, answered (which is not counted), checked and unmasked by the
code of a run; what a layer took is multiplied by the layers of the model. The products themselves, as the plan
``local`` computes them, stand beside it: offloading pays for a runner that has less to do than that. How much less is
its **leverage**: the processor seconds of these products over those of what stands in their place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from teegpu import facts, machine
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.samples import Spread
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.kernels import DTYPES, Matrix, dtype_name, quickest_dtype
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import local_dtype
from teegpu.record.events import DECODE, NO_LAYER, OTHER, PREFILL, TEE, WAIT, Event, Lap
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.ring import RingMatrix
from teegpu.shield.answers import Answer, NamingClient
from teegpu.shield.exchanges import Masked, TwoServers, Unmasked
from teegpu.shield.freivalds import Checks
from teegpu.shield.pads import Pads
from teegpu.shield.products import Exchange, ShieldedProducts
from teegpu.shield.quantised import LM_HEAD, Linear, Measures, linears, read, shape_of
from teegpu.tee.plans import LM_HEAD as LM_HEAD_PROGRAM
from teegpu.tee.plans import programs
from teegpu.wire.program import Program

MODES: Final = (facts.TWO_SERVER.name, facts.PADS.name, facts.NO_PRIVACY.name)
LOCAL: Final = "local"
TOTAL: Final = "all of it"
OFFLINE: Final = "offline"
CHUNK, BATCH, STEP = "chunk", "batch", "step"
_PHASES: Final = {CHUNK: PREFILL, BATCH: DECODE, STEP: DECODE}


@dataclass
class _Timed:
    """Seconds a token of one operation in one mode: by phase, one value for each repeat. ``processor_seconds`` are of
    all threads."""

    mode: str
    operation: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in _PHASES})
    processor_seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in _PHASES})


class _Server(NamingClient):
    """A server that is always right, in this process. Its time is nobody's."""

    def __init__(self, spec: ModelSpec, matrices: dict[Linear, RingMatrix], recorder: Recorder) -> None:
        # Of a connection nothing but what a run asks of it, which is below.
        self.spec = spec
        self._matrices = matrices
        self._clock = recorder
        self.processor_seconds = 0.0

    async def run(self, call: Call) -> Answer:
        began = time.process_time()
        operand = next(iter(call.inputs.values()))
        values = operand if isinstance(operand, torch.Tensor) else operand.expand()
        step = call.program.steps[0]
        answer = Answer({step.output: self.product(step.weights, values)})
        self.processor_seconds += time.process_time() - began
        self._clock.lap(WAIT, "WAIT", call.layer, call.chunk)
        return answer

    def product(self, linear: Linear, values: torch.Tensor) -> torch.Tensor:
        return self._matrices[linear].product(values)

    async def begin(self, call: Call) -> Callable[[], Awaitable[Answer]]:
        return lambda: self.run(call)  # as if the answer came only when it is waited for


class ShieldBenchmark:
    """``rows`` tokens in a chunk of a prompt; a step of decoding has one, or ``batch``. Of the model's layers so many
    are measured.

    Raises ``UsageError`` for what can't be measured, ``ModelError``, and ``ShieldError``.
    """

    name = "shield"
    failures: tuple[str, ...] = ()

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        *,
        rows: int,
        batch: int,
        repeats: int,
        layers: int,
        modes: Sequence[str] = MODES,
    ) -> None:
        for what, value in (("--rows", rows), ("--batch", batch), ("--repeats", repeats), ("--layers", layers)):
            if value < 1:
                raise UsageError(f"{what} {value} is less than 1")
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown:
            raise UsageError(f"--mode {unknown[0]} is none of {', '.join(MODES)}")
        self._folder = folder
        self._base = base
        self._rows = {CHUNK: rows, BATCH: batch, STEP: 1}
        self._repeats = repeats
        self._modes = tuple(modes)
        self._whole = read_spec(folder)
        measured = min(layers, self._whole.layers)
        self._spec = replace(self._whole, layers=measured, layer_windows=self._whole.layer_windows[:measured])
        self._scale = self._whole.layers / measured
        self._dtype = DTYPES.get(local_dtype(base)) or quickest_dtype()
        self._threads = base.run.threads or machine.available_cores()
        self._timed: dict[tuple[str, str], _Timed] = {}
        self._digest = ""
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        machine.keep_freed_memory()
        try:
            with WeightStore(self._folder, self._whole) as store, torch.inference_mode():
                self._run(store, notify)
        finally:
            torch.set_num_threads(threads_before)

    def _run(self, store: WeightStore, notify: Notify) -> None:
        spec = self._spec
        total = 1 + len(self._modes)
        self._digest = store.digest()
        notify(Progress(0, total, "the model", "reading its weights"))
        measures, matrices = Measures(spec), dict[Linear, RingMatrix]()
        checks = Checks(self._base.shield.checks, lambda reader: read(store, spec, [reader]))

        def keep(linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
            matrices[linear] = RingMatrix(weight)

        read(store, spec, [measures.add, checks.add, keep])
        self._measure_local(store)
        notify(Progress(1, total, "the model", "reading its weights", "done"))
        for number, mode in enumerate(self._modes, start=1):
            recorder = Recorder(self._sink)
            server = _Server(spec, matrices, recorder)
            exchange = self._exchange(mode, store, server, recorder, checks)
            shielded = ShieldedProducts(measures, exchange, recorder)
            for _ in range(self._repeats):
                for phase in _PHASES:
                    self._pass(mode, phase, shielded, recorder, server)
            cost = self._timed[mode, TOTAL].seconds[CHUNK]
            notify(Progress(1 + number, total, mode, "runs", f"{min(cost) * 1e3:.2f} ms a token in a chunk"))

    def _exchange(self, mode: str, store: WeightStore, server: _Server, recorder: Recorder, checks: Checks) -> Exchange:
        if mode == facts.TWO_SERVER.name:
            return TwoServers(server, server, recorder, checks, server.product)
        if mode == facts.NO_PRIVACY.name:
            return Unmasked(server, recorder, checks)
        pads = Pads(store, self._spec)
        pads.make(tokens := self._repeats * sum(self._rows.values()), 0)
        body = pads.offline.seconds / tokens
        pads.make(0, logits := self._repeats * (self._rows[BATCH] + 1))
        head = pads.offline.seconds / logits - body * tokens / logits
        timed = self._timed[mode, OFFLINE] = _Timed(mode, OFFLINE)
        timed.seconds = {phase: [body * self._scale + head * (phase != CHUNK)] for phase in _PHASES}
        return Masked(pads, server, recorder, checks)

    # One pass

    def _pass(self, mode: str, phase: str, products: ShieldedProducts, recorder: Recorder, server: _Server) -> None:
        rows = self._rows[phase]
        self._seconds: dict[str, float] = {}
        spent = 0.0
        recorder.begin(_PHASES[phase])
        for program, layer, scale in self._programs(phase):
            columns = self._spec.weights[program.steps[0].weights[0]][1]
            values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
            recorder.lap(OTHER, OTHER)
            began = time.process_time() - server.processor_seconds
            drive(products.run(Call(program, {program.inputs[0]: values}, layer)))
            spent += (time.process_time() - server.processor_seconds - began) * scale
        recorder.end(rows, 1)
        for operation, seconds in {**self._seconds, TOTAL: sum(self._seconds.values())}.items():
            self._timed.setdefault((mode, operation), _Timed(mode, operation)).seconds[phase].append(seconds / rows)
        self._timed[mode, TOTAL].processor_seconds[phase].append(spent / rows)

    def _programs(self, phase: str) -> Iterator[tuple[Program, int, float]]:
        """Each program of a pass, its layer, and for how many it stands."""
        for layer, layer_programs in enumerate(programs(self._spec, facts.ATTENTION)):
            for program in layer_programs.plain:
                yield program, layer, self._scale
        if phase != CHUNK:  # nearly no token of a prompt has logits
            yield LM_HEAD_PROGRAM, NO_LAYER, 1.0

    def _sink(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Lap) and event.part == TEE:
                scale = 1.0 if event.layer == NO_LAYER else self._scale
                seconds = (event.end_ns - event.start_ns) / 1e9 * scale
                self._seconds[event.op] = self._seconds.get(event.op, 0.0) + seconds

    def _measure_local(self, store: WeightStore) -> None:
        """The products as the plan ``local`` computes them."""
        timed = self._timed[LOCAL, TOTAL] = _Timed(LOCAL, TOTAL)
        matrices = {
            linear: Matrix(torch.cat([store.load(name, torch.float32) for name in linear]).to(self._dtype))
            for linear in linears(self._spec)
        }
        for phase, rows in self._rows.items():
            inputs = {linear: torch.randn(rows, matrix.shape[1]).to(self._dtype) for linear, matrix in matrices.items()}
            for number in range(1 + self._repeats):
                seconds = processor = 0.0
                for linear, matrix in matrices.items():
                    if linear == LM_HEAD and phase == CHUNK:
                        continue
                    scale = (1.0 if linear == LM_HEAD else self._scale) / rows
                    began, began_processor = time.perf_counter(), time.process_time()
                    matrix.product(inputs[linear])
                    seconds += (time.perf_counter() - began) * scale
                    processor += (time.process_time() - began_processor) * scale
                if number:  # the first pass makes kernels
                    timed.seconds[phase].append(seconds)
                    timed.processor_seconds[phase].append(processor)

    # What came of it

    def document(self, status: str) -> dict[str, Any]:
        results = [self._entry(timed) for timed in self._timed.values() if timed.seconds[CHUNK] or timed.seconds[STEP]]
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._whole,
            digest=self._digest,
            settings={
                "rows": self._rows[CHUNK],
                "batch": self._rows[BATCH],
                "local_dtype": dtype_name(self._dtype),
                "repeats": self._repeats,
                "layers_measured": self._spec.layers,
                "checks": self._base.shield.checks,
                "threads": self._threads,
                "pad_bytes_per_token": self._pad_bytes(lambda linear: linear != LM_HEAD),
                "head_pad_bytes_per_token": self._pad_bytes(lambda linear: linear == LM_HEAD),
            },
            notes=self._notes() if results else [],
            results=results,
        )

    def _pad_bytes(self, wanted: Callable[[Linear], bool]) -> int:
        return sum(4 * shape_of(self._whole, linear)[0] for linear in linears(self._whole) if wanted(linear))

    def _entry(self, timed: _Timed) -> dict[str, Any]:
        entry: dict[str, Any] = {"label": f"{timed.mode}: {timed.operation}", "mode": timed.mode}
        entry["operation"] = timed.operation
        for phase in _PHASES:
            if timed.seconds[phase]:
                entry[f"{phase}_seconds_per_token"] = Spread.of(timed.seconds[phase]).to_json()
            if timed.processor_seconds[phase]:
                entry[f"{phase}_processor_seconds_per_token"] = Spread.of(timed.processor_seconds[phase]).to_json()
                if timed.mode != LOCAL:
                    entry[f"{phase}_leverage"] = self._leverage(timed.mode, phase)
        return entry

    def _leverage(self, mode: str, phase: str) -> float:
        ours, local = (self._timed[each, TOTAL].processor_seconds[phase] for each in (mode, LOCAL))
        return statistics.median(local) / statistics.median(ours)

    def _recommended(self) -> str:
        """In which phases a mode has leverage."""
        told = []
        for mode in self._modes:
            phases = [phase for phase in _PHASES if (mode, TOTAL) in self._timed and self._leverage(mode, phase) > 1]
            told.append(f"{mode} {'in a ' + ', '.join(phases) if phases else 'nowhere'}")
        return "; ".join(told)

    def _notes(self) -> list[str]:
        body, head = (
            self._pad_bytes(lambda linear: linear != LM_HEAD),
            self._pad_bytes(lambda linear: linear == LM_HEAD),
        )
        return [
            f"chunk: a token of {self._rows[CHUNK]} in one chunk, lm_head apart; batch: one of {self._rows[BATCH]} in "
            "a step of decoding, lm_head included; step: its only one",
            f"measured on {self._spec.layers} of {self._whole.layers} layers and multiplied; threads: {self._threads}; "
            f"{self._base.shield.checks} bits of checks",
            f"none: verified, and nothing hidden; local: the products themselves in {dtype_name(self._dtype)}, all in "
            "the TEE; offline: pads, made before the prompt",
            "leverage: local's processor seconds over those of a mode, without sending and receiving. To be worth it, "
            f"a mode needs more than 1: {self._recommended()}",
            f"pads take {body:,} bytes of memory a token, and {head:,} where its logits are wanted",
        ]
