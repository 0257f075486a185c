"""Programs on the device against the same sums done by hand, and programs that it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu.gpu import executor as executing
from teegpu.gpu.executor import Execution, Executor
from teegpu.wire import dtypes
from teegpu.wire.limits import REMEMBERED_STEPS, Limits
from teegpu.wire.program import OPS, RING, Program, ShapeError, Step, linear, single
from tests.teegpu.gpu.conftest import decoded

MakeExecutor = Callable[..., Executor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

QKV_WEIGHTS = tuple(f"layers.0.{name}_proj" for name in "qkv")
QKV = single(["n"], linear("qkv", "n", *QKV_WEIGHTS))
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
EMBED = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))
SCORES = single(["q", "k"], Step("matmul", "s", ("q", "k"), transpose=True))
CONTEXT = single(["p", "v"], Step("matmul", "c", ("p", "v")))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(done: Execution) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.float32) for name, tensor in decoded(done).items()}


def run(
    executor: Executor, program: Program, encoding: str = "fp32", **inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    return outputs(executor.run(program, inputs, dict.fromkeys(program.outputs, encoding)))


def refused(executor: Executor, program: Program, encoding: str = "fp32", **inputs: torch.Tensor) -> ShapeError:
    with pytest.raises(ShapeError) as caught:
        executor.run(program, inputs, dict.fromkeys(program.outputs, encoding))
    return caught.value


# Against sums by hand


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_linear(make_executor: MakeExecutor, store: Any, dtype: torch.dtype, rows: int) -> None:
    x = random(rows, 32)
    got = run(make_executor(dtype), single(["x"], linear("y", "x", "layers.1.q_proj")), x=x)["y"]
    expected = x @ store.tensors["layers.1.q_proj"].T
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_lm_head(make_executor: MakeExecutor, store: Any) -> None:
    x = random(1, 32)
    done = make_executor().run(single(["x"], linear("y", "x", "lm_head")), {"x": x}, {"y": "fp32"})
    torch.testing.assert_close(outputs(done)["y"], x @ store.tensors["lm_head"].T)
    assert done.operations["LM_HEAD"][0] == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scale(make_executor: MakeExecutor, store: Any, dtype: torch.dtype) -> None:
    x = random(3, 32)
    got = run(make_executor(dtype), single(["x"], Step("scale", "y", ("x",), ("layers.0.input_layernorm",))), x=x)["y"]
    expected = x * store.tensors["layers.0.input_layernorm"]
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 4), (5,)])
def test_add(make_executor: MakeExecutor, shape: tuple[int, ...]) -> None:
    a, b = random(*shape), random(*shape, seed=1)
    assert torch.equal(run(make_executor(), single(["a", "b"], Step("add", "y", ("a", "b"))), a=a, b=b)["y"], a + b)


def test_a_register_may_be_added_to_itself(make_executor: MakeExecutor) -> None:
    x = random(2, 3)
    assert torch.equal(run(make_executor(), single(["x"], Step("add", "y", ("x", "x"))), x=x)["y"], 2 * x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(make_executor: MakeExecutor, store: Any, dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 0, 49, 3], dtype=dtype)
    assert torch.equal(run(make_executor(), EMBED, ids=ids)["x"], store.tensors["embed_tokens"][ids.to(torch.int64)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (9, 3)])
@pytest.mark.parametrize("rows", [1, 5])
def test_grouped_matmul_is_that_of_repeated_heads(
    make_executor: MakeExecutor, dtype: torch.dtype, heads: int, kv_heads: int, rows: int
) -> None:
    executor = make_executor(dtype)
    q, k = random(heads, rows, 8), random(kv_heads, 7, 8, seed=1)
    repeated = k.repeat_interleave(heads // kv_heads, dim=0)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(run(executor, SCORES, q=q, k=k)["s"], q @ repeated.transpose(1, 2), **tolerance)
    p = random(heads, rows, 7, seed=2)
    torch.testing.assert_close(run(executor, CONTEXT, p=p, v=k)["c"], p @ repeated, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_fused_program(make_executor: MakeExecutor, store: Any, dtype: torch.dtype) -> None:
    a, x = random(3, 32), random(3, 32, seed=1)
    got = run(make_executor(dtype), FUSED, a=a, x=x)
    w = {name.removeprefix("layers.0."): tensor for name, tensor in store.tensors.items()}
    z = x + a @ w["o_proj"].T
    n = z * w["post_attention_layernorm"]
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]}
    gate_up = torch.cat([n @ w["gate_proj"].T, n @ w["up_proj"].T], dim=-1)
    for name, expected in {"z": z, "gate_up": gate_up}.items():
        torch.testing.assert_close(got[name], expected, **tolerance)


# Several weights


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_several_weights_are_one_product_side_by_side(make_executor: MakeExecutor, dtype: torch.dtype) -> None:
    executor = make_executor(dtype)
    n = random(5, 32)
    done = executor.run(QKV, {"n": n}, {"qkv": "fp32"})
    (compiled,) = executor._compiled.values()
    assert len(compiled.kernels) == 1
    assert {name: count for name, (count, _) in done.operations.items()} == QKV.counts == {"LINEAR": 1}
    alone = [run(executor, single(["n"], linear("y", "n", name)), n=n)["y"] for name in QKV_WEIGHTS]
    tolerance = TOLERANCE[dtype] / 4
    torch.testing.assert_close(outputs(done)["qkv"], torch.cat(alone, dim=-1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "names",
    [("k_proj", "q_proj", "v_proj"), ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj")],
    ids=["another order", "a part", "one more"],
)
def test_weights_that_are_no_matrix_together_are_refused(make_executor: MakeExecutor, names: tuple[str, ...]) -> None:
    weights = tuple(f"layers.1.{name}" for name in names)
    error = refused(make_executor(), single(["n"], linear("y", "n", *weights)), n=random(2, 32))
    assert error.code == "unknown-weight"
    assert all(name in str(error) for name in weights)


def test_weights_of_different_layers_are_refused(make_executor: MakeExecutor) -> None:
    mixed = linear("y", "n", "layers.0.gate_proj", "layers.1.up_proj")
    assert refused(make_executor(), single(["n"], mixed), n=random(2, 32)).code == "unknown-weight"


def test_the_size_of_the_output_is_known_before_anything_is_computed(
    make_executor: MakeExecutor, executed: list[str]
) -> None:
    """Every weight that is named counts, whether the server has them as one matrix or not."""
    many = tuple(f"layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("q", "k", "gate", "up"))
    needed = 4 * (64 * 32 + 2 * 64 * 2 * (32 + 16 + 64 + 64))  # the input; the output, and again as the reply
    error = refused(make_executor(limits=Limits(working_bytes=needed - 1)), single(["n"], linear("y", "n", *many)),
                    n=random(64, 32))  # fmt: skip
    assert error.code == "too-large"
    assert executed == []


def test_steps_of_their_own_are_products_of_their_own(make_executor: MakeExecutor, store: Any) -> None:
    a, b = random(2, 32), random(2, 32, seed=1)
    steps = (
        linear("q", "a", "layers.0.q_proj"),
        linear("k", "b", "layers.0.k_proj"),
        linear("v", "a", "layers.1.v_proj"),
    )
    got = run(make_executor(), Program(("a", "b"), steps, ("q", "k", "v")), a=a, b=b)
    torch.testing.assert_close(got["q"], a @ store.tensors["layers.0.q_proj"].T)
    torch.testing.assert_close(got["k"], b @ store.tensors["layers.0.k_proj"].T)
    torch.testing.assert_close(got["v"], a @ store.tensors["layers.1.v_proj"].T)


# The wire's side


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_come_in_any_wire_dtype(make_executor: MakeExecutor, store: Any, given: torch.dtype) -> None:
    x = random(2, 32).to(given)
    got = run(make_executor(), single(["x"], linear("y", "x", "layers.0.o_proj")), x=x)["y"]
    torch.testing.assert_close(got, x.to(torch.float32) @ store.tensors["layers.0.o_proj"].T)


@pytest.mark.parametrize("encoding", dtypes.FLOATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_leave_in_the_encoding_asked_for(
    make_executor: MakeExecutor, dtype: torch.dtype, encoding: str
) -> None:
    a, x = random(2, 32), random(2, 32, seed=1)
    executor = make_executor(dtype)
    done = executor.run(FUSED, {"a": a, "x": x}, {"z": "fp32", "gate_up": encoding})
    assert [*done.layout.rows] == [("z", (2, 32), "fp32"), ("gate_up", (2, 128), encoding)]
    alone = run(executor, FUSED, a=a, x=x)["gate_up"]
    frame = memoryview(bytearray(dtypes.encode(alone, encoding)))
    assert torch.equal(outputs(done)["gate_up"], dtypes.decode(frame, (2, 128), encoding).to(torch.float32))


def test_inputs_are_not_written_to(make_executor: MakeExecutor) -> None:
    a, x = random(3, 32), random(3, 32, seed=1)
    before = a.clone(), x.clone()
    run(make_executor(), FUSED, a=a, x=x)
    assert torch.equal(a, before[0])
    assert torch.equal(x, before[1])


def test_inputs_may_be_given_in_any_order(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    q, k = random(4, 3, 8), random(2, 5, 8)
    assert torch.equal(run(executor, SCORES, q=q, k=k)["s"], run(executor, SCORES, k=k, q=q)["s"])
    assert len(executor._compiled) == 1


# Laws


def test_every_operation_is_linear(make_executor: MakeExecutor, store: Any) -> None:
    """Law 1: f(αx + βy) = αf(x) + βf(y) in each register that an operation reads."""
    executor = make_executor()
    programs: dict[str, tuple[Program, dict[str, tuple[int, ...]]]] = {
        "linear": (single(["x"], linear("out", "x", "layers.0.o_proj")), {"x": (3, 32)}),
        "scale": (single(["x"], Step("scale", "out", ("x",), ("norm",))), {"x": (3, 32)}),
        "matmul": (single(["x", "y"], Step("matmul", "out", ("x", "y"))), {"x": (4, 3, 5), "y": (2, 5, 6)}),
        "add": (single(["x", "y"], Step("add", "out", ("x", "y"))), {"x": (3, 4), "y": (3, 4)}),
    }
    assert {*programs, "embedding", RING} == set(OPS) == set(executing.KERNELS)  # RING: see test_ring_programs
    for program, shapes in programs.values():
        for varied in shapes:
            fixed = {name: random(*shape, seed=3) for name, shape in shapes.items()}
            if program.steps[0].op == "add":  # jointly linear: the other register is zero, not constant
                fixed = {name: torch.zeros(shape) for name, shape in shapes.items()}
            one, two = random(*shapes[varied], seed=4), random(*shapes[varied], seed=5)

            def value(
                x: torch.Tensor, program: Program = program, fixed: dict[str, torch.Tensor] = fixed, name: str = varied
            ) -> torch.Tensor:
                return run(executor, program, **{**fixed, name: x})["out"]

            torch.testing.assert_close(
                value(2.5 * one - 0.75 * two), 2.5 * value(one) - 0.75 * value(two), rtol=1e-4, atol=1e-4
            )
    ids = torch.tensor([1, 7, 1])
    one_hot = torch.nn.functional.one_hot(ids, 50).to(torch.float32)
    torch.testing.assert_close(run(executor, EMBED, ids=ids)["x"], one_hot @ store.tensors["embed_tokens"])


# Refusals


def test_a_weight_that_is_not_there(make_executor: MakeExecutor) -> None:
    for name in ("layers.2.q_proj", "layers.0.q_proj.bias", "q_proj", "__init__"):
        error = refused(make_executor(), single(["x"], linear("y", "x", name)), x=random(1, 32))
        assert error.code == "unknown-weight"
        assert name in str(error)


@pytest.mark.parametrize(
    ("program", "inputs"),
    [
        (QKV, {"n": random(2, 31)}),
        (QKV, {"n": random(32)}),
        (FUSED, {"a": random(2, 32), "x": random(3, 32)}),
        (SCORES, {"q": random(3, 2, 8), "k": random(2, 2, 8)}),
        (EMBED, {"ids": torch.zeros(2, 2, dtype=torch.int32)}),
    ],
)
def test_shapes_that_do_not_fit(make_executor: MakeExecutor, program: Program, inputs: dict[str, torch.Tensor]) -> None:
    assert refused(make_executor(), program, **inputs).code == "bad-shape"


@pytest.mark.parametrize("ids", [[-1], [50], [0, 1, 2**31 - 1], [-(2**31)]])
def test_token_ids_outside_of_the_vocabulary(make_executor: MakeExecutor, ids: list[int]) -> None:
    error = refused(make_executor(), EMBED, ids=torch.tensor(ids, dtype=torch.int32))
    assert error.code == "bad-shape"
    assert "vocabulary of 50" in str(error)


def test_values_are_no_token_ids_and_token_ids_are_no_values(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    assert "is token ids" in str(refused(executor, EMBED, ids=torch.tensor([1.0, 2.0])))
    integers = torch.ones(2, 32, dtype=torch.int32)
    assert "is values" in str(refused(executor, QKV, n=integers))
    run(executor, QKV, n=integers.to(torch.float32))
    assert "is values" in str(refused(executor, QKV, n=integers)), "a remembered program is checked all the same"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that really ran."""
    seen: list[str] = []
    queue = Executor._queue

    def spy(self: Executor, compiled: executing.Compiled, *rest: Any) -> list[torch.Tensor]:
        seen.extend(kernel.name for kernel in compiled.kernels)
        return queue(self, compiled, *rest)

    monkeypatch.setattr(Executor, "_queue", spy)
    return seen


