"""The child's side of ``teegpu.bench.child``: lines from stdin to a handler, its answers to stdout."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from teegpu.errors import ConnectionFailedError, TeegpuError
from transports.errors import TransportError

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def serve(handle: Handler) -> None:
    """Answers each command with what ``handle`` returns or raises, until standard input ends: then it ends the process
    at once, in the middle of a measurement too.

    What anything else prints to standard output goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for command in _commands():
        answers.write(json.dumps(answered(handle, command)) + "\n")
        answers.flush()


def answered(handle: Handler, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``command``; an error that a user can be told is an answer too."""
    try:
        return handle(command)
    except TeegpuError as error:
        return {"error": {"kind": type(error).__name__, "text": str(error)}}
    except TransportError as error:
        return {"error": {"kind": ConnectionFailedError.__name__, "text": str(error)}}


def _commands() -> Iterator[dict[str, Any]]:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        # The parent is gone or wants no more. Nothing here is worth finishing, and taking torch down takes time.
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="commands").start()
    while True:
        yield json.loads(lines.get())
