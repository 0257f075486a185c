"""Messages to frames and back. No I/O: every malformed message can be tried from byte strings.

Frame 0 is a msgpack header, a list ``[protocol version, kind, request id, …]``; a message with tensors ends it with a
table ``[[register, shape, wire dtype], …]``, and has one further frame for each row, in the table's order and exactly
as long as the row says: nothing can hide between them.

The table is packed by itself, as the program is: a decode step repeats both, so each side makes and checks them once.

Decoding checks everything against ``Limits`` before it touches a tensor's bytes and raises ``WireError``, never
another exception, whatever the bytes are.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import torch

from teegpu.errors import MismatchError, WireError
from teegpu.ring import SEED_BYTES, Operand, Seed
from teegpu.wire import dtypes, program
from teegpu.wire.layout import HEADER_KIND, Layout, Row, layout_of
from teegpu.wire.limits import (
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_LABEL_LENGTH,
    MAX_TEXT_LENGTH,
    REMEMBERED,
    REMEMBERED_BYTES,
    REMEMBERED_STEPS,
    REMEMBERED_TENSORS,
    Limits,
)
from teegpu.wire.messages import (
    PROTOCOL_VERSION,
    REFUSALS,
    Execute,
    Header,
    Health,
    HealthReport,
    Hello,
    Message,
    Refusal,
    Result,
    ServerTimes,
    Welcome,
)
from teegpu.wire.unpacking import unpack

Buffer = bytes | bytearray | memoryview


class Encoded(NamedTuple):
    """Frames ready to send. ``kinds`` tells a compression policy (label, bytes per value) of each frame."""

    frames: list[Buffer]
    kinds: tuple[tuple[str, int], ...]


class VersionError(MismatchError):
    """The peer speaks another version of the protocol."""

    def __init__(self, theirs: object) -> None:
        super().__init__(
            f"the peer speaks protocol version {theirs!r}, this is version {PROTOCOL_VERSION}: "
            "install the same teegpu release on both sides"
        )


# Encoding


def encode_hello(message: Hello) -> Encoded:
    return _encode([PROTOCOL_VERSION, "hello", message.request_id, message.software, message.ring])


def encode_welcome(message: Welcome) -> Encoded:
    body = {
        "software": message.software,
        "instance": message.instance,
        "model": message.model,
        "digest": message.digest,
        "dims": message.dims,
        "device": message.device,
        "dtype": message.dtype,
        "threads": message.threads,
        "memory_bytes": message.memory_bytes,
        "limits": message.limits,
        "layers": message.layers,
        "ring_digest": message.ring_digest,
        "ranks": message.ranks,
    }
    return _encode([PROTOCOL_VERSION, "welcome", message.request_id, body])


def encode_health(message: Health) -> Encoded:
    return _encode([PROTOCOL_VERSION, "health", message.request_id, message.software])


def encode_health_report(message: HealthReport) -> Encoded:
    names = (*_REPORT_TEXTS, *_REPORT_COUNTS, *_REPORT_NUMBERS, "layers", "draining")
    body = {name: getattr(message, name) for name in names}  # names of ours: the tables below
    return _encode([PROTOCOL_VERSION, "health-report", message.request_id, body])


def encode_refusal(message: Refusal) -> Encoded:
    return _encode([PROTOCOL_VERSION, "refusal", message.request_id, message.code, message.text[:MAX_TEXT_LENGTH]])


def encode_execute(message: Execute) -> Encoded:
    code, tensors, encodings = message.program, message.tensors, message.encodings
    layout = layout_of(tuple(Row(name, tuple(tensors[name].shape), encodings[name]) for name in code.inputs))
    replies = tuple(message.reply_encodings[register] for register in code.outputs)
    return ExecuteForm(code, layout, replies).encode(message.request_id, tensors)


class ExecuteForm:
    """What the messages ``Execute`` of one program, for inputs of one ``layout``, have in common: packed once.

    ``replies`` has the wire dtype of each output."""

    def __init__(self, code: program.Program, layout: Layout, replies: Sequence[str]) -> None:
        packer = msgpack.Packer()
        self._behind = b"".join(map(packer.pack, (code.packed, replies, layout.packed)))
        self._layout = layout

    def encode(self, request_id: int, operands: Mapping[str, Operand]) -> Encoded:
        """The message with ``operands``, one for each input and of the shape that the layout has for it."""
        frames: list[Buffer] = [_EXECUTE + request_id.to_bytes(8, "big") + self._behind]
        for register, _, encoding in self._layout.rows:
            operand = operands[register]
            frames.append(operand.key if isinstance(operand, Seed) else dtypes.encode(operand, encoding))
        return Encoded(frames, self._layout.kinds)


_EXECUTE = b"\x96" + msgpack.packb(PROTOCOL_VERSION) + msgpack.packb("execute") + b"\xcf"
"""How the header of an ``Execute`` of ours begins: a list of 6, and at the end what msgpack has before a number of 8
bytes, which is the request's id."""
_BEHIND_ID = len(_EXECUTE) + 8


