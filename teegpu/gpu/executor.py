"""Runs programs: checks one against the weights' table and its inputs' shapes, then executes it and times each step.

What a program costs in memory is known before it runs, and refused when it is over ``Limits.working_bytes``. Checking
is remembered per (program, shapes, encodings), so a decode step pays for it once.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Final

import torch

from teegpu.gpu.cuda import Device, Mark
from teegpu.gpu.ranks import MAKE_RING, Ranks
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.weights import DeviceWeights
from teegpu.kernels import Matrix, convert
from teegpu.ring import Operand, RingMatrix, Seed
from teegpu.ringkernels import scratch_bytes
from teegpu.wire.dtypes import narrow, nbytes
from teegpu.wire.layout import Layout, Row, layout_of
from teegpu.wire.limits import REMEMBERED, REMEMBERED_BYTES, REMEMBERED_STEPS, Limits
from teegpu.wire.program import RING, Program, Shape, ShapeError, Step, infer_shapes, report_name, unpack

_REPLY_HEADER_BYTES = 8 * 1024
_NOT_OFFERED = "this server does not compute shielded products: its server.shield is off"
_MACS_PER_THREAD = 2**38
_MACS_ON_CUDA = 2**44
"""Of a program, where ``limits.program_macs`` is 0: some ten seconds of a core, the longest that one program then keeps
others waiting; an H200 takes less than one."""
_PRODUCTS = frozenset({"linear", RING})
_CUT = _PRODUCTS | {"embedding"}
"""Operations with weights that are cut where there are several ranks."""
_QUANTISING_BYTES = 12
"""Per value at most, while an output is brought into int8: it is there in fp32, padded, and divided by its scales."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A step that is ready to run: ``function`` takes the registers ``inputs`` and gives what goes into ``output``.
    ``name`` is the operation's in reports."""

    output: str
    inputs: tuple[str, ...]
    function: Callable[..., torch.Tensor]
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A checked program for inputs of one shape, the reply's ``layout``, and the bytes of its registers and reply.
    ``shared``: all ranks compute it."""

    kernels: tuple[Kernel, ...]
    layout: Layout
    nbytes: int
    shared: bool


@dataclass(slots=True)
class Execution:
    """What a program gave and cost: ``frames`` as ``dtypes.narrow`` made them, on the CPU, for each row of ``layout``.
    ``operations`` maps report names to (steps, seconds)."""

    layout: Layout
    frames: list[torch.Tensor]
    operations: dict[str, tuple[int, float]]
    bring_in_seconds: float
    compute_seconds: float
    bring_out_seconds: float


Clock = Callable[[], float]


class Executor:
    """Executes programs on one device. One thread at a time.

    Tensors come in as the wire gave them (on the CPU, in their wire dtype) and leave as frames for the wire. ``ring``
    has the matrices for programs in the ring; None: they are refused. ``ranks``: those that compute together with this
    one, each with its part of the weights; the first one runs programs, the others ``follow``.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        limits: Limits,
        clock: Clock = time.perf_counter,
        *,
        ring: RingWeights | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.weights = weights
        self.ring = ring
        self._ranks = ranks
        self.limits = limits
        self._clock = clock
        self.working_bytes = 0
        """What programs may take beyond their requests and the weights as they were loaded: the most that one has
        needed so far. It says so before that is taken."""
        self._needed_bytes = 0
        self._loaded_bytes = weights.nbytes
        self._device = Device(weights.device) if weights.device.type == "cuda" else None
        usual = _MACS_PER_THREAD * torch.get_num_threads() if self._device is None else _MACS_ON_CUDA
        self._most_macs = limits.program_macs or usual * weights.cut.ranks
        if self._device is not None and ranks is not None:
            self._device.replays = False  # what ranks tell each other is not recorded
        self._ring_bytes = 0
        """Of int8 weights that were made since."""
        self._compiled: OrderedDict[object, Compiled] = OrderedDict()
        self._followed = lru_cache(REMEMBERED)(self._unpacked)

    def run(self, program: Program, inputs: Mapping[str, Operand], encodings: Mapping[str, str]) -> Execution:
        """Runs ``program`` on ``inputs`` and brings each output into the wire dtype that ``encodings`` names.

        Raises ``ShapeError``.
        """
        start = self._clock()
        self._check_kinds(program, inputs)
        compiled = self._compile(program, inputs, encodings)
        self._check_ids(program, inputs)
        tensors = {name: _expanded(inputs[name]) for name in program.inputs}
        prepared = self._clock()
        try:
            with self._along(program, compiled, tensors):
                if self._device is None:
                    frames, seconds = self._run_cpu(compiled, tensors)
                else:
                    key = (compiled, *(tensor.dtype for tensor in tensors.values()))
                    frames, seconds = self._device.run(key, compiled.nbytes, tensors, partial(self._queue, compiled))
        except torch.OutOfMemoryError as error:
            raise ShapeError(
                "out-of-memory",
                "the device has no memory left for this program: send smaller chunks (run.chunk_tokens)",
            ) from error
        operations: dict[str, tuple[int, float]] = {}
        for kernel, spent in zip(compiled.kernels, seconds[1:-1], strict=True):
            count, total = operations.get(kernel.name, (0, 0.0))
            operations[kernel.name] = (count + 1, total + spent)
        brought_in = prepared - start + seconds[0]
        return Execution(compiled.layout, frames, operations, brought_in, sum(seconds[1:-1]), seconds[-1])

    def _run_cpu(
        self, compiled: Compiled, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """The frames, and the seconds between the marks of ``_queue``: see ``Device.run``."""
        times = [self._clock()]
        frames = self._queue(compiled, inputs, lambda: times.append(self._clock()))
        times.append(self._clock())
        return frames, [second - first for first, second in pairwise(times)]

    def _queue(self, compiled: Compiled, inputs: Mapping[str, torch.Tensor], mark: Mark) -> list[torch.Tensor]:
        """Converts ``inputs``, runs the kernels and makes the frames, all on the device of the inputs. Calls ``mark``
        after the first and after each kernel."""
        registers = self._compute(compiled.kernels, inputs, mark, shared=compiled.shared)
        return [narrow(registers[name], encoding) for name, _, encoding in compiled.layout.rows]

    def _compute(
        self, kernels: Sequence[Kernel], inputs: Mapping[str, torch.Tensor], mark: Mark, *, shared: bool
    ) -> dict[str, torch.Tensor]:
        if shared and self._ranks is not None:
            self._ranks.share(inputs.values())
        registers = {name: self._convert(tensor) for name, tensor in inputs.items()}
        mark()
        for kernel in kernels:
            registers[kernel.output] = kernel.function(*[registers[name] for name in kernel.inputs])
            mark()
        return registers

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = tensor.dtype
        return (
            tensor
            if dtype == self.weights.dtype or not dtype.is_floating_point
            else convert(tensor, self.weights.dtype)
        )

    def make_ring(self, progress: Callable[[float], None] = lambda _: None) -> RingWeights:
        """The int8 matrices, made where they are not yet. Raises ``ShapeError`` where they are not offered."""
        if self.ring is None:
            raise ShapeError("not-offered", _NOT_OFFERED)
        if not self.ring.made:
            self._ring_bytes = self.ring.most_bytes
            self._update_working_bytes(0)
            if self._ranks is not None and self._ranks.first:
                self._ranks.make_ring()
            self.ring.make(progress)
        return self.ring

    # With others

    def follow(self) -> None:
        """Computes what the first rank runs, its own part of it, for as long as that one is there."""
        assert self._ranks is not None
        while True:
            kind, packed, inputs = self._ranks.receive()
            if kind == MAKE_RING:
                self.make_ring()
                continue
            known = self._followed if len(packed) <= REMEMBERED_BYTES else self._unpacked
            program, kernels = known(packed)
            with torch.inference_mode(), torch.cuda.device(self.weights.device) if self._device else nullcontext():
                registers = dict(zip(program.inputs, inputs, strict=True))
                self._compute(kernels, registers, lambda: None, shared=True)

    def _unpacked(self, packed: bytes) -> tuple[Program, tuple[Kernel, ...]]:
        """A program that the first rank has checked."""
        program = unpack(packed, max_steps=len(packed), max_registers=len(packed))
        return program, self._kernels(program)

    def _along(
        self, program: Program, compiled: Compiled, inputs: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Within it, other ranks compute the program as well, where they have a part in it."""
        if self._ranks is None or not compiled.shared:
            return nullcontext()
        return self._ranks.running(program.packed, list(inputs.values()))

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of what all ranks have of a register."""
        return part if self._ranks is None else self._ranks.summed(part)

    def _kernels(self, program: Program) -> tuple[Kernel, ...]:
        """The steps of ``program`` that this rank computes: all, or those that it has a part in, or reads again."""
        read = {name for step in program.steps for name in step.inputs}
        kernels = []
        for step in program.steps:
            again = step.output in read
            function = KERNELS[step.op](self, step)
            if self._ranks is not None:
                if step.op in _PRODUCTS:
                    outputs = [(self.weights.shape(name) or ())[0] for name in step.weights]
                    function = self._ranks.whole(function, outputs, everywhere=again)
                elif step.op not in _CUT and not again and not self._ranks.first:
                    continue
            kernels.append(Kernel(step.output, step.inputs, function, report_name(step)))
        return tuple(kernels)

    # Checking

    def _compile(self, program: Program, inputs: Mapping[str, Operand], encodings: Mapping[str, str]) -> Compiled:
        replies = [encodings[name] for name in program.outputs]
        key = (program.packed, *(inputs[name].shape for name in program.inputs), *replies)
        known = self._compiled.get(key)
        if known is not None:
            self._compiled.move_to_end(key)
            return known
        made = self._check(program, inputs, encodings)
        if len(program.steps) <= REMEMBERED_STEPS and len(program.packed) <= REMEMBERED_BYTES:
            self._compiled[key] = made
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return made

    def _check(self, program: Program, inputs: Mapping[str, Operand], encodings: Mapping[str, str]) -> Compiled:
        if program.in_ring and self.ring is None:
            raise ShapeError("not-offered", _NOT_OFFERED)
        given = {name: tuple(inputs[name].shape) for name in program.inputs}
        shapes = infer_shapes(program, given, self._weight_shape)
        macs = sum(_macs(step, shapes) for step in program.steps)
        if macs > self._most_macs:
            raise ShapeError(
                "too-large",
                f"this program takes {macs:.2g} multiplications, the server allows {self._most_macs:.2g} "
                "(limits.program_macs on the server): send smaller chunks (run.chunk_tokens)",
            )
        reply = sum(nbytes(shapes[name], encodings[name]) for name in program.outputs)
        itemsize = torch.int32.itemsize if program.in_ring else self.weights.dtype.itemsize
        needed = held = sum(math.prod(shape) for shape in shapes.values()) * itemsize + reply
        if program.in_ring:
            needed += max(self._ring_scratch_bytes(step, shapes) for step in program.steps)
        if self._ranks is not None:
            needed += held  # what ranks have of a register, beside it
        needed += _QUANTISING_BYTES * max(
            math.prod(shapes[name]) if encodings[name] == "int8" else 0 for name in program.outputs
        )
        if needed > self.limits.working_bytes:
            raise ShapeError(
                "too-large",
                f"this program needs {needed / 2**20:.0f} MiB, the server allows "
                f"{self.limits.working_bytes / 2**20:.0f} MiB (limits.program_mib on the server): send smaller chunks "
                "(run.chunk_tokens)",
            )
        if reply + _REPLY_HEADER_BYTES > self.limits.message_bytes:
            raise ShapeError(
                "too-large",
                f"the reply would take {reply / 2**20:.0f} MiB, the server allows "
                f"{self.limits.message_bytes / 2**20:.0f} MiB (limits.message_mib on the server): send smaller chunks "
                "(run.chunk_tokens)",
            )
        self._plan_memory(program, needed)
        layout = layout_of(tuple(Row(name, shapes[name], encodings[name]) for name in program.outputs))
        shared = any(step.op in _CUT for step in program.steps)
        return Compiled(self._kernels(program), layout, held, shared)

    def _ring_scratch_bytes(self, step: Step, shapes: Mapping[str, Shape]) -> int:
        """What a product in the ring takes for a moment beside its registers, at most."""
        rows, columns = shapes[step.inputs[0]]
        return scratch_bytes(rows, columns, shapes[step.output][1], self.weights.device)

    def _plan_memory(self, program: Program, needed: int) -> None:
        self._needed_bytes = max(self._needed_bytes, needed)
        # A projection that is asked for alone may be copied.
        alone = [step.weights[0] for step in program.steps if step.op == "linear" and len(step.weights) == 1]
        shapes = [self.weights.shape(name) or () for name in alone]
        self._update_working_bytes(sum(math.prod(shape) for shape in shapes) * self.weights.dtype.itemsize)

    def _update_working_bytes(self, copies: int) -> None:
        self.working_bytes = self._needed_bytes + self._ring_bytes + copies + self.weights.nbytes - self._loaded_bytes

    def _weight_shape(self, name: str) -> Shape | None:
        shape = self.weights.shape(name)
        if shape is None and self.weights.elsewhere(name):
            first, last = self.weights.layers
            raise ShapeError(
                "unknown-weight",
                f"this server holds layers {first}-{last} of {self.weights.spec.layers}, and weight {name!r} is not "
                "placed with them: the runner's run.endpoints has to name a server for every layer",
            )
        return shape

    def _check_kinds(self, program: Program, inputs: Mapping[str, Operand]) -> None:
        """That each input is of the kind that its program reads: first of all, since it costs nothing."""
        for name in program.inputs:
            operand = inputs[name]
            if program.in_ring:
                if not isinstance(operand, Seed) and operand.dtype != torch.int32:
                    raise ShapeError("bad-shape", f"register {name!r} is in the ring, but came as {operand.dtype}")
            elif isinstance(operand, Seed):
                raise ShapeError("bad-shape", f"register {name!r} came as a seed, which only programs in the ring take")
            elif operand.dtype.is_floating_point == (name in program.id_registers):
                what = "token ids" if name in program.id_registers else "values"
                raise ShapeError("bad-shape", f"register {name!r} is {what}, but came as {operand.dtype}")

    def _check_ids(self, program: Program, inputs: Mapping[str, Operand]) -> None:
        """What shapes do not tell. Done on the CPU, before anything is on the device."""
        for name in program.id_registers:
            vocabulary = (self.weights.shape("embed_tokens") or (0,))[0]
            low, high = torch.aminmax(_expanded(inputs[name]))
            if int(low) < 0 or int(high) >= vocabulary:
                raise ShapeError("bad-shape", f"a token id is outside of the vocabulary of {vocabulary}")

    def matrix(self, step: Step) -> Matrix | RingMatrix:
        """The weights of ``step``, a product, as one matrix. Raises ``ShapeError`` where they are none."""
        names = step.weights
        if step.op == RING:
            held = self.ring is not None and all(map(self.ring.holds, names))
            found: Matrix | RingMatrix | None = self.make_ring().matrix(*names) if held else None
        else:
            found = self.weights.matrix(*names)
        if found is None:
            raise ShapeError("unknown-weight", f"the server multiplies with no weight {' and '.join(map(repr, names))}")
        return found


def _macs(step: Step, shapes: Mapping[str, Shape]) -> int:
    """The multiplications of ``step``; what has none counts one for each value that it makes."""
    inner = shapes[step.inputs[0]][-1] if step.op in {"linear", "matmul", RING} else 1
    return math.prod(shapes[step.output]) * inner


def _product(executor: Executor, step: Step) -> Callable[..., torch.Tensor]:
    return executor.matrix(step).product


def _scale(executor: Executor, step: Step) -> Callable[..., torch.Tensor]:
    return executor.weights.tensor(step.weights[0]).mul


def _embedding(executor: Executor, step: Step) -> Callable[..., torch.Tensor]:
    table = executor.weights.tensor(step.weights[0])
    rows = (executor.weights.shape(step.weights[0]) or (0,))[0]
    if len(table) == rows:
        return lambda ids: torch.nn.functional.embedding(ids.to(torch.int64), table)
    first = executor.weights.cut.of(rows).start

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        # What other ranks hold is zero here.
        places = ids.to(torch.int64) - first
        held = (places >= 0) & (places < len(table))
        found = torch.nn.functional.embedding(places.where(held, 0), table)
        return executor.summed(found.where(held[:, None], 0))

    return look_up


KERNELS: Final[Mapping[str, Callable[[Executor, Step], Callable[..., torch.Tensor]]]] = {
    "embedding": _embedding,
    "linear": _product,
    "scale": _scale,
    "matmul": lambda _, step: partial(_grouped_matmul, transpose=step.transpose),
    "add": lambda _, __: torch.add,
    RING: _product,
}
"""What computes a step of each operation of ``program.OPS``, for an executor's weights. Raises ``ShapeError``."""


def _expanded(operand: Operand) -> torch.Tensor:
    return operand.expand() if isinstance(operand, Seed) else operand


def _grouped_matmul(a: torch.Tensor, b: torch.Tensor, transpose: bool) -> torch.Tensor:
    """(heads, rows, inner) x (kv_heads, inner, columns), or (kv_heads, columns, inner) to ``transpose``.

    The heads of a group are stacked as rows, so nothing is repeated.
    """
    heads, rows, inner = a.shape
    kv_heads = b.shape[0]
    stacked = a.reshape(kv_heads, heads // kv_heads * rows, inner)
    return torch.matmul(stacked, b.transpose(1, 2) if transpose else b).reshape(heads, rows, -1)
