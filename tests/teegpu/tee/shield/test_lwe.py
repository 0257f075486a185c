from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from teegpu import ring
from teegpu.errors import ShieldError
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import lwe, sealed
from teegpu.tee.shield.facts import Product, products, quantised
from teegpu.tee.shield.lwe import LweMask, LweSource
from teegpu.tee.shield.wrapping import multiply
from tests.conftest import TinyModel

O_PROJ: Product = ("layers.1.o_proj",)


class World:
    def __init__(self, tiny_model: TinyModel, data: Path) -> None:
        model = tiny_model("llama")
        self.spec = read_spec(model)
        self.store = WeightStore(model, self.spec)
        self.digest = self.store.digest()
        self.data = sealed.data_folder(str(data))
        self.matrices = {
            product: ring.RingMatrix(quantised(self.store, self.spec, product)[0]) for product in products(self.spec)
        }

    def make(self) -> Path:
        return lwe.make_hints(self.store, self.spec, self.digest, self.data)

    def source(self) -> LweSource:
        return LweSource(self.digest, self.spec, lwe.load_hints(self.spec, self.digest, self.data))


@pytest.fixture
def world(tiny_model: TinyModel, tmp_path: Path) -> Iterator[World]:
    made = World(tiny_model, tmp_path / "data")
    yield made
    made.store.close()


def secret_of(mask: LweMask) -> torch.Tensor:
    assert mask._secret is not None
    return mask._secret


def test_what_is_left_is_the_error_and_nothing_else(world: World) -> None:
    world.make()
    source = world.source()
    assert (source.mode, source.noise) == ("lwe", 6.4)
    for product, matrix in world.matrices.items():
        values = torch.randint(-(2**15), 2**15, (5, matrix.shape[1])).to(torch.int32)
        mask = source.take(product, 5)
        error = mask.operand - multiply(secret_of(mask), source._matrices[product].t())
        assert error.abs().max() < 8 * lwe.SIGMA
        answer = matrix.product(values + mask.operand)
        # Bit by bit: the product of the values with their errors, which are small against them.
        assert torch.equal(answer - mask.correction(), matrix.product(values + error))
    source.close()
    source.close()


def test_errors_and_secrets_are_as_they_should_be(world: World) -> None:
    world.make()
    source = world.source()
    mask = source.take(O_PROJ, 3000)
    secret = secret_of(mask)
    error = (mask.operand - multiply(secret, source._matrices[O_PROJ].t())).to(torch.float64)
    count = error.numel()
    assert abs(float(error.std()) / lwe.SIGMA - 1) < 4 / math.sqrt(2 * count)
    assert abs(float(secret.to(torch.float64).mean())) < 4 * math.sqrt(2 / 3 / secret.numel())
    assert abs(float(secret.to(torch.float64).var()) - 2 / 3) < 0.01
    bits = torch.stack([(mask.operand >> bit) & 1 for bit in range(32)]).to(torch.float64).mean((-1, -2))
    assert ((bits - 0.5).abs() < 4.5 * 0.5 / math.sqrt(count)).all()


def test_every_mask_is_fresh(world: World) -> None:
    world.make()
    source, other = world.source(), world.source()
    rows = torch.cat([source.take(O_PROJ, 4).operand, source.take(O_PROJ, 4).operand, other.take(O_PROJ, 4).operand])
    assert len({row.numpy().tobytes() for row in rows}) == 12
    mask = source.take(O_PROJ, 1)
    mask.correction()
    with pytest.raises(RuntimeError, match="once"):
        mask.correction()


def test_the_public_matrix_is_of_the_model_and_the_width() -> None:
    first = lwe.public_matrix("a" * 64, 40)
    assert first.shape == (40, lwe.DIMENSION)
    assert torch.equal(first, lwe.public_matrix("a" * 64, 40))
    assert not torch.equal(first, lwe.public_matrix("b" * 64, 40))
    assert not torch.equal(first, lwe.public_matrix("a" * 64, 41)[:40])


def test_hints_are_those_of_the_weights_and_sealed(world: World) -> None:
    path = world.make()
    assert path.stat().st_mode & 0o077 == 0
    assert abs(path.stat().st_size - lwe.hint_bytes(world.spec)) < 20_000
    hints = lwe.load_hints(world.spec, world.digest, world.data)
    weight, _ = quantised(world.store, world.spec, O_PROJ)
    expected = multiply(weight.to(torch.int32), lwe.public_matrix(world.digest, weight.shape[1]))
    assert torch.equal(hints[O_PROJ], expected)
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShieldError, match="damaged"):
        world.source()
    path.chmod(0o644)
    with pytest.raises(ShieldError, match="chmod 600"):
        world.source()


def test_hints_that_are_missing_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShieldError, match="teegpu hint make"):
        world.source()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ShieldError, match=r"free: set shield\.dir"):
        world.make()
    assert [entry for entry in world.data.iterdir() if not entry.name.startswith(".")] == []


def test_blocks_make_no_difference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make()
    before = lwe.load_hints(world.spec, world.digest, world.data)
    monkeypatch.setattr(lwe, "_BLOCK_ROWS", 7)
    shares: list[float] = []
    lwe.make_hints(world.store, world.spec, world.digest, world.data, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    after = lwe.load_hints(world.spec, world.digest, world.data)
    assert all(torch.equal(before[product], after[product]) for product in before)