def encode_result(request_id: int, times: ServerTimes, layout: Layout, frames: Sequence[torch.Tensor]) -> Encoded:
    """The message ``Result`` around what ``dtypes.narrow`` made (before, and timed) of each row of ``layout``, on the
    CPU."""
    operations = {name: [count, seconds] for name, (count, seconds) in times.operations.items()}
    spent = [times.queue_seconds, times.decode_seconds, times.compute_seconds, times.encode_seconds, operations]
    return _encode([PROTOCOL_VERSION, "result", request_id, spent], layout, frames)


def _encode(header: Header, layout: Layout | None = None, frames: Sequence[torch.Tensor] = ()) -> Encoded:
    if layout is None:
        # A model's folder may have a name that is not text: shown as such, not an error in the middle of a talk.
        return Encoded([msgpack.packb(header, unicode_errors="replace")], (HEADER_KIND,))
    return Encoded([msgpack.packb([*header, layout.packed]), *map(dtypes.frame_of, frames)], layout.kinds)


# Decoding


class Decoder:
    """Decodes the messages of one peer or of many. It remembers the last ``remember`` programs, and as many tensor
    tables, that it has checked."""

    def __init__(self, limits: Limits, remember: int = REMEMBERED) -> None:
        self.limits = limits
        self._remember = remember
        self._programs: OrderedDict[bytes, program.Program] = OrderedDict()
        self._tables: OrderedDict[bytes, Layout] = OrderedDict()
        self._headers: OrderedDict[bytes, _Form] = OrderedDict()
        """By what follows the id in a header that was checked: the same bytes say the same again."""

    def decode(self, frames: Sequence[memoryview]) -> Message:
        """The message in ``frames``.

        Tensors share the frames' memory wherever they can. Raises ``WireError``, or ``VersionError`` for a message of
        another protocol version.
        """
        head = self._head(frames)
        behind = head[_BEHIND_ID:] if head.startswith(_EXECUTE) else b""
        if (known := self._headers.get(behind)) is not None:
            self._headers.move_to_end(behind)
            return self._executed(int.from_bytes(head[len(_EXECUTE) : _BEHIND_ID], "big"), known, frames)
        header = self._header(head)
        kind, request_id, body = header[1], header[2], header[3:]
        if type(request_id) is not int or not 0 <= request_id < 2**64:
            raise WireError("a request id is a whole number below 2**64")
        if kind == "execute":
            form, lasting = self._execute(body)
            if lasting and behind:
                self._headers[behind] = form
                if len(self._headers) > self._remember:
                    self._headers.popitem(last=False)
            return self._executed(request_id, form, frames)
        if kind == "result":
            return self._result(request_id, body, frames)
        if len(frames) != 1:
            raise WireError(f"a message of kind {_shown(kind)} has no tensors")
        if kind == "hello" and len(body) == 2 and type(body[1]) is bool:
            return Hello(request_id, _text(body[0], "software"), body[1])
        if kind == "health" and len(body) == 1:
            return Health(request_id, _text(body[0], "software"))
        if kind == "health-report" and len(body) == 1:
            return _health_report(request_id, body[0])
        if kind == "welcome" and len(body) == 1:
            return _welcome(request_id, body[0])
        if kind == "refusal" and len(body) == 2:
            code, text = _text(body[0], "code"), _text(body[1], "text", MAX_TEXT_LENGTH)
            return Refusal(request_id, code if code in REFUSALS else "internal", text)
        raise WireError(f"a message of kind {_shown(kind)} with {len(body)} fields is none of ours")

    def _head(self, frames: Sequence[memoryview]) -> bytes:
        if not frames:
            raise WireError("a message has at least one frame")
        if frames[0].nbytes > MAX_HEADER_BYTES:
            raise WireError(f"a header of {frames[0].nbytes} bytes is over the limit of {MAX_HEADER_BYTES}")
        if sum(frame.nbytes for frame in frames) > self.limits.message_bytes:
            raise WireError(f"a message is over the limit of {self.limits.message_bytes} bytes (limits.message_mib)")
        return bytes(frames[0])

    def _header(self, head: bytes) -> Header:
        header = unpack(head, "a header")
        if not isinstance(header, list) or not header or type(header[0]) is not int:
            raise WireError("a header is a list that starts with the protocol version")
        if header[0] != PROTOCOL_VERSION:
            raise VersionError(header[0])
        if len(header) < 4:
            raise WireError("a header has at least a version, a kind, a request id and a body")
        return header

    def _execute(self, body: Header) -> tuple[_Form, bool]:
        """And whether it is one to be remembered."""
        if len(body) != 3:
            raise WireError("an execute message has a program, reply encodings and a tensor table")
        packed, replies, table = body
        if not isinstance(packed, bytes) or not isinstance(table, bytes):
            raise WireError("a program and a tensor table travel as bytes")
        if not isinstance(replies, list) or not all(type(encoding) is str for encoding in replies):
            raise WireError(f"a reply encoding is one of {', '.join(dtypes.TENSORS)}")
        form = self._form(packed, replies, table)
        return form, len(replies) <= REMEMBERED_TENSORS and packed in self._programs and table in self._tables

    def _executed(self, request_id: int, form: _Form, frames: Sequence[memoryview]) -> Execute:
        code, layout, encodings, reply_encodings = form
        tensors = dict(zip(layout.registers, self._operands(layout, frames), strict=True))
        return Execute(request_id, code, tensors, encodings, reply_encodings)

    def _form(self, packed: bytes, replies: list[str], table: bytes) -> _Form:
        code = self._program(packed)
        if len(replies) != len(code.outputs):
            raise WireError("an execute message names one reply encoding for each output")
        known = ("int32",) if code.in_ring else dtypes.FLOATS
        if not set(replies) <= set(known):
            raise WireError(f"a reply encoding of this program is one of {', '.join(known)}")
        layout = self._layout(table)
        if layout.registers != code.inputs:
            raise WireError("an execute message carries one tensor for each of its program's inputs, in their order")
        encodings = {row.register: row.encoding for row in layout.rows}
        return code, layout, encodings, dict(zip(code.outputs, replies, strict=True))

    def _program(self, packed: bytes) -> program.Program:
        known = self._programs.get(packed)
        if known is not None:
            self._programs.move_to_end(packed)
            return known
        code = program.unpack(packed, max_steps=self.limits.program_steps, max_registers=self.limits.tensors)
        if len(code.steps) <= REMEMBERED_STEPS and len(packed) <= REMEMBERED_BYTES:
            self._programs[packed] = code
            if len(self._programs) > self._remember:
                self._programs.popitem(last=False)
        return code

    def _result(self, request_id: int, body: Header, frames: Sequence[memoryview]) -> Result:
        if len(body) != 2:
            raise WireError("a result has times and a tensor table")
        times = _times(body[0])
        layout = self._layout(body[1])
        operands = self._operands(layout, frames)
        values = [operand for operand in operands if not isinstance(operand, Seed)]
        if len(values) != len(operands):
            raise WireError("a result holds no seeds")
        return Result(request_id, layout, values, times)

    def _operands(self, layout: Layout, frames: Sequence[memoryview]) -> list[Operand]:
        """What each frame holds, by its row."""
        if len(layout.rows) != len(frames) - 1:
            raise WireError(
                f"a tensor table of {len(layout.rows)} rows stands for as many frames after the header, not for "
                f"{len(frames) - 1}"
            )
        return [_operand(row, frame) for row, frame in zip(layout.rows, frames[1:], strict=True)]

    def _layout(self, packed: object) -> Layout:
        if not isinstance(packed, bytes):
            raise WireError("a tensor table travels as bytes")
        known = self._tables.get(packed)
        if known is not None:
            self._tables.move_to_end(packed)
            return known
        layout = Layout(self._checked_table(packed))
        if len(layout.rows) <= REMEMBERED_TENSORS and len(packed) <= REMEMBERED_BYTES:
            self._tables[packed] = layout
            if len(self._tables) > self._remember:
                self._tables.popitem(last=False)
        return layout

    def _checked_table(self, packed: bytes) -> tuple[Row, ...]:
        table = unpack(packed, "a tensor table")
        if not isinstance(table, list) or len(table) > self.limits.tensors:
            raise WireError(f"a message has at most {self.limits.tensors} tensors (limits.tensors)")
        rows: dict[str, Row] = {}
        for row in table:
            if not isinstance(row, list) or len(row) != 3:
                raise WireError("a row of the tensor table is register, shape and wire dtype")
            register, shape, encoding = row
            program.check_name(register, "a register")
            if register in rows:
                raise WireError(f"register {register!r} is in the tensor table twice")
            if not isinstance(encoding, str) or encoding not in dtypes.NAMES:
                raise WireError(f"a wire dtype is one of {', '.join(dtypes.NAMES)}")
            rows[register] = Row(register, self._checked_shape(shape), encoding)
        return tuple(rows.values())

    def _checked_shape(self, shape: object) -> tuple[int, ...]:
        if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMS:
            raise WireError(f"a shape is a list of 1 to {MAX_DIMS} dimensions")
        for dim in shape:
            if type(dim) is not int or not 0 < dim <= self.limits.dimension:
                raise WireError(f"a dimension is a whole number from 1 to {self.limits.dimension} (limits.dimension)")
        if math.prod(shape) > self.limits.message_bytes:
            raise WireError(f"a tensor is over the limit of {self.limits.message_bytes} bytes (limits.message_mib)")
        return tuple(shape)


