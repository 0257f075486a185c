"""Messages to frames and back, and what happens to frames that are no message."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from teegpu.errors import MismatchError, WireError
from teegpu.wire import codec, dtypes
from teegpu.wire.limits import MAX_LABEL_LENGTH, MAX_TEXT_LENGTH, REMEMBERED_STEPS, REMEMBERED_TENSORS, Limits
from teegpu.wire.messages import (
    PROTOCOL_VERSION,
    REFUSALS,
    Execute,
    Health,
    Hello,
    Refusal,
    Result,
    ServerTimes,
    Welcome,
)
from teegpu.wire.program import Program, linear, single
from tests.teegpu.wire.samples import (
    EMBED,
    FUSED,
    HEALTH,
    LIMITS,
    TIMES,
    WELCOME,
    decoder,
    execute,
    raw,
    refused,
    result,
    result_of,
)


def received(encoded: codec.Encoded) -> list[memoryview]:
    """The frames as a transport hands them over: other memory, writable."""
    return [memoryview(bytearray(frame)) for frame in encoded.frames]


# Round trips


def test_hello() -> None:
    assert decoder().decode(received(codec.encode_hello(Hello(2**64 - 1, "0.1.0")))) == Hello(2**64 - 1, "0.1.0")


def test_welcome() -> None:
    assert decoder().decode(received(codec.encode_welcome(WELCOME))) == WELCOME


def test_health() -> None:
    assert decoder().decode(received(codec.encode_health(Health(3, "0.1.0")))) == Health(3, "0.1.0")


def test_health_report() -> None:
    assert decoder().decode(received(codec.encode_health_report(HEALTH))) == HEALTH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clients", -1), ("rss_bytes", 2**63), ("waiting_bytes", 1.5), ("requests_served", None), ("refused", True),
        ("uptime_seconds", -1.0), ("uptime_seconds", math.nan), ("uptime_seconds", 1e12), ("busy_share", "1"),
        ("draining", 1), ("draining", None), ("model", 7), ("device", "x" * (MAX_LABEL_LENGTH + 1)),
        ("layers", (3, 2)), ("layers", [1]), ("layers", None),
    ],
)  # fmt: skip
def test_a_health_report_that_can_not_be(field: str, value: object) -> None:
    refused(received(codec.encode_health_report(replace(HEALTH, **{field: value}))))


def test_a_health_report_is_a_map_with_all_of_its_fields() -> None:
    refused(raw([PROTOCOL_VERSION, "health-report", 1, []]))
    refused(raw([PROTOCOL_VERSION, "health-report", 1, {"draining": False}]))
    message = decoder().decode(received(codec.encode_health_report(replace(HEALTH, busy_share=7.0))))
    assert message == replace(HEALTH, busy_share=1.0)


@pytest.mark.parametrize("code", REFUSALS)
def test_refusal(code: str) -> None:
    assert decoder().decode(received(codec.encode_refusal(Refusal(5, code, "no")))) == Refusal(5, code, "no")


@pytest.mark.parametrize("encoding", dtypes.FLOATS)
def test_execute(encoding: str) -> None:
    message = decoder().decode(received(execute(encoding)))
    assert isinstance(message, Execute)
    assert (message.request_id, message.program) == (3, FUSED)
    assert message.encodings == {"a": encoding, "x": encoding}
    assert message.reply_encodings == {"z": "fp16", "gate_up": "int8"}
    assert torch.allclose(message.tensors["a"].to(torch.float32), torch.arange(6.0).reshape(2, 3), atol=0.02)
    assert torch.allclose(message.tensors["x"].to(torch.float32), torch.ones(2, 65), atol=0.01)


def test_execute_with_token_ids() -> None:
    ids = torch.tensor([5, 0, 49151])
    message = decoder().decode(
        received(codec.encode_execute(Execute(1, EMBED, {"ids": ids}, {"ids": "int32"}, {"x": "fp32"})))
    )
    assert isinstance(message, Execute)
    assert message.tensors["ids"].tolist() == ids.tolist()


@pytest.mark.parametrize("encoding", dtypes.FLOATS)
def test_result(encoding: str) -> None:
    message = decoder().decode(received(result(encoding)))
    assert isinstance(message, Result)
    assert (message.request_id, message.times) == (9, TIMES)
    assert message.times.total_seconds == 1.875
    assert message.encodings == {"z": encoding, "gate_up": encoding}
    assert message.tensors["gate_up"].shape == (2, 65)


def test_the_order_of_inputs_is_the_programs() -> None:
    tensors = {"x": torch.ones(1, 2), "a": torch.zeros(1, 3)}
    encoded = codec.encode_execute(
        Execute(1, FUSED, tensors, {"x": "fp32", "a": "fp32"}, {"z": "fp32", "gate_up": "fp32"})
    )
    assert [frame.nbytes for frame in received(encoded)][1:] == [12, 8]


def test_frames_are_labelled_for_compression() -> None:
    encoded = execute("fp16")
    assert list(encoded.kinds) == [("header", 1), ("a/fp16", 2), ("x/fp16", 2)]
    assert len(encoded.frames) == 3
    assert list(codec.encode_hello(Hello(0, "")).kinds) == [("header", 1)]


def test_tensors_are_not_copied_on_either_side() -> None:
    sent = torch.ones(2, 3)
    call = Execute(1, single(["x"], linear("y", "x", "w")), {"x": sent}, {"x": "fp32"}, {"y": "fp32"})
    frames = [memoryview(frame) for frame in codec.encode_execute(call).frames]
    message = decoder().decode(frames)
    assert isinstance(message, Execute)
    sent[0, 0] = 42.0
    assert message.tensors["x"][0, 0] == 42.0


def test_the_same_message_has_the_same_bytes() -> None:
    first, second = (execute("int8") for _ in range(2))
    assert [bytes(frame) for frame in first.frames] == [bytes(frame) for frame in second.frames]


def test_a_name_that_is_not_text_can_be_sent() -> None:
    name = b"mod\xe9le".decode(errors="surrogateescape")
    message = decoder().decode(received(codec.encode_welcome(replace(WELCOME, model=name))))
    assert isinstance(message, Welcome)
    assert message.model == "mod?le"


# What a decoder remembers


def test_a_program_is_checked_once() -> None:
    seen = decoder()
    first, second = seen.decode(received(execute())), seen.decode(received(execute()))
    assert isinstance(first, Execute)
    assert isinstance(second, Execute)
    assert first.program is second.program


def test_programs_that_are_remembered_are_bounded() -> None:
    def program_of(index: int, decoding: codec.Decoder) -> Program:
        code = single(["x"], linear("y", "x", f"w{index}"))
        call = Execute(1, code, {"x": torch.ones(1, 1)}, {"x": "fp32"}, {"y": "fp32"})
        message = decoding.decode(received(codec.encode_execute(call)))
        assert isinstance(message, Execute)
        return message.program

    small = codec.Decoder(LIMITS, remember=4)
    kept = program_of(0, small)
    for index in range(1, 100):
        program_of(index, small)
        assert program_of(0, small) is kept  # what is in use stays
    assert len(small._programs) == 4
    gone = program_of(97, small)
    assert program_of(99, small) is not None
    assert gone == program_of(97, small)


def test_what_follows_the_id_is_parsed_once_and_no_other_bytes_pass_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, frames = decoder(), received(execute())
    first = seen.decode(frames)
    head, at = bytearray(frames[0]), codec._BEHIND_ID - 8
    head[at : at + 8] = b"\xff" * 8
    parsed: list[str] = []
    unpack = codec.unpack
    monkeypatch.setattr(codec, "unpack", lambda packed, what: (parsed.append(what), unpack(packed, what))[1])
    second = seen.decode([memoryview(head), *frames[1:]])
    assert isinstance(first, Execute)
    assert isinstance(second, Execute)
    assert second.request_id == 2**64 - 1
    assert second.program is first.program
    assert all(torch.equal(second.tensors[name], first.tensors[name]) for name in first.tensors)
    assert not parsed
    for index in {*range(len(head))} - {*range(at, at + 8)}:
        changed = bytearray(head)
        changed[index] ^= 1
        parsed.clear()
        with contextlib.suppress(WireError, MismatchError):
            seen.decode([memoryview(changed), *frames[1:]])
        assert parsed
    with pytest.raises(WireError, match="takes"):
        seen.decode([memoryview(head), *(frame[:-1] for frame in frames[1:])])


def test_headers_that_are_remembered_are_bounded() -> None:
    small = codec.Decoder(LIMITS, remember=4)
    for rows in range(1, 50):
        code = single(["x"], linear("y", "x", "w"))
        call = Execute(1, code, {"x": torch.ones(rows, 1)}, {"x": "fp32"}, {"y": "fp32"})
        small.decode(received(codec.encode_execute(call)))
    assert len(small._headers) == 4


def test_what_no_runner_sends_is_not_remembered() -> None:
    seen = codec.Decoder(Limits())
    names = [f"r{index}" for index in range(REMEMBERED_STEPS + 2)]
    steps = tuple(linear(after, before, "w") for before, after in pairwise(names))
    long = Program((names[0],), steps, (names[-1],))
    seen.decode(
        received(codec.encode_execute(Execute(1, long, {"r0": torch.ones(1, 1)}, {"r0": "fp32"}, {names[-1]: "fp32"})))
    )
    many = {f"t{index}": torch.ones(1) for index in range(REMEMBERED_TENSORS + 1)}
    seen.decode(received(result_of(many, dict.fromkeys(many, "fp32"))))
    assert not seen._programs
    assert not seen._headers
    assert not [layout for layout in seen._tables.values() if len(layout.rows) > 1]


# Versions


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, -1, 2**64 - 1])
def test_another_protocol_version_is_its_own_error(version: int) -> None:
    with pytest.raises(
        codec.VersionError, match=f"version {version}, this is version {PROTOCOL_VERSION}.*same teegpu release"
    ):
        decoder().decode(raw([version, "hello", 0, "9.9.9"]))


def test_another_version_may_look_entirely_different() -> None:
    with pytest.raises(MismatchError):
        decoder().decode(raw([PROTOCOL_VERSION + 1], b"and", b"more"))


@pytest.mark.parametrize("version", ["1", None, True, 1.0, math.nan, [1], {}])
def test_what_is_no_version_is_no_message(version: object) -> None:
    assert "starts with the protocol version" in refused(raw([version, "hello", 0, "0.1.0"]))


# Headers


def test_no_frames_at_all() -> None:
    assert "at least one frame" in refused([])


@pytest.mark.parametrize("header", [None, 1, "hello", {}, [], {"version": 1}])
def test_a_header_is_a_list(header: object) -> None:
    assert "a header is a list" in refused(raw(header))


@pytest.mark.parametrize("header", [[PROTOCOL_VERSION], [PROTOCOL_VERSION, "hello"], [PROTOCOL_VERSION, "hello", 0]])
def test_a_header_has_at_least_four_fields(header: list[object]) -> None:
    assert "at least a version" in refused(raw(header))


@pytest.mark.parametrize("request_id", [-1, True, 1.0, "1", None, [1]])
def test_a_request_id_is_a_whole_number(request_id: object) -> None:
    assert "request id" in refused(raw([PROTOCOL_VERSION, "hello", request_id, "0.1.0"]))


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "kind", ["", "HELLO", "__class__", "x" * 500, "\x1b[2J", None, 1, 1.5, math.nan, b"hello", ["hello"], {}, deep(500)]
)
def test_an_unknown_kind_is_refused_in_a_short_clean_line(kind: object) -> None:
    text = refused(raw([PROTOCOL_VERSION, kind, 0, "0.1.0"]))
    assert "none of ours" in text
    assert text.isprintable()
    assert len(text) < 150
    assert "no tensors" in refused(raw([PROTOCOL_VERSION, kind, 0, "0.1.0"], b"frame"))


def test_a_kind_as_deep_as_msgpack_goes_is_refused() -> None:
    header = bytes([0x94, PROTOCOL_VERSION]) + b"\x91" * 1000 + b"\xc0" + b"\x00\xa0"
    assert "of type list" in refused([memoryview(bytearray(header))])


@pytest.mark.parametrize(
    "header",
    [
        [PROTOCOL_VERSION, "hello", 0, 5],
        [PROTOCOL_VERSION, "hello", 0, None],
        [PROTOCOL_VERSION, "hello", 0, b"0.1.0"],
        [PROTOCOL_VERSION, "hello", 0, "x" * (MAX_LABEL_LENGTH + 1)],
        [PROTOCOL_VERSION, "refusal", 0, "x" * (MAX_LABEL_LENGTH + 1), "text"],
        [PROTOCOL_VERSION, "refusal", 0, "internal", "x" * (MAX_TEXT_LENGTH + 1)],
        [PROTOCOL_VERSION, "hello", 0, "0.1.0", 1],
        [PROTOCOL_VERSION, "refusal", 0, "malformed"],
        [PROTOCOL_VERSION, "refusal", 0, "malformed", None],
        [PROTOCOL_VERSION, "refusal", 0, 1, "text"],
        [PROTOCOL_VERSION, "welcome", 0, None],
        [PROTOCOL_VERSION, "welcome", 0, []],
        [PROTOCOL_VERSION, "execute", 0, b""],
        [PROTOCOL_VERSION, "execute", 0, b"", [], b"", 1],
        [PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}]],
        [PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}], b"\x90", 1],
    ],
    ids=str,
)
def test_each_kind_has_its_own_fields(header: list[object]) -> None:
    refused(raw(header))


def test_messages_without_tensors_have_one_frame() -> None:
    for encoded in (codec.encode_hello(Hello(1, "")), codec.encode_welcome(WELCOME)):
        assert "no tensors" in refused([*received(encoded), memoryview(bytearray(4))])


# Texts of a peer


def test_escape_sequences_of_a_peer_are_removed() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07 fine\r\nteegpu: forged line\u202e\x9b31m\u2028"
    message = decoder().decode(received(codec.encode_refusal(Refusal(1, "internal", evil))))
    assert isinstance(message, Refusal)
    assert message.text.isprintable()
    assert message.text == " [2J ]0;owned  fine  teegpu: forged line  31m "


@pytest.mark.parametrize("field", ["software", "instance", "model", "digest", "device", "dtype"])
def test_every_text_of_a_welcome_is_cleaned_and_bounded(field: str) -> None:
    message = decoder().decode(received(codec.encode_welcome(replace(WELCOME, **{field: "a\x1b[31mb"}))))
    assert getattr(message, field) == "a [31mb"
    refused(received(codec.encode_welcome(replace(WELCOME, **{field: "x" * (MAX_LABEL_LENGTH + 1)}))))
    refused(received(codec.encode_welcome(replace(WELCOME, **{field: None}))))


def test_a_hello_is_cleaned_too() -> None:
    assert decoder().decode(raw([PROTOCOL_VERSION, "hello", 0, "0.1\n.0", True])) == Hello(0, "0.1 .0", True)


def test_long_refusals_are_cut_when_they_are_sent() -> None:
    message = decoder().decode(received(codec.encode_refusal(Refusal(1, "internal", "x" * 10_000))))
    assert isinstance(message, Refusal)
    assert len(message.text) == MAX_TEXT_LENGTH


def test_a_refusal_of_an_unknown_sort_is_internal() -> None:
    assert decoder().decode(raw([PROTOCOL_VERSION, "refusal", 4, "teapot", "no"])) == Refusal(4, "internal", "no")


@pytest.mark.parametrize("field", ["dims", "limits"])
@pytest.mark.parametrize(
    "numbers",
    [None, [], {"a": -1}, {"a": True}, {"a": 1.0}, {"a": "1"}, {"a": 2**63}, {"": 1}, {"\x1b": 1}, {"a" * 65: 1},
     {str(key): key for key in range(65)}],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_numbers_of_a_welcome_are_checked(field: str, numbers: Any) -> None:
    refused(received(codec.encode_welcome(replace(WELCOME, **{field: numbers}))))


@pytest.mark.parametrize("field", ["threads", "memory_bytes"])
@pytest.mark.parametrize("number", [None, -1, True, 1.0, "1", 2**63, 2**64 - 1])
def test_counts_of_a_welcome_are_checked(field: str, number: Any) -> None:
    refused(received(codec.encode_welcome(replace(WELCOME, **{field: number}))))


@pytest.mark.parametrize("layers", [None, 3, [], [1], [0, 1, 2], [2, 1], [-1, 0], [0.0, 1], [True, 1], ["0", "1"], {}])
def test_the_layers_of_a_welcome_are_checked(layers: Any) -> None:
    assert "layer" in refused(received(codec.encode_welcome(replace(WELCOME, layers=layers))))


# Server times


@pytest.mark.parametrize(
    "times",
    [
        None,
        {},
        [0, 0, 0, 0],
        [0, 0, 0, 0, {}, 0],
        [0, 0, 0, 0, []],
        [0, 0, 0, "0", {}],
        [0, 0, True, 0, {}],
        [-0.001, 0, 0, 0, {}],
        [0, math.nan, 0, 0, {}],
        [0, math.inf, 0, 0, {}],
        [0, 2**64 - 1, 0, 0, {}],
        [1e9, 0, 0, 0, {}],
        [0, 0, 0, 0, {"LINEAR": 1}],
        [0, 0, 0, 0, {"LINEAR": [1]}],
        [0, 0, 0, 0, {"LINEAR": [-1, 0.0]}],
        [0, 0, 0, 0, {"LINEAR": [1.5, 0.0]}],
        [0, 0, 0, 0, {"LINEAR": [1, math.nan]}],
        [0, 0, 0, 0, {"LINEAR": [1, -1.0]}],
        [0, 0, 0, 0, {"RMSNORM": [1, 0.0]}],
        [0, 0, 0, 0, {"\x1b[31m": [1, 0.0]}],
        [0, 0, 0, 0, {"linear": [1, 0.0]}],
    ],
    ids=str,
)
def test_server_times_are_seconds_of_known_operations(times: object) -> None:
    refused(raw([PROTOCOL_VERSION, "result", 0, times, b"\x90"]))


def test_server_times_may_be_whole_numbers() -> None:
    message = decoder().decode(raw([PROTOCOL_VERSION, "result", 0, [0, 1, 2, 3, {"ADD": [1, 0]}], b"\x90"]))
    assert isinstance(message, Result)
    assert message.times == ServerTimes(0.0, 1.0, 2.0, 3.0, {"ADD": (1, 0.0)})
