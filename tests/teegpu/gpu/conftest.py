"""A model of two layers in memory, on every device that is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from teegpu import ring
from teegpu.gpu.executor import Execution, Executor
from teegpu.gpu.server import Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.spec import ModelSpec
from teegpu.wire import dtypes
from teegpu.wire.limits import Limits

SPEC = ModelSpec(
    name="tiny",
    architecture="qwen2",
    layers=2,
    hidden_size=32,
    intermediate_size=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab_size=50,
    max_positions=64,
    rms_eps=1e-6,
    rope={},
    layer_windows=(None, None),
    qkv_bias=True,
)


class MemoryStore:
    """The part of a ``WeightStore`` that a device loads from, with random values of the spec's shapes."""

    def __init__(self, spec: ModelSpec) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tensors = {name: torch.randn(shape, generator=generator) / 4 for name, shape in spec.weights.items()}
        self.loaded: list[str] = []
        self.tied = spec.tied_embeddings

    def load_whole(self, name: str, weight: torch.Tensor, scale: torch.Tensor, first: int = 0) -> None:
        ring.quantise_into(self.tensors[name][first : first + len(weight)], weight, scale)

    def load_into(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        self.loaded.append(name)
        out.copy_(self.tensors[name][first : first + len(out)])


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return SPEC


@pytest.fixture(scope="session")
def tied_spec() -> ModelSpec:
    return replace(SPEC, tied_embeddings=True)


@pytest.fixture
def make_store() -> Callable[[ModelSpec], MemoryStore]:
    return MemoryStore


@pytest.fixture(scope="session")
def store() -> MemoryStore:
    return MemoryStore(SPEC)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(request.param)


MakeExecutor = Callable[..., Executor]


@pytest.fixture
def make_executor(store: MemoryStore, spec: ModelSpec, device: torch.device) -> MakeExecutor:
    """``make_executor(dtype=torch.float32, limits=Limits(), **more)`` → an executor on ``device``."""

    def make(dtype: torch.dtype = torch.float32, limits: Limits | None = None, **more: object) -> Executor:
        return Executor(DeviceWeights(store, spec, device=device, dtype=dtype), limits or Limits(), **more)

    return make


@pytest.fixture
def identity(spec: ModelSpec) -> Identity:
    return Identity(spec, digest="ab" * 32, device="cpu", dtype="fp32", threads=1, memory_bytes=1234)


def decoded(done: Execution) -> dict[str, torch.Tensor]:
    """The outputs of an execution as the wire's own dtypes, fp32 for int8."""
    return {
        row.register: dtypes.decode(memoryview(bytearray(dtypes.frame_of(narrowed))), row.shape, row.encoding)
        for row, narrowed in zip(done.layout.rows, done.frames, strict=True)
    }
