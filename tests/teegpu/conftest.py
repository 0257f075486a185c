"""A runner's decoder joined to a GPU server in one process: every byte goes through the wire's codec, none over a
socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu import facts
from teegpu.gpu.executor import Executor
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Products, drive
from teegpu.remote.client import GpuClient
from teegpu.stats.summary import Summary
from teegpu.tee.decoder import Decoder, Span, Step, Want
from teegpu.tee.engine import Capacity, Engine
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import LocalProducts
from teegpu.tee.rotary import Rotary
from teegpu.tee.weights import TeeWeights
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute
from tests.conftest import TinyModel
from transports.base import Answered, Client, Incoming, Message, Reply


class DirectClient(Client):
    """Hands each message to the server's ``answer`` and keeps what crossed. ``tamper`` may change the reply's
    frames. Of several ``servers``, each with some layers, the one is asked that holds the program's first weight."""

    name = "direct"
    endpoint = "direct"

    def __init__(self, *servers: GpuServer) -> None:
        self.servers = servers
        self.asked: list[int] = []
        self.sent: list[list[bytes]] = []
        self.tamper: Callable[[list[memoryview]], list[memoryview]] = lambda frames: frames

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Answered:
        sent_ns = time.perf_counter_ns()
        frames = [bytes(frame) for frame in message.frames]
        self.sent.append(frames)
        incoming = Incoming([memoryview(bytearray(f)) for f in frames], b"", None, sent_ns)
        self.asked.append(self._place(incoming.frames))
        encoded = self.servers[self.asked[-1]].answer(incoming)
        answer = self.tamper([memoryview(bytearray(frame)) for frame in encoded.frames])
        up, down = sum(map(len, frames)), sum(frame.nbytes for frame in answer)
        return Answered(Reply(answer, sent_ns, time.perf_counter_ns(), up, down))

    def _place(self, frames: list[memoryview]) -> int:
        message = codec.Decoder(Limits()).decode(frames)
        weights = list(message.program.weights) if isinstance(message, Execute) else []
        held = [server._executor.weights for server in self.servers]
        places = [number for number, each in enumerate(held) if weights and each.shape(weights[0]) is not None]
        return places[0] if places else 0

    def close(self) -> None:
        pass


@dataclass
class Harness:
    """Everything of one runner and one server over ``folder``."""

    folder: ModelFolder
    spec: ModelSpec
    rotary: Rotary
    weights: TeeWeights
    store: WeightStore
    recorder: Recorder
    summary: Summary
    client: DirectClient
    wire_dtype: str
    borders: frozenset[int] = frozenset()

    def gpu_client(self, **options: Any) -> GpuClient:
        return GpuClient(
            self.client, self.spec, wire_dtype=self.wire_dtype, recorder=self.recorder, limits=Limits(), **options
        )

    def decoder(self, plan: str, products: Products | None = None) -> Decoder:
        chosen = facts.plan(plan)
        if products is None:
            products = self.gpu_client() if chosen.remote else LocalProducts(self.weights, self.recorder)
        return Decoder(self.spec, self.weights, self.rotary, chosen, products, self.recorder, self.borders)

    def engine(
        self,
        plan: str,
        *,
        decode_plan: str | None = None,
        chunk_tokens: int = 4096,
        prefix_bytes: int = 0,
        **options: Any,
    ) -> Engine:
        prefill = self.decoder(plan)
        return Engine(
            prefill,
            prefill if decode_plan is None else self.decoder(decode_plan),
            spec=self.spec,
            rotary=self.rotary,
            recorder=self.recorder,
            chunk_tokens=chunk_tokens,
            **{"capacity": Capacity(prefix_bytes=prefix_bytes), **options},
        )

    def logits(self, plan: str, ids: torch.Tensor, *edges: int, products: Products | None = None) -> torch.Tensor:
        """Logits of every position of ``ids``, (tokens, vocab), computed in passes that end at ``edges``."""
        decoder = self.decoder(plan, products)
        cache = KVCache(self.spec, capacity=4)
        outputs = []
        want: Want = "all"
        with torch.inference_mode():
            for start, stop in zip((0, *edges), (*edges, len(ids)), strict=True):
                cache.reserve(stop)
                self.rotary.prepare(stop)
                out = drive(decoder.forward(Step([Span(ids[start:stop], start, cache, want)])))
                cache.advance(stop)
                assert out is not None
                outputs.append(out)
        return torch.cat(outputs)


MakeHarness = Callable[..., Harness]


@pytest.fixture
def harness() -> Iterator[MakeHarness]:
    """``harness(folder, wire_dtype="fp32", dtype=torch.float32, shards=())``. ``shards``: the first and the last layer
    of each server, where there are several."""
    stores: list[WeightStore] = []

    def make(
        folder: ModelFolder,
        *,
        wire_dtype: str = "fp32",
        dtype: torch.dtype = torch.float32,
        shards: Sequence[tuple[int, int]] = (),
    ) -> Harness:
        spec = read_spec(folder)
        store = WeightStore(folder, spec)
        stores.append(store)
        summary = Summary()
        servers = []
        for layers in shards or [(0, spec.layers - 1)]:
            device = DeviceWeights(store, spec, device=torch.device("cpu"), dtype=dtype, layers=layers)
            identity = Identity(spec, "digest", "cpu", "fp32", 1, device.nbytes, layers)
            # It is asked directly, and only notes with its transport what it holds.
            transport: Any = SimpleNamespace(user_bytes=0)
            servers.append(GpuServer(transport, Executor(device, Limits()), identity, Limits()))
        return Harness(
            folder=folder,
            spec=spec,
            rotary=Rotary(spec),
            weights=TeeWeights(store, spec),
            store=store,
            recorder=Recorder(summary.add),
            summary=summary,
            client=DirectClient(*servers),
            wire_dtype=wire_dtype,
            borders=frozenset(first for first, _ in shards if first),
        )

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def runner(tiny_model: TinyModel, harness: MakeHarness) -> Harness:
    return harness(tiny_model("llama"))


@pytest.fixture(scope="session")
def reference() -> Callable[[ModelFolder], Any]:
    """``reference(folder)`` → the transformers model of that folder in fp32, loaded once."""
    import transformers

    loaded: dict[str, Any] = {}

    def load(folder: ModelFolder) -> Any:
        key = str(folder.path)
        if key not in loaded:
            loaded[key] = transformers.AutoModelForCausalLM.from_pretrained(key, dtype=torch.float32).eval()
        return loaded[key]

    return load


def random_ids(count: int, seed: int = 0, below: int = 250) -> torch.Tensor:
    return torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed))
