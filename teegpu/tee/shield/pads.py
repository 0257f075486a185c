"""The mode ``pads``: one-time pads that were made ahead, as in Slalom. Nothing is assumed of the server.

What is sent is ``q + r`` modulo 2**32 with a uniform ``r`` that serves for one message; ``W·r``, which is subtracted
from what comes back, was computed before and waits in the pool. Each product goes through the pads in their order, so
that however chunks overlap, no row of a pad is given twice. What a run has claimed and not used is lost with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from teegpu.errors import ShieldError
from teegpu.tee.shield.facts import Product
from teegpu.tee.shield.padledger import KINDS
from teegpu.tee.shield.padsegment import LEAF_TOKENS, Leaf
from teegpu.tee.shield.padstore import Pool, kind_of

_MOST_SEGMENTS: Final = 256
"""Files open at once. The products of the last layer use fewer pads than the others: what they leave behind goes when
there are more."""

_POLL_SECONDS: Final = 0.25
"""How often a run that waits for pads looks for new ones."""


class _Piece:
    """A leaf's part of one product, of which some tokens are used now and some later."""

    __slots__ = ("leaf", "pads", "products")

    def __init__(self, leaf: Leaf, place: int) -> None:
        self.leaf = leaf
        self.pads = leaf.pads(place)
        self.products: torch.Tensor | None = None

    def corrections(self, place: int) -> torch.Tensor:
        if self.products is None:
            out = torch.empty((LEAF_TOKENS, self.leaf.segment.layout.matrices[place].rows), dtype=torch.int32)
            block = self.leaf.segment.read(place, self.leaf.index, 1)
            self.leaf.open(place, block, memoryview(out.numpy()).cast("B"))
            self.products = out
        return self.products


@dataclass(slots=True)
class _Span:
    """Tokens ``start`` to ``stop`` of a leaf; of a whole leaf there is no ``piece``."""

    leaf: Leaf
    start: int
    stop: int
    piece: _Piece | None


class PadMask:
    """The mask of one message: see ``masks.Mask``."""

    def __init__(self, operand: torch.Tensor, place: int, spans: list[_Span]) -> None:
        self.operand = operand
        self._place = place
        self._spans = spans

    def correction(self) -> torch.Tensor:
        """``W·r``, int32 (rows, out), read from the pool. Raises ``DamagedError``."""
        place, spans = self._place, self._spans
        if not spans:
            raise RuntimeError("a mask's correction is there once")
        matrix = spans[0].leaf.segment.layout.matrices[place]
        out = torch.empty((self.operand.shape[0], matrix.rows), dtype=torch.int32)
        view = memoryview(out.numpy()).cast("B")
        row_bytes = matrix.rows * 4
        row = number = 0
        while number < len(spans):
            span = spans[number]
            if span.piece is not None:
                rows = span.stop - span.start
                out[row : row + rows] = span.piece.corrections(place)[span.start : span.stop]
                row += rows
                number += 1
                continue
            run = _neighbours(spans, number)
            blocks = span.leaf.segment.read(place, span.leaf.index, run)
            for index in range(run):
                block = blocks[index * matrix.block_bytes : (index + 1) * matrix.block_bytes]
                into = view[row * row_bytes : (row + LEAF_TOKENS) * row_bytes]
                spans[number + index].leaf.open(place, block, into)
                row += LEAF_TOKENS
            number += run
        self._spans = []
        return out


def _neighbours(spans: list[_Span], first: int) -> int:
    """How many whole leaves from ``first`` on lie side by side in one file."""
    leaf = spans[first].leaf
    count = 1
    for span in spans[first + 1 :]:
        beside = span.leaf.segment is leaf.segment and span.leaf.index == leaf.index + count
        if span.piece is not None or not beside:
            break
        count += 1
    return count


@dataclass(slots=True)
class _Stream:
    """The leaves of one kind that this run has claimed. ``dropped`` of them are gone."""

    leaves: list[Leaf] = field(default_factory=list)
    dropped: int = 0

    @property
    def claimed(self) -> int:
        return self.dropped + len(self.leaves)

    def __getitem__(self, number: int) -> Leaf:
        return self.leaves[number - self.dropped]


