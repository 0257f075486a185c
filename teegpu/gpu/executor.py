"""Runs programs: checks one against the weights' table and its inputs' shapes, then executes it and times each step.

What a program costs in memory is known before it runs, and refused when it is over ``Limits.working_bytes``. Checking
is remembered per (program, shapes, encodings), so a decode step pays for it once.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile

import torch

from teegpu.gpu.cuda import Device, Mark
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.weights import DeviceWeights
from teegpu.kernels import Matrix, convert
from teegpu.ring import Operand, RingMatrix, Seed
from teegpu.ringkernels import scratch_bytes
from teegpu.wire.dtypes import nbytes
from teegpu.wire.layout import FrameLayout, Layout, Row, layout_of
from teegpu.wire.limits import REMEMBERED, REMEMBERED_BYTES, REMEMBERED_STEPS, Limits
from teegpu.wire.program import RING, Program, Shape, ShapeError, Step, infer_shapes, report_name

_REPLY_HEADER_BYTES = 8 * 1024
_PRODUCTS = frozenset({"linear", RING})

_NOT_OFFERED = "this server does not compute shielded products: its server.shield is off"
_QUANTISING_BYTES = 12
"""Per value at most, while an output is brought into int8: it is there in fp32, padded, and divided by its scales."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One product or sum: ``steps`` is one step, or the neighbouring linear steps that run as one matrix product.

    ``whole`` is the register in which that product is left as it is; empty: it is cut into the steps' own. In the ring
    it is (1, values): one step's after the other's."""

    steps: tuple[Step, ...]
    matrix: Matrix | RingMatrix | None
    weight: torch.Tensor | None
    sizes: tuple[int, ...]
    name: str
    whole: str


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """``sources`` names for each frame of the reply's ``layout`` the registers that it is made of."""

    kernels: tuple[Kernel, ...]
    layout: Layout
    sources: tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class Execution:
    """What a program gave and cost: ``frames`` as ``FrameLayout.narrow`` made them, on the CPU, for each frame of
    ``layout``. ``operations`` maps report names to (logical operations, seconds)."""

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
    has the matrices for programs in the ring; None: they are refused.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        limits: Limits,
        clock: Clock = time.perf_counter,
        *,
        ring: RingWeights | None = None,
    ) -> None:
        self.weights = weights
        self.ring = ring
        self.limits = limits
        self._clock = clock
        self.announce: Callable[[int], None] = lambda _: None
        """Called with the bytes that programs may take beyond their requests and the weights as they were loaded: the
        most that one has needed so far. Before it is taken."""
        self._needed_bytes = 0
        self._loaded_bytes = weights.nbytes
        self._device = Device(weights.device) if weights.device.type == "cuda" else None
        self._ring_bytes = 0
        """Of int8 weights that were made since."""
        self._compiled: OrderedDict[object, Compiled] = OrderedDict()

    def run(self, program: Program, inputs: Mapping[str, Operand], encodings: Mapping[str, str]) -> Execution:
        """Runs ``program`` on ``inputs`` and brings each output into the wire dtype that ``encodings`` names.

        Raises ``ShapeError``.
        """
        start = self._clock()
        self._check_kinds(program, inputs)
        compiled = self._compile(program, inputs, encodings)
        self._check_ids(program, inputs)
        tensors = {name: _expanded(operand) for name, operand in inputs.items()}
        prepared = self._clock()
        try:
            if self._device is None:
                frames, seconds = self._run_cpu(compiled, tensors)
            else:
                key = (compiled, *(tensor.dtype for tensor in tensors.values()))
                frames, seconds = self._device.run(key, tensors, partial(self._queue, compiled))
        except torch.OutOfMemoryError as error:
            raise ShapeError(
                "out-of-memory",
                "the device has no memory left for this program: send smaller chunks (run.chunk_tokens)",
            ) from error
        operations: dict[str, tuple[int, float]] = {}
        for kernel, spent in zip(compiled.kernels, seconds[1:-1], strict=True):
            count, total = operations.get(kernel.name, (0, 0.0))
            operations[kernel.name] = (count + len(kernel.steps), total + spent)
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
        registers = {name: self._convert(tensor) for name, tensor in inputs.items()}
        mark()
        for kernel in compiled.kernels:
            self._execute(kernel, registers)
            mark()
        return _frames(compiled, registers)

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = tensor.dtype
        return (
            tensor
            if dtype == self.weights.dtype or not dtype.is_floating_point
            else convert(tensor, self.weights.dtype)
        )

    def _execute(self, kernel: Kernel, registers: dict[str, torch.Tensor]) -> None:
        step = kernel.steps[0]
        source = registers[step.inputs[0]]
        weight = kernel.weight
        if isinstance(kernel.matrix, RingMatrix):
            flat = kernel.matrix.products(source, kernel.sizes)
            if kernel.whole:
                registers[kernel.whole] = flat.unsqueeze(0)
            else:
                parts = flat.split([source.shape[0] * n for n in kernel.sizes])
                for each, part in zip(kernel.steps, parts, strict=True):
                    registers[each.output] = part.view(source.shape[0], -1)
        elif kernel.matrix is not None:
            product = kernel.matrix.product(source)
            if kernel.whole:
                registers[kernel.whole] = product
            else:
                for each, part in zip(kernel.steps, product.split(kernel.sizes, dim=-1), strict=True):
                    registers[each.output] = part
        elif step.op == "scale" and weight is not None:
            registers[step.output] = source * weight
        elif step.op == "add":
            registers[step.output] = source + registers[step.inputs[1]]
        elif step.op == "embedding" and weight is not None:
            registers[step.output] = torch.nn.functional.embedding(source.to(torch.int64), weight)
        else:
            registers[step.output] = _grouped_matmul(source, registers[step.inputs[1]], step.transpose)

    def make_ring(self) -> RingWeights:
        """The int8 matrices, made where they are not yet. Raises ``ShapeError`` where they are not offered."""
        if self.ring is None:
            raise ShapeError("not-offered", _NOT_OFFERED)
        if not self.ring.made:
            self._ring_bytes = self.ring.most_bytes
            self._tell(0)
            self.ring.make()
        return self.ring

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
        reply = sum(nbytes(shapes[name], encodings[name]) for name in program.outputs)
        itemsize = torch.int32.itemsize if program.in_ring else self.weights.dtype.itemsize
        needed = sum(math.prod(shape) for shape in shapes.values()) * itemsize + reply
        if program.in_ring:
            needed += _ring_scratch_bytes(program, shapes)
        layout = layout_of(tuple(Row(name, shapes[name], encodings[name]) for name in program.outputs))
        needed += max(self._narrowing_bytes(frame, itemsize) for frame in layout.frames)
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
        self._announce(program, needed)
        kernels = tuple(self._kernels(program, shapes, layout))
        return Compiled(kernels, layout, tuple(_sources(frame, kernels) for frame in layout.frames))

    def _narrowing_bytes(self, frame: FrameLayout, itemsize: int) -> int:
        """What is taken for a moment to bring outputs of ``itemsize`` bytes a value into ``frame``, beyond the frame
        itself."""
        joined = sum(frame.sizes) * itemsize if frame.seamless and len(frame.sizes) > 1 else 0
        if frame.encoding != "int8":
            return joined
        return joined + _QUANTISING_BYTES * (sum(frame.sizes) if frame.seamless else max(frame.sizes))

    def _announce(self, program: Program, needed: int) -> None:
        self._needed_bytes = max(self._needed_bytes, needed)
        # A projection that is asked for alone may be copied.
        shapes = [self.weights.shape(step.weight) or () for step in program.steps if step.op == "linear"]
        self._tell(sum(math.prod(shape) for shape in shapes) * self.weights.dtype.itemsize)

    def _tell(self, copies: int) -> None:
        self.announce(self._needed_bytes + self._ring_bytes + copies + self.weights.nbytes - self._loaded_bytes)

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
            vocabulary = self.weights.tensor("embed_tokens").shape[0]
            low, high = torch.aminmax(_expanded(inputs[name]))
            if int(low) < 0 or int(high) >= vocabulary:
                raise ShapeError("bad-shape", f"a token id is outside of the vocabulary of {vocabulary}")

    def _kernels(self, program: Program, shapes: Mapping[str, Shape], layout: Layout) -> list[Kernel]:
        kernels: list[Kernel] = []
        steps = list(program.steps)
        while steps:
            run = _run_of_linears(steps)
            matrix = self._matrix(run) if run else None
            if matrix is None:
                run = steps[:1]
                matrix = self._matrix(run) if run[0].op in _PRODUCTS else None
            if matrix is None and run[0].op in _PRODUCTS:
                raise ShapeError("unknown-weight", f"the server multiplies with no weight {run[0].weight!r}")
            weight = self.weights.tensor(run[0].weight) if run[0].weight and matrix is None else None
            sizes = tuple(shapes[step.output][-1] for step in run)
            del steps[: len(run)]
            outputs = tuple(step.output for step in run)
            read = {name for step in steps for name in step.inputs}
            alone = len(run) == 1 and not program.in_ring
            whole = outputs[0] if alone or (read.isdisjoint(outputs) and _contiguous(outputs, layout)) else ""
            kernels.append(Kernel(tuple(run), matrix, weight, sizes, report_name(run[0]), whole))
        return kernels

    def _matrix(self, steps: list[Step]) -> Matrix | RingMatrix | None:
        """The matrix of ``steps``, products of one kind, or None where they have none in common."""
        names = [step.weight for step in steps]
        if steps[0].op == RING:
            known = self.ring is not None and all(map(self.ring.holds, names))
            return self.make_ring().matrix(*names) if known else None
        return self.weights.matrix(*names)


