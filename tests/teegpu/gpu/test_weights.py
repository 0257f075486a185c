"""Weights on the device: one matrix per group of projections, single ones made of it, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu import kernels
from teegpu.gpu.weights import GROUPS, DeviceWeights
from teegpu.model.spec import PROJECTIONS, ModelSpec

CPU = torch.device("cpu")
MakeStore = Callable[[ModelSpec], Any]


@pytest.fixture(params=["packed", "plain"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether matrices have a layout of their own: both ways are tried wherever the first one exists."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "_packable", lambda _: False)
    elif not kernels.Matrix(torch.ones(2, 2)).packed:
        pytest.skip("matrices are not packed here")
    return request.param == "packed"


def linear_names(spec: ModelSpec) -> list[str]:
    return [name for name, shape in spec.weights.items() if len(shape) == 2 and name != "embed_tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_there_in_the_dtype_asked_for(
    store: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> None:
    weights = DeviceWeights(store, spec, device=device, dtype=dtype)
    for name in linear_names(spec):
        matrix = weights.matrix(name)
        assert matrix is not None
        assert matrix.dtype == dtype
        assert weights.shape(name) == matrix.shape == spec.weights[name]
        assert torch.equal(matrix.rows(0, matrix.shape[0]).cpu(), store.tensors[name].to(dtype))
    for name in ("embed_tokens", "norm", "layers.0.input_layernorm", "layers.1.post_attention_layernorm"):
        tensor = weights.tensor(name)
        assert (tensor.dtype, tensor.device.type) == (dtype, device.type)
        assert weights.shape(name) == spec.weights[name]
        assert torch.equal(tensor.cpu(), store.tensors[name].to(dtype))


@pytest.mark.parametrize(
    "name", ["layers.0.q_proj.bias", "layers.0.q_norm", "layers.2.q_proj", "model.norm.weight", "", "__class__"]
)
def test_other_names_are_not_for_programs(store: Any, spec: ModelSpec, name: str) -> None:
    weights = DeviceWeights(store, spec, device=CPU, dtype=torch.float32)
    assert weights.shape(name) is None
    assert weights.matrix(name) is None


def test_the_groups_hold_every_projection_once() -> None:
    assert sorted(name for group in GROUPS for name in group) == sorted(PROJECTIONS)


@pytest.mark.parametrize("group", [group for group in GROUPS if len(group) > 1])
def test_a_merged_matrix_is_its_parts_in_order(
    store: Any, spec: ModelSpec, group: tuple[str, ...], packed: bool
) -> None:
    weights = DeviceWeights(store, spec, device=CPU, dtype=torch.float32)
    names = [f"layers.1.{name}" for name in group]
    merged = weights.matrix(*names)
    assert merged is not None
    assert torch.equal(merged.rows(0, merged.shape[0]), torch.cat([store.tensors[name] for name in names]))
    for name in names:
        single = weights.matrix(name)
        assert single is not None
        assert single is weights.matrix(name), "made once"
        assert torch.equal(single.rows(0, single.shape[0]), store.tensors[name])


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.k_proj", "layers.0.q_proj", "layers.0.v_proj"],
        ["layers.0.q_proj", "layers.0.k_proj"],
        ["layers.0.q_proj", "layers.1.k_proj", "layers.0.v_proj"],
        ["embed_tokens"],
        ["norm"],
        [],
    ],
)
def test_other_combinations_are_no_matrix(store: Any, spec: ModelSpec, names: list[str]) -> None:
    assert DeviceWeights(store, spec, device=CPU, dtype=torch.float32).matrix(*names) is None


def linear_bytes(spec: ModelSpec, *projections: str) -> int:
    """Bytes in fp32 of ``projections`` in all layers."""
    return spec.layers * 4 * sum(out * in_ for out, in_ in map(spec.linear_shape, projections))


def test_bytes_are_those_of_the_parameters(store: Any, spec: ModelSpec, packed: bool) -> None:
    biases = sum(shape[0] for name, shape in spec.weights.items() if name.endswith(".bias"))
    for dtype in (torch.float32, torch.bfloat16):
        weights = DeviceWeights(store, spec, device=CPU, dtype=dtype)
        assert weights.nbytes == (spec.parameters - biases) * dtype.itemsize


def test_single_projections_are_views_unless_matrices_are_packed(store: Any, spec: ModelSpec, packed: bool) -> None:
    weights = DeviceWeights(store, spec, device=CPU, dtype=torch.float32)
    before = weights.nbytes
    for name in linear_names(spec):
        weights.matrix(name)
    copied = linear_bytes(spec, *(name for group in GROUPS if len(group) > 1 for name in group)) if packed else 0
    assert weights.nbytes == before + copied
    if not packed:
        merged = weights.matrix("layers.0.gate_proj", "layers.0.up_proj")
        gate, up = weights.matrix("layers.0.gate_proj"), weights.matrix("layers.0.up_proj")
        assert merged is not None
        assert gate is not None
        assert up is not None
        middle = merged.rows(spec.intermediate_size, merged.shape[0])
        assert gate.rows(0, 1).data_ptr() == merged.rows(0, 1).data_ptr()
        assert up.rows(0, 1).data_ptr() == middle.data_ptr()


def test_a_tied_lm_head_is_the_embedding(make_store: MakeStore, tied_spec: ModelSpec, packed: bool) -> None:
    store = make_store(tied_spec)
    weights = DeviceWeights(store, tied_spec, device=CPU, dtype=torch.float32)
    head = weights.matrix("lm_head")
    assert head is not None
    assert weights.shape("lm_head") == tied_spec.weights["embed_tokens"]
    assert torch.equal(head.rows(0, head.shape[0]), weights.tensor("embed_tokens"))
    assert "lm_head" not in store.loaded
    biases = sum(shape[0] for name, shape in tied_spec.weights.items() if name.endswith(".bias"))
    copied = weights.tensor("embed_tokens").nbytes if packed else 0
    assert weights.nbytes == (tied_spec.parameters - biases) * 4 + copied
    if not packed:
        assert head.rows(0, 1).data_ptr() == weights.tensor("embed_tokens").data_ptr()


def test_each_weight_is_read_once_and_progress_goes_to_one(make_store: MakeStore, spec: ModelSpec) -> None:
    store, seen = make_store(spec), []
    DeviceWeights(store, spec, device=CPU, dtype=torch.float32, progress=seen.append)
    assert sorted(store.loaded) == sorted(name for name in spec.weights if not name.endswith(".bias"))
    assert seen == sorted(seen)
    assert 0.0 <= seen[0] < seen[-1] == 1.0
