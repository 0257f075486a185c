from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teegpu import ring
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import facts
from teegpu.tee.shield.facts import FactTable
from tests.conftest import TinyModel


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_product_of_a_pass_is_known(tiny_model: TinyModel, architecture: str) -> None:
    folder = tiny_model(architecture)
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        table = FactTable.make(store, spec)
        names = [name for product in facts.products(spec) for name in product]
        assert names == [name for name in spec.weights if name.endswith(("_proj", "lm_head"))]
        for product in facts.products(spec):
            known = table.of(product)
            weight, scale = facts.quantised(store, spec, product)
            whole = torch.cat([store.load(name, torch.float32) for name in product])
            assert torch.equal(weight, ring.quantise(whole)[0])
            assert torch.equal(scale, known.scale)
            assert (known.rows, known.columns) == tuple(weight.shape)
            assert known.largest_norm == float(weight.to(torch.float64).norm(dim=-1).max())
    assert facts.layer_of(("layers.1.o_proj",)) == 1
    assert facts.layer_of(("lm_head",)) == -1


def test_a_servers_digest_is_that_of_what_it_holds(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        table = FactTable.make(store, spec)
        held = [name for name in spec.weights if name.endswith("_proj") and name.startswith("layers.1.")]
        digests = [(name, ring.digest(*ring.quantise(store.load(name)))) for name in [*held, "lm_head"]]
    assert table.server_digest((1, 1)) == ring.combined(digests)
    assert len({table.server_digest(layers) for layers in [(0, 0), (1, 1), (0, 1)]}) == 3


def test_facts_are_kept_for_the_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    shares: list[float] = []
    with WeightStore(folder, spec) as store:
        made = FactTable.load(store, spec, "abc", cache_dir=tmp_path, progress=shares.append)
    assert shares[-1] == 1.0
    assert (tmp_path / "shield" / "abc.npz").exists()
    # the store is closed: nothing can be read from it any more
    kept = FactTable.load(store, spec, "abc", cache_dir=tmp_path)
    assert kept.server_digest((0, 1)) == made.server_digest((0, 1))
    for product in facts.products(spec):
        assert torch.equal(kept.of(product).scale, made.of(product).scale)
        assert kept.of(product).largest_norm == made.of(product).largest_norm


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_made_anew(tiny_model: TinyModel, tmp_path: Path, content: bytes | None) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    path = tmp_path / "shield" / "abc.npz"
    with WeightStore(folder, spec) as store:
        FactTable.load(store, spec, "abc", cache_dir=tmp_path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
        FactTable.load(store, spec, "abc", cache_dir=tmp_path)
        assert path.read_bytes() == whole


def test_facts_of_another_shape_are_not_taken(tiny_model: TinyModel, tmp_path: Path) -> None:
    for folder in (tiny_model("llama"), tiny_model("llama", num_hidden_layers=3)):
        spec = read_spec(folder)
        with WeightStore(folder, spec) as store:
            assert FactTable.load(store, spec, "abc", cache_dir=tmp_path).of(("lm_head",)).rows == spec.vocab_size
            assert len(facts.products(spec)) == 4 * spec.layers + 1
