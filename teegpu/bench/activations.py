"""What really crosses the link: the tensors of a pass of the model, by kind, for measuring codecs on them.

A prompt goes through the plans ``fused`` and ``batched`` with a real server, in fp32, and each tensor is copied as it
is sent and received. The runner divides rows as it does for narrow wire dtypes, so their values are those that such a
dtype gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch

import transports
from teegpu.config import Config
from teegpu.metrics.recorder import Recorder
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import rotary_config
from teegpu.model.spec import ModelSpec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import client_options, wire_limits
from teegpu.tee import plans
from teegpu.tee.decoder import Decoder, Pass
from teegpu.tee.embedded_server import EmbeddedServer
from teegpu.tee.gpu_client import GpuClient
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import Call, Products, drive
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.weights import TeeWeights

KINDS: Final[dict[str, Mapping[str, str]]] = {
    "fused": {
        "x": "residual",
        "z": "residual",
        "q": "qkv",
        "k": "qkv",
        "v": "qkv",
        "a": "attended",
        "gate": "gate+up",
        "up": "gate+up",
        "h": "mlp",
    },
    "batched": {"n": "hidden", "scores": "scores", "p": "probabilities"},
}
"""By plan, what its registers hold: ``residual`` and ``hidden`` (the normalised one) states, Q, K and V, the output of
attention, the MLP's gate and up and their product, attention scores and what softmax makes of them."""

NAMES: Final = tuple(dict.fromkeys(kind for registers in KINDS.values() for kind in registers.values()))

MOST_LAYERS: Final = 5

Activations = dict[str, list[tuple[torch.Tensor, ...]]]
"""By kind, contiguous fp32 tensors, those together that one message carries."""


def sampled_layers(layers: int) -> list[int]:
    """Some layers from the first to the last but one, which is the last that computes every row."""
    last = max(0, layers - 2)
    count = min(MOST_LAYERS, last + 1)
    return sorted({round(place * last / max(1, count - 1)) for place in range(count)})


class Tap:
    """Hands calls on to ``inner`` and keeps copies of what goes there and comes back, of ``layers`` alone."""

    narrow_range = True

    def __init__(self, inner: Products, kinds: Mapping[str, str], layers: Collection[int]) -> None:
        self.found: Activations = {}
        self._inner = inner
        self._kinds = kinds
        self._layers = layers

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        self._keep(call, {name: each for name, each in call.inputs.items() if isinstance(each, torch.Tensor)})
        outputs = await self._inner.run(call)
        self._keep(call, outputs)  # before its owner writes to it
        return outputs

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]

    def _keep(self, call: Call, registers: Mapping[str, object]) -> None:
        if call.layer not in self._layers:
            return
        together: dict[str, list[torch.Tensor]] = {}
        for register, tensor in registers.items():
            kind = self._kinds.get(register)
            if kind is not None and isinstance(tensor, torch.Tensor):
                copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                together.setdefault(kind, []).append(copy)
        for kind, tensors in together.items():
            self.found.setdefault(kind, []).append(tuple(tensors))


def capture(
    folder: ModelFolder, spec: ModelSpec, base: Config, tokens: int, *, server_threads: int
) -> tuple[str, Activations]:
    """The model's digest, and what crosses in a prefill of ``tokens`` tokens of a built-in text, by the names of
    ``NAMES``. Raises what reading the model and reaching a server raise."""
    found: Activations = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(folder, base, threads=server_threads))
        store = stack.enter_context(WeightStore(folder, spec))
        digest = store.digest()
        weights, rotary = TeeWeights(store, spec), RotaryTable(rotary_config(folder))
        rotary.prepare(tokens)
        ids = torch.tensor(texts.prompt_of(Tokenizer(folder), tokens))
        server.wait()
        client = stack.enter_context(transports.connect("zmq", server.endpoint, client_options(base)))
        for plan, kinds in KINDS.items():
            record = Recorder()
            gpu = GpuClient(client, spec, wire_dtype="fp32", recorder=record, limits=wire_limits(base))
            gpu.hello(base.link.hello_timeout_seconds, digest)
            tap = Tap(gpu, kinds, sampled_layers(spec.layers))
            cache = KVCache(spec)
            cache.reserve(tokens)
            drive(Decoder(spec, weights, rotary, plans.get(plan), tap, record).forward(Pass(ids, 0, cache, "last")))
            found |= tap.found
    return digest, found