def test_a_program_that_needs_too_much_memory_is_refused_before_it_runs(
    make_executor: MakeExecutor, executed: list[str]
) -> None:
    tall, wide = torch.zeros(1, 2**18, 1), torch.zeros(1, 1, 2**18)
    chain = (Step("matmul", "small", ("b", "a")), Step("matmul", "huge", ("a", "b")))
    program = Program(("a", "b"), chain, ("small", "huge"))
    error = refused(make_executor(), program, a=tall, b=wide)
    assert error.code == "too-large"
    assert "run.chunk_tokens" in str(error)
    assert executed == []


UP_AND_DOWN = tuple(
    linear(f"r{number + 1}", f"r{number}", f"layers.0.{'down' if number % 2 else 'gate'}_proj") for number in range(64)
)
SQUARES = Program(("a", "b"), (Step("matmul", "y", ("a", "b")), Step("matmul", "z", ("y", "b"))), ("z",))


@pytest.mark.parametrize(
    ("program", "inputs", "macs"),
    [
        (Program(("r0",), UP_AND_DOWN, ("r64",)), {"r0": random(8, 32)}, 64 * 8 * 32 * 64),
        (SQUARES, {"a": random(1, 64, 64), "b": random(1, 64, 64)}, 2 * 64**3),
        (single(["x"], linear("y", "x", "lm_head")), {"x": random(7, 32)}, 7 * 32 * 50),
        (single(["x"], Step("scale", "y", ("x",), ("norm",))), {"x": random(7, 32)}, 7 * 32),
    ],
    ids=["many steps", "products of inputs", "one step", "no product"],
)
def test_the_work_of_a_program_is_known_before_it_is_done(
    make_executor: MakeExecutor,
    executed: list[str],
    program: Program,
    inputs: dict[str, torch.Tensor],
    macs: int,
) -> None:
    """A message of few bytes, within every bound on memory, may ask for any amount of it."""
    error = refused(make_executor(limits=Limits(program_macs=macs - 1)), program, **inputs)
    assert (error.code, executed) == ("too-large", [])
    assert "limits.program_macs on the server" in str(error)
    run(make_executor(limits=Limits(program_macs=macs)), program, "fp32", **inputs)
    assert executed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", dtypes.FLOATS)
