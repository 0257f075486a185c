"""Products that a server computes without seeing what it multiplies, and that are checked when they come back.

It stands in the place of a ``GpuClient``, and the decoder does not know. It makes whole numbers of a program's input,
has an ``Exchange`` get their product modulo 2**32, and makes floats of that. How the product is had is what the modes
differ in: from two servers that each see a share, from one that sees masked values, or, for reference, here. The whole
numbers, and so the results, are the same bits in all modes but ``lwe``, which adds noise to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from teegpu.metrics.events import TEE
from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.ring import Operand, RingMatrix
from teegpu.tee.products import Call
from teegpu.tee.shield import fixedpoint
from teegpu.tee.shield.facts import Facts, FactTable, Product, quantised
from teegpu.wire.program import Program, ring_linear

FIXED_POINT: Final = "FIXED_POINT"


@dataclass(frozen=True, slots=True)
class Ring:
    """A program of the decoder as a product in the ring: ``program`` has the same registers, ``source`` is the only one
    that goes in; ``sizes`` are the lengths of the outputs, in their order."""

    program: Program
    source: str
    sizes: tuple[int, ...]
    facts: Facts

    @property
    def product(self) -> Product:
        return self.facts.product

    def parts(self, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each output's name, with its columns of ``whole`` (rows, out): a view."""
        return zip(self.program.outputs, whole.split(self.sizes, dim=-1), strict=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """A product that is wanted: of ``whole``, int32 (rows, in), for the call that it comes from."""

    ring: Ring
    whole: torch.Tensor
    call: Call

    def to_call(self, operand: Operand) -> Call:
        """What is sent for it, with ``operand`` in the place of the values."""
        return Call(self.ring.program, {self.ring.source: operand}, self.call.layer, self.call.chunk)


class Exchange(Protocol):
    """How the product of whole numbers is had. ``noise``: the standard deviation that it adds to each of them."""

    noise: float

    async def product(self, asked: Asked) -> torch.Tensor:
        """int32 (rows, out), which nothing else holds."""


class ShieldedProducts:
    """Runs the programs of the plan ``attention`` (each a product of one input with neighbouring matrices) in the ring.

    Raises ``ShieldError`` and ``VerificationError`` beside what a ``GpuClient`` raises.
    """

    narrow_range = False

    def __init__(self, facts: FactTable, exchange: Exchange, recorder: Recorder) -> None:
        self._facts = facts
        self._exchange = exchange
        self._recorder = recorder
        self._rings: dict[bytes, Ring] = {}

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        program = call.program
        known = self._rings.get(program.packed)
        if known is None:
            known = self._rings[program.packed] = self._ring(program)
        record, exchange = self._recorder, self._exchange
        x = call.inputs[known.source]
        if not isinstance(x, torch.Tensor):
            raise TypeError("a product of the decoder has values, and no seed")
        whole, step = fixedpoint.encode(x, known.facts, exchange.noise)
        record.lap(TEE, FIXED_POINT, call.layer, call.chunk)
        product = await exchange.product(Asked(known, whole, call))
        values = fixedpoint.decode(product, step, known.facts)
        record.lap(TEE, FIXED_POINT, call.layer, call.chunk)
        parts = values.split(known.sizes, dim=-1) if len(known.sizes) > 1 else (values,)
        return dict(zip(program.outputs, parts, strict=True))

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]

    def _ring(self, program: Program) -> Ring:
        """``program`` in the ring. Raises ``RuntimeError`` for one that is more than one product: it must not be sent
        in the clear instead."""
        steps = program.steps
        outputs = tuple(step.output for step in steps)
        if len(program.inputs) != 1 or outputs != program.outputs or any(step.op != "linear" for step in steps):
            raise RuntimeError(f"a program with the outputs {', '.join(program.outputs)} can't be shielded")
        source = program.inputs[0]
        made = Program(program.inputs, tuple(ring_linear(s.output, s.weight, source) for s in steps), program.outputs)
        facts = self._facts.of(tuple(step.weight for step in steps))
        sizes = [self._facts.spec.weights[step.weight][0] for step in steps]
        return Ring(made, source, tuple(sizes), facts)


class Reference:
    """The same arithmetic in the TEE alone: what every mode's output is held against. Weights are in memory, at four
    bytes each where that makes products of one row quicker, else as int8."""

    noise = 0.0

    def __init__(self, store: WeightStore, spec: ModelSpec, recorder: Recorder) -> None:
        self._store = store
        self._spec = spec
        self._recorder = recorder
        self._matrices: dict[Product, RingMatrix] = {}

    def preload(self, wanted: Sequence[Product]) -> None:
        """Quantises now what will be asked for."""
        for product in wanted:
            self._matrix(product)

    async def product(self, asked: Asked) -> torch.Tensor:
        product = self._matrix(asked.ring.product).product(asked.whole)
        self._recorder.lap(TEE, "RING_LINEAR", asked.call.layer, asked.call.chunk)
        return product

    def _matrix(self, product: Product) -> RingMatrix:
        matrix = self._matrices.get(product)
        if matrix is None:
            matrix = self._matrices[product] = RingMatrix(quantised(self._store, self._spec, product)[0], roomy=True)
        return matrix
