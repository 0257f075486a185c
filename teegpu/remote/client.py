"""Programs to the GPU server and back: encode, send, wait, check the answer, decode, and record what each step took.

The server is not trusted. What it answers is held against what was asked: size, registers, shapes, wire dtypes,
operations, finite values. What masks inputs and verifies results is ``tee.shield``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teegpu import facts
from teegpu.errors import BadReplyError, MismatchError, ServerRefusedError, WireError
from teegpu.model.spec import ModelSpec
from teegpu.options import frame_kinds
from teegpu.record.events import SERIALIZATION, WAIT, Retried, Rpc
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.remote.connections import Replica, Shard
from teegpu.remote.pool import Pool
from teegpu.ring import Operand, Seed
from teegpu.wire import codec
from teegpu.wire.dtypes import nbytes
from teegpu.wire.layout import Layout, Row, layout_of
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from teegpu.wire.messages import Message as WireMessage
from teegpu.wire.messages import Refusal, Result
from teegpu.wire.program import Program, infer_shapes
from transports.base import Client, FrameKind, Message, Reply, Sent
from transports.errors import TransportError


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all calls of one program with inputs of the same shapes share: how they are encoded, and what the answer has
    to be: at most ``most`` bytes, and tensors of ``layout``. ``kinds`` are those of the request's frames."""

    form: codec.ExecuteForm
    kinds: Sequence[FrameKind]
    layout: Layout
    most: int
    label: str


@dataclass(frozen=True, slots=True)
class Request:
    """A call as it is sent."""

    message: Message
    call: Call
    asked: _Asked
    request_id: int


_Fault = tuple[Shard, Replica, Client, TransportError]
"""To whom a request was sent over which connection, and what came of it."""


