"""What a program may be, how it travels, and the shapes that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.errors import WireError
from teegpu.wire.program import (
    OPS,
    REPORT_NAMES,
    RING,
    Program,
    Shape,
    ShapeError,
    Step,
    check_name,
    infer_shapes,
    linear,
    report_name,
    ring_linear,
    single,
    unpack,
)

WEIGHTS: dict[str, Shape] = {
    "w": (6, 4),
    "v": (5, 4),
    "wide": (5, 6),
    "norm": (4,),
    "embed_tokens": (9, 4),
    "lm_head": (9, 4),
}

FUSED = Program(
    ("a", "x"),
    (
        linear("o", "a", "layers.0.o_proj"),
        Step("add", "z", ("x", "o")),
        Step("scale", "n", ("z",), ("layers.0.post_attention_layernorm",)),
        linear("gate_up", "n", "layers.0.gate_proj", "layers.0.up_proj"),
    ),
    ("z", "gate_up"),
)


def read(packed: bytes, *, max_steps: int = 64, max_registers: int = 32) -> Program:
    return unpack(packed, max_steps=max_steps, max_registers=max_registers)


# Rules


def test_a_program_of_ours_is_one() -> None:
    assert FUSED.counts == {"LINEAR": 2, "ADD": 1, "SCALE": 1}
    assert FUSED.weights == tuple(
        f"layers.0.{name}" for name in ("o_proj", "post_attention_layernorm", "gate_proj", "up_proj")
    )
    assert FUSED.id_registers == frozenset()
    assert not FUSED.in_ring


def test_a_program_in_the_ring() -> None:
    program = Program(("x",), (ring_linear("a", "x", "w", "v"), ring_linear("b", "x", "lm_head")), ("a", "b"))
    assert program.in_ring
    assert read(program.packed).in_ring
    assert program.counts == {"RING_LINEAR": 2}
    assert infer_shapes(program, {"x": (3, 4)}, WEIGHTS.get) == {"x": (3, 4), "a": (3, 11), "b": (3, 9)}
    for shape in ((3, 5), (4,), (1, 3, 4)):
        with pytest.raises(ShapeError, match="ring_linear 'w'"):
            infer_shapes(program, {"x": shape}, WEIGHTS.get)


@pytest.mark.parametrize(
    ("inputs", "steps", "outputs", "message"),
    [
        pytest.param((), (linear("y", "x", "w"),), ("y",), "at least one input", id="no input"),
        pytest.param(("x",), (), ("x",), "at least one input, one step", id="no step"),
        pytest.param(("x",), (linear("y", "x", "w"),), (), "one output", id="no output"),
        pytest.param(("x", "x"), (linear("y", "x", "w"),), ("y",), "twice among", id="an input named twice"),
        pytest.param(("x",), (linear("y", "x", "w"),), ("y", "y"), "twice among", id="an output named twice"),
        pytest.param(("x",), (Step("softmax", "y", ("x",)),), ("y",), "unknown operation 'softmax'", id="unknown"),
        pytest.param(("x",), (Step("LINEAR", "y", ("x",), ("w",)),), ("y",), "unknown operation", id="case matters"),
        pytest.param(("x",), (linear("y", "z", "w"),), ("y",), "'z' is read before", id="read before any write"),
        pytest.param(("x",), (linear("y", "y", "w"),), ("y",), "'y' is read before", id="reads what it writes"),
        pytest.param(
            ("x",), (linear("z", "y", "w"), linear("y", "x", "w")), ("y", "z"), "'y' is read before", id="wrong order"
        ),
        pytest.param(
            ("x",), (linear("y", "x", "w"), linear("y", "x", "v")), ("y",), "'y' is written twice", id="written twice"
        ),
        pytest.param(("x",), (linear("x", "x", "w"),), ("x",), "'x' is written twice", id="an input written"),
        pytest.param(("x",), (linear("y", "x", "w"),), ("y", "z"), "'z' is never written", id="output not written"),
        pytest.param(("x",), (linear("y", "x", "w"),), ("y", "x"), "'x' is never written", id="an input as output"),
        pytest.param(("x", "z"), (linear("y", "x", "w"),), ("y",), "'z' is never read", id="an input unused"),
        pytest.param(
            ("x",), (linear("y", "x", "w"), linear("z", "x", "v")), ("y",), "'z' is never read", id="a result unused"
        ),
        pytest.param(
            ("i",),
            (Step("embedding", "x", ("i",), ("embed_tokens",)), Step("add", "y", ("i", "i"))),
            ("x", "y"),
            "token ids",
            id="token ids computed with",
        ),
        pytest.param(
            ("a", "b"),
            (Step("add", "i", ("a", "b")), Step("embedding", "x", ("i",), ("embed_tokens",))),
            ("x",),
            "token ids",
            id="token ids computed",
        ),
        pytest.param(
            ("x",), (ring_linear("y", "x", "w"), linear("z", "x", "v")), ("y", "z"), "no steps of other", id="half ring"
        ),
        pytest.param(
            ("x",), (linear("y", "x", "w", "v", "w"),), ("y",), "one weight twice: w, v, w", id="a weight twice"
        ),
        pytest.param(("x",), (linear("y", "x"),), ("y",), "takes 1 input.* and 1 to 8 weights", id="no weight"),
        pytest.param(("x",), (Step("scale", "y", ("x",), ("w", "v")),), ("y",), "and a weight", id="two diagonals"),
        pytest.param(
            ("i",),
            (Step("embedding", "x", ("i",), ("embed_tokens",)), ring_linear("y", "x", "w")),
            ("y",),
            "no steps of other kinds",
            id="a ring after an embedding",
        ),
    ],
)
def test_a_program_that_breaks_a_rule_does_not_exist(
    inputs: tuple[str, ...], steps: tuple[Step, ...], outputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        Program(inputs, steps, outputs)
    packed = msgpack.packb([inputs, [[s.op, s.output, s.inputs, s.weights, s.transpose] for s in steps], outputs])
    with pytest.raises(WireError, match=message):
        read(packed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("more_inputs", "other_weight"), [(1, False), (-1, False), (0, True)])
def test_each_operation_takes_its_own_number_of_inputs_and_weights(
    op: str, more_inputs: int, other_weight: bool
) -> None:
    names = tuple("abc")[: OPS[op].inputs + more_inputs]
    weights = ("w",) if bool(OPS[op].weights) is not other_weight else ()
    with pytest.raises(WireError, match=f"operation '{op}' takes {OPS[op].inputs} input"):
        Program(names or ("x",), (Step(op, "y", names, weights),), ("y",))


@pytest.mark.parametrize("op", [op for op in OPS if op != "matmul"])
def test_only_matmul_transposes(op: str) -> None:
    names = tuple("ab")[: OPS[op].inputs]
    with pytest.raises(WireError, match="can't transpose"):
        Program(names, (Step(op, "y", names, ("w",) if OPS[op].weights else (), True),), ("y",))


def test_reports_know_every_operation() -> None:
    steps = [Step(op, "y", tuple("ab")[: row.inputs], ("w",) if row.weights else ()) for op, row in OPS.items()]
    assert {report_name(step) for step in [*steps, linear("y", "x", "lm_head")]} == REPORT_NAMES


# Travelling


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Valid programs: each step reads registers that are there, and what nothing reads is an output."""
    inputs = [f"in{index}" for index in range(draw(st.integers(1, 4)))]
    in_ring = draw(st.booleans())
    id_input = "ids" if not in_ring and draw(st.booleans()) else None
    steps: list[Step] = []
    known, unread = list(inputs), list(inputs)
    if id_input is not None:
        steps.append(Step("embedding", "r0", (id_input,), ("embed_tokens",)))
        known.append("r0")
        unread.append("r0")
    name = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
    for index in range(draw(st.integers(0, 6)) + len(inputs)):
        op = RING if in_ring else draw(st.sampled_from([op for op in OPS if op not in ("embedding", RING)]))
        pool = [register for register in inputs if register in unread] or known
        sources = (draw(st.sampled_from(pool)), *(draw(st.sampled_from(known)) for _ in range(OPS[op].inputs - 1)))
        output = f"r{index + 1}"
        transpose = op == "matmul" and draw(st.booleans())
        weights = draw(st.lists(name, min_size=1, max_size=OPS[op].weights, unique=True)) if OPS[op].weights else []
        steps.append(Step(op, output, sources, tuple(weights), transpose))
        known.append(output)
        unread = [register for register in [*unread, output] if register not in sources]
    outputs = [register for register in known if register not in inputs and register in unread]
    return Program((*inputs, *([id_input] if id_input else [])), tuple(steps), tuple(draw(st.permutations(outputs))))


