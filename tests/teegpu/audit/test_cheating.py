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
from teegpu.tee.shield.facts import Product, products, quantised
from teegpu.tee.shield.verify import Keys
from teegpu.tee.shield.wholeverify import WholeKeys
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


def test_an_unknown_lie_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no lie 'fib'"):
        cheating.LyingServer("fib", layers=2)


TRIES = 400
"""Of each kind of lie."""


class Verified:
    """A tiny model's keys, and its products."""

    def __init__(self, folder: ModelFolder) -> None:
        spec = read_spec(folder)
        with WeightStore(folder, spec) as store:
            self.keys = Keys.make(store, spec, 40)
            self.whole_keys = WholeKeys.make(store, spec, 40)
            self.products = [product for product in products(spec) if product != ("lm_head",)]
            self.matrices = {each: RingMatrix(quantised(store, spec, each)[0]) for each in self.products}

    def elsewhere(self, product: Product) -> Product:
        """The same product of the other layer."""
        layer = "layers.1" if product[0].startswith("layers.0") else "layers.0"
        return tuple(layer + name[len(layer) :] for name in product)


@pytest.fixture(scope="module")
def verified(tiny_model: TinyModel) -> Verified:
    return Verified(tiny_model("llama"))


def small(rows: int, columns: int, numbers: torch.Generator) -> torch.Tensor:
    """Values as the fixed point makes them."""
    return torch.randint(-(2**14), 2**14, (rows, columns), generator=numbers).to(torch.int32)


@pytest.mark.parametrize("checked", ["masked", "whole"])
@pytest.mark.parametrize("kind", cheating.KINDS)
def test_every_lie_is_caught_and_no_truth_is(verified: Verified, kind: str, checked: str) -> None:
    keys, values = (verified.keys, uniform) if checked == "masked" else (verified.whole_keys, small)
    numbers, chance = torch.Generator().manual_seed(8), random.Random(8)
    earlier: dict[Product, torch.Tensor] = {}
    told = 0
    while told < TRIES:
        product = chance.choice(verified.products)
        matrix = verified.matrices[product]
        sent = values(ROWS, matrix.shape[1], numbers)
        honest = matrix.product(sent)
        assert keys.wrong_rows(product, sent, honest) == []
        if kind == "other-layer":
            answer = verified.matrices[verified.elsewhere(product)].product(sent)
        elif kind == "replay":
            answer = earlier.get(product, honest)
            earlier[product] = honest
        else:
            frame = bytearray(honest.numpy().tobytes())
            cheating.spoil(kind, frame, ROWS, 4, chance)
            answer = torch.frombuffer(frame, dtype=torch.int32).view_as(honest)
        wrong = (answer != honest).any(-1).nonzero().flatten().tolist()
        if wrong:
            told += 1
            assert keys.wrong_rows(product, sent, answer) == wrong
