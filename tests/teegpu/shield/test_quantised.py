from __future__ import annotations

import pytest
import torch

from teegpu import ring
from teegpu.errors import ModelError
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.shield import quantised
from teegpu.shield.quantised import Linear, Measures
from tests.conftest import TinyModel


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_matrix_of_a_pass_is_known(tiny_model: TinyModel, architecture: str) -> None:
    folder = tiny_model(architecture)
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        measures = Measures.of_model(store, spec)
        names = [name for linear in quantised.linears(spec) for name in linear]
        assert names == [name for name in spec.weights if name.endswith(("_proj", "lm_head"))]
        for linear in quantised.linears(spec):
            known = measures.of(linear)
            weight, scale = quantised.quantised(store, spec, linear)
            whole = torch.cat([store.load(name, torch.float32) for name in linear])
            assert torch.equal(weight, ring.quantise(whole)[0])
            assert torch.equal(scale, known.scale)
            assert (known.rows, known.columns) == tuple(weight.shape) == quantised.shape_of(spec, linear)
            assert known.largest_norm == float(weight.to(torch.float64).norm(dim=-1).max())
    assert quantised.layer_of(("layers.1.o_proj",)) == 1
    assert quantised.layer_of(("lm_head",)) == -1


def test_a_servers_digest_is_that_of_what_it_holds(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        measures = Measures.of_model(store, spec)
        held = [name for name in spec.weights if name.endswith("_proj") and name.startswith("layers.1.")]
        digests = [(name, ring.digest(*ring.quantise(store.load(name)))) for name in [*held, "lm_head"]]
    assert measures.server_digest((1, 1)) == ring.combined(digests)
    assert len({measures.server_digest(layers) for layers in [(0, 0), (1, 1), (0, 1)]}) == 3


def test_one_pass_shows_the_same_to_all(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    seen: list[tuple[Linear, int]] = []
    shares: list[float] = []
    with WeightStore(folder, spec) as store:

        def reader(linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
            seen.append((linear, id(weight)))

        quantised.read(store, spec, [reader, reader], progress=shares.append)
        assert [linear for linear, _ in seen[::2]] == quantised.linears(spec)
        assert seen[::2] == seen[1::2]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        seen.clear()
        quantised.read(store, spec, [reader], wanted=[("lm_head",)])
        assert [linear for linear, _ in seen] == [("lm_head",)]


@pytest.mark.parametrize("width", [40, 1024, 1025, 3000])
def test_norms_are_exact(width: int) -> None:
    weight = torch.full((50, width), 127, dtype=torch.int8)
    weight[:, ::2] = 3
    weight[7] = -127
    assert quantised._largest_norm(weight) == (width * 127**2) ** 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45])
def test_weights_that_no_whole_number_stands_for_are_refused(value: float) -> None:
    values = torch.randn(4, 8)
    values[2] = value
    weight, scale = ring.quantise(values)
    spec = ModelSpec.__new__(ModelSpec)
    object.__setattr__(spec, "weights", {"layers.0.o_proj": (4, 8)})
    with pytest.raises(ModelError, match=r"layers\.0\.o_proj has rows of weights"):
        Measures(spec).add(("layers.0.o_proj",), weight, scale)
    values[2] = 0.0  # a row of zeros is a row
    Measures(spec).add(("layers.0.o_proj",), *ring.quantise(values))
