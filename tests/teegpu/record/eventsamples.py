"""Events of every kind, as a run makes them."""

from __future__ import annotations

from teegpu.record import events as ev

EVERY_KIND: list[ev.Event] = [
    ev.Noted(1, "going on without the server at tcp://10.0.0.1:5555"),
    ev.PhaseBegan(10**18, ev.PREFILL, 1024, 8),
    ev.Lap(10**18, 10**18 + 5, ev.TEE, "RMSNORM", 3, 7, 0),
    ev.Lap(-5, 0, ev.WAIT, "WAIT", ev.NO_LAYER, 0, 2**40),
    ev.Rpc(
        7, "z+gate+up", 3, 1, 10, 20, 100, 300, 200, 400, 0.5, 1e-6, 2e-6, 3.25, 4e-6,
        {"LINEAR": (3, 0.125), "LM_HEAD": (1, 0.0)}, 5, 6, 1, 2,
    ),
    ev.Retried(30, 7, 3, 1, 0, "ReplyTimeoutError"),
    ev.TokensMade(40, 1),
    ev.Speculated(4, 2),
    ev.TextMade(45, "Grüße, 世界"),
    ev.Sampled(50, 2**31, 0, 1.5),
    ev.PhaseEnded(60, ev.PREFILL, 1024, 1),
    ev.Arrived(61, 1, 1024, 64),
    ev.Admitted(62, 1, 128),
    ev.GaveWay(63, 1),
    ev.Stepped(70, 64, ((1, 128, 0), (2, 1, 1)), 2, 3, 2**30),
    ev.Left(71, 2, "stop"),
]  # fmt: skip


def laps(count: int, start: int = 0) -> list[ev.Event]:
    """``count`` laps of which each can be told from the others."""
    return [ev.Lap(number, number + 1, ev.TEE, "SILU", number % 30, 0, 0) for number in range(start, start + count)]


RUN: list[ev.Event] = [
    ev.PhaseBegan(0, ev.PREFILL, 9, 1),
    ev.Lap(0, 4_000_000, ev.TEE, "SILU", 0, 0, 0),
    ev.Lap(4_000_000, 6_000_000, ev.SERIALIZATION, "ENCODE", 0, 0, 0),
    ev.TokensMade(6_000_000, 1),
    ev.PhaseEnded(6_000_000, ev.PREFILL, 9, 1),
]
"""A prefill that made one token."""
