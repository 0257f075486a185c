"""Which tensors share a frame, and that each comes back as it would alone."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from teegpu.errors import WireError
from teegpu.wire import codec, dtypes
from teegpu.wire.layout import Layout, Row
from teegpu.wire.messages import PROTOCOL_VERSION, Result
from tests.teegpu.wire.samples import LIMITS, raw, refused, result_of, table

SHAPES = {
    "one token": [(1, 128), (1, 64), (1, 70)],
    "one token, in groups of no length": [(1, 70), (1, 64), (1, 5)],
    "several tokens": [(5, 128), (5, 64), (5, 70)],
    "of three dimensions": [(2, 3, 64), (1, 7, 65)],
    "of one dimension": [(3,), (64,)],
    "a single one": [(4, 65)],
}


def layout(*rows: tuple[str, tuple[int, ...], str]) -> Layout:
    return Layout(tuple(Row(*row) for row in rows))


def registers(made: Layout) -> list[tuple[str, ...]]:
    return [frame.registers for frame in made.frames]


def test_neighbours_of_one_narrow_dtype_share_a_frame() -> None:
    made = layout(("z", (1, 4), "fp16"), ("gate", (1, 8), "int8"), ("up", (1, 8), "int8"), ("x", (1, 4), "fp16"))
    assert registers(made) == [("z",), ("gate", "up"), ("x",)]
    assert made.kinds == (("header", 1), ("z/fp16", 2), ("gate+up/int8", 1), ("x/fp16", 2))


@pytest.mark.parametrize("encoding", ["fp32", "seed"])
def test_what_is_sent_as_it_lies_has_a_frame_of_its_own(encoding: str) -> None:
    made = layout(("q", (1, 4), encoding), ("k", (1, 4), encoding))
    assert registers(made) == [("q",), ("k",)]


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "int8", "int32"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_shared_frame_gives_what_frames_of_their_own_would(shapes: list[tuple[int, ...]], encoding: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) * 100 for shape in shapes]
    (frame,) = layout(*((f"t{i}", shape, encoding) for i, shape in enumerate(shapes))).frames
    data = dtypes.frame_of(frame.narrow(tensors))
    assert data.nbytes == sum(dtypes.nbytes(shape, encoding) for shape in shapes)
    values = frame.decode(memoryview(bytearray(data)))
    for tensor, part in zip(tensors, frame.split(values), strict=True):
        alone = dtypes.decode(memoryview(bytearray(dtypes.encode(tensor, encoding))), tuple(tensor.shape), encoding)
        assert torch.equal(part, alone)
        assert part.is_contiguous()


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "int8"])
def test_columns_of_one_product_need_not_be_copied_first(encoding: str) -> None:
    product = torch.randn(3, 192)
    parts = product.split((64, 128), dim=-1)
    (frame,) = layout(("gate", (3, 64), encoding), ("up", (3, 128), encoding)).frames
    whole, copies = frame.narrow(parts), frame.narrow([part.contiguous() for part in parts])
    assert bytes(dtypes.frame_of(whole)) == bytes(dtypes.frame_of(copies))


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "int8"])
def test_a_seamless_frame_takes_neighbours_as_one(encoding: str) -> None:
    product = torch.randn(1, 192)
    (frame,) = layout(("gate", (1, 64), encoding), ("up", (1, 128), encoding)).frames
    assert frame.seamless
    apart = frame.narrow(product.split((64, 128), dim=-1))
    assert bytes(dtypes.frame_of(frame.narrow([product]))) == bytes(dtypes.frame_of(apart))


def test_where_a_group_of_int8_would_reach_over_it_there_is_a_seam() -> None:
    rows = [("gate", (1, 65), "int8"), ("up", (1, 63), "int8")]
    assert not layout(*rows).frames[0].seamless
    assert layout(*rows[::-1], ("x", (1, 64), "int8")).frames[0].seamless is False
    assert layout(("a", (1, 64), "int8"), ("b", (1, 3), "int8")).frames[0].seamless


def test_one_half_becomes_the_other_as_it_would_alone() -> None:
    tensors = [torch.randn(40, 64).to(torch.bfloat16), torch.randn(40, 65).to(torch.bfloat16)]
    (frame,) = layout(("a", (40, 64), "fp16"), ("b", (40, 65), "fp16")).frames
    alone = [dtypes.encode(tensor, "fp16") for tensor in tensors]
    assert bytes(dtypes.frame_of(frame.narrow(tensors))) == b"".join(map(bytes, alone))


def test_a_message_with_shared_frames_comes_back() -> None:
    tensors = {"z": torch.randn(2, 64), "gate": torch.randn(2, 65), "up": torch.randn(2, 3), "n": torch.randn(2, 2)}
    encodings = {"z": "fp16", "gate": "fp16", "up": "fp16", "n": "fp32"}
    encoded = result_of(tensors, encodings)
    assert len(encoded.frames) == len(encoded.kinds) == 3
    message = codec.Decoder(LIMITS).decode([memoryview(bytearray(frame)) for frame in encoded.frames])
    assert isinstance(message, Result)
    assert list(message.tensors) == list(tensors)
    assert message.encodings == encodings
    for name, tensor in message.tensors.items():
        torch.testing.assert_close(tensor.float(), tensors[name], atol=1e-3, rtol=1e-3)


SHARED = (["x", [1, 2], "fp16"], ["y", [1, 3], "fp16"])


@pytest.mark.parametrize(
    "sizes",
    [(), (4, 6), (9,), (11,), (10, 0), (0, 10), (4,)],
    ids=["no frame", "a frame each", "a byte less", "a byte more", "one too many", "one too many, before", "one row's"],
)
def test_a_shared_frame_holds_exactly_its_rows(sizes: tuple[int, ...]) -> None:
    def message(*frames: bytes) -> list[memoryview]:
        return raw([PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}], table(*SHARED)], *frames)

    assert isinstance(codec.Decoder(LIMITS).decode(message(bytes(10))), Result)
    refused(message(*(bytes(size) for size in sizes)))


def test_a_bad_scale_of_any_tensor_of_a_shared_frame_is_refused() -> None:
    shapes = ((2, 64), (2, 65))
    data = bytearray(dtypes.frame_of(dtypes.narrow_all([torch.ones(shape) for shape in shapes], "int8")))
    values = sum(rows * n for rows, n in shapes)
    scales = (data.__len__() - values) // 2
    assert scales == 2 * 1 + 2 * 2
    for place in range(scales):
        damaged = bytearray(data)
        damaged[values + 2 * place : values + 2 * place + 2] = b"\x00\x7c"  # infinity
        with pytest.raises(WireError, match="not finite"):
            dtypes.decode_all(memoryview(damaged), shapes, "int8")


def test_every_byte_of_a_shared_frame_belongs_to_one_tensor() -> None:
    (frame,) = layout(("a", (2, 3), "fp16"), ("b", (2, 5), "fp16")).frames
    values = frame.decode(memoryview(bytearray(32)))
    for number, part in enumerate(frame.split(values)):
        part.add_(number + 1)
    assert sorted(chain(values.tolist())) == [1.0] * 6 + [2.0] * 10
