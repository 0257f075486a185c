"""The model's matrices as int8, for products modulo 2**32: made from the files when they are first wanted.

They are quantised from the weights as they are stored, not from those on the device, which may have been rounded to
another dtype: a runner makes the same bits from its own copy, and compares the digest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

import torch

from teegpu import machine, ring
from teegpu.model.spec import GROUPS, ModelSpec
from teegpu.model.weights import WHOLE, Cut

log = logging.getLogger("teegpu.gpu")


_ROOMY_BYTES: Final = 5
"""Per value of a ``ring.RingMatrix`` that may take room, at most."""


class Store(Protocol):
    """The part of a ``WeightStore`` that is needed."""

    def load_whole(self, name: str, weight: torch.Tensor, scale: torch.Tensor, first: int | None = None) -> None: ...


class RingWeights:
    """The matrices that are placed with ``layers`` (the first and the last one), on ``device``.

    ``open_store`` opens the model's files, once, when the matrices are made. On a CPU a matrix takes 4 bytes per value
    where that makes products of few rows quicker and memory allows it (all together at most half of what is free),
    else 1. ``cut``: the part of each that is held.
    """

    def __init__(
        self,
        open_store: Callable[[], AbstractContextManager[Store]],
        spec: ModelSpec,
        *,
        device: torch.device,
        layers: tuple[int, int],
        cut: Cut = WHOLE,
    ) -> None:
        self.digest = ""
        """``ring.combined`` of all matrices, uncut, where this is rank 0; empty while they are not made."""
        self._cut = cut
        self._open_store = open_store
        self._spec = spec
        self._device = device
        first, last = layers
        self._groups = [
            tuple(f"layers.{layer}.{projection}" for projection in group)
            for layer in range(first, last + 1)
            for group in GROUPS
        ]
        if last == spec.layers - 1:
            self._groups.append(("lm_head",))
        self._names = frozenset(name for group in self._groups for name in group)
        self._values = sum(math.prod(spec.weights[name]) for name in self._names)
        self._matrices: dict[tuple[str, ...], ring.RingMatrix] = {}
        self._places: dict[str, tuple[ring.RingMatrix, int]] = {}

    def holds(self, name: str) -> bool:
        """Whether ``name`` is one of the matrices, made or not."""
        return name in self._names

    @property
    def made(self) -> bool:
        return bool(self.digest)

    @property
    def nbytes(self) -> int:
        """The memory that the matrices take; 0 while they are not made."""
        return sum(self._matrices[group].nbytes for group in self._groups) if self.made else 0

    @property
    def most_bytes(self) -> int:
        """The most that they will take."""
        return -(-self._values // self._cut.ranks) * (_ROOMY_BYTES if self._roomy else 1)

    @property
    def _roomy(self) -> bool:
        free = machine.available_bytes()
        return self._device.type == "cpu" and free is not None and 2 * _ROOMY_BYTES * self._values <= free

    def make(self, progress: Callable[[float], None] = lambda _: None) -> None:
        """Reads and quantises all matrices, unless that is done. ``progress`` is called with the share, 0 to 1. Raises
        ``ModelError`` for a file that can't be read."""
        if self.made:
            return
        started = time.perf_counter()
        roomy = self._roomy
        digests: dict[str, bytes] = {}
        with self._open_store() as store:
            for done, group in enumerate(self._groups, start=1):
                self._make_group(store, group, roomy, digests)
                progress(done / len(self._groups))
        self.digest = ring.combined((name, digests[name]) for name in self._spec.weights if name in digests)
        seconds = time.perf_counter() - started
        about = {"event": "ring-weights", "bytes": self.nbytes, "seconds": round(seconds, 3)}
        log.info("int8 weights for shielded products made in %.1f s: %d MiB", seconds, self.nbytes >> 20, extra=about)

    def _make_group(self, store: Store, group: tuple[str, ...], roomy: bool, digests: dict[str, bytes]) -> None:
        shapes = [self._spec.weights[name] for name in group]
        held = torch.empty((sum(self._cut.rows(rows) for rows, _ in shapes), shapes[0][1]), dtype=torch.int8)
        starts: dict[str, int] = {}
        start = 0
        for name, shape in zip(group, shapes, strict=True):
            part = self._cut.of(shape[0])
            starts[name], place = start, held[start : start + part.stop - part.start]
            if self._cut.rank:
                store.load_whole(name, place, torch.empty(len(place)), part.start)
            else:  # The digest is of whole matrices, so the first rank reads them whole.
                whole = place if len(place) == shape[0] else torch.empty(shape, dtype=torch.int8)
                scale = torch.empty(shape[0])
                store.load_whole(name, whole, scale)
                digests[name] = ring.digest(whole, scale)
                if whole is not place:
                    place.copy_(whole[part])
            start += len(place)
        matrix = self._matrices[group] = ring.RingMatrix(held.to(self._device), roomy=roomy)
        self._places |= {name: (matrix, start) for name, start in starts.items()}

    def matrix(self, *names: str) -> ring.RingMatrix | None:
        """As ``DeviceWeights.matrix``: one projection, or neighbours that share an input. All are made first, where
        they are not."""
        self.make()
        found = self._matrices.get(names)
        if found is None and len(names) == 1 and names[0] in self._places:
            merged, start = self._places[names[0]]
            found = self._matrices[names] = merged.rows(start, start + self._cut.rows(self._spec.weights[names[0]][0]))
        return found
