"""Programs to the GPU server and back: encode, send, wait, check the answer, decode, and record what each step took.

The server is not trusted. What it answers is held against what was asked: size, registers, shapes, wire dtypes,
operations, finite values. What masks inputs and verifies results is ``tee.shield``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from teegpu.errors import BadReplyError, ServerRefusedError
from teegpu.metrics.events import SERIALIZATION, WAIT, Retried, Rpc
from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.options import frame_kinds
from teegpu.ring import Operand, Seed
from teegpu.tee.connections import Group, Member
from teegpu.tee.fleet import Fleet
from teegpu.tee.greeting import check_digest, decode_reply, hello
from teegpu.tee.products import Call
from teegpu.wire import codec
from teegpu.wire.dtypes import nbytes
from teegpu.wire.layout import Layout, Row, layout_of
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from teegpu.wire.messages import Result, Welcome
from teegpu.wire.program import Program, infer_shapes
from transports.base import Client, FrameKind, Message, Reply
from transports.errors import TransportError

RESIDUAL = frozenset({"x", "z", "logits"})
"""Registers that stay in fp16 when the wire dtype is int8: errors in the residual add up over the layers."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all calls of one program with inputs of the same shapes share: how they are encoded, and what the answer has
    to be: at most ``most`` bytes, and tensors of ``layout``. ``kinds`` are those of the request's frames."""

    form: codec.ExecuteForm
    kinds: Sequence[FrameKind]
    layout: Layout
    most: int
    label: str


@dataclass(slots=True)
class Request(Message):
    """A message with the call that it carries."""

    call: Call = field(kw_only=True)
    asked: _Asked = field(kw_only=True)
    request_id: int = field(kw_only=True)


_Fault = tuple[Group, Member, Client, TransportError]
"""To whom a request was sent over which connection, and what came of it."""


