from __future__ import annotations

import asyncio

import pytest

from teegpu.remote.calls import drive


async def answer() -> int:
    return 42


def test_a_coroutine_that_never_suspends_needs_no_loop() -> None:
    async def outer() -> int:
        return await answer() + await answer()

    assert drive(outer()) == 84


def test_one_that_suspends_is_refused() -> None:
    async def waits() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="without an event loop"):
        drive(waits())


def test_errors_come_through() -> None:
    async def fails() -> None:
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        drive(fails())
