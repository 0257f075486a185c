"""Tensor tables, calls and limits: what a decoder refuses before it touches a tensor's bytes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import msgpack
import pytest

from teegpu.errors import WireError
from teegpu.wire import codec, dtypes
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from teegpu.wire.messages import PROTOCOL_VERSION, Execute, Result
from teegpu.wire.program import Program, linear, single
from tests.teegpu.wire.samples import LIMITS, decoder, raw, refused, table


def with_table(packed: object, *frames: bytes) -> list[memoryview]:
    return raw([PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}], packed], *frames)


def test_a_table_and_its_frames() -> None:
    message = decoder().decode(with_table(table(["x", [2, 1], "fp32"], ["y", [3], "int32"]), bytes(8), bytes(12)))
    assert isinstance(message, Result)
    assert {name: tuple(tensor.shape) for name, tensor in message.tensors.items()} == {"x": (2, 1), "y": (3,)}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([["x", [2], "fp32"], ["y", [2], "fp32"]], id="a row without a frame"),
        pytest.param([], id="a frame without a row"),
        pytest.param([None], id="a row that is nothing"),
        pytest.param([["x", [2]]], id="a short row"),
        pytest.param([["x", [2], "fp32", 8]], id="a long row"),
        pytest.param([["", [2], "fp32"]], id="no name"),
        pytest.param([["x" * 65, [2], "fp32"]], id="a long name"),
        pytest.param([["\x1b[m", [2], "fp32"]], id="a control character"),
        pytest.param([[1, [2], "fp32"]], id="a name that is a number"),
        pytest.param([[["x"], [2], "fp32"]], id="a name that is a list"),
        pytest.param([["x", [2], "fp64"]], id="an unknown dtype"),
        pytest.param([["x", [2], "float32"]], id="torch's name of a dtype"),
        pytest.param([["x", [2], ["fp32"]]], id="a dtype that is a list"),
        pytest.param([["x", [2], None]], id="no dtype"),
        pytest.param([["x", [], "fp32"]], id="no dimensions"),
        pytest.param([["x", [1, 1, 1, 1, 2], "fp32"]], id="five dimensions"),
        pytest.param([["x", [0], "fp32"]], id="a dimension of zero"),
        pytest.param([["x", [-2], "fp32"]], id="a negative dimension"),
        pytest.param([["x", [-1, -2], "fp32"]], id="two negative dimensions"),
        pytest.param([["x", [True, 2], "fp32"]], id="a dimension that is a boolean"),
        pytest.param([["x", [2.0], "fp32"]], id="a dimension that is a float"),
        pytest.param([["x", ["2"], "fp32"]], id="a dimension that is a text"),
        pytest.param([["x", 2, "fp32"]], id="a shape that is a number"),
        pytest.param([["x", {"0": 2}, "fp32"]], id="a shape that is a map"),
        pytest.param([["x", [3], "fp32"]], id="more than the frame holds"),
        pytest.param([["x", [1], "fp32"]], id="less than the frame holds"),
        pytest.param([["x", [4097], "fp32"]], id="a dimension over the limit"),
        pytest.param([["x", [4096, 4096, 4096, 4096], "int8"]], id="a tensor over the limit"),
        pytest.param([["x", [2**64 - 1, 2**64 - 1], "fp32"]], id="huge dimensions"),
        pytest.param([["x", [2], "fp16"], ["y", [1], "fp16"]], id="two that share less than the frame holds"),
        pytest.param([["x", [2], "fp16"], ["y", [3], "fp16"]], id="two that share more than the frame holds"),
        pytest.param([["x", [2], "fp16"], ["y", [2], "bf16"]], id="two that share nothing"),
    ],
)
def test_a_table_that_is_not_its_frames_is_refused(rows: list[object]) -> None:
    refused(with_table(table(*rows), bytes(8)))


def test_a_register_is_in_the_table_once() -> None:
    rows = table(["x", [2], "fp32"], ["x", [2], "fp32"])
    assert "'x' is in the tensor table twice" in refused(with_table(rows, bytes(8), bytes(8)))


@pytest.mark.parametrize("packed", [None, [["x", [2], "fp32"]], "text", 1, b"", b"\xc1", msgpack.packb({})])
def test_a_table_is_a_packed_list(packed: object) -> None:
    refused(with_table(packed, bytes(8)))


def call(**changes: object) -> list[memoryview]:
    fields: dict[str, object] = {
        "program": single(["x"], linear("y", "x", "w")).packed,
        "replies": ["fp32"],
        "table": table(["x", [1, 2], "fp32"]),
    }
    fields |= changes
    return raw([PROTOCOL_VERSION, "execute", 0, *fields.values()], bytes(8))


def test_the_call_that_the_next_test_damages_is_good() -> None:
    assert isinstance(decoder().decode(call()), Execute)


@pytest.mark.parametrize(
    "changes",
    [
        {"program": "text"},
        {"program": None},
        {"program": b""},
        {"program": msgpack.packb([["x"], [], ["y"]])},
        {"replies": []},
        {"replies": ["fp32", "fp32"]},
        {"replies": {"y": "fp32"}},
        {"replies": ["int32"]},
        {"replies": ["fp64"]},
        {"replies": [None]},
        {"replies": [["fp32"]]},
        {"replies": "fp32"},
        {"table": table(["other", [1, 2], "fp32"])},
    ],
    ids=str,
)
def test_a_call_that_does_not_fit_together_is_refused(changes: dict[str, object]) -> None:
    refused(call(**changes))


# Limits


def test_the_size_of_a_header_is_limited() -> None:
    assert "over the limit of 262144" in refused([memoryview(bytearray(MAX_HEADER_BYTES + 1))])


def test_the_size_of_a_message_is_limited() -> None:
    frames = with_table(table(["x", [1024], "fp32"]), bytes(4096))
    size = sum(frame.nbytes for frame in frames)
    assert isinstance(decoder(replace(LIMITS, message_bytes=size)).decode(frames), Result)
    assert "limits.message_mib" in refused(frames, replace(LIMITS, message_bytes=size - 1))


def test_the_number_of_tensors_is_limited() -> None:
    rows = [[f"x{index}", [1], "fp32"] for index in range(5)]
    frames = with_table(table(*rows), *[bytes(4)] * 5)
    assert isinstance(decoder(replace(LIMITS, tensors=5)).decode(frames), Result)
    assert "at most 4 tensors (limits.tensors)" in refused(frames)


def test_a_dimension_is_limited() -> None:
    frames = with_table(table(["x", [100], "fp32"]), bytes(400))
    assert isinstance(decoder(replace(LIMITS, dimension=100)).decode(frames), Result)
    assert "limits.dimension" in refused(frames, replace(LIMITS, dimension=99))


def test_the_steps_of_a_program_are_limited() -> None:
    two = Program(("x",), (linear("h", "x", "w"), linear("y", "h", "w")), ("y",))
    assert isinstance(decoder(replace(LIMITS, program_steps=2)).decode(call(program=two.packed)), Execute)
    assert "limits.program_steps" in refused(call(program=two.packed), replace(LIMITS, program_steps=1))


def test_a_huge_declared_tensor_costs_no_memory() -> None:
    limits = Limits()
    decoding = codec.Decoder(limits)
    tracemalloc.start()
    try:
        for name in dtypes.NAMES:
            with pytest.raises(WireError):
                decoding.decode(with_table(table(["x", [2**14, 2**14], name]), bytes(64)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
