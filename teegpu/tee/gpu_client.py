"""Programs to the GPU server and back: encode, send, wait, check the answer, decode, and record what each step took.

The server is not trusted. What it answers is held against what was asked: registers, shapes, wire dtypes, finite
values. A layer that masks inputs and verifies results belongs here, between ``run`` and the wire: a program is
linear."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from teegpu import __version__
from teegpu.config import Config
from teegpu.errors import BadReplyError, MismatchError, ServerRefusedError, WireError
from teegpu.metrics.events import SERIALIZATION, WAIT, Rpc
from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.options import client_options, frame_kinds, wire_limits
from teegpu.tee.products import Call
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Hello, Refusal, Result, Welcome
from teegpu.wire.messages import Message as WireMessage
from teegpu.wire.program import Program, Shape, infer_shapes
from transports.base import Client, Message, Reply

RESIDUAL = frozenset({"x", "z", "logits"})
"""Registers that stay in fp16 when the wire dtype is int8: errors in the residual add up over the layers."""


@dataclass(frozen=True, slots=True)
class _Request(Message):
    """A message with the call that it carries."""

    call: Call = field(kw_only=True)
    request_id: int = field(kw_only=True)


class GpuClient:
    """Runs programs on one GPU server over ``transport``.

    ``overlapped`` says whether calls are awaited on an asyncio loop (with an overlapping transport) or made at once.
    """

    def __init__(
        self,
        transport: Client,
        spec: ModelSpec,
        *,
        wire_dtype: str,
        recorder: Recorder,
        limits: Limits,
        check_finite: bool = True,
    ) -> None:
        self.spec = spec
        self.wire_dtype = wire_dtype
        self.narrow_range = wire_dtype in ("fp16", "int8")
        self.overlapped = False
        self._transport = transport
        self._recorder = recorder
        self._decoder = codec.Decoder(limits)
        self._check_finite = check_finite
        self._next_id = 0
        self._shapes: dict[tuple[Any, ...], dict[str, Shape]] = {}
        self._layouts: dict[bytes, tuple[dict[str, str], dict[str, str]]] = {}
        transport.on_sent = self._sent

    @property
    def can_overlap(self) -> bool:
        return self._transport.overlaps

    def hello(self, timeout_seconds: float, digest: str | None = None) -> Welcome:
        """The server's introduction.

        With ``digest``, raises ``MismatchError`` when the server holds another model than that. Raises
        ``ConnectionFailedError`` (from the transport) when nobody answers, ``MismatchError`` for another protocol
        version, ``BadReplyError`` for nonsense.
        """
        welcome = hello(self._transport, self._decoder, timeout_seconds)
        if digest is not None and welcome.digest != digest:
            raise MismatchError(
                f"the server at {self._transport.endpoint} serves {welcome.model!r} (digest {welcome.digest[:12]}), "
                f"this runner has {self.spec.name!r} (digest {digest[:12]}): give both the same --model"
            )
        return welcome

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        request_id, message = self._encode(call)
        if self.overlapped:
            reply = await self._transport.request_async(message)
        else:
            reply = self._transport.request(message)
        return self._finish(call, request_id, reply)

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        if self.overlapped:
            return list(await asyncio.gather(*(self.run(call) for call in calls)))
        if not self._transport.overlaps:
            return [await self.run(call) for call in calls]
        encoded = [self._encode(call) for call in calls]
        replies = self._transport.request_all([message for _, message in encoded])
        return [
            self._finish(call, request_id, reply)
            for call, (request_id, _), reply in zip(calls, encoded, replies, strict=True)
        ]

    def _encode(self, call: Call) -> tuple[int, _Request]:
        self._next_id += 1
        program = call.program
        layout = self._layouts.get(program.packed)
        if layout is None:
            layout = self._layouts[program.packed] = self._layout(program)
        encoded = codec.encode_execute(Execute(self._next_id, program, call.inputs, *layout))
        message = _Request(encoded.frames, frame_kinds(encoded.kinds), call=call, request_id=self._next_id)
        self._recorder.lap(SERIALIZATION, "ENCODE", call.layer, call.chunk)
        return self._next_id, message

    def _sent(self, message: Message) -> None:
        """``message`` is on its way: what has passed since it was encoded is compression and the handing over."""
        if isinstance(message, _Request):
            call = message.call
            self._recorder.lap(SERIALIZATION, "SEND", call.layer, call.chunk, message.request_id)

    def _layout(self, program: Program) -> tuple[dict[str, str], dict[str, str]]:
        """The wire dtypes of a program's inputs and outputs."""
        ids = program.id_registers
        encodings = {name: "int32" if name in ids else self._encoding(name) for name in program.inputs}
        return encodings, {name: self._encoding(name) for name in program.outputs}

    def _encoding(self, register: str) -> str:
        return "fp16" if self.wire_dtype == "int8" and register in RESIDUAL else self.wire_dtype

    def _finish(self, call: Call, request_id: int, reply: Reply) -> dict[str, torch.Tensor]:
        record = self._recorder
        result = self._result(request_id, reply)
        outputs = self._checked(call, result)
        times = result.times
        record.add(
            Rpc(
                request_id=request_id,
                label="+".join(call.program.outputs),
                layer=call.layer,
                chunk=call.chunk,
                sent_ns=reply.sent_ns,
                received_ns=reply.received_ns,
                bytes_up=reply.bytes_up,
                bytes_down=reply.bytes_down,
                raw_bytes_up=reply.bytes_up + reply.up.raw_bytes - reply.up.compressed_bytes,
                raw_bytes_down=reply.bytes_down + reply.down.raw_bytes - reply.down.compressed_bytes,
                compression_seconds=reply.up.seconds + reply.down.seconds,
                queue_seconds=times.queue_seconds,
                decode_seconds=times.decode_seconds,
                compute_seconds=times.compute_seconds,
                encode_seconds=times.encode_seconds,
                operations=times.operations,
                tried_bytes=reply.up.tried_bytes + reply.down.tried_bytes,
                compressed_bytes=reply.up.raw_bytes + reply.down.raw_bytes,
            )
        )
        # What follows the reply's arrival is decompressing, decoding and checking it. In an overlapped prefill it may
        # have arrived while another chunk was at work: then nobody waited.
        record.lap_until(reply.received_ns, WAIT, "WAIT", call.layer, call.chunk, request_id)
        record.lap(SERIALIZATION, "DECODE", call.layer, call.chunk)
        return outputs

    def _result(self, request_id: int, reply: Reply) -> Result:
        answer = decode_reply(self._decoder, reply, self._transport.endpoint)
        if answer.request_id != request_id or not isinstance(answer, Result):
            raise BadReplyError(
                f"the server at {self._transport.endpoint} answered another question than the one asked"
            )
        return answer

    def _checked(self, call: Call, result: Result) -> dict[str, torch.Tensor]:
        """The outputs in fp32. Raises ``BadReplyError`` where they can't be the answer to ``call``."""
        program = call.program
        key = (program.packed, *(tensor.shape for tensor in call.inputs.values()))
        shapes = self._shapes.get(key)
        if shapes is None:
            given = {name: tuple(tensor.shape) for name, tensor in call.inputs.items()}
            shapes = infer_shapes(program, given, self.spec.weights.get)
            if len(self._shapes) > 8192:
                self._shapes.clear()
            self._shapes[key] = shapes
        if tuple(result.tensors) != program.outputs:
            raise self._bad(call, "other registers than were asked for")
        outputs: dict[str, torch.Tensor] = {}
        for name, tensor in result.tensors.items():
            if tuple(tensor.shape) != shapes[name] or result.encodings[name] != self._encoding(name):
                raise self._bad(call, f"register {name!r} as {result.encodings[name]} {tuple(tensor.shape)}, expected "
                                      f"{self._encoding(name)} {shapes[name]}")  # fmt: skip
            values = tensor.to(torch.float32)
            # One pass: infinities and NaNs survive a sum. (int8 has none: its scales were checked when it was decoded.)
            checked = result.encodings[name] == "int8" or not self._check_finite
            if not checked and not math.isfinite(values.sum().item()):
                raise self._bad(call, f"values that are not finite in {name!r} (if the server's dtype is fp16, its "
                                      "range may be exceeded: serve with --dtype bf16)")  # fmt: skip
            outputs[name] = values
        return outputs

    def _bad(self, call: Call, what: str) -> BadReplyError:
        where = f"layer {call.layer}" if call.layer >= 0 else "embedding or lm_head"
        return BadReplyError(f"the server at {self._transport.endpoint} answered {where} with {what}")


