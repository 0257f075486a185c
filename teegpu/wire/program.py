"""A program: the linear steps that one RPC carries, over named registers.

    inputs x, residual     steps  linear z0 layers.3.o_proj x      outputs z, gate_up
                                  add    z  z0 residual
                                  scale  n  layers.3.post_attention_layernorm z
                                  linear gate_up layers.3.gate_proj layers.3.up_proj n

A step may multiply with several weights: their products stand side by side in its one output. Registers are written
once and read after they are written; every input is read, every output written. Token ids come in as an input and are
read by ``embedding`` alone. A program that breaks these rules does not exist: ``Program`` refuses it when it is made,
and so does ``unpack`` for one from the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import msgpack

from teegpu.errors import WireError
from teegpu.wire.limits import MAX_NAME_LENGTH, MAX_STEP_WEIGHTS
from teegpu.wire.unpacking import unpack as unpack_value

RING: Final = "ring_linear"

Shape = tuple[int, ...]


class Step(NamedTuple):
    """``output = op(*inputs)``.

    ``embedding``: rows of the weight picked by token ids, (tokens,) → (tokens, hidden).
    ``linear``: ``inputs[0] @ weight.T`` for each of ``weights``, side by side: (tokens, in) → (tokens, sum of outs).
    ``scale``: ``inputs[0] * weight``, a diagonal product, (tokens, n) → (tokens, n).
    ``matmul``: per head, (heads, rows, inner) with (kv_heads, inner, columns), or (kv_heads, columns, inner) where
    ``transpose`` is set; heads is a multiple of kv_heads, and neighbouring heads share one.
    ``add``: the sum of two registers of one shape.
    ``ring_linear``: as ``linear`` with ``int8(weight)`` modulo 2**32, int32 (tokens, in) → int32 (tokens, sum of outs),
    where int8 is ``ring.quantise``.
    """

    op: str
    output: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    transpose: bool = False


def linear(output: str, source: str, *weights: str) -> Step:
    return Step("linear", output, (source,), weights)


def ring_linear(output: str, source: str, *weights: str) -> Step:
    return Step(RING, output, (source,), weights)


class ShapeError(WireError):
    """A program that can't be run on these shapes or weights. ``code`` is one of ``messages.REFUSALS``."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Op(NamedTuple):
    """An operation: how many ``inputs`` it reads, how many ``weights`` it takes at most (at least one, unless none),
    and the ``shape`` of its output for the shapes of both, or ``ShapeError``."""

    inputs: int
    weights: int
    shape: Callable[[Step, Sequence[Shape], Sequence[Shape]], Shape]


