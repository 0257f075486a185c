"""Each way of multiplying in the ring against whole numbers of any size, and the choice among them.

The ways are tried with integer kernels that are right. Of torch's own, which a processor may get wrong, nothing is
asserted but that they are never used where they are not exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from teegpu import ringkernels

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EXTREMES = (-(2**31), 2**31 - 1, -1, 0, 1, 127, 128, -128, -129, 0x7F7F7F7F, 0x7F80FF01, -0x7F7F7F80, -0x80, 0x8000)
"""Of an operand; among them every limb at both of its ends, and what carries from one limb to the next."""

each_way = pytest.mark.parametrize("name", ["float64", "int8", "bf16", "int32"])
SHAPES = [(1, 1, 1), (1, 1, 40), (1, 40, 1), (5, 1, 1), (4, 70, 17), (33, 64, 32), (1, 576, 960)]
"""(rows, columns, outputs); the least of each among them."""


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    """What was found out of kernels is forgotten before and after: a test may put others in their place."""
    for known in (ringkernels._measured, ringkernels._exact, ringkernels._exact_block):
        known.cache_clear()
    yield
    for known in (ringkernels._measured, ringkernels._exact, ringkernels._exact_block):
        known.cache_clear()


@pytest.fixture
def right_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.to(torch.int64) @ right.to(torch.int64)).to(torch.int32)

    monkeypatch.setattr(ringkernels, "_int8_product", product)
    monkeypatch.setattr(ringkernels, "_int32_product", product)


def exact(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = operand.numpy().astype(object) @ weight.numpy().astype(object).T
    return torch.from_numpy((wide % 2**32).astype(np.uint32).view(np.int32))


def product(name: str, operand: torch.Tensor, weight: torch.Tensor, *sizes: int) -> torch.Tensor:
    outputs = [torch.full((operand.shape[0], n), 7, dtype=torch.int32) for n in sizes or (weight.shape[0],)]
    ringkernels.WAYS[name](operand, weight, outputs)
    return torch.cat(outputs, -1)


def random(rows: int, columns: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    ends = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(ends.min, ends.max + 1, (rows, columns), generator=generator).to(dtype)


@each_way
@pytest.mark.usefixtures("right_kernels")
@pytest.mark.parametrize("rows", [1, 5, 17, 256])
@pytest.mark.parametrize("shape", [(16, 32), (17, 70), (1, 1)])
def test_random_values(name: str, rows: int, shape: tuple[int, int]) -> None:
    operand, weight = random(rows, shape[1]), random(*shape, torch.int8)
    assert torch.equal(product(name, operand, weight), exact(operand, weight))


@each_way
@pytest.mark.usefixtures("right_kernels")
def test_extremes_of_every_limb(name: str) -> None:
    values = torch.tensor(EXTREMES, dtype=torch.int64).to(torch.int32)
    weights = torch.tensor([[-128], [-127], [-1], [0], [1], [127]], dtype=torch.int8)
    assert torch.equal(product(name, values[:, None], weights), exact(values[:, None], weights))
    # and each summed over a row
    operand, weight = values[:, None].repeat(1, 100), weights.repeat(1, 100)
    assert torch.equal(product(name, operand, weight), exact(operand, weight))


@each_way
@pytest.mark.usefixtures("right_kernels")
@pytest.mark.parametrize("columns", [8192, 8193, 65536 + 3])
def test_rows_of_extremes_do_not_round(name: str, columns: int) -> None:
    """The largest sums that there are, at the border from which on columns are cut, and beyond."""
    weight = torch.full((4, columns), 127, dtype=torch.int8)
    weight[1], weight[2] = -127, -128
    weight[3, ::2] = -128
    operand = torch.full((2, columns), -(2**31), dtype=torch.int32)
    operand[0, 0] = operand[1, 1::2] = 2**31 - 1
    found = product(name, operand, weight)
    for row, column in np.ndindex(2, 4):
        wide = operand[row].to(torch.int64) * weight[column].to(torch.int64)
        assert int(found[row, column]) % 2**32 == int(wide.sum()) % 2**32  # below 2**63


def test_no_more_columns_are_summed_in_fp32_than_it_can() -> None:
    """Their sum is 2**24 + 1, which fp32 does not have."""
    operand, weight = torch.full((1, 1025), -128, dtype=torch.int32), torch.full((1, 1025), -128, dtype=torch.int8)
    operand[0, -1] = weight[0, -1] = 1
    assert product("bf16", operand, weight).item() == 2**24 + 1


@each_way
@pytest.mark.usefixtures("right_kernels")
def test_blocks_of_all_kinds_fit_together(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for setting in ("BLOCK_ROWS", "EXACT_COLUMNS"):
        monkeypatch.setattr(ringkernels, setting, 7)
    for setting in ("INT8_COLUMNS", "BF16_COLUMNS"):
        monkeypatch.setattr(ringkernels, setting, 32)
    monkeypatch.setitem(ringkernels.BLOCK_OUTPUTS, "cpu", 32)
    monkeypatch.setitem(ringkernels.BLOCK_WEIGHTS, "cpu", 70 * 16)
    operand, weight = random(20, 70), random(50, 70, torch.int8)
    expected = exact(operand, weight)
    for sizes in ((50,), (16, 34), (1, 1, 48), (15, 17, 18), (40, 10)):
        assert torch.equal(product(name, operand, weight, *sizes), expected)


def test_a_matrix_is_padded_with_zeros() -> None:
    weight = random(17, 30, torch.int8)
    found = ringkernels.padded(weight)
    assert found.shape == (32, 32)
    assert torch.equal(found[:17, :30], weight)
    assert not found[17:].any()
    assert not found[:, 30:].any()
    whole = random(16, 48, torch.int8)
    assert ringkernels.padded(whole) is whole


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_choice_is_exact_and_measured_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    found = ringkernels.measured(where)
    assert set(found) == ({1, 8, 64} if device == "cpu" else {1, 4, 8, 64, 256, 1024})
    assert set(found.values()) <= {"float64", *ringkernels.CANDIDATES[device]}
    assert found[64] != "int32"
    monkeypatch.setattr(ringkernels, "_seconds", lambda *_: pytest.fail("measured again"))
    for rows in (1, 7, 8, 63, 64, 5000):
        assert ringkernels.quickest(rows, where) == found[max(probed for probed in found if probed <= rows)]


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_way_that_is_not_exact_or_not_there_is_not_chosen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    calls = []

    def quick(operand: torch.Tensor, weight: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        calls.append(operand.shape[0])
        if fault == "missing":
            raise RuntimeError("not implemented for 'Int'")
        outputs[0].fill_(1)

    monkeypatch.setattr(ringkernels, "_PROBES", {"cpu": dict.fromkeys((1, 8, 64), (32, 48))})
    monkeypatch.setitem(ringkernels.WAYS, "int8", quick)
    monkeypatch.setitem(ringkernels.WAYS, "int32", quick)
    assert set(ringkernels.measured(torch.device("cpu")).values()) == {"float64"}
    assert set(calls) == {1, 8, 64}


@pytest.mark.parametrize("way", ["int8", "bf16", "int32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact_whatever_torchs_kernels_do(way: str, shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    operand, weight = random(rows, columns), random(outputs, columns, torch.int8)
    out = torch.empty((rows, outputs), dtype=torch.int32)
    ringkernels.multiply(operand, weight, (out,), way)
    assert torch.equal(out, exact(operand, weight))


@pytest.mark.parametrize("wrong", ["one column", "one row", "one output", "many outputs", "large sums", "raises"])
@pytest.mark.parametrize("way", ["int8", "bf16", "int32"])
def test_a_kernel_that_is_wrong_for_some_shapes_is_not_used_for_these(
    monkeypatch: pytest.MonkeyPatch, way: str, wrong: str
) -> None:
    """It may be right for the shapes that were timed, and be the quickest there."""

    def lies(left: torch.Tensor, right: torch.Tensor) -> bool:
        rows = left.shape[0] // (1 if way == "int32" else 4)
        return {
            "one column": left.shape[1] == 1,
            "one row": rows == 1,
            "one output": right.shape[1] == 1,
            "many outputs": right.shape[1] > 256,
        }.get(wrong, True)

    used = []

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        sums = left.to(torch.int64) @ right.to(torch.int64)
        if not lies(left, right):
            used.append(tuple(left.shape))
        elif wrong == "raises":
            raise RuntimeError("not implemented for 'Char'")
        elif wrong == "large sums":  # as where pairs are added up in 16 bits
            sums = sums.clamp(-(2**15), 2**15 - 1)
        else:
            sums[-1, -1] += 1
        return sums.to(torch.int32)

    monkeypatch.setattr(ringkernels, f"_{way}_product", kernel)
    for rows, columns, outputs in SHAPES:
        operand, weight = random(rows, columns), random(outputs, columns, torch.int8)
        parts = [torch.empty((rows, n), dtype=torch.int32) for n in (1, outputs - 1) if n]
        ringkernels.multiply(operand, weight, parts, way)
        assert torch.equal(torch.cat(parts, -1), exact(operand, weight))
    assert bool(used) == (wrong in ("one column", "one row", "one output", "many outputs"))


def test_a_shape_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    extremes = ringkernels._extremes
    monkeypatch.setattr(ringkernels, "_extremes", lambda *shape: tried.append(shape[:3]) or extremes(*shape))
    monkeypatch.setattr(ringkernels, "BLOCK_ROWS", 8)
    weight = random(20, 30, torch.int8)
    for rows in (3, 3, 19, 16, 3):
        operand, out = random(rows, 30), torch.empty((rows, 20), dtype=torch.int32)
        ringkernels.multiply(operand, weight, (out,), "int8")
        assert torch.equal(out, exact(operand, weight))
    assert sorted(tried) == [(3, 30, 20), (8, 30, 20)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["float64", *ringkernels.CANDIDATES["cuda"]])
@pytest.mark.parametrize("shape", [*SHAPES, (20, 3000, 130), (300, 200, 40)])
def test_products_on_cuda_are_exact(way: str, shape: tuple[int, int, int]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    rows, columns, outputs = shape
    operand, weight = random(rows, columns), random(outputs, columns, torch.int8)
    out = torch.empty((rows, outputs), dtype=torch.int32, device="cuda")
    ringkernels.multiply(operand.cuda(), ringkernels.padded(weight.cuda()), (out,), way)
    assert torch.equal(out.cpu(), exact(operand, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ringkernels.CANDIDATES["cuda"])
@pytest.mark.parametrize("rows", [1, 64, 1500])
def test_no_way_takes_more_memory_on_cuda_than_is_said(way: str, rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    outputs, columns = 40_000, 2048
    device = torch.device("cuda", 0)
    operand, weight = ringkernels._extremes(rows, columns, outputs, columns, device)
    out = torch.empty((rows, outputs), dtype=torch.int32, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ringkernels.multiply(operand, weight, (out,), way)
    taken = torch.cuda.max_memory_allocated(device) - before
    assert taken <= ringkernels.scratch_bytes(rows, columns, outputs, device)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_needed_on_the_way_is_bounded(kind: str) -> None:
    device = torch.device(kind)
    few, many = (ringkernels.scratch_bytes(rows, 64, 64, device) for rows in (1, 1024))
    assert few < many == ringkernels.scratch_bytes(10**6, 64, 64, device)
    assert ringkernels.scratch_bytes(10**6, 8192, 10**6, device) < {"cpu": 2**29, "cuda": 2**32}[kind]
