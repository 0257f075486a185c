"""A runner and a server of a tiny model in one process, what they say to each other, and choices made of bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from teegpu.facts import PLANS
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.remote.calls import Call
from teegpu.ring import SEED_BYTES, Seed
from teegpu.tee.plans import CONTEXT, EMBED, LM_HEAD, SCORES, programs
from teegpu.wire.limits import Limits
from teegpu.wire.program import ring_linear, single
from tests.teegpu.gpu.conftest import SPEC, MemoryStore
from transports.base import Answered, Client, Incoming, Message, Reply, ServerLoad

T = TypeVar("T")

LIMITS = Limits(message_bytes=2**20, tensors=8, dimension=4096, program_steps=16, working_bytes=8 * 2**20)
WIRE_DTYPES = ("fp32", "bf16", "fp16", "int8")
TOKENS = 3
RING_QKV = single(["n"], ring_linear("qkv", "n", "layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"))


DIGEST = "ab" * 32


def make_server() -> GpuServer:
    weights = DeviceWeights(MemoryStore(SPEC), SPEC, device=torch.device("cpu"), dtype=torch.float32)
    identity = Identity(SPEC, DIGEST, "cpu", "fp32", 1, weights.nbytes)
    transport: Any = SimpleNamespace(user_bytes=0, load=ServerLoad())  # it is asked directly
    ring = RingWeights(
        lambda: contextlib.nullcontext(MemoryStore(SPEC)), SPEC, device=weights.device, layers=weights.layers
    )
    return GpuServer(transport, Executor(weights, LIMITS, ring=ring), identity, LIMITS)


def make_calls() -> list[Call]:
    """One call of each program of a layer that is not the last, and those that belong to none."""
    hidden, inner, heads = SPEC.hidden_size, SPEC.intermediate_size, SPEC.heads * SPEC.head_dim
    sizes = {"n": hidden, "a": heads, "x": hidden, "h": inner, "z": hidden}
    fused = programs(SPEC, PLANS["fused"])[0]
    generator = torch.Generator().manual_seed(3)

    def call(program: Any, layer: int) -> Call:
        inputs = {name: torch.randn(TOKENS, sizes[name], generator=generator) for name in program.inputs}
        return Call(program, inputs, layer)

    attention = torch.randn(SPEC.heads, TOKENS, SPEC.head_dim), torch.randn(SPEC.kv_heads, TOKENS, SPEC.head_dim)
    return [
        *(call(program, 0) for program in (*fused.qkv, fused.after_attention, fused.after_mlp, fused.end)),
        call(LM_HEAD, -1),
        Call(EMBED, {"ids": torch.arange(TOKENS)}),
        Call(SCORES, {"q": attention[0], "k": attention[1]}, 0),
        Call(CONTEXT, {"p": torch.randn(SPEC.heads, TOKENS, TOKENS), "v": attention[1]}, 0),
        Call(RING_QKV, {"n": torch.arange(TOKENS * hidden, dtype=torch.int32).view(TOKENS, hidden) - 7}, 0),
        Call(RING_QKV, {"n": Seed(bytes(SEED_BYTES), (TOKENS, hidden))}, 0),
        Call(single(["n"], ring_linear("logits", "n", "lm_head")), {"n": Seed(bytes(SEED_BYTES), (1, hidden))}),
    ]


class Direct(Client):
    """Asks ``answer`` (frames → frames) and keeps the frames of the last request and reply."""

    name = "direct"
    endpoint = "direct"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.answered: list[bytes] = []

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Answered:
        sent_ns = time.perf_counter_ns()
        self.asked = [bytes(frame) for frame in message.frames]
        self.answered = [bytes(frame) for frame in self.answer(self.asked)]
        frames = [memoryview(bytearray(frame)) for frame in self.answered]
        down = sum(map(len, self.answered))
        return Answered(Reply(frames, sent_ns, time.perf_counter_ns(), message.nbytes, down))

    def close(self) -> None:
        return


def incoming(frames: Sequence[bytes]) -> Incoming:
    return Incoming([memoryview(bytearray(frame)) for frame in frames], b"", None, time.perf_counter_ns())


def join(frames: Sequence[bytes]) -> bytes:
    """Frames as one string of bytes: before each its length, in two bytes."""
    return b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)


def split(data: bytes) -> list[bytes]:
    """The frames in ``data``, whatever it is: the last one is as long as what is left."""
    return list(_split(data))


def _split(data: bytes) -> Iterator[bytes]:
    while len(data) >= 2:
        length = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + length]
        data = data[2 + length :]


class Source:
    """Choices, made of bytes as they come; nothing but zeros when these are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        self._at += count
        return part + bytes(count - len(part))

    def below(self, most: int) -> int:
        return int.from_bytes(self.take(1 if most <= 256 else 3), "big") % most

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def seldom(self) -> bool:
        """True for one byte of sixteen."""
        return self.below(256) >= 240

    @property
    def rest(self) -> bytes:
        return self._data[self._at :]
