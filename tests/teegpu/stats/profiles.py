"""A profile that tests can reckon with."""

from __future__ import annotations

from typing import Any

from teegpu import __version__
from teegpu.record.events import DECODE, PREFILL
from teegpu.stats.profile import Measured, Profile, Server, Way, fingerprint


def measured(transport: str = "pipelined", wire: str = "fp16", *, faster: float = 1.0) -> tuple[Measured, ...]:
    """``fused`` takes 1 ms for each token of a prompt, in chunks of 256 0.9 ms, and 50 ms for a step; ``attention`` a
    tenth more; ``local`` 2 ms and 20 ms. ``faster``: what the link takes less."""
    rows = []
    for tokens in (64, 256, 1024):
        ways = [
            Way("fused", 256, 0.9e-3 * tokens / faster), Way("fused", 2048, 1e-3 * tokens / faster),
            Way("attention", 2048, 1.1e-3 * tokens / faster), Way("local", 2048, 2e-3 * tokens),
        ]  # fmt: skip
        rows.append(Measured(PREFILL, transport, wire, tokens, tuple(ways)))
        steps = Way("local", 0, 0.02), Way("fused", 0, 0.05 / faster), Way("attention", 0, 0.055 / faster)
        rows.append(Measured(DECODE, transport, wire, tokens, steps))
    return tuple(rows)


def profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "endpoints": ("tcp://10.0.0.1:5555",),
        "link": "",
        "model": "smollm2-135m",
        "digest": "d" * 64,
        "machine": fingerprint(),
        "version": __version__,
        "runner_threads": 2,
        "server": Server("cuda", "bf16", 8),
        "created_at": "2026-01-02T03:04:05+00:00",
        "measured": measured(),
    }
    return Profile(**values | changes)
