"""Figures as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        # what would be rounded up to 1024 belongs to the next unit
        if count < 1023.95 or (unit == "B" and count < 1024):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
