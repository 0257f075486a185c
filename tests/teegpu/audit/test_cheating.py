"""What lying servers do to an answer, and that verification finds it every time in thousands of tries."""

from __future__ import annotations

import random

import pytest
import torch

from teegpu.audit import cheating
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.ring import RingMatrix
from teegpu.shield.freivalds import Checks
from teegpu.shield.quantised import Linear, Reader, linears, quantised
from tests.conftest import TinyModel
from tests.teegpu.audit.made import uniform

ROWS, COLUMNS = 6, 10


@pytest.mark.parametrize("kind", ["flip-bit", "top-bit", "zero", "swap-rows"])
def test_a_lie_is_what_it_is_called(kind: str) -> None:
    for seed in range(50):
        honest = uniform(ROWS, COLUMNS, torch.Generator().manual_seed(seed))
        frame = bytearray(honest.numpy().tobytes())
        cheating.spoil(kind, frame, ROWS, 4, random.Random(seed))
        told = torch.frombuffer(frame, dtype=torch.int32).view(ROWS, COLUMNS)
        difference = (told - honest).flatten()
        changed = difference[difference != 0]
        if kind == "flip-bit":
            assert len(changed) == 1
            assert int(changed[0]).bit_count() == 1 or (-int(changed[0])).bit_count() == 1
        elif kind == "top-bit":
            assert changed.tolist() == [-(2**31)]
        elif kind == "zero":
            assert not told.any()
        else:
            rows = {tuple(row) for row in honest.tolist()}
            assert {tuple(row) for row in told.tolist()} == rows
            assert (told != honest).any(-1).sum() == 2


def test_one_row_can_not_be_swapped() -> None:
    frame = bytearray(range(40))
    cheating.spoil("swap-rows", frame, 1, 4, random.Random(0))
    assert frame == bytearray(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_a_steered_answer_has_the_token_that_the_server_wants(dtype: torch.dtype) -> None:
    for seed in range(12):
        logits = (torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(seed)) * 2**seed).to(dtype)
        changed = logits.clone()
        cheating.steer(changed, 7)
        assert changed.argmax(-1).tolist() == [7] * ROWS
        changed[:, 7] = logits[:, 7]
        assert torch.equal(changed, logits)


def test_an_unknown_lie_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no lie 'fib'"):
        cheating.LyingServer("fib", layers=2)


TRIES = 400
"""Of each kind of lie."""


class Verified:
    """A tiny model's matrices, and what their products are checked with."""

    def __init__(self, folder: ModelFolder) -> None:
        spec = read_spec(folder)
        with WeightStore(folder, spec) as store:
            self.linears = [linear for linear in linears(spec) if linear != ("lm_head",)]
            weights = {linear: quantised(store, spec, linear) for linear in linears(spec)}

        def stream(reader: Reader) -> None:
            for linear, (weight, scale) in weights.items():
                reader(linear, weight, scale)

        self.checks = Checks(40, stream)
        self.matrices = {linear: RingMatrix(weights[linear][0]) for linear in self.linears}

    def elsewhere(self, linear: Linear) -> Linear:
        """The same matrix of the other layer."""
        layer = "layers.1" if linear[0].startswith("layers.0") else "layers.0"
        return tuple(layer + name[len(layer) :] for name in linear)


@pytest.fixture(scope="module")
def verified(tiny_model: TinyModel) -> Verified:
    return Verified(tiny_model("llama"))


def small(rows: int, columns: int, numbers: torch.Generator) -> torch.Tensor:
    """Values as the fixed point makes them."""
    return torch.randint(-(2**14), 2**14, (rows, columns), generator=numbers).to(torch.int32)


@pytest.mark.parametrize("kind", [kind for kind in cheating.KINDS if kind not in ("dtype", "escapes")])
def test_every_lie_is_caught_and_no_truth_is(verified: Verified, kind: str) -> None:
    checks = verified.checks
    numbers, chance = torch.Generator().manual_seed(8), random.Random(8)
    earlier: dict[Linear, torch.Tensor] = {}
    told = 0
    while told < TRIES:
        linear = chance.choice(verified.linears)
        matrix = verified.matrices[linear]
        sent = small(ROWS, matrix.shape[1], numbers)
        honest = matrix.product(sent)
        assert checks.prepare(linear, sent)(honest) == []
        if kind == "other-layer":
            answer = verified.matrices[verified.elsewhere(linear)].product(sent)
        elif kind == "replay":
            answer = earlier.get(linear, honest)
            earlier[linear] = honest
        elif kind == "steer":
            answer = honest.clone()
            cheating.steer(answer, chance.randrange(answer.shape[1]))
        else:
            frame = bytearray(honest.numpy().tobytes())
            cheating.spoil(kind, frame, ROWS, 4, chance)
            answer = torch.frombuffer(frame, dtype=torch.int32).view_as(honest)
        wrong = (answer != honest).any(-1).nonzero().flatten().tolist()
        if wrong:
            told += 1
            assert checks.prepare(linear, sent)(answer) == wrong
