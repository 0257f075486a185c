"""The table of a message's tensors, and the frames that it stands for."""

from __future__ import annotations

import msgpack
import pytest
import torch

from teegpu.wire import codec
from teegpu.wire.layout import Layout, Row, layout_of
from teegpu.wire.limits import REMEMBERED_TENSORS
from teegpu.wire.messages import PROTOCOL_VERSION, Result
from tests.teegpu.wire.samples import LIMITS, raw, refused, result_of, table


def test_every_row_has_a_frame_of_its_own_with_a_kind() -> None:
    made = Layout((Row("z", (1, 4), "fp16"), Row("gate_up", (1, 8), "int8"), Row("x", (1, 4), "fp32")))
    assert made.registers == ("z", "gate_up", "x")
    assert made.kinds == (("header", 1), ("z/fp16", 2), ("gate_up/int8", 1), ("x/fp32", 4))
    assert msgpack.unpackb(made.packed) == [["z", [1, 4], "fp16"], ["gate_up", [1, 8], "int8"], ["x", [1, 4], "fp32"]]


def test_a_layout_that_comes_again_is_made_once_unless_it_is_long() -> None:
    rows = tuple(Row(f"r{index}", (1, 2), "fp16") for index in range(REMEMBERED_TENSORS))
    assert layout_of(rows) is layout_of(tuple(rows))
    longer = (*rows, Row("one more", (1, 2), "fp16"))
    assert layout_of(longer) is not layout_of(longer)


def test_tensors_of_different_wire_dtypes_come_back() -> None:
    tensors = {"z": torch.randn(2, 64), "gate_up": torch.randn(2, 65), "n": torch.randn(2, 2)}
    encodings = {"z": "fp16", "gate_up": "bf16", "n": "fp32"}
    encoded = result_of(tensors, encodings)
    assert len(encoded.frames) == len(encoded.kinds) == 4
    message = codec.Decoder(LIMITS).decode([memoryview(bytearray(frame)) for frame in encoded.frames])
    assert isinstance(message, Result)
    assert list(message.tensors) == list(tensors)
    assert message.encodings == encodings
    for name, tensor in message.tensors.items():
        torch.testing.assert_close(tensor.float(), tensors[name], atol=1e-2, rtol=1e-2)


TWO = (["x", [1, 2], "fp16"], ["y", [1, 3], "fp16"])


@pytest.mark.parametrize(
    "sizes",
    [(), (4,), (10,), (4, 5), (4, 7), (6, 4), (10, 0), (0, 10), (4, 6, 0)],
    ids=[
        *("no frame", "one row's", "both in one", "a byte less", "a byte more", "in another order"),
        *("all in the first", "all in the second", "one too many"),
    ],
)
def test_a_frame_holds_exactly_its_row(sizes: tuple[int, ...]) -> None:
    def message(*frames: bytes) -> list[memoryview]:
        return raw([PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}], table(*TWO)], *frames)

    assert isinstance(codec.Decoder(LIMITS).decode(message(bytes(4), bytes(6))), Result)
    refused(message(*(bytes(size) for size in sizes)))
