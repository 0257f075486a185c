"""A ``KeyboardInterrupt`` that was handled should leave the exit code to us."""

from __future__ import annotations


def handled() -> None:
    """Make CPython forget that an interrupt came. Call it where a ``KeyboardInterrupt`` has been caught.

    One that passes through ``exec`` of a text (dataclasses are made that way, so imports are full of it) is remembered
    as unhandled, whoever catches it later, and the process then ends by signal SIGINT instead of with its exit code.
    Running any text anew clears that memory.
    """
    exec("")