def decode_reply(decoder: codec.Decoder, reply: Reply, endpoint: str) -> WireMessage:
    """The message in ``reply``. Raises ``BadReplyError``, and for a refusal ``ServerRefusedError`` or
    ``MismatchError``."""
    try:
        answer = decoder.decode(reply.frames)
    except WireError as error:
        raise BadReplyError(f"the server at {endpoint} sent a reply that is not valid: {error}") from error
    if isinstance(answer, Refusal):
        kind = MismatchError if answer.code == "version" else ServerRefusedError
        raise kind(f"the server at {endpoint} refused ({answer.code}): {answer.text}")
    return answer


def hello(transport: Client, decoder: codec.Decoder, timeout_seconds: float) -> Welcome:
    """One ``hello`` exchange."""
    encoded = codec.encode_hello(Hello(0, __version__))
    reply = transport.request(Message(encoded.frames), timeout_seconds=timeout_seconds)
    answer = decode_reply(decoder, reply, transport.endpoint)
    if not isinstance(answer, Welcome):
        raise BadReplyError(f"what answers at {transport.endpoint} is not a teegpu GPU server")
    return answer


def probe(endpoint: str, config: Config) -> dict[str, Any]:
    """Who answers at ``endpoint``: version, model, digest, device, dtype, and the median of a few round trips."""
    import transports

    decoder = codec.Decoder(wire_limits(config))
    with transports.connect("zmq", endpoint, client_options(config)) as transport:
        welcome = hello(transport, decoder, config.link.hello_timeout_seconds)
        samples = []
        for _ in range(5):
            start = time.perf_counter()
            hello(transport, decoder, config.link.hello_timeout_seconds)
            samples.append(time.perf_counter() - start)
    return {
        "version": welcome.software,
        "model": welcome.model,
        "digest": welcome.digest,
        "device": welcome.device,
        "dtype": welcome.dtype,
        "rtt_seconds": sorted(samples)[len(samples) // 2],
    }
