"""What settings come to where they leave something open."""

from __future__ import annotations

import pytest

from teegpu.config import load
from teegpu.options import local_dtype


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "auto"),
        ({"server.dtype": "bf16"}, "auto"),
        ({"server.dtype": "fp32"}, "fp32"),
        ({"run.wire_dtype": "fp32"}, "fp32"),
        ({"run.wire_dtype": "fp32", "run.local_dtype": "bf16"}, "bf16"),
        ({"run.local_dtype": "fp32"}, "fp32"),
    ],
)
def test_who_asks_for_fp32_gets_it_from_local_too(flags: dict[str, str], told: str) -> None:
    assert local_dtype(load(flags)) == told