def test_the_memory_that_is_counted_is_inputs_registers_and_reply(
    make_executor: MakeExecutor, executed: list[str], dtype: torch.dtype, encoding: str
) -> None:
    registers = 4 * 32 + 4 * 64  # n, then Q, K and V
    reply = dtypes.nbytes((4, 64), encoding)
    needed = registers * dtype.itemsize + reply
    if encoding == "int8":
        needed += 12 * 4 * 64
    n = random(4, 32)
    run(make_executor(dtype, Limits(working_bytes=needed)), QKV, encoding, n=n)
    assert executed == ["LINEAR"]
    assert refused(make_executor(dtype, Limits(working_bytes=needed - 1)), QKV, encoding, n=n).code == "too-large"
    assert executed == ["LINEAR"]


def test_a_reply_over_the_message_limit_is_refused_before_it_is_computed(
    make_executor: MakeExecutor, executed: list[str]
) -> None:
    n = random(64, 32)
    reply = 64 * (32 + 16 + 16) * 4
    executor = make_executor(limits=Limits(message_bytes=reply + 8 * 1024 - 1))
    assert "reply" in str(refused(executor, QKV, n=n))
    assert executed == []
    run(executor, QKV, "fp16", n=n)
    run(make_executor(limits=Limits(message_bytes=reply + 8 * 1024)), QKV, n=n)
    assert executed == ["LINEAR", "LINEAR"]
    assert refused(executor, QKV, n=n).code == "too-large"


