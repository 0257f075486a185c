"""A phase taken apart for people: exclusive parts whose shares add up to 100.0 % as they are printed.

The wall time of a phase is tee + serialization + network + server + gpu + other. What the server reports per operation
is busy time, of which the runner waited for a part only where requests overlap; the phase's exposed GPU time is divided
among the operations in proportion, so that their shares add up to GPU compute and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from teegpu.report import look
from teegpu.units import printable

GPU_OPS = ("EMBEDDING", "LINEAR", "MATMUL", "LM_HEAD")
TEE_OPS = ("RMSNORM", "ROTARY", "SOFTMAX", "SILU")
"""Rows that are always there, in this order."""


@dataclass(frozen=True, slots=True)
class Part:
    """An exclusive part of a phase's wall time: ``{name}_seconds`` in the document. ``letter`` stands for it where
    there is no colour, ``short`` and ``shorter`` are its label where there is less room; ``dark`` and ``light`` are its
    colours on such a background. They are Okabe and Ito's bluish green, yellow, vermillion, purple and blue, a little
    lighter or darker: people tell them apart however they see colours, and they differ in brightness too."""

    name: str
    label: str
    short: str
    letter: str
    dark: str
    light: str
    shorter: str = ""


PARTS = {
    part.name: part
    for part in (
        Part("tee", "TEE compute", "TEE", "T", "#12b886", "#009e73"),
        Part("serialization", "Serialization", "serialization", "S", "#f0c419", "#e0a800", "serial."),
        Part("network", "Network", "network", "N", "#e8590c", "#d55e00"),
        Part("server", "Server overhead", "server", "Q", "#cc79a7", "#bf6a9a"),
        Part("gpu", "GPU compute", "GPU", "G", "#56b4e9", "#3d9fda"),
        Part("other", "Other", "other", ".", "#7a8591", "#9aa5b1"),
    )
}
"""In the order in which charts and tables show them."""


@dataclass
class Item:
    """``seconds``: as they were measured, busy ones for an operation of the server. ``exposed``: the part of the wall.
    ``tenths``: of a percent of the wall; those of all items of a phase add up to 1000."""

    name: str
    count: int | None
    seconds: float
    exposed: float
    tenths: int = 0

    @property
    def average(self) -> float | None:
        return self.seconds / self.count if self.count else None


@dataclass
class Breakdown:
    """``excess``: by how much the parts of the record exceed its wall time, as a fraction; 0 where they add up."""

    wall: float
    communication: list[Item]
    gpu: list[Item]
    tee: list[Item]
    server: Item
    other: Item
    excess: float = 0.0
    items: list[Item] = field(init=False)

    def __post_init__(self) -> None:
        self.items = [*self.communication, *self.gpu, *self.tee, self.server, self.other]
        for item, tenths in zip(self.items, rounded([item.exposed for item in self.items], 1000), strict=True):
            item.tenths = tenths
        self.gpu, self.tee = _shown(self.gpu), _shown(self.tee)


def _shown(items: list[Item]) -> list[Item]:
    """Without the rest of a section where there is none worth a row."""
    return [item for item in items if item.count is not None or item.tenths]


def took_place(phase: Mapping[str, Any]) -> bool:
    return look.amount(phase, "passes") > 0 or whole(phase) > 0


def whole(phase: Mapping[str, Any]) -> float:
    """The wall time in seconds; of a phase that has not ended, what its parts make so far."""
    return look.amount(phase, "seconds") or sum(look.amount(phase, f"{part}_seconds") for part in PARTS)


def breakdown(phase: Mapping[str, Any]) -> Breakdown:
    """The parts of a phase of the document."""
    calls = int(look.amount(phase, "rpc_calls"))
    seconds = {part: look.amount(phase, f"{part}_seconds") for part in PARTS}
    parts, wall = sum(seconds.values()), whole(phase)
    gpu_busy = look.amount(phase, "busy", "gpu_seconds")
    communication = [
        Item("RPC calls", calls, seconds["network"], seconds["network"]),
        Item("Serialization", calls, seconds["serialization"], seconds["serialization"]),
    ]
    return Breakdown(
        wall,
        communication,
        _gpu(phase, gpu_busy, seconds["gpu"]),
        _tee(phase, seconds["tee"]),
        Item("Server overhead", None, seconds["server"], seconds["server"]),
        Item("Other", None, seconds["other"], seconds["other"] + max(0.0, wall - parts)),
        max(0.0, parts / wall - 1) if wall else 0.0,
    )


def _gpu(phase: Mapping[str, Any], busy: float, exposed: float) -> list[Item]:
    found = _operations(phase, "gpu")
    claimed = sum(seconds for _, seconds in found.values())
    each = exposed / max(busy, claimed) if max(busy, claimed) else 0.0
    items = [
        Item(name, *found.get(name, (0, 0.0)), found.get(name, (0, 0.0))[1] * each)
        for name in (*GPU_OPS, *sorted(found.keys() - set(GPU_OPS)))
    ]
    rest = max(0.0, busy - claimed)
    return [*items, Item("others", None, rest, max(0.0, exposed - sum(item.exposed for item in items)))]


def _tee(phase: Mapping[str, Any], total: float) -> list[Item]:
    found = _operations(phase, "tee")
    # Where the attention is computed in one piece, its softmax has no time of its own.
    first = ["ATTENTION" if name == "SOFTMAX" and name not in found and "ATTENTION" in found else name
             for name in TEE_OPS]  # fmt: skip
    rest = sorted(found.keys() - set(first), key=lambda name: -found[name][1])
    items = [Item(name, *found.get(name, (0, 0.0)), found.get(name, (0, 0.0))[1]) for name in (*first, *rest)]
    left = max(0.0, total - sum(item.seconds for item in items))
    return [*items, Item("others", None, left, left)]


def _operations(phase: Mapping[str, Any], where: str) -> dict[str, tuple[int, float]]:
    """Name → (count, seconds) of the operations that ran there."""
    found: dict[str, tuple[int, float]] = {}
    for name, operation in look.mapping(phase, "ops").items():
        if look.text(operation, "where") == where:
            plain = printable(str(name).removesuffix(f"@{where}"), 24)
            count, seconds = found.get(plain, (0, 0.0))
            found[plain] = (
                count + int(look.amount(operation, "count")),
                seconds + look.amount(operation, "seconds"),
            )
    return found


def rounded(values: Sequence[float], whole: int) -> list[int]:
    """Whole numbers in proportion to ``values`` that add up to ``whole`` (all 0 where the values are): each is rounded
    down, and what is left goes to the largest remainders."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [value / total * whole for value in values]
    result = [int(value) for value in exact]
    order = sorted(range(len(values)), key=lambda place: result[place] - exact[place])
    for place in order[: max(0, whole - sum(result))]:
        result[place] += 1
    return result
