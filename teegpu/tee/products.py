"""Products that the TEE computes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from teegpu.kernels import Matrix
from teegpu.model.spec import ModelSpec
from teegpu.record.events import TEE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.wire.program import report_name


class Matrices(Protocol):
    """Where the matrices of the plan ``local`` are from (``tee.weights``)."""

    spec: ModelSpec

    def matrix(self, names: tuple[str, ...]) -> Matrix:
        """The projections ``names``, which share an input, as one (sum of outs, in) matrix."""


class LocalProducts:
    """Linear steps in the TEE, on its own copy of the weights: the plan ``local``."""

    narrow_range = False

    def __init__(self, weights: Matrices, recorder: Recorder) -> None:
        self._weights = weights
        self._recorder = recorder

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        (step,) = call.program.steps
        source = call.inputs[step.inputs[0]]
        if call.program.in_ring or not isinstance(source, torch.Tensor):
            raise TypeError("the plan local has no programs in the ring")
        matrix = self._weights.matrix(step.weights)
        product = matrix.product(source.to(matrix.dtype)).to(torch.float32)
        self._recorder.lap(TEE, report_name(step), call.layer, call.chunk)
        return {step.output: product}

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]
