"""Programs in the ring on the device, against whole numbers of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from teegpu import ring
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.wire.limits import Limits
from teegpu.wire.program import Program, ShapeError, ring_linear, single
from tests.teegpu.gpu.conftest import decoded

MakeExecutor = Callable[..., Executor]

QKV = single(["n"], ring_linear("qkv", "n", "layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"))
SEED = bytes(range(32))


@pytest.fixture
def make_ring(store: Any, spec: Any, device: torch.device) -> Callable[..., RingWeights]:
    def make(layers: tuple[int, int] = (0, 1)) -> RingWeights:
        return RingWeights(lambda: contextlib.nullcontext(store), spec, device=device, layers=layers)

    return make


@pytest.fixture
def executor(make_executor: MakeExecutor, make_ring: Callable[..., RingWeights]) -> Executor:
    return make_executor(ring=make_ring())


def operand(rows: int, columns: int = 32) -> torch.Tensor:
    return ring.expand(SEED, rows, columns)


def expected(store: Any, weight: str, x: torch.Tensor) -> torch.Tensor:
    quantised, _ = ring.quantise(store.tensors[weight])
    wide = x.numpy().astype(object) @ quantised.numpy().astype(object).T
    return torch.from_numpy((wide % 2**32).astype(np.uint32).view(np.int32))


def run(executor: Executor, program: Program, inputs: Mapping[str, ring.Operand]) -> dict[str, torch.Tensor]:
    return decoded(executor.run(program, inputs, dict.fromkeys(program.outputs, "int32")))


@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize("weight", ["layers.0.o_proj", "layers.1.down_proj", "lm_head"])
def test_a_product_is_exact(executor: Executor, store: Any, rows: int, weight: str) -> None:
    for attempt in range(3 if rows == 1 else 1):  # what comes again is replayed on CUDA
        x = ring.expand(bytes([attempt] * 32), rows, store.tensors[weight].shape[1])
        done = executor.run(single(["x"], ring_linear("y", "x", weight)), {"x": x}, {"y": "int32"})
        assert torch.equal(decoded(done)["y"], expected(store, weight, x))
        assert {name: count for name, (count, _) in done.operations.items()} == {"RING_LINEAR": 1}


@pytest.mark.parametrize("rows", [1, 3])
def test_several_weights_are_one_product_side_by_side(executor: Executor, store: Any, rows: int) -> None:
    x = operand(rows)
    done = executor.run(QKV, {"n": x}, {"qkv": "int32"})
    (compiled,) = executor._compiled.values()
    assert len(compiled.kernels) == 1
    assert done.operations["RING_LINEAR"][0] == 1
    assert torch.equal(decoded(done)["qkv"], torch.cat([expected(store, name, x) for name in QKV.weights], dim=-1))


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("k_proj", "q_proj", "v_proj"), ("q_proj", "norm")])
def test_weights_that_are_no_matrix_together_are_refused(executor: Executor, names: tuple[str, ...]) -> None:
    weights = [name if name == "norm" else f"layers.0.{name}" for name in names]
    with pytest.raises(ShapeError):
        run(executor, single(["x"], ring_linear("y", "x", *weights)), {"x": operand(2)})


def test_a_seed_stands_for_what_it_expands_to(executor: Executor) -> None:
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            run(executor, QKV, {"n": ring.Seed(SEED, (5, 32))}).values(),
            run(executor, QKV, {"n": operand(5)}).values(),
            strict=True,
        )
    )


def test_a_seed_is_not_expanded_before_the_limits_are_checked(
    make_executor: MakeExecutor, make_ring: Callable[..., RingWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "expand", lambda *_: pytest.fail("expanded"))
    executor = make_executor(limits=Limits(working_bytes=2**20), ring=make_ring())
    with pytest.raises(ShapeError, match=r"limits\.program_mib") as caught:
        run(executor, QKV, {"n": ring.Seed(SEED, (2**14, 32))})
    assert caught.value.code == "too-large"
    with pytest.raises(ShapeError, match="can't take an input") as caught:
        run(executor, QKV, {"n": ring.Seed(SEED, (2, 33))})
    assert executor.ring is not None
    assert not executor.ring.made


def test_seeds_buy_no_more_work_than_is_said(
    make_executor: MakeExecutor, make_ring: Callable[..., RingWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 bytes that stand for a million rows, through 64 products: hours, and within the bounds on memory."""
    monkeypatch.setattr(ring, "expand", lambda *_: pytest.fail("expanded"))
    executor = make_executor(limits=Limits(working_bytes=2**50, message_bytes=2**50), ring=make_ring())
    weights = [f"layers.{number % 4 // 2}.{'down' if number % 2 else 'gate'}_proj" for number in range(64)]
    steps = tuple(ring_linear(f"r{number + 1}", f"r{number}", name) for number, name in enumerate(weights))
    with pytest.raises(ShapeError, match=r"limits\.program_macs on the server") as caught:
        run(executor, Program(("r0",), steps, ("r64",)), {"r0": ring.Seed(SEED, (2**28, 32))})
    assert caught.value.code == "too-large"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_only_int32_is_in_the_ring(executor: Executor, dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="is in the ring, but came as") as caught:
        run(executor, QKV, {"n": torch.ones(2, 32, dtype=dtype)})
    assert caught.value.code == "bad-shape"


@pytest.mark.parametrize("weight", ["embed_tokens", "norm", "layers.7.q_proj", "nonsense"])
def test_other_weights_are_refused(executor: Executor, weight: str) -> None:
    with pytest.raises(ShapeError):
        run(executor, single(["x"], ring_linear("y", "x", weight)), {"x": operand(2)})


def test_without_int8_weights_it_is_not_offered(make_executor: MakeExecutor) -> None:
    with pytest.raises(ShapeError, match=r"server\.shield is off") as caught:
        run(make_executor(), QKV, {"n": operand(2)})
    assert caught.value.code == "not-offered"


# The int8 weights


def test_they_are_made_once_and_told_before_they_take_memory(executor: Executor) -> None:
    assert executor.working_bytes == 0
    assert executor.ring is not None
    assert executor.ring.nbytes == 0
    assert executor.ring.digest == ""
    run(executor, QKV, {"n": operand(2)})
    assert executor.working_bytes >= executor.ring.nbytes > 0
    assert len(executor.ring.digest) == 64
    assert executor.make_ring() is executor.ring


def test_the_digest_is_that_of_what_is_held(store: Any, spec: Any, make_ring: Callable[..., RingWeights]) -> None:
    def by_hand(layers: set[int], lm_head: bool) -> str:
        names = [
            name for name, shape in spec.weights.items()
            if len(shape) == 2 and name != "embed_tokens"
            and (lm_head if name == "lm_head" else int(name.split(".")[1]) in layers)
        ]  # fmt: skip
        return ring.combined((name, ring.digest(*ring.quantise(store.tensors[name]))) for name in names)

    digests = []
    for layers in ((0, 1), (0, 0), (1, 1)):
        held = make_ring(layers)
        held.make()
        assert held.digest == by_hand(set(range(layers[0], layers[1] + 1)), layers[1] == 1)
        digests.append(held.digest)
    assert len(set(digests)) == 3
