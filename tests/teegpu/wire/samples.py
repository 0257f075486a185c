"""Messages that the codec's tests take apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
import torch

from teegpu.errors import WireError
from teegpu.ring import Operand, Seed
from teegpu.wire import codec, dtypes
from teegpu.wire.layout import Layout, Row
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, HealthReport, ServerTimes, Welcome
from teegpu.wire.program import Program, Step, linear, ring_linear, single

LIMITS = Limits(message_bytes=2**20, tensors=4, dimension=4096, program_steps=8)

FUSED = Program(
    ("a", "x"),
    (linear("o", "a", "o_proj"), Step("add", "z", ("x", "o")), linear("gate_up", "z", "gate_proj", "up_proj")),
    ("z", "gate_up"),
)
RING = single(["n"], ring_linear("qk", "n", "q_proj", "k_proj"))
EMBED = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))

WELCOME = Welcome(
    request_id=7,
    software="0.1.0",
    instance="0123456789abcdef",
    model="smollm2-135m",
    digest="ab" * 32,
    dims={"layers": 30, "hidden_size": 576},
    device="cpu",
    dtype="bf16",
    threads=2,
    memory_bytes=269_000_000,
    limits={"message_bytes": 2**31},
    layers=(0, 29),
)
HEALTH = HealthReport(
    request_id=8,
    software="0.1.0",
    instance="0123456789abcdef",
    model="smollm2-135m",
    digest="ab" * 32,
    device="cpu",
    dtype="bf16",
    layers=(10, 20),
    uptime_seconds=12.5,
    clients=3,
    connections=4,
    requests_served=1000,
    refused=2,
    in_flight=5,
    waiting_requests=4,
    waiting_bytes=2**33,
    busy_share=0.75,
    rss_bytes=2**30,
    weight_bytes=2**29,
    ring_bytes=2**27,
    draining=True,
)
TIMES = ServerTimes(0.25, 0.5, 1.0, 0.125, {"LINEAR": (3, 0.75), "LM_HEAD": (1, 0.25)})


def decoder(limits: Limits = LIMITS) -> codec.Decoder:
    return codec.Decoder(limits)


def execute(encoding: str = "fp32", reply: str = "fp16") -> codec.Encoded:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "x": torch.ones(2, 65)}
    message = Execute(3, FUSED, tensors, dict.fromkeys(tensors, encoding), {"z": reply, "gate_up": "int8"})
    return codec.encode_execute(message)


def in_ring(operand: Operand) -> codec.Encoded:
    """A request in the ring with ``operand`` as its input."""
    encoding = "seed" if isinstance(operand, Seed) else "int32"
    return codec.encode_execute(Execute(4, RING, {"n": operand}, {"n": encoding}, {"qk": "int32"}))


def result(encoding: str = "fp32") -> codec.Encoded:
    tensors = {"z": torch.arange(6.0).reshape(2, 3), "gate_up": torch.ones(2, 65)}
    return result_of(tensors, dict.fromkeys(tensors, encoding))


def result_of(
    tensors: Mapping[str, torch.Tensor],
    encodings: Mapping[str, str],
    *,
    request_id: int = 9,
    times: ServerTimes = TIMES,
) -> codec.Encoded:
    """A result that carries ``tensors``."""
    layout = Layout(tuple(Row(name, tuple(tensor.shape), encodings[name]) for name, tensor in tensors.items()))
    frames = [dtypes.narrow(tensors[row.register], row.encoding) for row in layout.rows]
    return codec.encode_result(request_id, times, layout, frames)


def raw(header: Any, *frames: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in (msgpack.packb(header), *frames)]


def table(*rows: object) -> bytes:
    return msgpack.packb(rows)


def refused(frames: list[memoryview], limits: Limits = LIMITS) -> str:
    with pytest.raises(WireError) as caught:
        decoder(limits).decode(frames)
    assert "\n" not in str(caught.value)
    return str(caught.value)
