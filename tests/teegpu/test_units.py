"""Figures as people read them."""

from __future__ import annotations

import pytest

from teegpu.units import human_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_bytes_for_a_person(count: int, text: str) -> None:
    assert human_bytes(count) == text
