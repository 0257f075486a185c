from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product, products
from teegpu.tee.shield.plainverify import Dtypes, PlainKeys
from tests.conftest import TinyModel

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def keys(tiny_model: TinyModel, tmp_path: Path) -> PlainKeys:
    return load(tiny_model, tmp_path)


def load(tiny_model: TinyModel, tmp_path: Path, **more: bool) -> PlainKeys:
    model = tiny_model("llama")
    spec = read_spec(model)
    with WeightStore(model, spec) as store:
        folder = sealed.data_folder(str(tmp_path / "shield"))
        return PlainKeys.load(store, spec, store.digest(), checks=40, folder=folder, **more)


def weights(tiny_model: TinyModel) -> dict[Product, torch.Tensor]:
    model = tiny_model("llama")
    spec = read_spec(model)
    with WeightStore(model, spec) as store:
        return {p: torch.cat([store.load(name, torch.float32) for name in p]) for p in products(spec)}


def inputs(columns: int, rows: int = 50) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 300  # as real activations are
    x[7] *= 1e-4
    x[9] = 0
    return x


def served(x: torch.Tensor, weight: torch.Tensor, dtypes: Dtypes) -> torch.Tensor:
    """What an honest server answers."""
    compute = TORCH[dtypes.server]
    product = x.to(TORCH[dtypes.sent]).to(compute) @ weight.to(compute).t()
    return product.to(TORCH[dtypes.reply]).to(torch.float32)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("server", ["fp32", "bf16", "fp16"])
def test_honest_servers_pass(keys: PlainKeys, tiny_model: TinyModel, wire: str, server: str) -> None:
    dtypes = Dtypes(wire, server, wire)
    for product, weight in weights(tiny_model).items():
        x = inputs(weight.shape[1])
        assert keys.wrong_rows(product, x, served(x, weight, dtypes), dtypes) == []


@pytest.mark.parametrize("dtypes", [Dtypes("fp16", "fp32", "fp16"), Dtypes("bf16", "bf16", "bf16")])
def test_gross_cheats_are_caught(keys: PlainKeys, tiny_model: TinyModel, dtypes: Dtypes) -> None:
    table = weights(tiny_model)
    for product, weight in table.items():
        x = inputs(weight.shape[1])
        honest = served(x, weight, dtypes)
        zeroed, swapped, doubled, infinite = (honest.clone() for _ in range(4))
        zeroed[5] = 0
        swapped[[5, 6]] = swapped[[6, 5]]
        doubled[5] *= 2
        infinite[5, 0] = float("inf")
        assert keys.wrong_rows(product, x, zeroed, dtypes) == [5]
        assert keys.wrong_rows(product, x, swapped, dtypes) == [5, 6]
        assert keys.wrong_rows(product, x, doubled, dtypes) == [5]
        assert keys.wrong_rows(product, x, infinite, dtypes) == [5]
    o = [table["layers.0.o_proj",], table["layers.1.o_proj",]]
    x = inputs(o[0].shape[1])
    assert len(keys.wrong_rows(("layers.0.o_proj",), x, served(x, o[1], dtypes), dtypes)) == 49  # but the row of zeros


def test_what_is_stated_passes(keys: PlainKeys, tiny_model: TinyModel) -> None:
    """The limit that the documentation states: a small change is not seen."""
    product, weight = next(iter(weights(tiny_model).items()))
    dtypes = Dtypes("bf16", "bf16", "bf16")
    x = inputs(weight.shape[1])
    assert keys.wrong_rows(product, x, served(x, weight, dtypes) * 1.01, dtypes) == []


def test_an_expected_error_is_allowed_for(keys: PlainKeys, tiny_model: TinyModel) -> None:
    product, weight = next(iter(weights(tiny_model).items()))
    dtypes = Dtypes("fp32", "fp32", "fp32")
    x = inputs(weight.shape[1])
    off = served(x, weight, dtypes) + 0.01
    assert len(keys.wrong_rows(product, x, off, dtypes)) == 50
    assert keys.wrong_rows(product, x, off, dtypes, torch.full((50, 1), 0.1)) == []


def test_keys_are_kept(keys: PlainKeys, tiny_model: TinyModel, tmp_path: Path) -> None:
    again = load(tiny_model, tmp_path)
    assert torch.equal(again._signs, keys._signs)
    assert torch.equal(again._folded[("lm_head",)].values, keys._folded[("lm_head",)].values)
    assert not torch.equal(load(tiny_model, tmp_path, remake=True)._signs, keys._signs)
    again.discard()
    assert not torch.equal(load(tiny_model, tmp_path)._signs, keys._signs)
