from __future__ import annotations

import pytest
import torch

from teegpu.tee.attention import Masks, attend, attend_side_by_side, first_visible
from teegpu.tee.kv_cache import Neighbours, Slab
from tests.teegpu.tee.test_kv_cache import SPEC


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float, first: int
) -> torch.Tensor:
    """Attention one query and one head at a time. ``first`` is the position of the first key."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[0]
    stop = first + k.shape[1]
    out = torch.empty(tokens, heads, v.shape[2])
    for index in range(tokens):
        at = stop - tokens + index
        seen = [p - first for p in range(first, at + 1) if window is None or p > at - window]
        for head in range(heads):
            scores = (k[head // group][seen] @ q[index, head]) * scale
            out[index, head] = torch.softmax(scores, 0) @ v[head // group][seen]
    return out.reshape(tokens, -1)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (1, 9), (9, 9), (3, 9), (5, 6)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_what_its_definition_says(tokens: int, positions: int, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(tokens, 4, 8), torch.randn(kv_heads, positions, 8), torch.randn(kv_heads, positions, 8)
    first = first_visible(positions - tokens, window)
    got = attend(q, k[:, first:], v[:, first:], Masks(), window, 0.3)
    torch.testing.assert_close(got, by_hand(q, k[:, first:], v[:, first:], window, 0.3, first), atol=1e-5, rtol=1e-5)


def test_a_mask_is_made_once_for_a_shape_and_the_store_is_bounded() -> None:
    masks = Masks()
    assert masks.get(3, 7, None) is masks.get(3, 7, None)
    kept = masks.get(2, 2, None)
    for keys in range(10, 200):
        masks.get(1, keys, 5)
        masks.get(2, 2, None)
    assert masks.get(2, 2, None) is kept
    assert len(masks._masks) <= 64


def test_the_first_visible_position() -> None:
    assert first_visible(10, None) == 0
    assert first_visible(10, 4) == 7
    assert first_visible(2, 4) == 0


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_side_by_side_each_gets_what_it_gets_alone(kv_heads: int, window: int | None) -> None:
    """Also beside one whose values are not numbers, and with memory behind its own that is of nobody."""
    torch.manual_seed(0)
    starts, longest = [8, 2, 0, 6], 9
    q, k, v = torch.randn(4, 4, 8), torch.randn(4, kv_heads, 12, 8), torch.randn(4, kv_heads, 12, 8)
    k[3], v[3] = float("nan"), float("inf")
    near = Neighbours.of(Slab(SPEC, 4, 12), 0, starts)
    assert near.longest == longest
    got = attend_side_by_side(q, k[:, :, :longest], v[:, :, :longest], near.mask, window, 0.3)
    for row, start in enumerate(starts[:3]):
        mine = (tensor[row, :, : start + 1] for tensor in (k, v))
        expected = by_hand(q[row : row + 1], *mine, window, 0.3, 0)
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-5, rtol=1e-5)