class PadSource:
    """Pads out of ``pool``, which it closes: see ``masks.MaskSource``.

    ``when_exhausted``: ``fail`` raises ``ShieldError`` where there are no pads left, ``wait`` waits until another
    process has made more.
    """

    mode = "pads"
    noise = 0.0

    def __init__(
        self,
        pool: Pool,
        *,
        when_exhausted: Literal["fail", "wait"] | str = "fail",
        notify: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._pool = pool
        self._wait = when_exhausted == "wait"
        self._notify = notify
        self._sleep = sleep
        self._streams = {kind: _Stream() for kind in KINDS}
        self._used: dict[Product, int] = {}
        self._pieces: dict[Product, _Piece] = {}
        self._places = {matrix.product: place for kind in KINDS for place, matrix in enumerate(pool.matrices[kind])}

    def take(self, product: Product, rows: int) -> PadMask:
        """A fresh mask for ``rows`` rows of ``product``; that its pads are spent is on the disk when it returns."""
        kind, place = kind_of(product), self._places[product]
        start, stop = self.reserve(product, rows)
        stream = self._streams[kind]
        self._used[product] = stop
        operand = torch.empty((rows, self._pool.matrices[kind][place].columns), dtype=torch.int32)
        spans: list[_Span] = []
        row = 0
        while start < stop:
            leaf = stream[start // LEAF_TOKENS]
            first = start % LEAF_TOKENS
            last = min(LEAF_TOKENS, first + stop - start)
            if last - first == LEAF_TOKENS:
                piece = None
                operand[row : row + LEAF_TOKENS] = leaf.pads(place)
            else:
                piece = self._piece(product, leaf, place, last)
                operand[row : row + last - first] = piece.pads[first:last]
            spans.append(_Span(leaf, first, last, piece))
            row += last - first
            start += last - first
        return PadMask(operand, place, spans)

    def reserve(self, product: Product, rows: int) -> tuple[int, int]:
        """Claims what the next ``rows`` rows of ``product`` need, where it is not claimed yet; gives their place among
        the tokens of this run. Raises as ``take`` does."""
        kind = kind_of(product)
        stream = self._streams[kind]
        while True:
            # Claiming may let go of old leaves, so both are looked at again.
            start = max(self._used.get(product, 0), stream.dropped * LEAF_TOKENS)
            stop = start + rows
            missing = -(-stop // LEAF_TOKENS) - stream.claimed
            if missing <= 0:
                return start, stop
            self._claim(kind, missing, rows)

    def _piece(self, product: Product, leaf: Leaf, place: int, stop: int) -> _Piece:
        """The part of ``leaf`` for ``product``; kept until its last token is used."""
        piece = self._pieces.pop(product, None)
        if piece is None or piece.leaf is not leaf:
            piece = _Piece(leaf, place)
        if stop < LEAF_TOKENS:
            self._pieces[product] = piece
        return piece

    def _claim(self, kind: str, leaves: int, rows: int) -> None:
        told = False
        while not (claimed := self._pool.claim(kind, leaves)):
            left = self._pool.left()[kind]
            what = "the layers" if kind == "body" else "lm_head"
            if not self._wait:
                raise ShieldError(
                    f"no pads left: {rows:,} for {what} are needed, and {left:,} are there: make more with "
                    "'teegpu pads make', or wait for another process to make them (shield.when_exhausted = wait)"
                )
            if not told:
                told = True
                self._notify(f"waiting for pads for {what}: {rows:,} are needed, and {left:,} are there")
            self._sleep(_POLL_SECONDS)
        stream = self._streams[kind]
        stream.leaves += claimed
        if self._pool.open_segments > _MOST_SEGMENTS:
            self._drop(leaves)

    def _drop(self, needed: int) -> None:
        """Lets go of the older half of all leaves that were there before the last ``needed`` ones."""
        for stream in self._streams.values():
            count = max(0, (len(stream.leaves) - needed) // 2)
            del stream.leaves[:count]
            stream.dropped += count
        self._pool.let_go({leaf.segment for stream in self._streams.values() for leaf in stream.leaves})

    def left(self) -> dict[str, int]:
        """Tokens for which the pool has pads, by kind (``body``: all layers, ``head``: lm_head)."""
        return self._pool.left()

    def close(self) -> None:
        """Lets go of what was claimed: nobody can read it any more. May be called twice."""
        self._pieces.clear()
        for stream in self._streams.values():
            stream.leaves.clear()
        self._pool.close()
