"""What an emulated link is like, and how that is written: ``rtt=5ms,bandwidth=1gbit``."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from transports.errors import LinkSpecError

KEYS = ("rtt", "bandwidth", "up", "down", "jitter")
SECONDS_PER_UNIT = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES_PER_UNIT = {
    "bit": 1 / 8,
    "kbit": 1e3 / 8,
    "mbit": 1e6 / 8,
    "gbit": 1e9 / 8,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
UNLIMITED = ("unlimited", "none", "loopback")
MAX_RTT_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 125.0  # 1 kbit/s
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link's properties. Bandwidths are ``math.inf`` where there is no limit.

    ``jitter_seconds`` is the largest deviation, either way and evenly spread, of each one-way delay from half the RTT;
    the order of bytes stays as it was. Raises ``LinkSpecError`` for values that can't be.
    """

    rtt_seconds: float = 0.0
    up_bytes_per_second: float = math.inf
    down_bytes_per_second: float = math.inf
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rtt_seconds <= MAX_RTT_SECONDS:
            raise LinkSpecError(f"link: rtt must be between 0 and {MAX_RTT_SECONDS:.0f}s, not {self.rtt_seconds}s")
        for name, rate in (("up", self.up_bytes_per_second), ("down", self.down_bytes_per_second)):
            if not rate >= MIN_BYTES_PER_SECOND:
                raise LinkSpecError(
                    f"link: {name} bandwidth must be at least 1kbit, not {rate * 8:g}bit: for no limit, say 'unlimited'"
                )
        if not 0.0 <= self.jitter_seconds <= self.rtt_seconds / 2:
            raise LinkSpecError(
                f"link: jitter must be between 0 and half the rtt ({_seconds(self.rtt_seconds / 2)}), "
                f"not {_seconds(self.jitter_seconds)}: with more, bytes would arrive before they were sent"
            )

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Read ``rtt=5ms,bandwidth=1gbit``, with ``up=…`` and ``down=…`` for one direction, and ``jitter=1ms``.

        Times end in us, ms or s; bandwidths in kbit, mbit, gbit (per second, any case), in kB, MB, GB, KiB, MiB or GiB
        (bytes per second, as written here), or are ``unlimited``. What is left out is not limited; ``loopback`` alone
        is a link without any limit. Raises ``LinkSpecError``.
        """
        if text.strip().lower() in UNLIMITED:
            return cls()
        given: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise LinkSpecError(f"link: '{part.strip()}' is not key=value: write rtt=5ms,bandwidth=1gbit")
            if key not in KEYS:
                near = difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.4)
                hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(KEYS)}"
                raise LinkSpecError(f"link: unknown key '{key}', {hint}")
            if key in given:
                raise LinkSpecError(f"link: '{key}' is given twice: leave one of them out")
            given[key] = value
        if {"bandwidth", "up", "down"} <= given.keys():
            raise LinkSpecError("link: bandwidth has no effect beside both up and down: leave it out")
        both = parse_bandwidth("bandwidth", given.get("bandwidth", "unlimited"))
        return cls(
            rtt_seconds=parse_seconds("rtt", given.get("rtt", "0")),
            up_bytes_per_second=parse_bandwidth("up", given["up"]) if "up" in given else both,
            down_bytes_per_second=parse_bandwidth("down", given["down"]) if "down" in given else both,
            jitter_seconds=parse_seconds("jitter", given.get("jitter", "0")),
        )

    def __str__(self) -> str:
        """In the form that ``parse`` reads."""
        parts = [f"rtt={_seconds(self.rtt_seconds)}"]
        if self.up_bytes_per_second == self.down_bytes_per_second:
            parts.append(f"bandwidth={_bandwidth(self.up_bytes_per_second)}")
        else:
            parts.append(f"up={_bandwidth(self.up_bytes_per_second)}")
            parts.append(f"down={_bandwidth(self.down_bytes_per_second)}")
        if self.jitter_seconds:
            parts.append(f"jitter={_seconds(self.jitter_seconds)}")
        return ",".join(parts)

    def seconds_for(self, bytes_up: int, bytes_down: int, rounds: int) -> float:
        """The least time in which the link can carry that much: both directions at once, and one RTT per round."""
        return (
            max(bytes_up / self.up_bytes_per_second, bytes_down / self.down_bytes_per_second)
            + rounds * self.rtt_seconds
        )


def parse_seconds(key: str, text: str) -> float:
    """``5ms`` → 0.005. Raises ``LinkSpecError`` naming ``key``."""
    match = _QUANTITY.fullmatch(text)
    number, unit = match.groups() if match else ("", "")
    if match and unit == "" and float(number) == 0.0:
        return 0.0
    if not match or unit not in SECONDS_PER_UNIT:
        raise LinkSpecError(f"link: {key}={text} is not a time: write a number and us, ms or s, for example {key}=5ms")
    return float(number) * SECONDS_PER_UNIT[unit]


def parse_bandwidth(key: str, text: str) -> float:
    """``1gbit`` → 125e6 bytes per second; ``unlimited`` → inf. Raises ``LinkSpecError`` naming ``key``."""
    if text.lower() in UNLIMITED:
        return math.inf
    match = _QUANTITY.fullmatch(text.removesuffix("/s"))
    number, unit = match.groups() if match else ("", "")
    if match and unit.lower().endswith("bit"):
        unit = unit.lower()
    if not match or unit not in BYTES_PER_UNIT:
        raise LinkSpecError(
            f"link: {key}={text} is not a bandwidth: write a number and kbit, mbit or gbit (bits per second), "
            f"or kB, MB or GB (bytes per second), for example {key}=1gbit"
        )
    return float(number) * BYTES_PER_UNIT[unit]


def _seconds(seconds: float) -> str:
    if seconds == 0.0:
        return "0"
    unit = "s" if seconds >= 1.0 else "ms" if seconds >= 1e-3 else "us"
    return f"{_number(seconds / SECONDS_PER_UNIT[unit])}{unit}"


def _bandwidth(rate: float) -> str:
    if math.isinf(rate):
        return "unlimited"
    unit = "gbit" if rate * 8 >= 1e9 else "mbit" if rate * 8 >= 1e6 else "kbit"
    return f"{_number(rate / BYTES_PER_UNIT[unit])}{unit}"


def _number(value: float) -> str:
    return f"{value:.12g}"
