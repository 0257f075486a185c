"""A shielded runner and its servers in one process: every byte goes through the wire's codec, and is kept."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu import facts, ring
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.folder import ModelFolder
from teegpu.remote.calls import Products
from teegpu.ring import RingMatrix
from teegpu.shield.answers import NamingClient
from teegpu.shield.exchanges import Masked, TwoServers, Unmasked
from teegpu.shield.freivalds import Checks
from teegpu.shield.pads import Mask
from teegpu.shield.products import Exchange, Reference, ShieldedProducts
from teegpu.shield.quantised import Linear, Measures, quantised, read
from teegpu.tee.decoder import Decoder
from teegpu.tee.engine import Engine
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.wire.limits import Limits
from tests.teegpu.conftest import DirectClient, Harness, MakeHarness


class FreshMasks:
    """Masks whose products are computed on the spot, as ``pads`` computes them before. ``taken`` are all of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.taken: list[torch.Tensor] = []

    def take(self, linear: Linear, rows: int) -> Mask:
        operand = ring.expand(os.urandom(32), rows, self._world.measures.of(linear).columns)
        self.taken.append(operand.clone())
        weight = quantised(self._world.harness.store, self._world.harness.spec, linear)[0]
        return Mask(operand, ring.RingMatrix(weight).product(operand))


class World:
    """``clients`` are the connections to two servers, with all that was sent over them; ``servers`` are these."""

    def __init__(self, harness: Harness, dtype: torch.dtype = torch.float32) -> None:
        self.harness = harness
        self.measures = Measures.of_model(harness.store, harness.spec)
        self.servers = [self._server(dtype) for _ in range(2)]
        self.clients = [DirectClient(server) for server in self.servers]
        for number, client in enumerate(self.clients, 1):
            client.endpoint = f"tcp://server{number}:5555"
        self._ids = itertools.count(1)
        self.masks = FreshMasks(self)

    def _server(self, dtype: torch.dtype) -> GpuServer:
        spec, store = self.harness.spec, self.harness.store
        device = DeviceWeights(store, spec, device=torch.device("cpu"), dtype=dtype)
        layers = (0, spec.layers - 1)
        ring_weights = RingWeights(store.reopen, spec, device=torch.device("cpu"), layers=layers)
        identity = Identity(spec, "digest", "cpu", "fp32", 1, device.nbytes, layers)
        transport: Any = SimpleNamespace(user_bytes=0)
        return GpuServer(transport, Executor(device, Limits(), ring=ring_weights), identity, Limits())

    def gpu(self, number: int, wire_dtype: str = "int32") -> NamingClient:
        harness = self.harness
        return NamingClient(
            self.clients[number],
            harness.spec,
            wire_dtype=wire_dtype,
            recorder=harness.recorder,
            limits=Limits(),
            ids=self._ids,
        )

    def exchange(self, mode: str, checks: Checks | None = None) -> Exchange:
        harness = self.harness
        if mode == "reference":
            return Reference(harness.store, harness.spec, harness.recorder)
        if mode == "two-server":
            return TwoServers(self.gpu(0), self.gpu(1), harness.recorder, checks, self._recomputed)
        if mode == "none":
            return Unmasked(self.gpu(0), harness.recorder, checks)
        return Masked(self.masks, self.gpu(0), harness.recorder, checks)

    def checks(self, bits: int = 40) -> Checks:
        made = Checks(bits, lambda reader: read(self.harness.store, self.harness.spec, [reader]))
        read(self.harness.store, self.harness.spec, [made.add])
        return made

    def _recomputed(self, linear: Linear, values: torch.Tensor) -> torch.Tensor:
        return RingMatrix(quantised(self.harness.store, self.harness.spec, linear)[0]).product(values)

    def products(self, mode: str, checks: Checks | None = None) -> ShieldedProducts:
        return ShieldedProducts(self.measures, self.exchange(mode, checks), self.harness.recorder)

    def generate(self, products: Products, prompt: Sequence[int], tokens: int, **options: Any) -> list[int]:
        """Greedy output of the plan ``attention`` over ``products``."""
        harness = self.harness
        decoder = Decoder(
            harness.spec, harness.weights, harness.rotary, facts.plan("attention"), products, harness.recorder
        )
        engine = Engine(
            decoder,
            decoder,
            spec=harness.spec,
            rotary=harness.rotary,
            recorder=harness.recorder,
            chunk_tokens=options.pop("chunk_tokens", 4096),
            **options,
        )
        greedy = Sampler(SamplingOptions(temperature=0.0))
        return engine.generate(prompt, max_tokens=tokens, sampler=greedy).token_ids

    @property
    def sent(self) -> list[list[list[bytes]]]:
        """The frames of every message, by server."""
        return [client.sent for client in self.clients]


MakeWorld = Callable[..., World]


@pytest.fixture
def world(harness: MakeHarness) -> MakeWorld:
    """``world(folder)`` → a ``World`` around two servers of that model."""

    def make(folder: ModelFolder, **options: Any) -> World:
        return World(harness(folder), **options)

    return make
