"""The Triton kernels, in Triton's interpreter: that takes no GPU, but Triton itself, which torch's builds for CPUs come
without (pip install triton: 0.2 GB, 0.7 GB on the disk). Where it is missing these tests are skipped; where there is a
CUDA device ``test_ringkernels`` tries the kernels as they are compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teegpu import ringkernels

if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("the kernels are compiled here", allow_module_level=True)

# Earlier ones can't interpret with numpy 2.4.
pytest.importorskip("triton", minversion="3.7", reason="needs triton 3.7 or newer: pip install triton")
from teegpu import ringtriton

each_kernel = pytest.mark.parametrize("name", ["split", "fused", "gemv"])


def exact(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty((len(operand), len(weight)), dtype=torch.int32)
    ringkernels.float64(operand, weight, (out,))
    return out


@each_kernel
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (70, 17), (300, 40), (1030, 3)])
def test_products_are_exact_and_nothing_else_is_written(name: str, rows: int, columns: int, outputs: int) -> None:
    """Sizes that no tile divides; the extremes, then random values; and an output that is a part of a larger one."""
    extremes = ringkernels._extremes(rows, columns, outputs, columns + -columns % 16, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rows)
    operand = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator).to(torch.int32)
    weight = torch.randint(-128, 128, (outputs, columns), generator=generator).to(torch.int8)
    for left, right in (extremes, (operand, ringkernels.padded(weight)[:outputs])):
        whole = torch.full((rows + 1, outputs + 2), 7, dtype=torch.int32)
        getattr(ringtriton, name)(left, right, whole[:rows, 1:-1])
        assert torch.equal(whole[:rows, 1:-1], exact(left, right))
        whole[:rows, 1:-1] = 7
        assert (whole == 7).all()


@pytest.mark.parametrize("name", ["split", "fused"])
def test_each_tile_is_exact(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each that there is, on rows, outputs and columns that take several of it."""
    for tile in {ringtriton._tile(rows) for rows in (1, 4, 5, 16, 17, 64, 65, 1024)}:
        monkeypatch.setattr(ringtriton, "_tile", lambda _, tile=tile: tile)
        rows, outputs, columns = tile.rows + 3, tile.outputs + 5, tile.columns + 16
        operand, weight = ringkernels._extremes(rows, columns, outputs, columns, torch.device("cpu"))
        out = torch.empty((rows, outputs), dtype=torch.int32)
        getattr(ringtriton, name)(operand, weight, out)
        assert torch.equal(out, exact(operand, weight)), tile


def test_a_kernel_that_can_not_be_is_told_of_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what ``ringkernels`` takes for a way that is not there."""
    monkeypatch.setattr(ringtriton, "_GEMV_COLUMNS", 500)  # Triton has powers of two alone
    operand, weight = ringkernels._extremes(1, 16, 1, 16, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="power of 2"):
        ringtriton.gemv(operand, weight, torch.empty((1, 1), dtype=torch.int32))


@pytest.mark.slow
def test_trying_a_shape_compiles_what_others_of_its_rows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing is compiled while a CUDA graph is recorded: for an H100, which compiling does not need."""
    monkeypatch.delenv("TRITON_INTERPRET")
    classes = [[(1, 0), (3, 1), (4, 2)], [(5, 0), (16, 3)], [(17, 0), (64, 1)], [(65, 0), (300, 1), (1024, 2)]]
    shapes = [(rows, 1024, 64 + place, place) for each in classes for rows, place in each]
    command = [sys.executable, str(Path(__file__).with_name("compiling.py")), json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = iter(json.loads(done.stdout))
    tried = [[next(found) for _ in each] for each in classes]
    for first, *others in tried:
        assert [name for name, _ in first] == ["_split", "_product", "_product", "_gemv"]
        assert all(other == first for other in others)
    assert len({str(first) for first, *_ in tried}) == len(classes)
