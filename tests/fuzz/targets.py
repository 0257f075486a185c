"""What is fuzzed. A target takes bytes, does what a peer's bytes could make us do, and says in a word what came of it;
it raises ``AssertionError``, or whatever else should never come out, when that is not what may come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from itertools import count
from typing import Any

import msgpack
import numpy as np
import torch

from teegpu.endpoints import Endpoint
from teegpu.errors import MismatchError, TeegpuError, WireError
from teegpu.record.events import PREFILL
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.handshake import ModelHandshake
from teegpu.stats.summary import Summary
from teegpu.wire import codec, dtypes
from teegpu.wire.limits import MAX_STEP_WEIGHTS
from teegpu.wire.messages import PROTOCOL_VERSION, Health, HealthReport, Hello, Refusal, Result, Welcome
from teegpu.wire.program import OPS, RING
from tests.fuzz import attested, files, handshake
from tests.fuzz.world import (
    DIGEST,
    LIMITS,
    WIRE_DTYPES,
    Direct,
    Source,
    incoming,
    join,
    make_calls,
    make_server,
    split,
)
from tests.teegpu.gpu.conftest import SPEC
from transports import envelope
from transports.base import Compression, Reply
from transports.compression import Compressor
from transports.errors import FrameError, TransportError
from transports.framecodec import FrameCodec

Target = Callable[[bytes], str]


def views(frames: list[bytes]) -> list[memoryview]:
    return [memoryview(bytearray(frame)) for frame in frames]


def refused(error: Exception) -> str:
    """An error ends on a terminal, in a log or in a record: it is one line, whatever the peer sent."""
    assert str(error).isprintable()
    return "refused"


# Any message, as either side reads it


def any_message(data: bytes) -> str:
    try:
        message = codec.Decoder(LIMITS).decode(views(split(data)))
    except (WireError, MismatchError) as error:
        return refused(error)
    for item in fields(message):
        value = getattr(message, item.name)
        assert not isinstance(value, str) or value.isprintable()
    return type(message).__name__


# Who answers a runner's hello


@cache
def _handshake() -> ModelHandshake:
    return ModelHandshake(codec.Decoder(LIMITS), SPEC, DIGEST)


def welcome(data: bytes) -> str:
    reply = Reply(views(split(data)), 0, 1, 0, len(data), Compression(), Compression(), 0)
    try:
        found = _handshake().check(reply, Endpoint("tcp://127.0.0.1:5555"))
    except (TeegpuError, TransportError) as error:
        return refused(error)
    assert found.digest == DIGEST
    assert found.model.isprintable()
    return "taken"


# A reply, as the runner reads it: to a call that was made, in each wire dtype


class _Runner:
    def __init__(self) -> None:
        self.server = make_server()
        self.calls = make_calls()
        self.transport = Direct(lambda asked: self.server.answer(incoming(asked)).frames)
        self.uses = 0
        self.renew()

    def renew(self) -> None:
        """What a run keeps must not grow with the number of inputs."""
        self.recorder = Recorder(Summary().add)
        self.recorder.begin(PREFILL)
        self.clients = [
            GpuClient(self.transport, SPEC, wire_dtype=name, recorder=self.recorder, limits=LIMITS)
            for name in WIRE_DTYPES
        ]

    def ask(self, wire_dtype: int, call: Call) -> dict[str, torch.Tensor]:
        self.uses += 1
        if self.uses % 2000 == 0:
            self.renew()
        client = self.clients[wire_dtype]
        client._ids = count(1)  # each reply is to the first request
        try:
            return drive(client.run(call))
        finally:
            self.recorder.flush()  # what a server claims goes through the summary too


@cache
def _runner() -> _Runner:
    return _Runner()


def reply(data: bytes) -> str:
    """Byte 0 chooses the wire dtype, byte 1 the call; the frames of the reply follow."""
    runner = _runner()
    if len(data) < 2:
        return "short"
    call = runner.calls[data[1] % len(runner.calls)]
    honest, runner.transport.answer = runner.transport.answer, lambda _: split(data[2:])
    try:
        outputs = runner.ask(data[0] % len(WIRE_DTYPES), call)
    except (TeegpuError, TransportError) as error:
        return refused(error)
    finally:
        runner.transport.answer = honest
    assert tuple(outputs) == call.program.outputs
    shapes = {row.register: row.shape for row in runner.clients[0]._asked(call).layout.rows}
    for name, value in outputs.items():
        assert value.dtype == (torch.int32 if call.program.in_ring else torch.float32)
        assert tuple(value.shape) == shapes[name]
        assert torch.isfinite(value).all()
    return "taken"


# A request, as the server reads it


@cache
def _server() -> object:
    return make_server()


def request(data: bytes) -> str:
    return _answered(split(data))


def _answered(frames: list[bytes]) -> str:
    server = _server()
    with torch.inference_mode():
        encoded = server.answer(incoming(frames))  # type: ignore[attr-defined]
    try:
        message = codec.Decoder(LIMITS).decode(views([bytes(frame) for frame in encoded.frames]))
    except WireError as error:
        # Who asks for infinities in int8 gets them, and is told so when they are decoded.
        if "scale that is not finite" not in str(error):
            raise
        return "infinite"
    if isinstance(message, Refusal):
        # That one is for what nobody thought of.
        assert message.code != "internal", message.text
        assert message.text.isprintable()
        return f"refused: {message.code}"
    assert isinstance(message, Result | Welcome | HealthReport)
    return type(message).__name__


OPERATIONS = (*OPS, "relu")
REGISTERS = ("x", "n", "a", "h", "z", "q", "k", "ids", "out")
WEIGHTS = (*SPEC.weights, "layers.2.q_proj", "norm.bias")
DIMENSIONS = (1, 2, 3, 8, 16, SPEC.hidden_size, SPEC.intermediate_size, SPEC.vocab_size, 0, 4097)


def program(data: bytes) -> str:
    """A request that is put together of what requests are made of: one of ours with changes, or any."""
    source = Source(data)
    if source.seldom():
        code = _any_program(source)
        shapes = {name: _any_shape(source) for name in code[0]}
    else:
        call = source.pick(_runner().calls)
        code = msgpack.unpackb(call.program.packed)
        shapes = {name: list(tensor.shape) for name, tensor in call.inputs.items()}
        for _ in range(source.below(3)):
            _change(source, code, shapes)
    rows: list[list[Any]] = []
    frames: list[bytes] = []
    ids = {step[2][0] for step in code[1] if step[0] == "embedding" and step[2]}
    in_ring = any(step[0] == RING for step in code[1])
    for name in code[0]:
        shape = shapes.get(name, [1, 1])
        encoding = "int32" if name in ids else source.pick(("int32", "seed") if in_ring else WIRE_DTYPES)
        if source.seldom():
            encoding = source.pick(dtypes.NAMES)
        rows.append([name, shape, encoding])
        length = dtypes.nbytes(tuple(shape), encoding) if 0 not in shape else 0
        pattern = source.take(8) if encoding != "int32" else b"\1\0\0\0"
        data = (pattern * (min(length, 2**18) // len(pattern) + 1))[:length]
        frames.append(data)
    replies = [source.pick(("int32",) if in_ring and not source.seldom() else WIRE_DTYPES) for _ in code[2]]
    header = [PROTOCOL_VERSION, "execute", source.below(2**16), msgpack.packb(code), replies, msgpack.packb(rows)]
    return _answered([msgpack.packb(header), *frames])


def _any_shape(source: Source) -> list[int]:
    return [source.pick(DIMENSIONS) for _ in range(1 + source.below(3))]


def _any_program(source: Source) -> list[list[object]]:
    inputs = [source.pick(REGISTERS) for _ in range(1 + source.below(3))]
    steps = [_any_step(source) for _ in range(1 + source.below(6))]
    return [inputs, steps, [source.pick(REGISTERS) for _ in range(1 + source.below(3))]]


def _any_step(source: Source) -> list[object]:
    inputs = [source.pick(REGISTERS) for _ in range(1 + source.below(2))]
    return [source.pick(OPERATIONS), source.pick(REGISTERS), inputs, _any_weights(source), bool(source.below(2))]


def _any_weights(source: Source) -> list[str]:
    """None, one, a few, or more than a step takes; now and then one twice."""
    count = source.pick((0, 1, 1, 1, 2, 3, MAX_STEP_WEIGHTS, MAX_STEP_WEIGHTS + 1))
    return [source.pick(WEIGHTS) for _ in range(count)]


def _change(source: Source, code: list[list[object]], shapes: dict[str, list[int]]) -> None:
    """One change to a program of ours, or to the shape of an input."""
    steps = code[1]
    match source.below(8):
        case 0:
            shapes[source.pick(list(shapes))] = _any_shape(source)
        case 1:
            source.pick(list(shapes.values()))[0] = 1 + source.below(2**12)
        case 2:
            steps[source.below(len(steps))][3] = _any_weights(source)  # type: ignore[index]
        case 3:
            steps[source.below(len(steps))] = _any_step(source)
        case 4:
            steps.insert(source.below(len(steps) + 1), _any_step(source))
        case 5:
            weights: Any = steps[source.below(len(steps))][3]  # type: ignore[index]
            weights[source.below(len(weights) + 1) :] = _any_weights(source)
        case 6:
            code[2].append(source.pick(REGISTERS))
        case _:
            code[source.pick([0, 1, 2])].reverse()


# The transport's framing


@cache
def _compressor() -> Compressor:
    return Compressor(1, lambda: None)


def framing(data: bytes) -> str:
    """The envelope, then its frames."""
    parts = split(data)
    if not parts:
        return "short"
    head, *frames = parts
    envelope.peek_request_id(head)
    try:
        found = envelope.unpack(head, [len(frame) for frame in frames], max_frames=8, max_message_bytes=2**20)
        if found.refusal:
            assert envelope.read_reason(frames[0]).isprintable()
            return "refusal"
        received, _ = _compressor().decompress(views(frames), found.codecs, found.itemsizes, found.raw_lengths)
    except TransportError as error:
        return refused(error)
    assert [frame.nbytes for frame in received] == list(found.raw_lengths)
    assert sum(frame.nbytes for frame in received) <= 2**20
    return "compressed" if found.compressed else "raw"


@cache
def _codec() -> FrameCodec:
    return FrameCodec(1)


def compressed(data: bytes) -> str:
    """Byte 0 is the codec, byte 1 the item size, then 3 bytes of length; the frame follows."""
    source = Source(data)
    kind, itemsize, length = source.below(4), source.below(9), source.below(2**20)
    try:
        decoded = _codec().decode(memoryview(bytearray(source.rest)), kind, itemsize, length, 0)
    except FrameError as error:
        return refused(error)
    assert decoded.nbytes == length
    return "taken"


TARGETS: dict[str, Target] = {
    "any-message": any_message,
    "welcome": welcome,
    "reply": reply,
    "request": request,
    "program": program,
    "framing": framing,
    "compressed": compressed,
    **files.TARGETS,
    **attested.TARGETS,
    **handshake.TARGETS,
}


@cache
def seeds() -> dict[str, list[bytes]]:
    """For each target, real messages: recorded from a runner and a server."""
    runner = _runner()
    requests: list[list[bytes]] = []
    replies: list[list[bytes]] = []
    labelled: list[bytes] = []
    for number in range(len(WIRE_DTYPES)):
        for index, call in enumerate(runner.calls):
            runner.ask(number, call)
            requests.append(runner.transport.asked)
            replies.append(runner.transport.answered)
            labelled.append(bytes([number, index]) + join(runner.transport.answered))
    for encoded in (codec.encode_hello(Hello(0, "0.1.0")), codec.encode_health(Health(0, "0.1.0"))):
        requests.append([bytes(frame) for frame in encoded.frames])
    replies.append([bytes(frame) for frame in runner.server.answer(incoming(requests[-2])).frames])
    replies.append([bytes(codec.encode_refusal(Refusal(1, "malformed", "why")).frames[0])])
    sealed = [[envelope.pack(5, [len(frame) for frame in frames], flags=1), *frames] for frames in requests + replies]
    sealed.append(envelope.pack_refusal(5, envelope.REFUSED_LIMIT, "too much"))
    shrunk = []
    for frames in replies[:: len(runner.calls)]:
        packed, codecs = zip(
            *(FrameCodec(1).encode(np.frombuffer(frame, np.uint8), 1) for frame in frames), strict=True
        )
        lengths = [len(frame) for frame in frames]
        sealed.append([envelope.pack(5, lengths, codecs), *packed])
        for length, how, frame in zip(lengths, codecs, packed, strict=True):
            shrunk.append(bytes([how, 1]) + length.to_bytes(3, "big") + frame)
    # Of a short frame, damage also finds the byte that says nothing here.
    for length in range(4):
        short, how = FrameCodec(1).encode(np.zeros(length, np.uint8), 1)
        shrunk.append(bytes([how, 1]) + length.to_bytes(3, "big") + short)
    return {
        "any-message": [join(frames) for frames in requests + replies],
        "welcome": [join(replies[-2])],
        "reply": labelled,
        "request": [join(frames) for frames in requests],
        "program": [bytes([0, index, 0]) for index in range(len(runner.calls))] + [bytes([255, *range(60)])],
        "framing": [join(frames) for frames in sealed],
        "compressed": shrunk,
        **files.seeds(),
        **attested.seeds(),
        **handshake.seeds(),
    }
