"""What the runner has to know of each matrix to shield its products, from its own trusted copy of the weights.

Weights are streamed once: quantised as the server quantises them, measured, hashed, and dropped. What is kept are the
scales of the rows, the largest norm of a row, and the digests that a server's int8 weights must have. It is the same
for the same weights, so it is kept in the user's cache under the model's digest.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from teegpu import ring
from teegpu.model.folder import default_cache_dir
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore

Product = tuple[str, ...]
"""The weights that share an input, by name, in their order: they are one matrix, the rows of one after the other."""

_GROUPS: Final = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_VERSION: Final = 1
"""Of the kept file and of the quantiser: another one is made anew."""
_BLOCK_VALUES: Final = 2**22
"""Values that are measured at once: a whole lm_head in float64 would take gigabytes."""


def products(spec: ModelSpec) -> list[Product]:
    """Every product of a forward pass, in its order: Q, K and V; O; gate and up; down; of each layer, and lm_head."""
    layers = (tuple(f"layers.{layer}.{name}" for name in group) for layer in range(spec.layers) for group in _GROUPS)
    return [*layers, ("lm_head",)]


def layer_of(product: Product) -> int:
    """The layer of ``product``, or -1 for lm_head."""
    return int(product[0].split(".")[1]) if product[0].startswith("layers.") else -1


def quantised(store: WeightStore, spec: ModelSpec, product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """``product`` as servers compute with it: int8 (rows, columns) and the scale of each row, fp32 (rows,).

    Raises ``ModelError`` for a file that can't be read.
    """
    columns = spec.weights[product[0]][1]
    rows = sum(spec.weights[name][0] for name in product)
    weight = torch.empty((rows, columns), dtype=torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    start = 0
    for name in product:
        part = slice(start, start + spec.weights[name][0])
        ring.quantise_into(store.load(name), weight[part], scale[part])
        start = part.stop
    return weight, scale


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """One product: ``columns`` is the length of its input, ``rows`` that of its output.

    ``scale``: what each row of the int8 matrix is multiplied with, fp32 (rows,). ``largest_norm``: the largest
    Euclidean norm of a row of the int8 matrix.
    """

    product: Product
    columns: int
    rows: int
    scale: torch.Tensor
    largest_norm: float


class FactTable:
    """The facts of all products of a model, and the ``ring.digest`` of each weight in them by name."""

    def __init__(self, spec: ModelSpec, facts: Mapping[Product, Facts], digests: Mapping[str, bytes]) -> None:
        self.spec = spec
        self._facts = dict(facts)
        self._digests = dict(digests)

    def of(self, product: Product) -> Facts:
        """Raises ``KeyError`` for what is no product of the model."""
        return self._facts[product]

    def server_digest(self, layers: tuple[int, int]) -> str:
        """What a server that holds ``layers``, the first and the last one, must say of its int8 weights."""
        first, last = layers
        spec = self.spec
        held = (name for name in spec.weights if name in self._digests and first <= spec.layer_of(name) <= last)
        return ring.combined((name, self._digests[name]) for name in held)

    @classmethod
    def make(cls, store: WeightStore, spec: ModelSpec, progress: Callable[[float], None] = lambda _: None) -> FactTable:
        """Streams all weights once; ``progress`` is called with the share that is done, 0 to 1."""
        facts: dict[Product, Facts] = {}
        digests: dict[str, bytes] = {}
        todo = products(spec)
        total = sum(math.prod(spec.weights[name]) for product in todo for name in product)
        done = 0
        for product in todo:
            weight, scale = quantised(store, spec, product)
            start, largest = 0, 0.0
            for name in product:
                part = slice(start, start + spec.weights[name][0])
                digests[name] = ring.digest(weight[part], scale[part])
                start = part.stop
            step = max(1, _BLOCK_VALUES // weight.shape[1])
            for first in range(0, weight.shape[0], step):
                # Sums of squares of int8 are whole numbers, and in float64 exact.
                squares = weight[first : first + step].to(torch.float64).square_().sum(-1)
                largest = max(largest, math.sqrt(float(squares.max())))
            facts[product] = Facts(product, weight.shape[1], weight.shape[0], scale, largest)
            done += weight.numel()
            progress(done / total)
        return cls(spec, facts, digests)

    @classmethod
    def load(
        cls,
        store: WeightStore,
        spec: ModelSpec,
        digest: str,
        *,
        cache_dir: Path | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> FactTable:
        """As ``make``, from the user's cache where it is there for the model with ``digest``. A cache that can't be
        read or written is no error."""
        path = (cache_dir or default_cache_dir()) / "shield" / f"{digest}.npz"
        table = cls._read(path, spec)
        if table is None:
            table = cls.make(store, spec, progress)
            table._write(path)
        return table

    def _write(self, path: Path) -> None:
        names = list(self._digests)
        arrays: dict[str, Any] = {
            "version": np.array([_VERSION], dtype=np.int64),
            "scales": torch.cat([facts.scale for facts in self._facts.values()]).numpy(),
            "norms": np.array([facts.largest_norm for facts in self._facts.values()], dtype=np.float64),
            "digests": np.frombuffer(b"".join(self._digests[name] for name in names), dtype=np.uint8),
        }
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    np.savez(file, **arrays)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink()
                raise

    @classmethod
    def _read(cls, path: Path, spec: ModelSpec) -> FactTable | None:
        """The kept facts, or None where there are none that fit the model."""
        todo = products(spec)
        rows = [sum(spec.weights[name][0] for name in product) for product in todo]
        names = [name for product in todo for name in product]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                version, scales, norms, digests = (kept[key] for key in ("version", "scales", "norms", "digests"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if version.tolist() != [_VERSION] or scales.dtype != np.float32 or scales.shape != (sum(rows),):
            return None
        if norms.shape != (len(todo),) or digests.dtype != np.uint8 or digests.shape != (32 * len(names),):
            return None
        facts: dict[Product, Facts] = {}
        parts = torch.from_numpy(scales).split(rows)
        for product, scale, norm in zip(todo, parts, norms.tolist(), strict=True):
            facts[product] = Facts(product, spec.weights[product[0]][1], scale.shape[0], scale, norm)
        raw = digests.tobytes()
        return cls(spec, facts, {name: raw[32 * i : 32 * i + 32] for i, name in enumerate(names)})