@settings(deadline=None, max_examples=150)
@given(programs())
def test_a_program_travels_unchanged(program: Program) -> None:
    again = read(program.packed)
    assert again == program
    assert again.packed == program.packed
    assert sum(again.counts.values()) == len(program.steps)


@settings(deadline=None, max_examples=200)
@given(programs(), st.data())
def test_a_damaged_program_is_another_program_or_a_wire_error(program: Program, data: st.DataObject) -> None:
    packed = bytearray(program.packed)
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = read(bytes(packed[: data.draw(st.integers(0, len(packed)))]))
    except WireError:
        return
    assert isinstance(result, Program)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=8)
    | st.sampled_from(["x", "y", "add", "linear", "matmul", "embedding", "w", "", "\x1b[2J", "é"]),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=30,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=100) | values.map(msgpack.packb) | st.tuples(values, values, values).map(msgpack.packb))
def test_any_bytes_are_a_program_or_a_wire_error(packed: bytes) -> None:
    try:
        result = read(packed)
    except WireError:
        return
    assert isinstance(result, Program)


STEP = ["linear", "y", ["x"], ["w"], False]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"inputs": []}, id="a map"),
        pytest.param([["x"], [STEP]], id="no outputs"),
        pytest.param([["x"], [STEP], ["y"], 1], id="a field too many"),
        pytest.param(["x", [STEP], ["y"]], id="inputs are a text"),
        pytest.param([["x"], STEP, ["y"]], id="steps are no lists"),
        pytest.param([["x"], {}, ["y"]], id="steps are a map"),
        pytest.param([["x"], [STEP[:4]], ["y"]], id="a short step"),
        pytest.param([["x"], [["linear", "y", "x", ["w"], False]], ["y"]], id="a step's inputs are a text"),
        pytest.param([["x"], [["linear", "y", ["x", "x", "x"], ["w"], False]], ["y"]], id="three inputs"),
        pytest.param([["x"], [["linear", "y", ["x"], [None], False]], ["y"]], id="weight is nil"),
        pytest.param([["x"], [["linear", "y", ["x"], ["w"], 0]], ["y"]], id="transpose is a number"),
        pytest.param([["x"], [["linear", "y", ["x"], ["w" * 65], False]], ["y"]], id="a long weight name"),
        pytest.param([["x"], [["linear", "y\n", ["x"], ["w"], False]], ["y\n"]], id="a control character"),
        pytest.param([["é"], [["linear", "y", ["é"], ["w"], False]], ["y"]], id="not ASCII"),
        pytest.param([[b"x"], [["linear", "y", [b"x"], ["w"], False]], ["y"]], id="a name in bytes"),
        pytest.param([[["x"]], [["linear", "y", [["x"]], ["w"], False]], ["y"]], id="a name that is a list"),
        pytest.param([["x"], [["linear", "y", ["x"], "w", False]], ["y"]], id="weights are a text"),
        pytest.param([["x"], [["linear", "y", ["x"], None, False]], ["y"]], id="weights are nil"),
        pytest.param([["x"], [["linear", "y", ["x"], [""], False]], ["y"]], id="an empty weight name"),
        pytest.param([["x"], [["linear", "y", ["x"], list("abcdefghi"), False]], ["y"]], id="nine weights"),
    ],
)
def test_the_form_of_a_packed_program_is_checked(value: Any) -> None:
    with pytest.raises(WireError):
        read(msgpack.packb(value))


