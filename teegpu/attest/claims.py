"""What a genuine quote says, whoever made the processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Claims:
    """``report_data``: the 64 bytes that the TEE had signed. ``measurements``: hexadecimal, by the names that policies
    have. ``numbers``: what policies bound from below (``vmpl``: from above). ``tcb_status`` and ``tcb_at`` are Intel's
    judgement of the processor's firmware and when that level was set; ``collateral_at``: when the oldest part of what
    vendors said was said (Unix times; None where there is no such thing). ``platform``: which processor it is."""

    kind: str
    report_data: bytes
    measurements: Mapping[str, str]
    numbers: Mapping[str, int] = field(default_factory=dict)
    tcb_status: str = ""
    tcb_at: int | None = None
    advisories: tuple[str, ...] = ()
    platform: str = ""
    collateral_at: int | None = None
