"""Products of whole numbers from servers: from two, each with a share, from one that sees masks, or in the clear.

Whichever way, what the run goes on with is the product of its own whole numbers, and that is what is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import torch

from teegpu.record.events import TEE
from teegpu.record.recorder import Recorder
from teegpu.ring import SEED_BYTES, Seed, add, subtract
from teegpu.shield.answers import Answer, NamingClient, wrong_product
from teegpu.shield.freivalds import Checks
from teegpu.shield.pads import MaskSource
from teegpu.shield.products import Asked
from teegpu.shield.quantised import Linear

MASK: Final = "MASK"
UNMASK: Final = "UNMASK"
VERIFY: Final = "VERIFY"


Recompute = Callable[[Linear, torch.Tensor], torch.Tensor]
"""The product of int32 (rows, in) with the runner's own weights, int32 (rows, out)."""


class TwoServers:
    """Two pools, of which neither sees anything: the first gets ``whole + r`` for a fresh uniform ``r``, the second
    the seed of ``r``. Each of these is uniform by itself; the difference of the products is the product of ``whole``.

    The difference alone is checked, which is what the run goes on with; where it is wrong, each server's answer is
    held against what it should have been, to say whose it was.
    """

    def __init__(
        self,
        first: NamingClient,
        second: NamingClient,
        recorder: Recorder,
        checks: Checks | None,
        recompute: Recompute,
    ) -> None:
        self._recorder = recorder
        self._checks = checks
        self._recompute = recompute
        self._first = first
        self._second = second

    async def product(self, asked: Asked) -> torch.Tensor:
        call = asked.call
        rows, columns = asked.whole.shape
        seed = Seed(os.urandom(SEED_BYTES), (rows, columns))
        share = seed.expand(plus=asked.whole)
        self._recorder.lap(TEE, MASK, call.layer, call.chunk)
        # The seed first: it is on its way in no time, and its server begins.
        second = await self._second.begin(asked.to_call(seed))
        first = await self._first.begin(asked.to_call(share))
        check = _Check(self._checks, self._recorder, asked)
        one, other = await first(), await second()
        name = asked.ring.output
        product = subtract(one[name], other[name])
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        check.passes(product, lambda: self._at_fault(asked, (share, one), (seed, other)))
        return product

    def _at_fault(self, asked: Asked, first: tuple[torch.Tensor, Answer], second: tuple[Seed, Answer]) -> list[str]:
        (share, one), (seed, other) = first, second
        linear, name = asked.ring.linear, asked.ring.output
        found = []
        if not torch.equal(one[name], self._recompute(linear, share)):
            found.append(one.address)
        if not torch.equal(other[name], self._recompute(linear, seed.expand())):
            found.append(other.address)
        return found or [one.address, other.address]


class Masked:
    """One pool, which gets ``whole`` plus a mask of which the product is known here."""

    def __init__(self, source: MaskSource, client: NamingClient, recorder: Recorder, checks: Checks | None) -> None:
        self._source = source
        self._client = client
        self._recorder = recorder
        self._checks = checks

    async def product(self, asked: Asked) -> torch.Tensor:
        call = asked.call
        mask = self._source.take(asked.ring.linear, asked.whole.shape[0])
        masked = add(mask.operand, asked.whole, out=mask.operand)
        self._recorder.lap(TEE, MASK, call.layer, call.chunk)
        finish = await self._client.begin(asked.to_call(masked))
        check = _Check(self._checks, self._recorder, asked)
        answer = await finish()
        product = subtract(answer[asked.ring.output], mask.correction, out=mask.correction)
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        check.passes(product, lambda: [answer.address])
        return product


class Unmasked:
    """One pool, which sees the whole numbers, and whose products are checked: nothing is hidden."""

    def __init__(self, client: NamingClient, recorder: Recorder, checks: Checks | None) -> None:
        self._client = client
        self._recorder = recorder
        self._checks = checks

    async def product(self, asked: Asked) -> torch.Tensor:
        finish = await self._client.begin(asked.to_call(asked.whole))
        check = _Check(self._checks, self._recorder, asked)
        answer = await finish()
        product = answer[asked.ring.output]
        check.passes(product, lambda: [answer.address])
        return product


class _Check:
    """Of the product of ``asked``, which is on its way: what can be computed before it is there, is.

    ``checks``: None where nothing is verified."""

    def __init__(self, checks: Checks | None, recorder: Recorder, asked: Asked) -> None:
        self._recorder = recorder
        self._asked = asked
        self._wrong_rows = None if checks is None else checks.prepare(asked.ring.linear, asked.whole)
        self._lap()

    def _lap(self) -> None:
        if self._wrong_rows is not None:
            self._recorder.lap(TEE, VERIFY, self._asked.call.layer, self._asked.call.chunk)

    def passes(self, received: torch.Tensor, at_fault: Callable[[], list[str]]) -> None:
        """Raises ``VerificationError`` where ``received`` is not the product; ``at_fault`` then says whose it is."""
        wrong = self._wrong_rows(received) if self._wrong_rows is not None else []
        if wrong:
            raise wrong_product(self._recorder, self._asked.ring.linear, wrong, received.shape[0], at_fault())
        self._lap()