class GpuClient:
    """Runs programs on the GPU servers of a pool, or on the one at the end of a ``Client``.

    A request that the network loses is sent again, as ``Pool`` says; its caller notices the time that it took, or gets
    ``ConnectionFailedError`` where it took too long. ``ids`` are those of requests: clients that share a recorder share
    them.
    """

    def __init__(
        self,
        servers: Pool | Client,
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
        self._float = facts.WIRE_DTYPES.get(wire_dtype)  # none: a private run, all of whose values are int32
        self.narrow_range = self._float is not None and self._float.narrow_range
        self._pool = servers if isinstance(servers, Pool) else Pool.of(servers, recorder)
        self._recorder = recorder
        self._decoder = codec.Decoder(limits)
        self._check_finite = check_finite
        self._ids = ids if ids is not None else itertools.count(1)
        self._lines: tuple[asyncio.AbstractEventLoop | None, dict[int, asyncio.Lock]] = (None, {})
        self._known: dict[tuple[Any, ...], _Asked] = {}

    @property
    def can_overlap(self) -> bool:
        return self._pool.overlaps

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        return await (await self.begin(call))()

    async def begin(self, call: Call) -> Callable[[], Awaitable[dict[str, torch.Tensor]]]:
        """Sends ``call`` and goes on; what is returned gives what ``run`` would, or raises it."""
        request = self._encode(call)
        pool = self._pool
        shard = pool.shard_of(call)
        replica = pool.at_hand
        if replica is None or (client := replica.client) is None:
            replica, client = await self._replica(shard, call.overlapped)
        lost: TransportError | None = None
        began_ns = self._recorder.clock_ns()
        try:
            sent = await self._send(client, request)
        except TransportError as error:
            lost = error

        async def finish() -> dict[str, torch.Tensor]:
            try:
                if lost is not None:
                    raise lost
                reply = await sent if call.overlapped else sent.wait()
            except TransportError as error:
                return await self._again(request, (shard, replica, client, error), began_ns)
            pool.answered(shard, replica, client)
            return self._finish(request, reply, replica, 1)

        return finish

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        if any(call.overlapped for call in calls):
            return list(await asyncio.gather(*(self.run(call) for call in calls)))
        if not self._pool.overlaps:
            return [await self.run(call) for call in calls]
        begun = [await self.begin(call) for call in calls]
        return [await finish() for finish in begun]

    async def _again(self, request: Request, fault: _Fault, began_ns: int) -> dict[str, torch.Tensor]:
        """What ``request``, which was sent first at ``began_ns``, gives when it is sent until it is answered.

        Raises what ``Pool.pick``, ``failed`` and ``pause`` do, and ``Deadline.allow``."""
        pool, overlapped = self._pool, request.call.overlapped
        attempts = 1
        while True:
            now = self._recorder.clock_ns()
            pool.deadline.spend(request.call, (now - began_ns) / 1e9)
            began_ns = now
            self._lost(request, fault)
            shard = fault[0]
            replica, client = await self._replica(shard, overlapped)
            attempts += 1
            try:
                sent = await self._send(client, request)
                reply = await sent if overlapped else sent.wait()
            except TransportError as error:
                fault = (shard, replica, client, error)
            else:
                pool.answered(shard, replica, client)
                return self._finish(request, reply, replica, attempts)

    async def _send(self, client: Client, request: Request) -> Sent:
        """From when it was encoded until it was sent, ``request`` was being compressed, or stood in line. What follows
        is part of the round trip: were it charged up to now, then on a busy machine, where the server may get the
        processor in this very moment, its work would look like ours."""
        call, message = request.call, request.message
        seconds = self._pool.deadline.allow(call)
        if call.overlapped:
            sent = await client.begin_async(message, timeout_seconds=seconds)
        else:
            sent = client.begin(message, timeout_seconds=seconds)
        self._recorder.lap_until(sent.sent_ns, SERIALIZATION, "SEND", call.layer, call.chunk, request.request_id)
        return sent

    async def _replica(self, shard: Shard, overlapped: bool) -> tuple[Replica, Client]:
        """A replica of ``shard`` that can be sent to, once there is one."""
        pool, waited = self._pool, False
        async with self._line(shard) if overlapped else contextlib.nullcontext():
            try:
                while (replica := pool.pick(shard)) is None or replica.client is None:
                    seconds, waited = pool.pause(shard), True
                    if overlapped:
                        await asyncio.sleep(seconds)
                    else:
                        pool.sleep(seconds)
            finally:
                if waited:
                    self._recorder.lap(WAIT, "WAIT")
        return replica, replica.client

    def _line(self, shard: Shard) -> asyncio.Lock:
        """Those who wait for ``shard`` in the loop that runs now go on in the order in which they came, so that
        requests are sent in the order in which they were made or lost."""
        loop = asyncio.get_running_loop()
        if self._lines[0] is not loop:
            self._lines = (loop, {})
        return self._lines[1].setdefault(shard.index, asyncio.Lock())

    def _lost(self, request: Request, fault: _Fault) -> None:
        """Records that ``request`` was sent in vain and will be sent again. Raises what ``Pool.failed`` does.

        The time since is a wait, and as no reply ends it all of it counts as network."""
        record, call = self._recorder, request.call
        now = record.clock_ns()
        record.lap_until(now, WAIT, "WAIT", call.layer, call.chunk)
        _, replica, _, error = fault
        self._check_size(request.message, replica)
        self._pool.failed(*fault)
        record.add(Retried(now, request.request_id, call.layer, call.chunk, replica.index, type(error).__name__))

    def _check_size(self, message: Message, replica: Replica) -> None:
        """Raises ``ServerRefusedError`` where a message was lost because it is longer than the server takes: it closes
        the connection without a word, and would do so each time."""
        most = None if replica.welcome is None else replica.welcome.limits.get("message_bytes")
        if most is not None and message.nbytes > most:
            raise ServerRefusedError(
                f"a request has {message.nbytes} bytes, and the server at {replica.address} takes {most} (its "
                "limits.message_mib): make chunks of the prompt shorter (run.chunk_tokens), or let it take more"
            )

    def _encode(self, call: Call) -> Request:
        request_id = next(self._ids)
        asked = self._asked(call)
        frames = asked.form.encode(request_id, call.inputs).frames
        request = Request(Message(frames, asked.kinds, asked.most), call, asked, request_id)
        self._recorder.lap(SERIALIZATION, "ENCODE", call.layer, call.chunk)
        return request

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

    def _encoding(self, register: str) -> str:
        return self.wire_dtype if self._float is None else self._float.for_register(register).name

    def _finish(self, request: Request, reply: Reply, replica: Replica, attempts: int) -> dict[str, torch.Tensor]:
        record, call, request_id = self._recorder, request.call, request.request_id
        self._pool.deadline.spend(call, (reply.received_ns - reply.sent_ns) / 1e9)
        result = self._result(request_id, reply, replica.address)
        outputs = self._checked(request, result, replica.address)
        times = result.times
        replica.waited(times.queue_seconds, reply.received_ns)
        record.add(
            Rpc(
                request_id=request_id,
                label=request.asked.label,
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
                endpoint=replica.index,
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

    def _checked(self, request: Request, result: Result, address: str) -> dict[str, torch.Tensor]:
        """The outputs in fp32, or int32 in the ring. Raises ``BadReplyError`` where they can't be the answer to
        ``request``."""
        call, expected = request.call, request.asked.layout
        if result.layout.rows != expected.rows:
            raise _bad(call, address, _difference(result.layout.rows, expected.rows))
        counts = call.program.counts
        for name, (count, _) in result.times.operations.items():
            if counts.get(name) != count:
                raise _bad(call, address, f"another count of operations than were asked for: {name} × {count}")
        outputs: dict[str, torch.Tensor] = {}
        for row, received in zip(expected.rows, result.values, strict=True):
            if row.encoding == "int32":  # in the ring, where every one is a value
                outputs[row.register] = received
                continue
            values = outputs[row.register] = received.to(torch.float32)
            # One pass: infinities and NaNs survive a sum. (int8 has none: its scales were checked when it was decoded.)
            checked = row.encoding == "int8" or not self._check_finite
            if not checked and not math.isfinite(values.sum().item()):
                raise _bad(call, address, f"values that are not finite in {row.register!r} (if the server's dtype is "
                                      "fp16, its range may be exceeded: serve with --dtype bf16)")  # fmt: skip
        return outputs


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


def _difference(found: Sequence[Row], expected: Sequence[Row]) -> str:
    """What is wrong with the table of a reply."""
    if [row.register for row in found] != [row.register for row in expected]:
        return "other registers than were asked for"
    got, row = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
    return f"register {row.register!r} as {got.encoding} {got.shape}, expected {row.encoding} {row.shape}"


def _bad(call: Call, address: str, what: str) -> BadReplyError:
    where = f"layer {call.layer}" if call.layer >= 0 else "embedding or lm_head"
    return BadReplyError(f"the server at {address} answered {where} with {what}")
