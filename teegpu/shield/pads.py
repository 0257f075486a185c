"""One-time pads, as in Slalom: masks whose products are computed before they are needed, in the memory of this process.

What is sent is ``q + r`` modulo 2**32 with a uniform ``r`` that serves for one message; ``W·r``, which is subtracted
from what comes back, was computed before. Each product goes through its pads in their order, under one lock, so that
however chunks overlap, or threads ask, no row of a pad is handed out twice; a request that is given up has used its
pads up. They die with the process, and a fork of it gets none: who owns the disk can neither read, copy nor roll back
what was never there.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from teegpu import machine, ring
from teegpu.errors import ShieldError
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.shield.quantised import LM_HEAD, Linear, linears, read, shape_of
from teegpu.units import human_bytes

_MOST_OF_MEMORY: Final = 0.8
"""Of what is free, for pads."""

Notify = Callable[[str, float | None], None]
"""Takes what is being done, and the share that is done, from 0 to 1, or None where that is unknown."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of one message. It is used for that message alone; a message that is sent again is the same bytes.

    ``operand``, int32 (rows, in), is added to the whole numbers modulo 2**32, ``correction``, int32 (rows, out), is
    subtracted from the product that comes back. Both are the caller's own.
    """

    operand: torch.Tensor
    correction: torch.Tensor


class MaskSource(Protocol):
    """Makes masks, each of which it hands out once, ever."""

    def take(self, linear: Linear, rows: int) -> Mask:
        """A fresh mask for ``rows`` rows of ``linear``. Raises ``ShieldError`` where there is none: then the run ends,
        it never goes on without."""


@dataclass(slots=True)
class _Block:
    """Pads that were made together: the rows of ``ring.expand(seed, …)`` and their products. ``used`` is how many of
    them have been handed out."""

    seed: bytes
    products: torch.Tensor
    used: int = 0

    @property
    def left(self) -> int:
        return self.products.shape[0] - self.used


@dataclass(slots=True)
class Offline:
    """What pads have cost so far: seconds, for how many tokens and logits, and the most memory that they took."""

    seconds: float = 0.0
    tokens: int = 0
    logits: int = 0
    most_bytes: int = 0


class Pads:
    """The pads of a run, of the model in ``store``: a ``MaskSource``. ``offline`` is what they have cost."""

    def __init__(self, store: WeightStore, spec: ModelSpec) -> None:
        self._store = store
        self._spec = spec
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._blocks: dict[Linear, deque[_Block]] = {linear: deque() for linear in linears(spec)}
        self.offline = Offline()

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(block.products.nbytes for blocks in self._blocks.values() for block in blocks)

    def left(self, linear: Linear) -> int:
        """Rows of ``linear`` for which there are pads."""
        return sum(block.left for block in self._blocks[linear])

    def make(self, tokens: int, logits: int, notify: Notify = lambda _, __: None) -> None:
        """Sees to it that there are pads for the layers of ``tokens`` tokens, and for lm_head of ``logits``.

        Raises ``ShieldError`` where they don't fit into memory, and ``ModelError``.
        """
        with self._lock:
            self._check_owner()
            missing = {linear: (logits if linear == LM_HEAD else tokens) - self.left(linear) for linear in self._blocks}
            missing = {linear: count for linear, count in missing.items() if count > 0}
            if missing:
                self._check_memory(missing, tokens)
                began = time.perf_counter()
                self._make(missing, notify)
                cost = self.offline
                cost.seconds += time.perf_counter() - began
                cost.tokens += max((count for linear, count in missing.items() if linear != LM_HEAD), default=0)
                cost.logits += missing.get(LM_HEAD, 0)
                cost.most_bytes = max(cost.most_bytes, self.nbytes)

    def _check_memory(self, missing: dict[Linear, int], tokens: int) -> None:
        need = sum(4 * count * shape_of(self._spec, linear)[0] for linear, count in missing.items())
        free = machine.available_bytes()
        if free is not None and need > _MOST_OF_MEMORY * free:
            fit = int(_MOST_OF_MEMORY * free / need * tokens)
            raise ShieldError(
                f"pads for {tokens:,} tokens take {human_bytes(need)} of memory, and {human_bytes(free)} are free: "
                f"about {fit:,} tokens fit, prompt and answer together (run.max_tokens, run.speculate)"
            )

    def _make(self, missing: dict[Linear, int], notify: Notify) -> None:
        most = max(missing.values())
        total = sum(count * rows * columns for linear, count in missing.items()
                    for rows, columns in [shape_of(self._spec, linear)])  # fmt: skip
        done = 0
        what = f"making pads for {most:,} tokens"
        notify(what, 0.0)

        def add(linear: Linear, weight: torch.Tensor, _: torch.Tensor) -> None:
            nonlocal done
            seed, count = os.urandom(ring.SEED_BYTES), missing[linear]
            products = ring.RingMatrix(weight).product(ring.expand(seed, count, weight.shape[1]))
            self._blocks[linear].append(_Block(seed, products))
            done += count * weight.numel()
            notify(what, done / total)

        read(self._store, self._spec, [add], wanted=list(missing))

    def take(self, linear: Linear, rows: int) -> Mask:
        pieces: list[tuple[_Block, int, int]] = []
        with self._lock:
            self._check_owner()
            blocks, left = self._blocks[linear], self.left(linear)
            if left < rows:
                what = "lm_head" if linear == LM_HEAD else "the layers"
                raise ShieldError(f"no pads left for {what}: {rows:,} are needed, and {left:,} are there")
            missing = rows
            while missing:
                block = blocks[0]
                count = min(missing, block.left)
                pieces.append((block, block.used, block.used + count))
                block.used += count
                missing -= count
                if not block.left:
                    blocks.popleft()
        columns = shape_of(self._spec, linear)[1]
        operands = [ring.expand(block.seed, stop - start, columns, first=start) for block, start, stop in pieces]
        products = [block.products[start:stop] for block, start, stop in pieces]
        if len(pieces) == 1:
            return Mask(operands[0], products[0])  # rows that nobody else will ever see
        return Mask(torch.cat(operands), torch.cat(products))

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise ShieldError("pads belong to the process that made them: a fork of it would use the same ones again")

    def close(self) -> None:
        """Lets go of them. May be called twice."""
        with self._lock:
            for blocks in self._blocks.values():
                blocks.clear()
