"""Replies to programs in the ring, from servers that are honest and others; and who says what of its int8 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from teegpu import ring
from teegpu.endpoints import Endpoint
from teegpu.errors import BadReplyError, MismatchError
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.record.events import PREFILL
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.handshake import ModelHandshake
from teegpu.ring import Seed
from teegpu.stats.summary import Summary
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Result, Welcome
from teegpu.wire.program import ring_linear, single
from tests.fuzz.world import Direct, incoming
from tests.teegpu.gpu.conftest import SPEC, MemoryStore
from tests.teegpu.wire.samples import WELCOME, result_of
from transports.base import Reply, ServerLoad

HIDDEN = SPEC.hidden_size
QKV = single(["n"], ring_linear("qkv", "n", "layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"))
STORE = MemoryStore(SPEC)
VALUES = ring.expand(bytes(range(32)), 3, HIDDEN)


class Transport:
    """What a server needs of its transport when it is asked directly."""

    user_bytes = 0
    load = ServerLoad()


@pytest.fixture(scope="module")
def server() -> GpuServer:
    weights = DeviceWeights(STORE, SPEC, device=torch.device("cpu"), dtype=torch.float32)
    held = RingWeights(lambda: contextlib.nullcontext(STORE), SPEC, device=weights.device, layers=weights.layers)
    identity = Identity(SPEC, "ab" * 32, "cpu", "fp32", 1, weights.nbytes)
    transport: Any = Transport()
    return GpuServer(transport, Executor(weights, Limits(), ring=held), identity, Limits())


def client(server: GpuServer, tamper: Callable[[list[bytes]], list[bytes]] = lambda frames: frames) -> GpuClient:
    recorder = Recorder(Summary().add)
    recorder.begin(PREFILL)
    direct = Direct(lambda asked: tamper([bytes(frame) for frame in server.answer(incoming(asked)).frames]))
    # Whatever the wire dtype is, what is in the ring travels as int32.
    return GpuClient(direct, SPEC, wire_dtype="int8", recorder=recorder, limits=Limits())


def ask(asked: GpuClient, operand: ring.Operand) -> dict[str, torch.Tensor]:
    return drive(asked.run(Call(QKV, {"n": operand}, 0)))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_outputs_are_exact_and_the_callers_own(server: GpuServer, rows: int) -> None:
    seed = Seed(bytes(range(32)), (rows, HIDDEN))
    for operand in (seed, seed.expand()):
        outputs = ask(client(server), operand)
        assert list(outputs) == ["qkv"]
        weight = torch.cat([ring.quantise(STORE.tensors[name])[0] for name in QKV.weights])
        assert torch.equal(outputs["qkv"], ring.RingMatrix(weight).product(seed.expand()))
        outputs["qkv"].zero_()


def rebuilt(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], encoding: str = "int32") -> Any:
    """Tampers with a result by changing its tensors, and encoding them as a server could have."""

    def tamper(frames: list[bytes]) -> list[bytes]:
        result = codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in frames])
        assert isinstance(result, Result)
        tensors = change(result.tensors)
        encodings = dict.fromkeys(tensors, encoding)
        encoded = result_of(tensors, encodings, request_id=result.request_id, times=result.times)
        return [bytes(frame) for frame in encoded.frames]

    return tamper


FORGED = {
    "floats": (rebuilt(lambda t: {n: v.to(torch.float32) for n, v in t.items()}, "fp32"), "'qkv' as fp32"),
    "quantised floats": (rebuilt(lambda t: {n: v / 2**20 for n, v in t.items()}, "int8"), "'qkv' as int8"),
    "a row less": (rebuilt(lambda t: {n: v[:-1] for n, v in t.items()}), r"'qkv' as int32 \(2, "),
    "flat": (rebuilt(lambda t: {n: v.flatten() for n, v in t.items()}), r"'qkv' as int32 \(192,\)"),
    "another name": (rebuilt(lambda t: {"q": t["qkv"]}), "other registers"),
    "in parts": (rebuilt(lambda t: dict(zip("qkv", t["qkv"].split((32, 16, 16), -1), strict=True))), "other registers"),
    "a frame cut short": (lambda frames: [frames[0], frames[1][:-4]], "its frame holds"),
    "a frame cut in two": (lambda frames: [frames[0], frames[1][:384], frames[1][384:]], "frame"),
    "nothing": (lambda frames: [frames[0]], "frame"),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_can_not_be_the_answer_is_refused(server: GpuServer, what: str) -> None:
    tamper, message = FORGED[what]
    with pytest.raises(BadReplyError, match=message):
        ask(client(server, tamper), VALUES)


def test_every_int32_is_a_value(server: GpuServer) -> None:
    """Nothing in its bits says that one is wrong: that is for those who verify products."""
    worst = torch.tensor([-(2**31), 2**31 - 1, 0x7FC00000, 0x7F800000], dtype=torch.int32)
    tamper = rebuilt(lambda t: {n: worst[torch.arange(v.numel()) % 4].view(v.shape) for n, v in t.items()})
    outputs = ask(client(server, tamper), VALUES)
    assert outputs["qkv"].flatten()[:4].tolist() == worst.tolist()


# Who says what of its int8 weights

DIGESTS = {(0, 1): "aa" * 32, (0, 0): "bb" * 32}


def greet(welcome: Welcome, digest: Callable[[tuple[int, int]], str] | None = DIGESTS.__getitem__) -> Welcome:
    handshake = ModelHandshake(codec.Decoder(Limits()), SPEC, "ab" * 32, digest)
    frames = [memoryview(bytearray(frame)) for frame in codec.encode_welcome(welcome).frames]
    layers = None if welcome.layers == (0, 1) else welcome.layers
    return handshake.check(Reply(frames, 0, 0, 0, 0), Endpoint("tcp://a:1", layers))


def said(ring_digest: str, layers: tuple[int, int] = (0, 1)) -> Welcome:
    dims = {"layers": SPEC.layers}
    return replace(WELCOME, digest="ab" * 32, dims=dims, layers=layers, ring_digest=ring_digest)


def test_the_right_digest_for_the_layers_that_are_held() -> None:
    assert greet(said("aa" * 32)).ring_digest == "aa" * 32
    assert greet(said("bb" * 32, (0, 0))).layers == (0, 0)
    assert greet(said("whatever"), None).ring_digest == "whatever"  # nobody asked


@pytest.mark.parametrize("ring_digest", ["", "bb" * 32, "AA" * 32, "aa" * 31])
def test_another_digest_or_none_is_a_mismatch(ring_digest: str) -> None:
    with pytest.raises(MismatchError, match=r"tcp://a:1 has other int8 weights .*install the same teegpu release"):
        greet(said(ring_digest))


def test_layers_that_the_model_does_not_have_are_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="another number of layers"):
        greet(said("", (0, 7)), lambda _: "")


@pytest.mark.parametrize("asks", [True, False])
def test_a_hello_asks_where_a_runner_has_programs_in_the_ring(asks: bool) -> None:
    handshake = ModelHandshake(codec.Decoder(Limits()), SPEC, "digest", DIGESTS.__getitem__ if asks else None)
    frames = [memoryview(bytearray(frame)) for frame in handshake.message.frames]
    hello = codec.Decoder(Limits()).decode(frames)
    assert isinstance(hello, codec.Hello)
    assert hello.ring is asks