def _ring_scratch_bytes(program: Program, shapes: Mapping[str, Shape]) -> int:
    """What a product of ``program``, which is in the ring, takes for a moment beside its registers, at most."""
    most = 0
    for source in {step.inputs[0] for step in program.steps}:
        outputs = sum(shapes[step.output][1] for step in program.steps if step.inputs[0] == source)
        rows, columns = shapes[source]
        most = max(most, scratch_bytes(rows, columns, outputs))
    return most


def _contiguous(outputs: tuple[str, ...], layout: Layout) -> bool:
    """Whether ``outputs``, side by side as one product, are also one after the other in a frame of ``layout``."""
    return any(
        (frame.seamless or frame.encoding == "int32") and frame.registers[place : place + len(outputs)] == outputs
        for frame in layout.frames
        for place in range(len(frame.registers))
    )


def _sources(frame: FrameLayout, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """The registers that ``frame`` is made of: where a product was left whole, its first one stands for all."""
    inside = {step.output for kernel in kernels if kernel.whole for step in kernel.steps[1:]}
    return tuple(name for name in frame.registers if name not in inside)


def _frames(compiled: Compiled, registers: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    frames = zip(compiled.layout.frames, compiled.sources, strict=True)
    return [frame.narrow([registers[name] for name in names]) for frame, names in frames]


def _run_of_linears(steps: list[Step]) -> list[Step]:
    """The leading products with weights that share the first one's input, or none."""
    return list(takewhile(lambda step: step.op in _PRODUCTS and step.inputs == steps[0].inputs, steps))


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