def test_a_device_without_memory_is_a_refusal(make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    executor = make_executor()
    with monkeypatch.context() as patched:
        patched.setattr(executor, "_queue", no_memory)
        error = refused(executor, QKV, n=random(1, 32))
    assert error.code == "out-of-memory"
    assert "20.00 GiB" not in str(error)
    run(executor, QKV, n=random(1, 32))


# What is remembered


def test_what_is_compiled_is_remembered_and_bounded(
    make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "REMEMBERED", 4)
    executor = make_executor()
    run(executor, QKV, n=random(1, 32))
    (kept,) = executor._compiled.values()
    for rows in range(2, 20):
        run(executor, QKV, n=random(rows, 32))
        run(executor, QKV, n=random(1, 32))
    assert len(executor._compiled) == 4
    assert kept in executor._compiled.values(), "what is in use stays"


def test_what_no_runner_sends_is_not_remembered(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    names = [f"r{index}" for index in range(REMEMBERED_STEPS + 2)]
    steps = tuple(Step("add", after, (before, before)) for before, after in itertools.pairwise(names))
    x = random(1, 3)
    assert torch.equal(run(executor, Program((names[0],), steps, (names[-1],)), r0=x)[names[-1]], x * 2 ** len(steps))
    assert not executor._compiled


# Times


def test_times_are_those_of_the_clock(store: Any, spec: Any) -> None:
    from teegpu.gpu.weights import DeviceWeights

    ticks = itertools.count()
    weights = DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32)
    executor = Executor(weights, Limits(), clock=lambda: float(next(ticks)))
    done = executor.run(FUSED, {"a": random(3, 32), "x": random(3, 32)}, dict.fromkeys(FUSED.outputs, "fp16"))
    # Readings: start, checked; then start, in, after each of 4 kernels, out.
    assert (done.bring_in_seconds, done.compute_seconds, done.bring_out_seconds) == (2.0, 4.0, 1.0)
    assert done.operations == {"LINEAR": (2, 2.0), "ADD": (1, 1.0), "SCALE": (1, 1.0)}


def test_times_add_up(make_executor: MakeExecutor) -> None:
    done = make_executor().run(FUSED, {"a": random(3, 32), "x": random(3, 32)}, dict.fromkeys(FUSED.outputs, "fp16"))
    assert {name: count for name, (count, _) in done.operations.items()} == FUSED.counts
    assert sum(seconds for _, seconds in done.operations.values()) == pytest.approx(done.compute_seconds)
    assert min(done.bring_in_seconds, done.bring_out_seconds, *(s for _, s in done.operations.values())) >= 0.0
