"""Plain products of a server, held against the runner's own weights within a tolerance (see ``plainverify``).

A program is verified product by product. The input of each is known here: it was sent, or it is an output of the same
program, scaled by a vector of the model as the fused plan does. Where a product comes back inside a sum with a
residual, that is taken off again, and what rounding did to the sum is added to the tolerance: against a large residual
a product is verified the less closely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch

from teegpu.metrics.events import TEE
from teegpu.metrics.recorder import Recorder
from teegpu.tee.products import Call
from teegpu.tee.shield.answers import NamingClient, wrong_product
from teegpu.tee.shield.plainverify import ROUNDOFF, Dtypes, PlainKeys
from teegpu.tee.weights import TeeWeights
from teegpu.wire.program import Step

VERIFY = "VERIFY"


class VerifiedProducts:
    """Runs programs on ``client`` and verifies what comes back. ``server_dtype`` gives the least precise dtype in which
    one of the servers computes.

    Raises ``VerificationError`` beside what the client raises.
    """

    def __init__(
        self,
        client: NamingClient,
        keys: PlainKeys,
        weights: TeeWeights,
        recorder: Recorder,
        server_dtype: Callable[[], str],
    ) -> None:
        self.narrow_range = client.narrow_range
        self._client = client
        self._keys = keys
        self._weights = weights
        self._recorder = recorder
        self._server_dtype = server_dtype

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        answer = await self._client.run(call)
        self._verify(call, answer, answer.address)
        self._recorder.lap(TEE, VERIFY, call.layer, call.chunk)
        return answer

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]

    def _verify(self, call: Call, answer: Mapping[str, torch.Tensor], address: str) -> None:
        known = dict(call.inputs) | dict(answer)
        sums: dict[str, Step] = {}
        for step in call.program.steps:
            if step.op == "scale":
                known[step.output] = _tensor(known, step.inputs[0]) * self._weights.vector(step.weight)
            elif step.op == "add":
                sums |= dict.fromkeys(step.inputs, step)
        linears = (step for step in call.program.steps if step.op == "linear")
        for source, steps in groupby(linears, key=lambda step: step.inputs[0]):
            self._verify_product(call, tuple(steps), source, known, sums, address)

    def _verify_product(
        self,
        call: Call,
        steps: tuple[Step, ...],
        source: str,
        known: Mapping[str, object],
        sums: Mapping[str, Step],
        address: str,
    ) -> None:
        """Verifies the products of ``source`` with the matrices of ``steps``."""
        encoding = self._client.encoding
        server = self._server_dtype()
        sent = _tensor(known, source)
        extra = None
        first = steps[0].output
        if first in known:
            received = torch.cat([_tensor(known, step.output) for step in steps], dim=-1)
            reply = encoding(first)
        else:
            total = sums[first]
            residual = next(name for name in total.inputs if name != first)
            whole, rest = _tensor(known, total.output), _tensor(known, residual)
            received = whole - rest
            reply = encoding(total.output)
            # The residual was rounded on its way and by the server, the sum by the server and on its way.
            extra = (ROUNDOFF[encoding(residual)] + ROUNDOFF[server]) * _norm(rest)
            extra = extra + (ROUNDOFF[reply] + ROUNDOFF[server]) * _norm(whole)
        into = encoding(source) if source in call.inputs else reply
        product = tuple(step.weight for step in steps)
        wrong = self._keys.wrong_rows(product, sent, received, Dtypes(into, server, reply), extra)
        if wrong:
            self._keys.discard()
            raise wrong_product(self._recorder, product, wrong, sent.shape[0], [address])


def _tensor(known: Mapping[str, object], name: str) -> torch.Tensor:
    value = known[name]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"register {name!r} of a plain program holds no values")
    return value


def _norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dim=-1, keepdim=True)
