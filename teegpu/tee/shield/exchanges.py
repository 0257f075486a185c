"""Products of whole numbers from servers that must not see them: from two, each with a share, or from one, masked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import torch

from teegpu.metrics.events import TEE
from teegpu.metrics.recorder import Recorder
from teegpu.ring import SEED_BYTES, Seed
from teegpu.tee.products import Call
from teegpu.tee.shield.answers import Answer, NamingClient, wrong_product
from teegpu.tee.shield.facts import Product
from teegpu.tee.shield.masks import Mask, MaskSource
from teegpu.tee.shield.products import Asked

MASK: Final = "MASK"
UNMASK: Final = "UNMASK"
VERIFY: Final = "VERIFY"
CORRECTION: Final = {"pads": "PADS", "lwe": "HINT"}
"""What a mask's correction is called in reports, by mode."""


Recompute = Callable[[Product, torch.Tensor], torch.Tensor]
"""The product of int32 (rows, in) with the runner's own weights, int32 (rows, out)."""


class Check(Protocol):
    """Finds wrong products, as ``verify.Keys`` and ``wholeverify.WholeKeys`` do. ``discard`` is for after it has found
    one."""

    def wrong_rows(self, product: Product, sent: torch.Tensor, received: torch.Tensor) -> list[int]: ...

    def discard(self) -> None: ...


class TwoServers:
    """Two fleets, of which neither sees anything: the first gets ``whole + r`` for a fresh uniform ``r``, the second
    the seed of ``r``. Each of these is uniform by itself; the difference of the products is the product of ``whole``.

    The difference alone is checked, which is what the run goes on with; where it is wrong, each server's answer is
    held against what it should have been, to say whose it was.
    """

    noise = 0.0

    def __init__(
        self,
        first: NamingClient,
        second: NamingClient,
        recorder: Recorder,
        check: Check | None,
        recompute: Recompute,
    ) -> None:
        self._recorder = recorder
        self._check = check
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
        product = torch.empty((rows, asked.ring.facts.rows), dtype=torch.int32)
        for name, into in asked.ring.parts(product):
            torch.sub(one[name], other[name], out=into)
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        if self._check is not None:
            at_fault = partial(self._at_fault, asked, (share, one), (seed, other))
            _verify(self._check, self._recorder, asked, asked.whole, product, at_fault)
        return product

    async def _both(self, first: Call, second: Call) -> tuple[Answer, Answer]:
        if self._first.overlapped:
            async with asyncio.TaskGroup() as group:
                small = group.create_task(self._second.run(second))
                large = group.create_task(self._first.run(first))
            return large.result(), small.result()
        # The seed first: it is on its way in no time, and its server begins.
        rest = self._second.begin(second)
        one = await self._first.run(first)
        return one, await rest()

    def _at_fault(self, asked: Asked, first: tuple[torch.Tensor, Answer], second: tuple[Seed, Answer]) -> list[str]:
        (share, one), (seed, other) = first, second
        product = asked.ring.product
        found = []
        if not torch.equal(joined(one), self._recompute(product, share)):
            found.append(one.address)
        if not torch.equal(joined(other), self._recompute(product, seed.expand())):
            found.append(other.address)
        return found or [one.address, other.address]


class Masked:
    """One fleet, which gets ``whole`` plus a mask of which the product is known, or can be had, here.

    ``check`` is one of products that did not wrap. Where the mask leaves noise in the product, which then is not the
    product of ``whole``, it is one of the masked values, modulo 2**32.
    """

    def __init__(self, source: MaskSource, client: NamingClient, recorder: Recorder, check: Check | None) -> None:
        self._recorder = recorder
        self._check = check
        self.noise = source.noise
        self._checks_masked = source.noise > 0.0
        self._source = source
        self._client = client
        self._work = CORRECTION[source.mode]

    async def product(self, asked: Asked) -> torch.Tensor:
        call, product = asked.call, asked.ring.product
        mask = self._source.take(product, asked.whole.shape[0])
        masked = asked.whole + mask.operand
        self._recorder.lap(TEE, MASK, call.layer, call.chunk)
        answer, result = await self._meanwhile(asked.to_call(masked), mask)
        check = self._check
        if check is not None and self._checks_masked:
            _verify(check, self._recorder, asked, masked, joined(answer), lambda: [answer.address])
        for name, into in asked.ring.parts(result):
            torch.sub(answer[name], into, out=into)
        self._recorder.lap(TEE, UNMASK, call.layer, call.chunk)
        if check is not None and not self._checks_masked:
            _verify(check, self._recorder, asked, asked.whole, result, lambda: [answer.address])
        return result

    async def _meanwhile(self, call: Call, mask: Mask) -> tuple[Answer, torch.Tensor]:
        """What the server answers, and the mask's correction, which is made while the request is on its way."""
        if self._client.overlapped:
            task = asyncio.get_running_loop().create_task(self._client.run(call))
            await asyncio.sleep(0)  # it is sent now
            try:
                correction = mask.correction()
            except BaseException:
                task.cancel()
                raise
            self._recorder.lap(TEE, self._work, call.layer, call.chunk)
            return await task, correction
        finish = self._client.begin(call)
        correction = mask.correction()
        self._recorder.lap(TEE, self._work, call.layer, call.chunk)
        return await finish(), correction


def _verify(
    check: Check,
    recorder: Recorder,
    asked: Asked,
    sent: torch.Tensor,
    received: torch.Tensor,
    at_fault: Callable[[], list[str]],
) -> None:
    """Raises ``VerificationError`` where ``received`` is not the product of ``sent``, and gives up the keys that found
    it: ``at_fault`` then says whose it is."""
    product = asked.ring.product
    wrong = check.wrong_rows(product, sent, received)
    if wrong:
        check.discard()
        raise wrong_product(recorder, product, wrong, sent.shape[0], at_fault())
    recorder.lap(TEE, VERIFY, asked.call.layer, asked.call.chunk)


def joined(answer: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The outputs side by side, int32 (rows, out)."""
    parts = list(answer.values())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