def chain(length: int) -> Program:
    steps = tuple(linear(f"r{index + 1}", f"r{index}", "w") for index in range(length))
    return Program(("r0",), steps, (f"r{length}",))


def test_the_number_of_steps_is_limited() -> None:
    assert read(chain(8).packed, max_steps=8) == chain(8)
    with pytest.raises(WireError, match=r"at most 8 steps \(limits.program_steps\)"):
        read(chain(9).packed, max_steps=8)


def test_the_number_of_inputs_and_outputs_is_limited() -> None:
    wide = Program(("x",), tuple(linear(f"y{index}", "x", "w") for index in range(5)), tuple(f"y{i}" for i in range(5)))
    assert read(wide.packed, max_registers=5) == wide
    with pytest.raises(WireError, match="outputs are not a list of at most 4"):
        read(wide.packed, max_registers=4)
    deep = Program(("a", "b", "c"), (Step("add", "d", ("a", "b")), Step("add", "e", ("c", "d"))), ("e",))
    with pytest.raises(WireError, match="inputs are not a list of at most 2"):
        read(deep.packed, max_registers=2)


@pytest.mark.parametrize("name", ["x", "layers.31.post_attention_layernorm", "~!", "a" * 64])
def test_names_that_can_be(name: str) -> None:
    assert check_name(name, "a register") == name


