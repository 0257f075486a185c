"""Causal attention over grouped key/value heads, in the TEE, and the masks that it needs."""

from __future__ import annotations

from collections import OrderedDict

import torch

from teegpu.tee.nonlinear import capped, softmax

_REMEMBER = 64


class Masks:
    """Additive masks (queries, keys) with 0 and -inf, kept for the shapes that come again in every layer."""

    def __init__(self) -> None:
        self._masks: OrderedDict[tuple[int, int, int | None], torch.Tensor] = OrderedDict()

    def get(self, queries: int, keys: int, window: int | None) -> torch.Tensor:
        """The mask of the last ``queries`` of ``keys`` positions: each sees itself, those before it, and with a
        ``window`` only the last ``window`` of them, itself included."""
        key = (queries, keys, window)
        mask = self._masks.get(key)
        if mask is None:
            mask = self._make(queries, keys, window)
            self._masks[key] = mask
            if len(self._masks) > _REMEMBER:
                self._masks.popitem(last=False)
        else:
            self._masks.move_to_end(key)
        return mask

    @staticmethod
    def _make(queries: int, keys: int, window: int | None) -> torch.Tensor:
        at = torch.arange(keys - queries, keys)[:, None]
        seen = torch.arange(keys)[None, :]
        hidden = seen > at
        if window is not None:
            hidden |= seen <= at - window
        return torch.zeros(queries, keys).masked_fill_(hidden, float("-inf"))


def first_visible(start: int, window: int | None) -> int:
    """The first position that any query from position ``start`` on can see."""
    return 0 if window is None else max(0, start - window + 1)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    masks: Masks,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of the last positions over all.

    ``queries`` (tokens, heads, d); ``keys`` and ``values`` (kv_heads, positions, d), the last ``tokens`` positions
    being the queries' own. Returns (tokens, heads · d). The heads of a group share their keys; nothing is repeated.
    ``cap``: scores are ``nonlinear.capped`` by it.
    """
    tokens, heads, dim = queries.shape
    kv_heads, positions, _ = keys.shape
    all_visible = window is None or positions <= window
    if cap is not None:  # torch's attention has no place for it
        groups = queries.view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
        scores = capped(torch.matmul(groups * scale, keys[:, None].transpose(-1, -2)), cap)
        hidden = tokens > 1 or not all_visible
        weights = softmax(scores, masks.get(tokens, positions, window) if hidden else None)
        return torch.matmul(weights, values[:, None]).permute(2, 0, 1, 3).reshape(tokens, heads * dim)
    if tokens == 1 and all_visible:
        # A single query needs no mask, so the heads of a group can be rows of one product: keys are read once.
        rows = queries.reshape(1, kv_heads, heads // kv_heads, dim)
        out = torch.nn.functional.scaled_dot_product_attention(rows, keys[None], values[None], scale=scale)
        return out.reshape(1, heads * dim)
    causal = tokens == positions and all_visible
    out = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=None if causal else masks.get(tokens, positions, window),
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * dim)


def attend_side_by_side(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of one new position of each of several sequences over all of its own.

    ``queries`` (sequences, heads, d); ``keys`` and ``values`` (sequences, kv_heads, positions, d), as long as those of
    the longest; ``mask`` (sequences, 1, 1, positions) of 0 and -inf. Returns (sequences, heads · d). ``cap`` as in
    ``attend``.
    """
    count, heads, dim = queries.shape
    kv_heads, positions = keys.shape[1:3]
    if window is not None and positions > window:
        newest = (mask == 0).sum(-1, keepdim=True)
        mask = mask.masked_fill(torch.arange(positions) < newest - window, float("-inf"))
    rows = (queries * scale).view(count, kv_heads, heads // kv_heads, dim)
    scores = torch.matmul(rows, keys.transpose(-1, -2))
    weights = torch.softmax((scores if cap is None else capped(scores, cap)).add_(mask), dim=-1)
    return torch.matmul(weights, values).view(count, heads * dim)
