"""Tensors to bytes and back: sizes, error bounds, shared memory, and what can't be represented."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.errors import WireError
from teegpu.wire import dtypes

SHAPES = [(1, 1), (1, 64), (3, 65), (7, 63), (2, 576), (5, 100), (1,), (130,), (4, 3, 70), (2, 3, 4, 5)]
INT8_MAX = 127 * 65504.0


def values(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator) * scale


def received(frame: memoryview) -> memoryview:
    """The frame as a transport hands it over: other memory, writable."""
    return memoryview(bytearray(frame))


def trip(tensor: torch.Tensor, name: str) -> torch.Tensor:
    frame = dtypes.encode(tensor, name)
    assert frame.nbytes == dtypes.nbytes(tuple(tensor.shape), name)
    return dtypes.decode(received(frame), tuple(tensor.shape), name)


# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_floats_come_back_as_torch_rounds_them(shape: tuple[int, ...], name: str) -> None:
    tensor = values(shape, 30.0)
    back = trip(tensor, name)
    assert back.dtype == dtypes.PLAIN[name]
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor.to(dtypes.PLAIN[name]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e5])
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...], scale: float) -> None:
    tensor = values(shape, scale)
    back = trip(tensor, "int8")
    assert back.dtype == torch.float32
    assert back.shape == tensor.shape
    n = shape[-1]
    rows, wrong = tensor.reshape(-1, n), (back - tensor).reshape(-1, n).abs()
    for start in range(0, n, dtypes.GROUP):
        group = slice(start, start + dtypes.GROUP)
        largest = rows[:, group].abs().amax(-1)
        # Half a step of 1/127 of the group's largest value, and a little for the step's own rounding to fp16.
        bound = largest / 127 * 0.57 + 64 * 2.0**-24
        assert (wrong[:, group].amax(-1) <= bound).all()


def test_int8_groups_do_not_disturb_each_other() -> None:
    tensor = torch.ones(2, 128)
    tensor[0, 0] = 1000.0
    back = trip(tensor, "int8")
    assert back[0, 0] == pytest.approx(1000.0, rel=1e-3)
    assert torch.allclose(back[0, 64:], tensor[0, 64:], rtol=1e-3)
    assert torch.allclose(back[1], tensor[1], rtol=1e-3)


@pytest.mark.parametrize("shape", [(7, 100), (3, 5, 64), (9, 1)], ids=str)
@pytest.mark.parametrize("block", [1, 130, 200, 10**6])
def test_int8_does_not_depend_on_how_many_rows_are_done_at_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block: int
) -> None:
    tensor = values(shape, 5.0)
    expected = [trip(row, "int8") for row in tensor.reshape(-1, shape[-1])]
    monkeypatch.setattr(dtypes, "_BLOCK_VALUES", block)
    assert torch.equal(trip(tensor, "int8").reshape(-1, shape[-1]), torch.stack(expected))


def test_int8_is_laid_out_as_documented() -> None:
    tensor = torch.zeros(2, 65)
    tensor[0, :64] = 127.0
    tensor[0, 64] = -63.5
    tensor[1, 3] = 254.0
    frame = bytes(dtypes.encode(tensor, "int8"))
    assert len(frame) == 2 * 65 + 2 * 2 * 2
    assert frame[:65] == bytes([127] * 64) + struct.pack("b", -127)
    assert frame[65 + 3] == 127
    smallest = 2.0**-24
    assert struct.unpack("<4e", frame[130:]) == (1.0, 0.5, 2.0, smallest)


def test_zeros_stay_zero() -> None:
    for name in dtypes.FLOATS:
        assert not trip(torch.zeros(3, 100), name).any()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", dtypes.FLOATS)
def test_any_float_dtype_can_be_sent(source: torch.dtype, name: str) -> None:
    tensor = values((3, 70)).to(source)
    assert torch.equal(trip(tensor, name), trip(tensor.to(torch.float32), name))


def test_token_ids_come_back_exactly() -> None:
    ids = torch.tensor([0, 1, 49151, 2**31 - 1], dtype=torch.int64)
    back = trip(ids, "int32")
    assert back.dtype == torch.int32
    assert back.tolist() == ids.tolist()


@pytest.mark.parametrize("name", dtypes.TENSORS)
def test_memory_with_holes_is_sent_in_order(name: str) -> None:
    tensor = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    if name == "int32":
        tensor = tensor.to(torch.int32)
    for part in (tensor[:, 2:7], tensor.t(), tensor[::2], tensor.reshape(2, 3, 10).transpose(0, 1)):
        assert not part.is_contiguous()
        assert torch.equal(trip(part, name), trip(part.contiguous(), name))


def test_the_gradient_of_a_parameter_does_not_matter() -> None:
    tensor = values((2, 64)).requires_grad_()
    for name in dtypes.FLOATS:
        assert not trip(tensor, name).requires_grad


# What a wire dtype can't hold


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_floats_carry_infinities_and_nan(name: str) -> None:
    back = trip(torch.tensor([[math.inf, -math.inf, math.nan, 1.0]]), name).to(torch.float32)
    assert back[0, :2].tolist() == [math.inf, -math.inf]
    assert back[0, 2].isnan()


def test_fp16_overflows_to_infinity_and_not_to_its_largest_value() -> None:
    assert trip(torch.tensor([[70000.0, -70000.0]]), "fp16").tolist() == [[math.inf, -math.inf]]


def test_int8_reaches_as_far_as_it_says() -> None:
    tensor = torch.full((1, 3), INT8_MAX)
    assert trip(tensor, "int8").tolist() == tensor.tolist()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1.01 * INT8_MAX, -1e30])
@pytest.mark.parametrize("where", [(0, 0), (1, 64), (2, 99)])
def test_int8_refuses_what_it_can_not_hold_where_it_is_received(bad: float, where: tuple[int, int]) -> None:
    tensor = values((3, 100))
    tensor[where] = bad
    frame = dtypes.encode(tensor, "int8")
    with pytest.raises(WireError, match="scale that is not finite"):
        dtypes.decode(received(frame), (3, 100), "int8")


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_int8_scales_that_are_not_finite_are_refused(scale: float) -> None:
    frame = bytearray(dtypes.encode(values((3, 65)), "int8"))
    for index in range(6):
        damaged = bytearray(frame)
        struct.pack_into("<e", damaged, 3 * 65 + 2 * index, scale)
        with pytest.raises(WireError, match="not finite"):
            dtypes.decode(memoryview(damaged), (3, 65), "int8")


def test_infinite_scales_of_both_signs_do_not_cancel() -> None:
    damaged = bytearray(dtypes.encode(values((2, 64)), "int8"))
    struct.pack_into("<2e", damaged, 128, math.inf, -math.inf)
    with pytest.raises(WireError, match="not finite"):
        dtypes.decode(memoryview(damaged), (2, 64), "int8")


def test_the_largest_scales_are_finite_together() -> None:
    frame = struct.pack("b", 127) * 1000 + struct.pack("<e", 65504.0) * 1000
    assert dtypes.decode(memoryview(bytearray(frame)), (1000, 1), "int8").unique().tolist() == [INT8_MAX]


# Lengths


@pytest.mark.parametrize("name", dtypes.TENSORS)
@pytest.mark.parametrize("change", [-1, 1, 64])
def test_a_frame_of_another_length_is_refused(name: str, change: int) -> None:
    frame = memoryview(bytearray(dtypes.nbytes((3, 65), name) + change))
    with pytest.raises(WireError, match=r"\(3, 65\)"):
        dtypes.decode(frame, (3, 65), name)


def test_a_shape_beyond_all_memory_is_refused_by_its_length() -> None:
    for name in dtypes.TENSORS:
        with pytest.raises(WireError):
            dtypes.decode(memoryview(bytearray(16)), (2**24, 2**24, 2**24), name)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(dtypes.TENSORS), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_any_bytes_of_the_right_length_are_a_tensor_or_a_wire_error(
    name: str, shape: list[int], data: st.DataObject
) -> None:
    count = dtypes.nbytes(tuple(shape), name)
    frame = received(memoryview(data.draw(st.binary(min_size=count, max_size=count))))
    try:
        tensor = dtypes.decode(frame, tuple(shape), name)
    except WireError:
        assert name == "int8"
        return
    assert list(tensor.shape) == shape


# Memory


@pytest.mark.parametrize(("name", "dtype"), list(dtypes.PLAIN.items()))
def test_what_needs_no_conversion_is_sent_from_its_own_memory(name: str, dtype: torch.dtype) -> None:
    tensor = torch.ones((4, 10), dtype=dtype)
    assert dtypes.narrow(tensor, name) is tensor
    frame = dtypes.encode(tensor, name)
    tensor[0, 0] = 0
    assert bytes(frame[: dtype.itemsize]) == bytes(dtype.itemsize)


@pytest.mark.parametrize("name", dtypes.PLAIN)
def test_what_is_received_is_not_copied(name: str) -> None:
    frame = memoryview(bytearray(dtypes.nbytes((4, 10), name)))
    tensor = dtypes.decode(frame, (4, 10), name)
    frame[:4] = bytes([1, 2, 3, 4])
    assert tensor.view(-1).view(torch.uint8)[:4].tolist() == [1, 2, 3, 4]


def test_a_frame_outlives_the_tensor_it_came_from() -> None:
    frame = dtypes.encode(torch.full((100, 100), 7.0), "fp32")
    torch.zeros(100, 100)
    assert dtypes.decode(received(frame), (100, 100), "fp32").unique().tolist() == [7.0]


@pytest.mark.parametrize("name", dtypes.TENSORS)
def test_a_read_only_frame_gives_a_tensor_that_may_be_written(name: str) -> None:
    tensor = torch.ones((2, 64), dtype=torch.int32 if name == "int32" else torch.float32)
    sent = bytes(dtypes.encode(tensor, name))
    back = dtypes.decode(memoryview(sent), (2, 64), name)  # warnings are errors here
    assert torch.allclose(back.to(tensor.dtype), tensor, rtol=1e-3)
    back.zero_()
    assert sent == bytes(dtypes.encode(tensor, name))


@pytest.mark.parametrize("name", dtypes.TENSORS)
def test_a_frame_may_start_anywhere_and_be_of_any_format(name: str) -> None:
    tensor = torch.arange(192).reshape(3, 64)
    tensor = tensor.to(torch.int32) if name == "int32" else tensor.to(torch.float32)
    sent = bytes(dtypes.encode(tensor, name))
    expected = dtypes.decode(memoryview(bytearray(sent)), (3, 64), name)
    shifted = memoryview(bytearray(b"!" + sent))[1:]
    assert torch.equal(dtypes.decode(shifted, (3, 64), name), expected)
    wide = memoryview(bytearray(sent)).cast("H")
    assert torch.equal(dtypes.decode(wide, (3, 64), name), expected)


@pytest.mark.parametrize("name", dtypes.TENSORS)
def test_frames_are_flat_bytes(name: str) -> None:
    tensor = torch.ones((2, 3, 64), dtype=torch.int32 if name == "int32" else torch.float32)
    frame = dtypes.encode(tensor, name)
    assert (frame.ndim, frame.itemsize, frame.format) == (1, 1, "B")
    assert dtypes.itemsize(name) * tensor.numel() <= frame.nbytes


def test_no_value_is_beyond_its_scale_however_small_that_is() -> None:
    largest = torch.logspace(-9, 6.8, 4096, dtype=torch.float64).to(torch.float32)
    tensor = torch.stack([largest, -largest / 3] * 32, dim=-1)
    error = (trip(tensor, "int8") - tensor).abs().amax(-1)
    assert (error <= largest / 127 * 0.6 + 2.0**-24).all()
