"""Attacks that compare messages: the same prompt twice, prompts that differ in a token, masks that were used twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from teegpu.audit.findings import Finding
from teegpu.audit.known import AGAIN, CHANGED, PROMPT, Truth
from teegpu.audit.reading import View

_ALIKE = 0.99
"""Rows whose cosine is above this are taken for equal: floats may differ in their last bits from run to run."""

_SMALL_BITS = 24
"""Fixed-point values have at most 22 bits and a sign. A difference of two uniform values that is as small as one of two
of those has the probability 2**(_SMALL_BITS - 31)."""
_COLUMNS = 64
_NEIGHBOURS = 8
"""Rows that share a mask are near each other when all are sorted by a column; these many neighbours are looked at."""
_SORTS = 4
_SMALL_SHARE = 0.5
"""Of the columns of two rows, so many small differences are taken for a shared mask."""


def same_prompt(view: View, truth: Truth, layer: int) -> Finding:
    """Whether the server can see that a prompt came again."""
    tokens = len(truth.prompt)
    alike = _alike(view, AGAIN, layer, tokens)
    attack, target = "the same prompt again", f"layer {layer}, input"
    if alike is None:
        return _not_sent(attack, target, view)
    count = int(alike.sum())
    return Finding(
        attack,
        target,
        view.label,
        _probability_alike(count, tokens, _columns(view, layer)),
        f"{count:,} of {tokens:,} rows are alike",
        control=view.control,
    )


def changed_token(view: View, truth: Truth, layer: int) -> Finding:
    """Whether the server can see in which token two prompts differ."""
    tokens = len(truth.prompt)
    alike = _alike(view, CHANGED, layer, tokens)
    attack, target = "one token changed", f"layer {layer}, input"
    if alike is None:
        return _not_sent(attack, target, view)
    count = int(alike.sum())
    first = int(alike.to(torch.int8).argmin()) if count < tokens else tokens
    where = "its place is seen" if count and first == truth.changed else "its place is not seen"
    return Finding(
        attack,
        target,
        view.label,
        _probability_alike(count, tokens, _columns(view, layer)),
        f"{count:,} of {tokens:,} rows are alike; {where}",
        control=view.control,
    )


def equal_rows(view: View, scenes: Iterable[str]) -> Finding:
    """Rows that are the same bytes in two places. Text repeats itself; masked rows must not."""
    seen: Counter[bytes] = Counter()
    narrowest = 2**31
    for rows in _all_rows(view, scenes):
        # Each row as its own bytes: rows of different length are never equal.
        plain = rows.contiguous().view(torch.uint8)
        narrowest = min(narrowest, plain.shape[1] * 8)
        seen.update(row.tobytes() for row in plain.numpy())
    total = sum(seen.values())
    equal = total - len(seen)
    if not total:
        return _not_sent("equal rows", "all requests", view)
    by_chance = math.exp(min(0.0, 2.0 * math.log(total) - min(narrowest, 1000) * math.log(2.0)))
    return Finding(
        "equal rows",
        "all requests",
        view.label,
        by_chance if equal else 1.0,
        f"{equal:,} of {total:,} rows came before",
        control=view.control,
    )


def masks_used_twice(view: View, scenes: Iterable[str]) -> Finding:
    """Rows whose difference modulo 2**32 is small in most columns: then they share a mask, and the difference is that
    of the plain values."""
    attack, target = "masks used twice", "differences of all rows"
    parts = [rows[:, :_COLUMNS] for rows in _all_rows(view, scenes) if rows.dtype == torch.int32]
    width = min((part.shape[1] for part in parts), default=0)
    if not width:
        return Finding(attack, target, view.label, None, "values are not masked", control=view.control)
    rows = torch.cat([part[:, :width] for part in parts])
    pairs = _pairs_with_small_differences(rows)
    tested = rows.shape[0] * _NEIGHBOURS * min(_SORTS, width)
    return Finding(
        attack,
        target,
        view.label,
        min(1.0, tested * _tail(width)) if pairs else 1.0,
        f"{pairs:,} pairs among {rows.shape[0]:,} rows",
        control=view.control,
    )


def _pairs_with_small_differences(rows: torch.Tensor) -> int:
    """Pairs of ``rows`` (n, columns) int32 that differ little in most columns."""
    found: set[tuple[int, int]] = set()
    needed = math.ceil(rows.shape[1] * _SMALL_SHARE)
    for column in range(min(_SORTS, rows.shape[1])):
        order = rows[:, column].argsort()
        ordered = rows[order]
        for distance in range(1, min(_NEIGHBOURS, rows.shape[0] - 1) + 1):
            # In int32, differences are taken modulo 2**32; the smallest of all has no absolute value, and is not small.
            size = (ordered[distance:] - ordered[:-distance]).abs()
            small = ((size >= 0) & (size < 2**_SMALL_BITS)).sum(-1)
            for place in (small >= needed).nonzero().flatten().tolist():
                one, other = int(order[place]), int(order[place + distance])
                found.add((min(one, other), max(one, other)))
    return len(found)


def _tail(columns: int) -> float:
    """The probability that two unrelated rows differ little in ``_SMALL_SHARE`` of their columns: a union bound."""
    needed = math.ceil(columns * _SMALL_SHARE)
    return math.comb(columns, needed) * 2.0 ** (needed * (_SMALL_BITS - 31))


def _all_rows(view: View, scenes: Iterable[str]) -> Iterator[torch.Tensor]:
    """The operands of all works, those alone that are (rows, columns) of values."""
    for scene in scenes:
        for work in view.works(scene):
            for name, operand in work.operands.items():
                if operand.dim() == 2 and name not in work.program.id_registers:
                    yield operand


def _alike(view: View, scene: str, layer: int, tokens: int) -> torch.Tensor | None:
    """For each of the first ``tokens`` rows whether it is the same in the scene ``prompt`` and in ``scene``."""
    first, second = view.entering(PROMPT, layer), view.entering(scene, layer)
    if first is None or second is None or min(first.rows.shape[0], second.rows.shape[0]) < tokens:
        return None
    one, other = first.rows[:tokens].to(torch.float32), second.rows[:tokens].to(torch.float32)
    return torch.nn.functional.cosine_similarity(one, other, dim=-1) > _ALIKE


def _columns(view: View, layer: int) -> int:
    entering = view.entering(PROMPT, layer)
    return 1 if entering is None else entering.rows.shape[1]


def _probability_alike(count: int, rows: int, columns: int) -> float:
    """That ``count`` or more of ``rows`` unrelated pairs of directions are alike: 1 for none, else a bound."""
    return min(1.0, rows * (1.0 - _ALIKE**2) ** ((columns - 1) / 2.0)) if count else 1.0


def _not_sent(attack: str, target: str, view: View) -> Finding:
    return Finding(attack, target, view.label, None, "what it needs is not sent", control=view.control)
