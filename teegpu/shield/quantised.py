"""The runner's own weights as whole numbers, and what it has to know of each matrix to shield its products.

Weights are quantised as the server quantises them, from the runner's own trusted copy, one matrix in memory at a time:
``read`` streams them once for all who want to see them. What is known of them lives in this process's memory alone, so
no file decides what an answer is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from teegpu import ring
from teegpu.errors import ModelError
from teegpu.model.spec import GROUPS, ModelSpec
from teegpu.model.weights import WeightStore

Linear = tuple[str, ...]
"""The weights that share an input, by name, in their order: they are one matrix, the rows of one after the other."""

LM_HEAD: Final[Linear] = ("lm_head",)

_BLOCK_VALUES: Final = 2**20
"""Values that are measured at once, in a processor's cache."""

Progress = Callable[[float], None]
"""Takes the share that is done, 0 to 1."""

Reader = Callable[[Linear, torch.Tensor, torch.Tensor], None]
"""Takes a matrix: int8 (rows, columns), and the scale of each row, fp32 (rows,)."""


def linears(spec: ModelSpec) -> list[Linear]:
    """Every matrix of a forward pass, in its order: Q, K and V; O; gate and up; down; of each layer, and lm_head."""
    layers = (tuple(f"layers.{layer}.{name}" for name in group) for layer in range(spec.layers) for group in GROUPS)
    return [*layers, LM_HEAD]


def layer_of(linear: Linear) -> int:
    """The layer of ``linear``, or -1 for lm_head."""
    return int(linear[0].split(".")[1]) if linear[0].startswith("layers.") else -1


def shape_of(spec: ModelSpec, linear: Linear) -> tuple[int, int]:
    """(rows, columns)."""
    return sum(spec.weights[name][0] for name in linear), spec.weights[linear[0]][1]


def quantised(store: WeightStore, spec: ModelSpec, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """``linear`` as servers compute with it: int8 (rows, columns) and the scale of each row, fp32 (rows,).

    Raises ``ModelError`` for a file that can't be read.
    """
    rows, columns = shape_of(spec, linear)
    weight = torch.empty((rows, columns), dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    start = 0
    for name in linear:
        part = slice(start, start + spec.weights[name][0])
        store.load_whole(name, weight[part], scale[part])
        start = part.stop
    return weight, scale


def read(
    store: WeightStore,
    spec: ModelSpec,
    readers: Sequence[Reader],
    *,
    wanted: Sequence[Linear] | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Shows each matrix (those ``wanted``, None: all) to each of ``readers``, in their order. Raises ``ModelError``."""
    todo = linears(spec) if wanted is None else wanted
    total = sum(math.prod(shape_of(spec, linear)) for linear in todo)
    done = 0
    for linear in todo:
        weight, scale = quantised(store, spec, linear)
        for reader in readers:
            reader(linear, weight, scale)
        done += weight.numel()
        progress(done / total)


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """One matrix: ``columns`` is the length of its input, ``rows`` that of its output.

    ``scale``: what each row of the int8 matrix is multiplied with, fp32 (rows,). ``largest_norm``: the largest
    Euclidean norm of a row of the int8 matrix.
    """

    linear: Linear
    columns: int
    rows: int
    scale: torch.Tensor
    largest_norm: float


class Measures:
    """The measures of all matrices of a model, and the ``ring.digest`` of each weight in them by name. ``add`` is a
    ``Reader``."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._measures: dict[Linear, Measure] = {}
        self._digests: dict[str, bytes] = {}

    @classmethod
    def of_model(cls, store: WeightStore, spec: ModelSpec) -> Measures:
        """All of them. Raises ``ModelError``."""
        measures = cls(spec)
        read(store, spec, [measures.add])
        return measures

    def add(self, linear: Linear, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Raises ``ModelError`` for weights that are not finite, or too small for the scale of their row: nothing that
        is computed with them could be right."""
        largest = _largest_norm(weight)
        if not (torch.isfinite(scale).all() and (scale > 0).all()) or 0 < largest < 1:
            raise ModelError(f"{'+'.join(linear)} has rows of weights that are not finite, or too small to be told "
                             "from zero: no product with them can be computed in whole numbers")  # fmt: skip
        start = 0
        for name in linear:
            part = slice(start, start + self.spec.weights[name][0])
            self._digests[name] = ring.digest(weight[part], scale[part])
            start = part.stop
        self._measures[linear] = Measure(linear, weight.shape[1], weight.shape[0], scale, largest)

    def of(self, linear: Linear) -> Measure:
        """Raises ``KeyError`` for what is no matrix of the model."""
        return self._measures[linear]

    def server_digest(self, layers: tuple[int, int]) -> str:
        """What a server that holds ``layers``, the first and the last one, must say of its int8 weights."""
        first, last = layers
        spec = self.spec
        held = (name for name in spec.weights if name in self._digests and first <= spec.layer_of(name) <= last)
        return ring.combined((name, self._digests[name]) for name in held)


def _largest_norm(weight: torch.Tensor) -> float:
    """Sums of squares of int8 are whole numbers: exact in float64, and in float32 up to 2**24."""
    exact = torch.float32 if weight.shape[1] * 128**2 <= 2**24 else torch.float64
    largest = 0.0
    step = max(1, _BLOCK_VALUES // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        squares = weight[first : first + step].to(exact).square_().sum(-1)
        largest = max(largest, float(squares.max()))
    return math.sqrt(largest)
