"""Answers of servers with the server's name on them, and what is said of one that is wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import torch

from teegpu.errors import VerificationError
from teegpu.record.events import Noted
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.remote.client import GpuClient, Request
from teegpu.shield.quantised import Linear, layer_of
from teegpu.wire.messages import Result


class Answer(dict[str, torch.Tensor]):
    """The outputs of a call, and the ``address`` of the server that gave them."""

    address = ""


class NamingClient(GpuClient):
    """A ``GpuClient`` whose outputs say who gave them."""

    async def run(self, call: Call) -> Answer:
        return _answer(await super().run(call))

    async def begin(self, call: Call) -> Callable[[], Awaitable[Answer]]:
        finish = await super().begin(call)

        async def answered() -> Answer:
            return _answer(await finish())

        return answered

    def _checked(self, request: Request, result: Result, address: str) -> Answer:
        answer = Answer(super()._checked(request, result, address))
        answer.address = address
        return answer


def _answer(outputs: dict[str, torch.Tensor]) -> Answer:
    if not isinstance(outputs, Answer):
        raise TypeError("what a naming client has checked is an answer")
    return outputs


def wrong_product(
    recorder: Recorder, linear: Linear, rows: Sequence[int], total: int, at_fault: Sequence[str]
) -> VerificationError:
    """The error to raise where ``rows`` of the ``total`` of the product with ``linear`` are not what they should be, by
    the servers ``at_fault``. It is also noted in the record."""
    layer, names = layer_of(linear), "+".join(name.rpartition(".")[2] for name in linear)
    where = f"layer {layer}, {names}" if layer >= 0 else names
    who = " and ".join(f"the server at {address}" for address in at_fault)
    error = VerificationError(
        f"{who} answered {where} with values that are not the product that was asked for, in {len(rows)} of {total} "
        f"row{'s' * (total != 1)} (the first is {rows[0]}): nothing of that answer was used; find out what computes "
        "there, or use another server"
    )
    recorder.add(Noted(recorder.clock_ns(), f"verification failed: {error}"))
    return error