class GpuClient:
    """Runs programs on the GPU servers of a fleet, or on the one at the end of a ``Client``.

    A request that the network loses is sent again, as ``Fleet`` says; its caller notices the time that it took, or gets
    ``ConnectionFailedError`` where it took too long. ``overlapped`` says whether calls are awaited on an asyncio loop
    (with an overlapping transport) or made at once. ``ids`` are those of requests: clients that share a recorder share
    them.
    """

    def __init__(
        self,
        servers: Fleet | Client,
        spec: ModelSpec,
        *,
        wire_dtype: str,
        recorder: Recorder,
        limits: Limits,
        check_finite: bool = True,
        ids: Iterator[int] | None = None,
    ) -> None:
        self.spec = spec
        self.wire_dtype = wire_dtype
        self.narrow_range = wire_dtype in ("fp16", "int8")
        self.overlapped = False
        self._fleet = fleet = servers if isinstance(servers, Fleet) else Fleet.of(servers, recorder)
        self._recorder = recorder
        self._decoder = codec.Decoder(limits)
        self._check_finite = check_finite
        self._ids = ids if ids is not None else itertools.count(1)
        self._lines: tuple[asyncio.AbstractEventLoop | None, dict[int, asyncio.Lock]] = (None, {})
        self._known: dict[tuple[Any, ...], _Asked] = {}
        fleet.tell_when_sent(self._sent)

    @property
    def can_overlap(self) -> bool:
        return self._fleet.overlaps

    def hello(self, timeout_seconds: float, digest: str | None = None) -> Welcome:
        """The introduction of the server of a fleet that has but one connection (see ``Fleet.of``).

        With ``digest``, raises ``MismatchError`` when the server holds another model than that. Raises
        ``ConnectionFailedError`` (from the transport) when nobody answers, ``MismatchError`` for another protocol
        version, ``BadReplyError`` for nonsense.
        """
        client = self._fleet.members[0].client
        if client is None:
            raise RuntimeError("there is no connection to say hello over")
        welcome = hello(client, self._decoder, timeout_seconds)
        if digest is not None:
            check_digest(welcome, self.spec, digest, client.endpoint)
        return welcome

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        message = self._encode(call)
        member = self._fleet.at_hand
        if member is not None and (client := member.client) is not None:
            # The way of nearly every request; what can go wrong is the business of ``_persist``.
            try:
                if self.overlapped:
                    reply = await client.request_async(message)
                else:
                    reply = client.request(message)
            except TransportError as error:
                fault = (self._fleet.group_of(call), member, client, error)
            else:
                return self._finish(message, reply, member, 1)
        else:
            fault = None
        (reply,), member, attempts = await self._persist([message], fault)
        return self._finish(message, reply, member, attempts)

    def begin(self, call: Call) -> Callable[[], Awaitable[dict[str, torch.Tensor]]]:
        """Sends ``call`` and goes on; what is returned gives what ``run`` would, or raises it. Not while
        ``overlapped``: there tasks do the same."""
        message = self._encode(call)
        fleet = self._fleet
        group = fleet.group_of(call)
        member = fleet.at_hand or fleet.pick(group)
        client = member.client if member is not None else None
        wait: Callable[[], Reply] | None = None
        lost: TransportError | None = None
        if client is not None:
            try:
                wait = client.begin(message)
            except TransportError as error:
                lost = error

        async def finish() -> dict[str, torch.Tensor]:
            fault: _Fault | None = None
            if member is not None and client is not None:
                error = lost
                try:
                    reply = wait() if wait is not None else None
                except TransportError as late:
                    reply, error = None, late
                if reply is not None:
                    fleet.answered(group, member, client)
                    return self._finish(message, reply, member, 1)
                if error is not None:
                    fault = (group, member, client, error)
            (again,), who, attempts = await self._persist([message], fault)
            return self._finish(message, again, who, attempts)

        return finish

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        fleet = self._fleet
        if self.overlapped:
            return list(await asyncio.gather(*(self.run(call) for call in calls)))
        if not fleet.overlaps or len({id(fleet.group_of(call)) for call in calls}) != 1:
            return [await self.run(call) for call in calls]
        messages = [self._encode(call) for call in calls]
        replies, member, attempts = await self._persist(messages, None)
        return [
            self._finish(message, reply, member, attempts) for message, reply in zip(messages, replies, strict=True)
        ]

    async def _persist(self, messages: Sequence[Request], fault: _Fault | None) -> tuple[list[Reply], Member, int]:
        """The replies to ``messages`` (of one group), who gave them, and how often they were sent, ``fault`` included.

        Raises what ``Fleet.pick``, ``failed`` and ``pause`` do."""
        fleet = self._fleet
        group = fleet.group_of(messages[0].call)
        attempts = 0
        while True:
            if fault is not None:
                attempts += 1
                self._lost(messages, fault)
            member, client = await self._member(group)
            try:
                if self.overlapped:
                    replies = [await client.request_async(message) for message in messages]
                elif len(messages) == 1:
                    replies = [client.request(messages[0])]
                else:
                    replies = client.request_all(messages)
            except TransportError as error:
                fault = (group, member, client, error)
            else:
                fleet.answered(group, member, client)
                return replies, member, attempts + 1

    async def _member(self, group: Group) -> tuple[Member, Client]:
        """A member of ``group`` that can be sent to, once there is one."""
        fleet, waited = self._fleet, False
        async with self._line(group) if self.overlapped else contextlib.nullcontext():
            try:
                while (member := fleet.pick(group)) is None or member.client is None:
                    seconds, waited = fleet.pause(group), True
                    if self.overlapped:
                        await asyncio.sleep(seconds)
                    else:
                        fleet.sleep(seconds)
            finally:
                if waited:
                    self._recorder.lap(WAIT, "WAIT")
        return member, member.client

    def _line(self, group: Group) -> asyncio.Lock:
        """Those who wait for ``group`` in the loop that runs now go on in the order in which they came, so that
        requests are sent in the order in which they were made or lost."""
        loop = asyncio.get_running_loop()
        if self._lines[0] is not loop:
            self._lines = (loop, {})
        return self._lines[1].setdefault(group.index, asyncio.Lock())

    def _lost(self, messages: Sequence[Request], fault: _Fault) -> None:
        """Records that ``messages`` were sent in vain and will be sent again. Raises what ``Fleet.failed`` does.

        The time since is a wait, and as no reply ends it all of it counts as network."""
        record = self._recorder
        now = record.clock_ns()
        for message in messages:
            record.lap_until(now, WAIT, "WAIT", message.call.layer, message.call.chunk)
        _, member, _, error = fault
        self._check_size(messages, member)
        self._fleet.failed(*fault)
        for message in messages:
            call, reason = message.call, type(error).__name__
            record.add(Retried(now, message.request_id, call.layer, call.chunk, member.index, reason))

    def _check_size(self, messages: Sequence[Request], member: Member) -> None:
        """Raises ``ServerRefusedError`` where a message was lost because it is longer than the server takes: it closes
        the connection without a word, and would do so each time."""
        most = None if member.welcome is None else member.welcome.limits.get("message_bytes")
        longest = max(message.nbytes for message in messages)
        if most is not None and longest > most:
            raise ServerRefusedError(
                f"a request has {longest} bytes, and the server at {member.address} takes {most} (its "
                "limits.message_mib): make chunks of the prompt shorter (run.chunk_tokens), or let it take more"
            )

    def _encode(self, call: Call) -> Request:
        request_id = next(self._ids)
        asked = self._asked(call)
        frames = asked.form.encode(request_id, call.inputs).frames
        message = Request(frames, asked.kinds, asked.most, call=call, asked=asked, request_id=request_id)
        self._recorder.lap(SERIALIZATION, "ENCODE", call.layer, call.chunk)
        return message

    def _asked(self, call: Call) -> _Asked:
        program = call.program
        key: tuple[Any, ...] = (program.packed, *[operand.shape for operand in call.inputs.values()])
        if program.in_ring:  # a seed has the shape of what it stands for
            key = (*key, *map(type, call.inputs.values()))
        asked = self._known.get(key)
        if asked is None:
            if len(self._known) > 8192:
                self._known.clear()
            asked = self._known[key] = self._ask(program, call.inputs)
        return asked

    def _ask(self, program: Program, inputs: Mapping[str, Operand]) -> _Asked:
        given = {name: tuple(inputs[name].shape) for name in program.inputs}
        shapes = infer_shapes(program, given, self.spec.weights.get)
        up = layout_of(tuple(Row(name, given[name], self._up(program, name, inputs[name])) for name in program.inputs))
        replies = ["int32" if program.in_ring else self._encoding(name) for name in program.outputs]
        down = layout_of(tuple(map(Row, program.outputs, [shapes[name] for name in program.outputs], replies)))
        return _Asked(
            form=codec.ExecuteForm(program, up, replies),
            kinds=frame_kinds(up.kinds),
            layout=down,
            most=MAX_HEADER_BYTES + sum(nbytes(row.shape, row.encoding) for row in down.rows),
            label="+".join(program.outputs),
        )

    def _up(self, program: Program, register: str, operand: Operand) -> str:
        """The wire dtype of an input."""
        if isinstance(operand, Seed):
            return "seed"
        return "int32" if program.in_ring or register in program.id_registers else self._encoding(register)

    def _sent(self, message: Message, sent_ns: int) -> None:
        """``message`` is on its way since ``sent_ns``; from when it was encoded until then it was being compressed.

        What follows is part of the round trip. Were it charged up to now, then on a busy machine, where the server may
        get the processor in this very moment, its work would look like ours."""
        if isinstance(message, Request):
            call = message.call
            self._recorder.lap_until(sent_ns, SERIALIZATION, "SEND", call.layer, call.chunk, message.request_id)

    def _encoding(self, register: str) -> str:
        return "fp16" if self.wire_dtype == "int8" and register in RESIDUAL else self.wire_dtype

    def _finish(self, message: Request, reply: Reply, member: Member, attempts: int) -> dict[str, torch.Tensor]:
        record, call, request_id = self._recorder, message.call, message.request_id
        result = self._result(request_id, reply, member.address)
        outputs = self._checked(message, result, member.address)
        times = result.times
        record.add(
            Rpc(
                request_id=request_id,
                label=message.asked.label,
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
                # The server's own encoding and compressing of this reply came after it had written down its times.
                encode_seconds=times.encode_seconds + max(0.0, reply.server_ns / 1e9 - times.total_seconds),
                operations=times.operations,
                tried_bytes=reply.up.tried_bytes + reply.down.tried_bytes,
                compressed_bytes=reply.up.raw_bytes + reply.down.raw_bytes,
                endpoint=member.index,
                attempts=attempts,
            )
        )
        # What follows the reply's arrival is decompressing, decoding and checking it. In an overlapped prefill it may
        # have arrived while another chunk was at work: then nobody waited.
        record.lap_until(reply.received_ns, WAIT, "WAIT", call.layer, call.chunk, request_id)
        record.lap(SERIALIZATION, "DECODE", call.layer, call.chunk)
        return outputs

    def _result(self, request_id: int, reply: Reply, address: str) -> Result:
        answer = decode_reply(self._decoder, reply, address)
        if answer.request_id != request_id or not isinstance(answer, Result):
            raise BadReplyError(f"the server at {address} answered another question than the one asked")
        return answer

    def _checked(self, message: Request, result: Result, address: str) -> dict[str, torch.Tensor]:
        """The outputs in fp32, or int32 in the ring. Raises ``BadReplyError`` where they can't be the answer to
        ``message``."""
        call, expected = message.call, message.asked.layout
        if result.layout.rows != expected.rows:
            raise _bad(call, address, _difference(result.layout.rows, expected.rows))
        counts = call.program.counts
        for name, (count, _) in result.times.operations.items():
            if counts.get(name) != count:
                raise _bad(call, address, f"another count of operations than were asked for: {name} × {count}")
        outputs: dict[str, torch.Tensor] = {}
        for frame, received in zip(expected.frames, result.values, strict=True):
            if frame.encoding == "int32":  # in the ring, where every one is a value
                outputs.update(zip(frame.registers, frame.split(received), strict=True))
                continue
            values = received.to(torch.float32)
            # One pass: infinities and NaNs survive a sum. (int8 has none: its scales were checked when it was decoded.)
            checked = frame.encoding == "int8" or not self._check_finite
            if not checked and not math.isfinite(values.sum().item()):
                registers = " or ".join(repr(name) for name in frame.registers)
                raise _bad(call, address, f"values that are not finite in {registers} (if the server's dtype is fp16, "
                                      "its range may be exceeded: serve with --dtype bf16)")  # fmt: skip
            outputs.update(zip(frame.registers, frame.split(values), strict=True))
        return outputs


def _difference(found: Sequence[Row], expected: Sequence[Row]) -> str:
    """What is wrong with the table of a reply."""
    if [row.register for row in found] != [row.register for row in expected]:
        return "other registers than were asked for"
    got, row = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
    return f"register {row.register!r} as {got.encoding} {got.shape}, expected {row.encoding} {row.shape}"


def _bad(call: Call, address: str, what: str) -> BadReplyError:
    where = f"layer {call.layer}" if call.layer >= 0 else "embedding or lm_head"
    return BadReplyError(f"the server at {address} answered {where} with {what}")
