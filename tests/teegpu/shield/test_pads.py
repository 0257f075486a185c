"""Pads: exact, uniform, each used once, whoever asks and whatever becomes of the request."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from teegpu import machine, ring
from teegpu.errors import ShieldError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.shield.pads import Mask, Pads
from teegpu.shield.quantised import LM_HEAD, Linear, linears, quantised
from tests.conftest import TinyModel

O_PROJ: Linear = ("layers.1.o_proj",)


class World:
    """A tiny model, its matrices, and pads for it."""

    def __init__(self, model: ModelFolder) -> None:
        self.spec = read_spec(model)
        self.store = WeightStore(model, self.spec)
        self.linears = linears(self.spec)
        self.matrices = {each: ring.RingMatrix(quantised(self.store, self.spec, each)[0]) for each in self.linears}
        self.pads = Pads(self.store, self.spec)

    def check(self, linear: Linear, mask: Mask, seed: int = 0) -> None:
        """Masked and unmasked, a product is what it is."""
        values = torch.randint(-1000, 1000, mask.operand.shape, generator=torch.Generator().manual_seed(seed))
        values = values.to(torch.int32)
        matrix = self.matrices[linear]
        answer = matrix.product(values + mask.operand)
        assert torch.equal(answer - mask.correction, matrix.product(values))


@pytest.fixture
def world(tiny_model: TinyModel) -> Iterator[World]:
    made = World(tiny_model("llama"))
    yield made
    made.store.close()


def rows_of(mask: Mask) -> list[bytes]:
    return [row.numpy().tobytes() for row in mask.operand]


def test_corrections_are_exact_and_no_row_comes_twice(world: World) -> None:
    """Also over the seams between what was made at different times."""
    pads = world.pads
    seen: set[bytes] = set()
    count = 0
    for number, rows in enumerate((1, 1, 5, 9, 24, 1, 60, 3)):
        pads.make(rows + 7, 3)
        for linear in world.linears:
            wanted = 1 if linear == LM_HEAD else rows
            mask = pads.take(linear, wanted)
            assert mask.operand.shape == (wanted, world.matrices[linear].shape[1])
            seen |= set(rows_of(mask))
            count += wanted
            world.check(linear, mask, number)
    assert len(seen) == count
    assert {pads.left(linear) for linear in world.linears if linear != LM_HEAD} == {7}
    assert pads.left(LM_HEAD) == 2


def test_no_more_is_made_than_is_missing(world: World) -> None:
    pads = world.pads
    pads.make(10, 2)
    first = pads.nbytes
    pads.make(10, 2)
    assert pads.nbytes == first
    assert (pads.offline.tokens, pads.offline.logits) == (10, 2)
    pads.take(O_PROJ, 4)
    pads.make(10, 2)
    assert {pads.left(linear) for linear in world.linears} == {10, 2}
    assert pads.offline.most_bytes == pads.nbytes
    assert pads.offline.seconds > 0


def test_masks_outlive_the_pads(world: World) -> None:
    world.pads.make(64, 0)
    masks = [world.pads.take(O_PROJ, rows) for rows in (3, 8, 20, 1)]
    world.pads.close()
    world.pads.close()
    for mask in reversed(masks):
        world.check(O_PROJ, mask)
    assert world.pads.nbytes == 0


def test_pads_are_uniform(world: World) -> None:
    world.pads.make(1024, 0)
    values = world.pads.take(O_PROJ, 1024).operand.flatten()
    bits = torch.stack([(values >> bit) & 1 for bit in range(32)]).to(torch.float64).mean(-1)
    assert ((bits - 0.5).abs() < 4.5 * 0.5 / values.numel() ** 0.5).all()
    bytes_ = values.view(torch.uint8).to(torch.int64)
    expected = bytes_.numel() / 256
    chi_squared = float(((torch.bincount(bytes_, minlength=256) - expected) ** 2 / expected).sum())
    assert 150 < chi_squared < 380  # 255 degrees of freedom: mean 255, standard deviation 22.6


def test_two_runs_never_have_the_same_pads(world: World) -> None:
    again = Pads(world.store, world.spec)
    for pads in (world.pads, again):
        pads.make(8, 0)
    rows = [
        row for pads in (world.pads, again) for linear in world.linears[:4] for row in rows_of(pads.take(linear, 8))
    ]
    assert len(set(rows)) == len(rows)


def test_what_is_not_there_is_an_error_and_takes_nothing(world: World) -> None:
    world.pads.make(5, 1)
    with pytest.raises(ShieldError, match="no pads left for the layers: 6 are needed, and 5 are there"):
        world.pads.take(O_PROJ, 6)
    world.check(O_PROJ, world.pads.take(O_PROJ, 5))
    world.pads.take(LM_HEAD, 1)
    with pytest.raises(ShieldError, match="no pads left for lm_head: 1 are needed, and 0 are there"):
        world.pads.take(LM_HEAD, 1)


def test_threads_never_get_the_same_pad(world: World) -> None:
    """Also those that make more meanwhile."""
    each, threads = 60, 8
    world.pads.make(each * threads // 2, 0)
    ready = threading.Barrier(threads)

    def ask(number: int) -> list[bytes]:
        ready.wait(30)
        found = []
        for count in range(each):
            if count == each // 3 and number % 2:
                world.pads.make(each * threads, 0)
            mask = world.pads.take(O_PROJ, 1)
            world.check(O_PROJ, mask, count)
            found += rows_of(mask)
        return found

    world.pads.make(each * threads, 0)
    with ThreadPoolExecutor(threads) as pool:
        rows = [row for found in pool.map(ask, range(threads)) for row in found]
    assert len(set(rows)) == len(rows) == each * threads


def test_a_fork_gets_none(world: World) -> None:
    world.pads.make(8, 1)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        told = b"it got one"
        try:
            for ask in (lambda: world.pads.take(O_PROJ, 1), lambda: world.pads.make(20, 1)):
                try:
                    ask()
                except ShieldError as error:
                    told = str(error).encode()
                else:
                    told = b"it got one"
                    break
        finally:
            os.write(writing, told)
            os._exit(0)
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    assert b"belong to the process that made them" in os.read(reading, 1000)
    os.close(reading)
    world.check(O_PROJ, world.pads.take(O_PROJ, 8))


def test_pads_beyond_what_is_free_are_refused_before_any_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**20)
    with pytest.raises(ShieldError, match=r"pads for 1,000,000 tokens take .* 1\.0 MiB are free: about [\d,]+ "):
        world.pads.make(1_000_000, 0)
    assert world.pads.nbytes == 0


def test_progress_is_told(world: World) -> None:
    told: list[tuple[str, float | None]] = []
    world.pads.make(12, 2, lambda text, share: told.append((text, share)))
    assert {text for text, _ in told} == {"making pads for 12 tokens"}
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("columns", [1, 3, 4, 70])
def test_a_stream_can_be_entered_at_any_row(columns: int) -> None:
    whole = ring.expand(bytes(range(32)), 50, columns)
    for first, count in ((0, 50), (1, 1), (2, 17), (13, 30), (49, 1)):
        assert torch.equal(ring.expand(bytes(range(32)), count, columns, first=first), whole[first : first + count])