@pytest.mark.parametrize("name", ["", "a" * 65, "\x1b[31m", "a\nb", "\x7f", "é", "\u202e", b"x", 1, None, ["x"]])
def test_names_that_can_not_be(name: object) -> None:
    with pytest.raises(WireError, match="a register is not a name"):
        check_name(name, "a register")


# Shapes


@pytest.mark.parametrize(
    ("step", "inputs", "shape"),
    [
        (linear("y", "x", "w"), {"x": (3, 4)}, (3, 6)),
        (linear("y", "x", "lm_head"), {"x": (1, 4)}, (1, 9)),
        (linear("y", "x", "w", "v", "lm_head"), {"x": (3, 4)}, (3, 20)),
        (Step("scale", "y", ("x",), ("norm",)), {"x": (3, 4)}, (3, 4)),
        (Step("embedding", "y", ("x",), ("embed_tokens",)), {"x": (3,)}, (3, 4)),
        (Step("add", "y", ("a", "b")), {"a": (3, 4), "b": (3, 4)}, (3, 4)),
        (Step("add", "y", ("a", "b")), {"a": (2, 3, 4), "b": (2, 3, 4)}, (2, 3, 4)),
        (Step("matmul", "y", ("a", "b")), {"a": (4, 3, 8), "b": (2, 8, 5)}, (4, 3, 5)),
        (Step("matmul", "y", ("a", "b"), transpose=True), {"a": (4, 3, 8), "b": (2, 5, 8)}, (4, 3, 5)),
        (Step("matmul", "y", ("a", "b")), {"a": (2, 1, 1), "b": (2, 1, 1)}, (2, 1, 1)),
    ],
)
def test_the_shape_of_each_operation(step: Step, inputs: dict[str, Shape], shape: Shape) -> None:
    shapes = infer_shapes(single(list(inputs), step), inputs, WEIGHTS.get)
    assert shapes == {**inputs, "y": shape}