_Form = tuple[program.Program, Layout, dict[str, str], dict[str, str]]
"""What messages ``Execute`` with other values may share: the program, the inputs, and the wire dtypes of inputs and of
outputs."""


def _operand(row: Row, frame: memoryview) -> Operand:
    return _seed(frame, row.shape) if row.encoding == "seed" else dtypes.decode(frame, row.shape, row.encoding)


def _seed(frame: memoryview, shape: tuple[int, ...]) -> Seed:
    if len(shape) != 2 or frame.nbytes != SEED_BYTES:
        raise WireError(f"a seed is {SEED_BYTES} bytes that stand for (rows, columns), not {frame.nbytes} for {shape}")
    return Seed(bytes(frame), (shape[0], shape[1]))


def _shown(value: object) -> str:
    """A peer's value for an error message: what is short. (The representation of a deep list overflows the stack.)"""
    if isinstance(value, str):
        return f"{value[:40]!r}"
    return str(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"


def _text(value: object, what: str, most: int = MAX_LABEL_LENGTH) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise WireError(f"{what} is not a text of at most {most} characters")
    # A peer's text ends in a terminal or a log: no control characters, so no escape sequences and no forged lines.
    return "".join(character if character.isprintable() else " " for character in value)


def _integer(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise WireError(f"{what} is not a whole number below 2**63")
    return value


def _integers(value: object, what: str) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > 64:
        raise WireError(f"{what} are not a map of at most 64 numbers")
    return {program.check_name(key, what): _integer(number, what) for key, number in value.items()}


def _layers(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise WireError("layers are a first and a last one")
    first, last = _integer(value[0], "a layer"), _integer(value[1], "a layer")
    if first > last:
        raise WireError("the last layer held comes before the first one")
    return first, last


def _welcome(request_id: int, body: object) -> Welcome:
    if not isinstance(body, dict):
        raise WireError("a welcome carries a map")
    texts = {key: _text(body.get(key), key) for key in ("software", "instance", "model", "digest", "device", "dtype")}
    return Welcome(
        request_id=request_id,
        **texts,
        dims=_integers(body.get("dims"), "dims"),
        threads=_integer(body.get("threads"), "threads"),
        memory_bytes=_integer(body.get("memory_bytes"), "memory_bytes"),
        limits=_integers(body.get("limits"), "limits"),
        layers=_layers(body.get("layers")),
        ring_digest=_text(body.get("ring_digest"), "ring_digest"),
        ranks=_integer(body.get("ranks"), "ranks"),
    )


_REPORT_TEXTS = ("software", "instance", "model", "digest", "device", "dtype")
_REPORT_COUNTS = (
    *("clients", "connections", "requests_served", "refused", "in_flight"),
    *("waiting_requests", "waiting_bytes", "rss_bytes", "weight_bytes", "ring_bytes", "ranks"),
)
_REPORT_NUMBERS = ("uptime_seconds", "busy_share")


def _health_report(request_id: int, body: object) -> HealthReport:
    if not isinstance(body, dict) or type(body.get("draining")) is not bool:
        raise WireError("a health report carries a map")
    values: dict[str, Any] = {name: _text(body.get(name), name) for name in _REPORT_TEXTS}
    values |= {name: _integer(body.get(name), name) for name in _REPORT_COUNTS}
    return HealthReport(
        **values,
        request_id=request_id,
        layers=_layers(body.get("layers")),
        uptime_seconds=_seconds(body.get("uptime_seconds")),
        busy_share=min(1.0, _seconds(body.get("busy_share"))),
        draining=body["draining"],
    )


def _seconds(value: object) -> float:
    if type(value) is float and 0.0 <= value < 1e9:
        return value
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise WireError("a server time is not a number of seconds")
    return float(value)


def _times(value: object) -> ServerTimes:
    if not isinstance(value, list) or len(value) != 5 or not isinstance(value[4], dict):
        raise WireError("server times are four numbers and a map of operations")
    operations: dict[str, tuple[int, float]] = {}
    for name, entry in value[4].items():
        # Names of ours alone: a peer must not fill the record with its own, or count under those of the TEE.
        if name not in program.REPORT_NAMES or not isinstance(entry, list) or len(entry) != 2:
            raise WireError("a server operation is one of a program's, with a count and seconds")
        operations[name] = (_integer(entry[0], "a count"), _seconds(entry[1]))
    return ServerTimes(_seconds(value[0]), _seconds(value[1]), _seconds(value[2]), _seconds(value[3]), operations)