def _embedding_shape(step: Step, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    if len(inputs[0]) != 1 or step.weights != ("embed_tokens",):
        raise ShapeError(
            "bad-shape", f"embedding takes (tokens,) ids and embed_tokens, got {inputs[0]} and {step.weights[0]!r}"
        )
    return (inputs[0][0], weights[0][1])


def _linear_shape(step: Step, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    for name, weight in zip(step.weights, weights, strict=True):
        if len(weight) != 2 or len(inputs[0]) != 2 or inputs[0][1] != weight[1]:
            raise _unfit(step, name, weight, inputs[0])
    return (inputs[0][0], sum(weight[0] for weight in weights))


def _scale_shape(step: Step, inputs: Sequence[Shape], weights: Sequence[Shape]) -> Shape:
    if len(weights[0]) != 1 or len(inputs[0]) != 2 or inputs[0][1] != weights[0][0]:
        raise _unfit(step, step.weights[0], weights[0], inputs[0])
    return inputs[0]


def _matmul_shape(step: Step, inputs: Sequence[Shape], _: Sequence[Shape]) -> Shape:
    first, second = inputs
    if len(first) == len(second) == 3 and first[0] % second[0] == 0:
        inner, columns = (second[2], second[1]) if step.transpose else (second[1], second[2])
        if first[2] == inner:
            return (first[0], first[1], columns)
    raise ShapeError("bad-shape", f"matmul can't take {first} and {second}{' transposed' * step.transpose}")


def _add_shape(_: Step, inputs: Sequence[Shape], __: Sequence[Shape]) -> Shape:
    if inputs[0] != inputs[1]:
        raise ShapeError("bad-shape", f"add needs two registers of one shape, got {inputs[0]} and {inputs[1]}")
    return inputs[0]


def _unfit(step: Step, name: str, weight: Shape, source: Shape) -> ShapeError:
    return ShapeError("bad-shape", f"{step.op} {name!r} {weight} can't take an input of shape {source}")


OPS: Final[Mapping[str, Op]] = {
    "embedding": Op(1, 1, _embedding_shape),
    "linear": Op(1, MAX_STEP_WEIGHTS, _linear_shape),
    "scale": Op(1, 1, _scale_shape),
    "matmul": Op(2, 0, _matmul_shape),
    "add": Op(2, 0, _add_shape),
    RING: Op(1, MAX_STEP_WEIGHTS, _linear_shape),
}
"""Every operation that a GPU server runs; ``gpu.executor`` has the kernels. All are linear in each register that they
read (``embedding``: in the one-hot rows that its ids stand for; ``ring_linear``: modulo 2**32)."""

REPORT_NAMES: Final = frozenset({op.upper() for op in OPS} | {"LM_HEAD"})
"""Every operation by its name in reports, as ``report_name`` gives it."""


@dataclass(frozen=True)
class Program:
    """Steps with the registers that go in and come out.

    Raises ``WireError`` when made of unknown operations, when registers are read before they are written, written
    twice, or never used, when token ids are computed or computed with, or when only a part of it is in the ring.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.inputs or not self.steps or not self.outputs:
            raise WireError("a program needs at least one input, one step and one output")
        known = set(self.inputs)
        if len(known) != len(self.inputs) or len(set(self.outputs)) != len(self.outputs):
            raise WireError("a program names one register twice among its inputs or outputs")
        read: set[str] = set(self.outputs)
        for step in self.steps:
            op = OPS.get(step.op)
            if op is None:
                raise WireError(f"unknown operation {step.op!r}: the server runs {', '.join(OPS)}")
            if len(step.inputs) != op.inputs or not min(1, op.weights) <= len(step.weights) <= op.weights:
                takes = f"1 to {op.weights} weights" if op.weights > 1 else "a weight" if op.weights else "no weight"
                raise WireError(f"operation {step.op!r} takes {op.inputs} input(s) and {takes}")
            if len(set(step.weights)) != len(step.weights):
                raise WireError(f"a step takes one weight twice: {', '.join(step.weights)}")
            if step.transpose and step.op != "matmul":
                raise WireError(f"operation {step.op!r} can't transpose")
            for register in step.inputs:
                if register not in known:
                    raise WireError(f"register {register!r} is read before it is written")
            if step.output in known:
                raise WireError(f"register {step.output!r} is written twice")
            known.add(step.output)
            read.update(step.inputs)
        if unknown := set(self.outputs) - (known - set(self.inputs)):
            raise WireError(f"output {min(unknown)!r} is never written")
        if unused := known - read:
            raise WireError(f"register {min(unused)!r} is never read")
        ids = self.id_registers
        if not ids <= set(self.inputs) or any(
            step.op != "embedding" and ids.intersection(step.inputs) for step in self.steps
        ):
            raise WireError("token ids are an input of the program, read by 'embedding' alone")
        if len({step.op == RING for step in self.steps}) > 1:
            raise WireError(f"a program with a step {RING!r} has no steps of other kinds: its registers are int32")

    @cached_property
    def id_registers(self) -> frozenset[str]:
        """The inputs that hold token ids; all others hold values."""
        return frozenset(step.inputs[0] for step in self.steps if step.op == "embedding")

    @cached_property
    def in_ring(self) -> bool:
        """Whether every register is int32, modulo 2**32; else values are floats."""
        return self.steps[0].op == RING

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Every weight that its steps take, in their order."""
        return tuple(name for step in self.steps for name in step.weights)

    @cached_property
    def packed(self) -> bytes:
        """The program as it travels; built once, so that repeating a program costs nothing."""
        steps = [[s.op, s.output, list(s.inputs), list(s.weights), s.transpose] for s in self.steps]
        return bytes(msgpack.packb([list(self.inputs), steps, list(self.outputs)]))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Logical operations by the names of reports: LINEAR, LM_HEAD, EMBEDDING, MATMUL, SCALE, ADD, RING_LINEAR."""
        counts: dict[str, int] = {}
        for step in self.steps:
            name = report_name(step)
            counts[name] = counts.get(name, 0) + 1
        return counts


def infer_shapes(
    program: Program, inputs: Mapping[str, Shape], weight_shape: Callable[[str], Shape | None]
) -> dict[str, Shape]:
    """The shape of every register of ``program``: the server checks a request with it, the runner a reply.

    ``inputs`` has the shape of each input, with no dimension below 1. ``weight_shape`` gives the shape of a weight that
    programs may use, or None. Raises ``ShapeError``.
    """
    shapes = dict(inputs)
    for step in program.steps:
        weights = [_known(name, weight_shape(name)) for name in step.weights]
        shapes[step.output] = OPS[step.op].shape(step, [shapes[name] for name in step.inputs], weights)
    return shapes


def _known(name: str, shape: Shape | None) -> Shape:
    if shape is None:
        raise ShapeError("unknown-weight", f"the model has no weight {name!r}")
    return shape


def report_name(step: Step) -> str:
    return "LM_HEAD" if step.weights == ("lm_head",) and step.op != RING else step.op.upper()


def check_name(value: object, what: str) -> str:
    """``value`` if it is a short printable ASCII string, as registers, weights and operations are; else WireError."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_LENGTH:
        raise WireError(f"{what} is not a name of 1 to {MAX_NAME_LENGTH} characters")
    if not value.isascii() or not value.isprintable():
        raise WireError(f"{what} is not a name of printable ASCII characters")
    return value


def _names(value: object, what: str, most: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise WireError(f"{what} are not a list of at most {most} names")
    return tuple(check_name(item, what) for item in value)


def unpack(packed: bytes, *, max_steps: int, max_registers: int) -> Program:
    """The program that ``Program.packed`` describes.

    Raises ``WireError`` for anything else, never another exception.
    """
    value = unpack_value(packed, "the program")
    if not isinstance(value, list) or len(value) != 3:
        raise WireError("a program is a list of inputs, steps and outputs")
    raw_inputs, raw_steps, raw_outputs = value
    if not isinstance(raw_steps, list) or len(raw_steps) > max_steps:
        raise WireError(f"a program has at most {max_steps} steps (limits.program_steps)")
    return Program(
        _names(raw_inputs, "program inputs", max_registers),
        tuple(_step(raw) for raw in raw_steps),
        _names(raw_outputs, "program outputs", max_registers),
    )


def _step(raw: object) -> Step:
    if not isinstance(raw, list) or len(raw) != 5:
        raise WireError("a step is a list of operation, output, inputs, weights and transpose")
    op, output, inputs, weights, transpose = raw
    if not isinstance(transpose, bool):
        raise WireError("a step's transpose is a boolean")
    return Step(
        check_name(op, "an operation"),
        check_name(output, "a step's output"),
        _names(inputs, "a step's inputs", 2),
        _names(weights, "a step's weights", MAX_STEP_WEIGHTS),
        transpose,
    )


def single(inputs: Sequence[str], step: Step) -> Program:
    """A program of one step."""
    return Program(tuple(inputs), (step,), (step.output,))
