"""Captured messages as a server reads them: which product, which rows, what it answered.

A ``View`` is what somebody knows: one server, or two that put together what they have.
"""

from __future__ import annotations

import abc
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from teegpu.audit.capture import Capture, Exchange
from teegpu.errors import WireError
from teegpu.ring import Seed
from teegpu.wire.codec import Decoder
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Result
from teegpu.wire.program import Program

RESIDUAL = "x"
"""The register in which the plan ``fused`` sends what goes into a layer."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request to compute and its answer. ``operands`` and ``outputs`` are by register, in the dtype in which they
    crossed the link (int8 as fp32, seeds expanded); ``encodings`` are the wire dtypes of the operands. ``outputs`` are
    empty where they were not kept."""

    program: Program
    operands: dict[str, torch.Tensor]
    encodings: dict[str, str]
    outputs: dict[str, torch.Tensor]

    @property
    def rows(self) -> int:
        """Of its first operand: tokens."""
        return next(iter(self.operands.values())).shape[0]

    def asks_for(self, weight: str) -> bool:
        return weight in self.program.weights

    def reads(self, weight: str) -> torch.Tensor | None:
        """The operand that is multiplied with ``weight`` as it came, or None."""
        names = [step.inputs[0] for step in self.program.steps if weight in step.weights]
        return self.operands.get(names[0]) if names else None


@dataclass(frozen=True, slots=True)
class Entering:
    """What enters a layer: ``rows`` (tokens, hidden), one for each token, or a multiple of them.

    ``form``: ``normed`` rows went through the layer's norm, its weight included; ``residual`` ones did not."""

    rows: torch.Tensor
    form: Literal["normed", "residual"]


class View(abc.ABC):
    """``label`` is its name in tables. ``control``: it knows more than any one server is to know."""

    def __init__(self, label: str, *, control: bool = False) -> None:
        self.label = label
        self.control = control
        self._works: dict[str, list[Work]] = {}

    def works(self, scene: str) -> list[Work]:
        """The work of ``scene`` that was kept, in its order."""
        if scene not in self._works:
            self._works[scene] = list(self._read(scene))
        return self._works[scene]

    @abc.abstractmethod
    def _read(self, scene: str) -> Iterator[Work]: ...

    def entering(self, scene: str, layer: int) -> Entering | None:
        """The rows that enter ``layer``, or None where they are not sent."""
        works = self.works(scene)
        read = (work.reads(f"layers.{layer}.q_proj") for work in works)
        normed = [rows for rows in read if rows is not None]
        if normed:
            return Entering(torch.cat(normed), "normed")
        residual = [
            work.operands[RESIDUAL]
            for work in works
            if RESIDUAL in work.operands and work.reads(f"layers.{layer}.o_proj") is not None
        ]
        return Entering(torch.cat(residual), "residual") if residual else None

    def logits(self, scene: str) -> torch.Tensor | None:
        """What was answered to lm_head, (tokens, vocab), or None where it was not asked for."""
        parts = [_logits(work.outputs) for work in self.works(scene) if "logits" in work.outputs]
        return torch.cat(parts) if parts else None

    def ids(self, scene: str) -> list[int] | None:
        """Token ids that came as such, or None."""
        found = [work.operands[name] for work in self.works(scene) for name in sorted(work.program.id_registers)]
        return torch.cat(found).tolist() if found else None


class ServerView(View):
    """What the server at ``server`` (its address) got of ``capture``, read with ``limits``."""

    def __init__(self, label: str, capture: Capture, server: str, limits: Limits) -> None:
        super().__init__(label)
        self.server = server
        self._capture = capture
        self._decoder = Decoder(limits)

    def exchanges(self, scene: str | None = None) -> list[Exchange]:
        return self._capture.of(self.server, scene)

    def _read(self, scene: str) -> Iterator[Work]:
        for exchange in self.exchanges(scene):
            if exchange.request is None:
                continue
            asked = self._decoder.decode([memoryview(frame) for frame in exchange.request])
            if isinstance(asked, Execute):
                operands = {
                    name: operand.expand() if isinstance(operand, Seed) else operand
                    for name, operand in asked.tensors.items()
                }
                yield Work(asked.program, operands, dict(asked.encodings), self._outputs(exchange))

    def _outputs(self, exchange: Exchange) -> dict[str, torch.Tensor]:
        if exchange.reply is None:
            return {}
        try:
            answered = self._decoder.decode([memoryview(frame) for frame in exchange.reply])
        except WireError:
            return {}  # what a server says is not always a message; what it was sent counts all the same
        return answered.tensors if isinstance(answered, Result) else {}


class Together(View):
    """Two servers that put together what they have: of each product, what the first got and answered less what the
    second did. Rows must be int32; the differences are modulo 2**32."""

    def __init__(self, label: str, first: View, second: View) -> None:
        super().__init__(label, control=True)
        self._first, self._second = first, second

    def _read(self, scene: str) -> Iterator[Work]:
        others: dict[bytes, list[Work]] = defaultdict(list)
        for work in self._second.works(scene):
            others[work.program.packed].append(work)
        for work in self._first.works(scene):
            waiting = others[work.program.packed]
            if waiting:
                other = waiting.pop(0)
                yield Work(
                    work.program,
                    _less(work.operands, other.operands),
                    work.encodings,
                    _less(work.outputs, other.outputs),
                )


def _logits(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those that were answered, or what a server can make of the two that the TEE joins: it knows what both are of, and
    a factor of all logits of a token changes nothing."""
    if "logits_x" not in outputs:
        return outputs["logits"]
    added = outputs["d"].to(torch.float32)
    return outputs["logits_x"] + outputs["logits"] * torch.rsqrt(added.square().mean(-1, keepdim=True) + 1e-12)


def _less(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value - second[name]
        for name, value in first.items()
        if name in second and value.shape == second[name].shape
    }
