"""A shielded runner and its servers in one process: every byte goes through the wire's codec, and is kept."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu import ring
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.folder import ModelFolder
from teegpu.ring import RingMatrix
from teegpu.tee import plans
from teegpu.tee.decoder import Decoder
from teegpu.tee.generate import Session
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import Products
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.shield.answers import NamingClient
from teegpu.tee.shield.exchanges import Check, Masked, TwoServers
from teegpu.tee.shield.facts import FactTable, Product, quantised
from teegpu.tee.shield.products import Exchange, Reference, ShieldedProducts
from teegpu.wire.limits import Limits
from tests.teegpu.tee.conftest import DirectClient, Harness, MakeHarness


class FreshMasks:
    """Masks whose products are computed on the spot, as ``pads`` computes them before. ``taken`` are all of them."""

    mode = "pads"
    noise = 0.0

    def __init__(self, world: World) -> None:
        self._world = world
        self.taken: list[torch.Tensor] = []

    def take(self, product: Product, rows: int) -> Any:
        facts = self._world.facts.of(product)
        operand = ring.expand(os.urandom(32), rows, facts.columns)
        self.taken.append(operand)
        weight = quantised(self._world.harness.store, self._world.harness.spec, product)[0]
        return SimpleNamespace(operand=operand, correction=lambda: ring.RingMatrix(weight).product(operand))

    def close(self) -> None:
        pass


class World:
    """``clients`` are the connections to two servers, with all that was sent over them; ``servers`` are these."""

    def __init__(self, harness: Harness, dtype: torch.dtype = torch.float32) -> None:
        self.harness = harness
        self.facts = FactTable.make(harness.store, harness.spec)
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

    def exchange(self, mode: str, check: Check | None = None) -> Exchange:
        harness = self.harness
        if mode == "reference":
            return Reference(harness.store, harness.spec, harness.recorder)
        if mode == "two-server":
            return TwoServers(self.gpu(0), self.gpu(1), harness.recorder, check, self._recomputed)
        return Masked(self.masks, self.gpu(0), harness.recorder, check)

    def _recomputed(self, product: Product, values: torch.Tensor) -> torch.Tensor:
        return RingMatrix(quantised(self.harness.store, self.harness.spec, product)[0]).product(values)

    def products(self, mode: str, check: Check | None = None) -> ShieldedProducts:
        return ShieldedProducts(self.facts, self.exchange(mode, check), self.harness.recorder)

    def generate(self, products: Products, prompt: Sequence[int], tokens: int, **options: Any) -> list[int]:
        """Greedy output of the plan ``attention`` over ``products``."""
        harness = self.harness
        decoder = Decoder(
            harness.spec, harness.weights, harness.rotary, plans.get("attention"), products, harness.recorder
        )
        session = Session(
            decoder,
            decoder,
            cache=KVCache(harness.spec, capacity=16),
            rotary=harness.rotary,
            recorder=harness.recorder,
            max_positions=harness.spec.max_positions,
            chunk_tokens=options.pop("chunk_tokens", 4096),
            **options,
        )
        greedy = Sampler(SamplingOptions(temperature=0.0))
        return session.generate(prompt, max_tokens=tokens, sampler=greedy).token_ids

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
