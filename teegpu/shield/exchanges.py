"""Products of whole numbers from servers: from two, each with a share, from one that sees masks, or in the clear.

Whichever way, what the run goes on with is the product of its own whole numbers, and that is what is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from teegpu.record.events import TEE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.ring import SEED_BYTES, Seed
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
        share = seed.expand().add_(asked.whole)
        self._recorder.lap(TEE, MASK, call.layer, call.chunk)
        one, other = await self._both(asked.to_call(share), asked.to_call(seed))
        name = asked.ring.output
        product = one[name] - other[name]
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        at_fault = partial(self._at_fault, asked, (share, one), (seed, other))
        _verify(self._checks, self._recorder, asked, product, at_fault)
        return product

    async def _both(self, first: Call, second: Call) -> tuple[Answer, Answer]:
        # The seed first: it is on its way in no time, and its server begins.
        rest = await self._second.begin(second)
        one = await self._first.run(first)
        return one, await rest()

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
        masked = mask.operand.add_(asked.whole)
        self._recorder.lap(TEE, MASK, call.layer, call.chunk)
        answer = await self._client.run(asked.to_call(masked))
        product = torch.sub(answer[asked.ring.output], mask.correction, out=mask.correction)
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        _verify(self._checks, self._recorder, asked, product, lambda: [answer.address])
        return product


class Unmasked:
    """One pool, which sees the whole numbers, and whose products are checked: nothing is hidden."""

    def __init__(self, client: NamingClient, recorder: Recorder, checks: Checks | None) -> None:
        self._client = client
        self._recorder = recorder
        self._checks = checks

    async def product(self, asked: Asked) -> torch.Tensor:
        answer = await self._client.run(asked.to_call(asked.whole))
        product = answer[asked.ring.output]
        _verify(self._checks, self._recorder, asked, product, lambda: [answer.address])
        return product


def _verify(
    checks: Checks | None, recorder: Recorder, asked: Asked, received: torch.Tensor, at_fault: Callable[[], list[str]]
) -> None:
    """Raises ``VerificationError`` where ``received`` is not the product of ``asked``; ``at_fault`` then says whose
    it is."""
    if checks is None:
        return
    linear = asked.ring.linear
    wrong = checks.wrong_rows(linear, asked.whole, received)
    if wrong:
        raise wrong_product(recorder, linear, wrong, received.shape[0], at_fault())
    recorder.lap(TEE, VERIFY, asked.call.layer, asked.call.chunk)