@pytest.mark.parametrize(
    ("step", "inputs", "code"),
    [
        pytest.param(linear("y", "x", "gone"), {"x": (3, 4)}, "unknown-weight", id="no such weight"),
        pytest.param(
            Step("scale", "y", ("x",), ("gone",)), {"x": (3, 4)}, "unknown-weight", id="scale: no such weight"
        ),
        pytest.param(
            Step("embedding", "y", ("x",), ("gone",)), {"x": (3,)}, "unknown-weight", id="embedding: no such weight"
        ),
        pytest.param(linear("y", "x", "w", "gone"), {"x": (3, 4)}, "unknown-weight", id="one of two not there"),
        pytest.param(linear("y", "x", "w", "norm"), {"x": (3, 4)}, "bad-shape", id="linear: one of two a norm"),
        pytest.param(linear("y", "x", "w", "wide"), {"x": (3, 4)}, "bad-shape", id="linear: one of two wider"),
        pytest.param(linear("y", "x", "w"), {"x": (3, 5)}, "bad-shape", id="linear: another width"),
        pytest.param(linear("y", "x", "w"), {"x": (4,)}, "bad-shape", id="linear: a vector"),
        pytest.param(linear("y", "x", "w"), {"x": (1, 3, 4)}, "bad-shape", id="linear: three dimensions"),
        pytest.param(linear("y", "x", "norm"), {"x": (3, 4)}, "bad-shape", id="linear: a norm"),
        pytest.param(Step("scale", "y", ("x",), ("norm",)), {"x": (3, 5)}, "bad-shape", id="scale: another width"),
        pytest.param(Step("scale", "y", ("x",), ("norm",)), {"x": (4,)}, "bad-shape", id="scale: a vector"),
        pytest.param(Step("scale", "y", ("x",), ("w",)), {"x": (6, 4)}, "bad-shape", id="scale: a matrix"),
        pytest.param(Step("embedding", "y", ("x",), ("w",)), {"x": (3,)}, "bad-shape", id="embedding: another matrix"),
        pytest.param(Step("embedding", "y", ("x",), ("norm",)), {"x": (3,)}, "bad-shape", id="embedding: a norm"),
        pytest.param(
            Step("embedding", "y", ("x",), ("embed_tokens",)), {"x": (3, 4)}, "bad-shape", id="ids: 2 dimensions"
        ),
        pytest.param(Step("add", "y", ("a", "b")), {"a": (3, 4), "b": (1, 4)}, "bad-shape", id="add: no broadcasting"),
        pytest.param(Step("add", "y", ("a", "b")), {"a": (3, 4), "b": (4,)}, "bad-shape", id="add: other dimensions"),
        pytest.param(
            Step("matmul", "y", ("a", "b")), {"a": (3, 4), "b": (4, 3)}, "bad-shape", id="matmul: 2 dimensions"
        ),
        pytest.param(
            Step("matmul", "y", ("a", "b")), {"a": (3, 2, 4), "b": (2, 4, 2)}, "bad-shape", id="matmul: uneven groups"
        ),
        pytest.param(
            Step("matmul", "y", ("a", "b")), {"a": (2, 2, 4), "b": (4, 4, 2)}, "bad-shape", id="matmul: fewer heads"
        ),
        pytest.param(
            Step("matmul", "y", ("a", "b")), {"a": (2, 3, 8), "b": (2, 5, 8)}, "bad-shape", id="matmul: not transposed"
        ),
        pytest.param(
            Step("matmul", "y", ("a", "b"), transpose=True),
            {"a": (2, 3, 8), "b": (2, 8, 5)},
            "bad-shape",
            id="transposed",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(step: Step, inputs: dict[str, Shape], code: str) -> None:
    with pytest.raises(ShapeError) as caught:
        infer_shapes(single(list(inputs), step), inputs, WEIGHTS.get)
    assert caught.value.code == code
    assert step.op in str(caught.value) or any(name in str(caught.value) for name in step.weights)


def test_shapes_go_from_step_to_step() -> None:
    weights: dict[str, Shape] = {
        "layers.0.o_proj": (4, 8),
        "layers.0.post_attention_layernorm": (4,),
        "layers.0.gate_proj": (12, 4),
        "layers.0.up_proj": (12, 4),
    }
    lookup: Callable[[str], Shape | None] = weights.get
    shapes = infer_shapes(FUSED, {"a": (3, 8), "x": (3, 4)}, lookup)
    assert {name: shapes[name] for name in FUSED.outputs} == {"z": (3, 4), "gate_up": (3, 24)}
    with pytest.raises(ShapeError, match="add"):
        infer_shapes(FUSED, {"a": (3, 8), "x": (2, 4)}, lookup)
