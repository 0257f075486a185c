"""Figures as people read them."""

from __future__ import annotations

import pytest

from teegpu.units import about_seconds, human_age, human_bytes, human_seconds, printable


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (2.5e-6, "2.5 µs"), (0.00123, "1.23 ms"), (0.0999, "99.9 ms"), (0.5, "500 ms"), (0.9994, "999 ms"),
        (0.9996, "1.000 s"), (9.9996, "10.000 s"), (75.2, "75.20 s"), (-0.5, "-500 ms"), (1234.5, "1,234.50 s"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.337, "9.3 s"), (25.5, "26 s"), (0.0212, "21 ms"), (0.996, "1.0 s"), (0.0001, "0.1 ms")]
)
def test_estimates_have_two_digits(seconds: float, text: str) -> None:
    assert about_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7300, "2 h"), (200_000, "2 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert human_age(seconds) == text


def test_text_from_elsewhere_is_fit_for_a_terminal() -> None:
    assert printable("a\x1b[2J\x07b\nc\u202ed") == "a�[2J�b c�d"
    assert printable("模型 é") == "模型 é"
    assert printable("x" * 11, 10) == "x" * 9 + "…"
