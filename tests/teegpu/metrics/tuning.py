"""Rates that tests can reckon with, and a profile of them."""

from __future__ import annotations

import math
from typing import Any

from teegpu import __version__
from teegpu.metrics.predict import Link
from teegpu.metrics.profile import Profile, Server, fingerprint
from teegpu.metrics.rates import Compression, Rates, Units
from teegpu.metrics.traffic import Shape

SHAPE = Shape(30, 576, 1536, 9, 3, 64, 49152)


def rates(
    *,
    rtt: float = 0.0,
    bandwidth: float = math.inf,
    tee_flop: float = 1e-10,
    server_flop: float = 1e-11,
    request: float = 1e-4,
    value: float = 1e-10,
    **more: Any,
) -> Rates:
    """A TEE and a server whose product's seconds are given for each multiply-add."""
    prices: dict[str, Units] = {
        "tee/LINEAR": (1e-5, 4e-10, tee_flop),
        "tee/ATTENTION": (1e-5, 4e-10, tee_flop),
        "tee/RMSNORM": (1e-5, value, 0.0),
        "tee/SILU": (1e-5, value, 0.0),
        "tee/OTHER": (0.0, 0.0, 0.0),
        "server/LINEAR": (1e-5, 2e-10, server_flop),
        "server/SUM": (1e-5, value, 0.0),
    }
    for wire in ("fp32", "bf16", "fp16", "int8"):
        for place in ("runner/encode", "runner/decode", "server/decode", "server/encode"):
            prices[f"{place}.{wire}"] = (request / 4, 0.0, 0.0 if wire == "fp32" else value)
    options: dict[str, Any] = {"compression": {"fp16": Compression(0.9, 0.7, 1e-9, 1e-9)}} | more
    return Rates(prices, Link(rtt, bandwidth, bandwidth), **options)


def profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "endpoints": ("tcp://10.0.0.1:5555",),
        "link": "",
        "model": "smollm2-135m",
        "digest": "d" * 64,
        "shape": SHAPE,
        "machine": fingerprint(),
        "version": __version__,
        "runner_threads": 2,
        "server": Server("cuda", "bf16", 8),
        "created_at": "2026-01-02T03:04:05+00:00",
        "rates": rates(),
    }
    return Profile(**values | changes)
