"""Compiles the Triton kernels for an H100, which takes none: ``python compiling.py SHAPES``, rows, columns, outputs and
the place of the result of each product as JSON. Prints what was compiled for each: names and hashes."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from teegpu import ringkernels, ringtriton


class Driver:
    """Of a device that is not there, as far as compiling asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(rows: int, columns: int, outputs: int, place: int) -> list[list[str]]:
    found = []

    def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: int) -> None:
        found.append([kernel.__name__, kernel.warmup(*arguments, grid=grid, **options).hash])

    ringtriton._launch = launch
    operand = torch.zeros((rows, columns), dtype=torch.int32)
    weight = ringkernels.padded(torch.zeros((outputs, columns), dtype=torch.int8))[:outputs]
    out = torch.zeros((rows, place + outputs), dtype=torch.int32)[:, place:]
    for multiply in (ringtriton.split, ringtriton.fused, ringtriton.gemv):
        multiply(operand, weight, out)
    return found


driver.set_active(Driver())
print(json.dumps([compiled(*shape) for shape in json.loads(sys.argv[1])]))
