"""Products in whole numbers: what private and verified runs compute with.

It stands in the place of a ``GpuClient``, and the decoder does not know. It makes whole numbers of a program's input,
has an ``Exchange`` get their product modulo 2**32, and makes floats of that. How the product is had is what the modes
differ in: from two servers that each see a share, from one that sees masked values, from one that sees all and is
checked, or, for reference, here. The whole numbers, and so the results, are the same bits in all modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch

from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.record.events import TEE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.ring import Operand, RingMatrix
from teegpu.shield import fixedpoint
from teegpu.shield.quantised import Linear, Measure, Measures, quantised
from teegpu.wire.program import Program, ring_linear, single

FIXED_POINT: Final = "FIXED_POINT"


@dataclass(frozen=True, slots=True)
class Ring:
    """A program of the decoder as a product in the ring: ``program`` has the same registers, one that goes in and one
    that comes out."""

    program: Program
    measure: Measure

    @property
    def linear(self) -> Linear:
        return self.measure.linear

    @property
    def source(self) -> str:
        return self.program.inputs[0]

    @property
    def output(self) -> str:
        return self.program.outputs[0]


@dataclass(frozen=True, slots=True)
class Asked:
    """A product that is wanted: of ``whole``, int32 (rows, in), for the call that it comes from."""

    ring: Ring
    whole: torch.Tensor
    call: Call

    def to_call(self, operand: Operand) -> Call:
        """What is sent for it, with ``operand`` in the place of the values."""
        return replace(self.call, program=self.ring.program, inputs={self.ring.source: operand})


class Exchange(Protocol):
    """How the product of whole numbers is had."""

    async def product(self, asked: Asked) -> torch.Tensor:
        """int32 (rows, out), which nothing else holds."""


class ShieldedProducts:
    """Runs the programs of the plan ``attention`` (each a product of one input) in the ring.

    Raises ``ShieldError`` and ``VerificationError`` beside what a ``GpuClient`` raises.
    """

    narrow_range = False

    def __init__(self, measures: Measures, exchange: Exchange, recorder: Recorder) -> None:
        self._measures = measures
        self._exchange = exchange
        self._recorder = recorder
        self._rings: dict[bytes, Ring] = {}

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        program = call.program
        known = self._rings.get(program.packed)
        if known is None:
            known = self._rings[program.packed] = self._ring(program)
        record = self._recorder
        x = call.inputs[known.source]
        if not isinstance(x, torch.Tensor):
            raise TypeError("a product of the decoder has values, and no seed")
        whole, step = fixedpoint.encode(x, known.measure)
        record.lap(TEE, FIXED_POINT, call.layer, call.chunk)
        product = await self._exchange.product(Asked(known, whole, call))
        values = fixedpoint.decode(product, step, known.measure)
        record.lap(TEE, FIXED_POINT, call.layer, call.chunk)
        return {known.output: values}

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]

    def _ring(self, program: Program) -> Ring:
        """``program`` in the ring. Raises ``RuntimeError`` for one that is more than one product: it must not be sent
        in the clear instead."""
        step = program.steps[0]
        if len(program.steps) != 1 or step.op != "linear":
            raise RuntimeError(f"a program with the outputs {', '.join(program.outputs)} can't be shielded")
        made = single(program.inputs, ring_linear(step.output, *step.inputs, *step.weights))
        return Ring(made, self._measures.of(step.weights))


class Reference:
    """The same arithmetic in the TEE alone: what every mode's output is held against. Weights are in memory, at four
    bytes each where that makes products of one row quicker, else as int8. ``add`` is a ``Reader``; what it has not seen
    is read when it is asked for."""

    def __init__(self, store: WeightStore, spec: ModelSpec, recorder: Recorder) -> None:
        self._store = store
        self._spec = spec
        self._recorder = recorder
        self._matrices: dict[Linear, RingMatrix] = {}

    def add(self, linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
        self._matrices[linear] = RingMatrix(weight, roomy=True)

    async def product(self, asked: Asked) -> torch.Tensor:
        linear = asked.ring.linear
        if linear not in self._matrices:
            self.add(linear, *quantised(self._store, self._spec, linear))
        product = self._matrices[linear].product(asked.whole)
        self._recorder.lap(TEE, "RING_LINEAR", asked.call.layer, asked.call.chunk)
        return product
