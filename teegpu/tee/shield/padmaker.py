"""Makes pads: for each token and product ``W·r``, which is as much work as the product itself, done ahead.

A segment of 128 tokens is made at a time, and is part of the pool when it is whole: an interrupt or a full disk leaves
what was made until then.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from teegpu import machine, ring
from teegpu.errors import ShieldError
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product, quantised
from teegpu.tee.shield.padledger import KINDS, Place
from teegpu.tee.shield.padsegment import LEAF_TOKENS, SegmentWriter, pads_of
from teegpu.tee.shield.padstore import Pool, pool_folder, read_pool, token_bytes, write_pool
from teegpu.units import about_seconds, human_bytes

SEGMENT_LEAVES: Final = 16
"""Leaves of a segment: 128 tokens, with which a matrix product runs at full speed."""

Notify = Callable[[str, float | None], None]
"""Told what is being done, and the share that is done, from 0 to 1, or None where that is unknown."""


@dataclass(slots=True)
class Made:
    """What was made: tokens, and seconds for each of them, by kind."""

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def per_token(self, kind: str) -> float | None:
        return self.seconds[kind] / self.tokens[kind] if self.tokens[kind] else None


class PadMaker:
    """Makes pads for the model of ``store`` in ``data``, of which ``digest`` is that of the model.

    ``made`` is what there is so far, whatever ended ``run``. ``up_to``: no more than are missing for so many.
    Raises ``ShieldError`` as ``Pool`` does, and where the disk is too small or full.
    """

    def __init__(self, store: WeightStore, spec: ModelSpec, digest: str, data: Path, name: str) -> None:
        self._store = store
        self._spec = spec
        self._digest = digest
        self._folder = pool_folder(data, digest)
        self._name = name
        self._matrices: dict[Product, ring.RingMatrix] = {}
        self._memory_bytes = machine.memory_bytes() // 4
        self.made = Made()

    def run(self, tokens: int, heads: int, notify: Notify, *, up_to: bool = False) -> Made:
        """Pads for the layers of ``tokens`` tokens, and for the logits of ``heads``; both rounded up to 8."""
        key = sealed.SealKey.load()
        sealed.private_folder(self._folder.parent)
        with sealed.making(self._folder, lambda: notify("waiting for another process that makes pads", None)):
            pool = self._pool(key)
            try:
                wanted = {"body": tokens, "head": heads}
                if up_to:
                    left = pool.left()
                    wanted = {kind: max(0, count - left[kind]) for kind, count in wanted.items()}
                leaves = {kind: -(-count // LEAF_TOKENS) for kind, count in wanted.items()}
                self._check_space(leaves)
                self._remove_leftovers()
                self._make(pool, leaves, notify)
            finally:
                pool.close()
                self._keep_costs()
        return self.made

    def _pool(self, key: sealed.SealKey) -> Pool:
        try:
            return Pool(self._folder, self._digest, self._spec, key)
        except FileNotFoundError:
            Pool.create(self._folder, self._digest, self._name, key)
            return Pool(self._folder, self._digest, self._spec, key)

    def _check_space(self, leaves: dict[str, int]) -> None:
        sizes = {kind: token_bytes(self._spec, kind) for kind in KINDS}
        need = sum(leaves[kind] * LEAF_TOKENS * sizes[kind] for kind in KINDS)
        free = shutil.disk_usage(self._folder).free
        if need > free:
            fit = int(free / need * leaves["body"] * LEAF_TOKENS)
            raise ShieldError(
                f"these pads take {human_bytes(need)}, and {self._folder} has {human_bytes(free)} free: make fewer "
                f"(about {fit:,} tokens fit), or set shield.dir (TEEGPU_SHIELD_DIR) to a folder on another disk"
            )

    def _remove_leftovers(self) -> None:
        """What a killed process left behind; it holds nothing that was ever used."""
        with sealed.explaining(self._folder):
            for path in self._folder.glob(".*.pads~"):
                path.unlink(missing_ok=True)

    def _make(self, pool: Pool, leaves: dict[str, int], notify: Notify) -> None:
        work = {kind: sum(m.rows * m.columns for m in pool.matrices[kind]) for kind in KINDS}
        total = sum(leaves[kind] * work[kind] for kind in KINDS)
        done, began = 0, time.perf_counter()
        for kind in KINDS:
            left = leaves[kind]
            place = pool.end(kind)
            while left:
                count = min(left, SEGMENT_LEAVES)
                notify(_told(kind, leaves[kind] - left, leaves[kind], done, total, began), done / total)
                started = time.perf_counter()
                with sealed.explaining(self._folder):
                    place = self._segment(pool, kind, place, count)
                self.made.tokens[kind] += count * LEAF_TOKENS
                self.made.seconds[kind] += time.perf_counter() - started
                left -= count
                done += count * work[kind]
            self._matrices.clear()

    def _segment(self, pool: Pool, kind: str, place: Place, leaves: int) -> Place:
        """Makes one from ``place`` on; gives the place after it."""
        matrices = pool.matrices[kind]
        writer = SegmentWriter(self._folder, pool.id, self._digest, kind, place.next, matrices, leaves)
        try:
            keys = []
            for _ in range(leaves):
                keys.append(place.leaf_key(writer.salt))
                place = place.at(place.next + 1)
            for number, matrix in enumerate(matrices):
                pads = torch.cat([pads_of(key, number, matrix.columns) for key in keys])
                writer.put(number, keys, self._matrix(matrix.product).product(pads))
            writer.finish()
        finally:
            writer.abandon()
        return place

    def _matrix(self, product: Product) -> ring.RingMatrix:
        """Kept from segment to segment where the memory allows it: quantising is a good part of the work."""
        found = self._matrices.get(product)
        if found is None:
            found = ring.RingMatrix(quantised(self._store, self._spec, product)[0])
            if sum(matrix.nbytes for matrix in self._matrices.values()) < self._memory_bytes:
                self._matrices[product] = found
        return found

    def _keep_costs(self) -> None:
        """For ``pads show``."""
        content = read_pool(self._folder)
        costs = dict(content.get("seconds_per_token", {}))
        costs |= {kind: value for kind in KINDS if (value := self.made.per_token(kind)) is not None}
        if costs != content.get("seconds_per_token", {}):
            write_pool(self._folder, content | {"seconds_per_token": costs})


def _told(kind: str, leaves: int, of: int, done: int, total: int, began: float) -> str:
    what = "the layers" if kind == "body" else "lm_head"
    text = f"making pads for {what}: {leaves * LEAF_TOKENS:,} of {of * LEAF_TOKENS:,} tokens"
    if done:
        text += f", about {about_seconds((time.perf_counter() - began) / done * (total - done))} left"
    return text
