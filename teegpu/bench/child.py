"""A case in a process of its own: commands in, answers out, one JSON object on a line. Both sides of it.

A process for each case, because threads are set per process and because its peak memory is then the case's own. It
waits on its standard input between commands, without using the processor, and ends when that ends: it can't outlive
the parent.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from teegpu import children, errors, machine
from teegpu.errors import ConnectionFailedError, TeegpuError
from transports.errors import TransportError

Handler = Callable[[dict[str, Any]], dict[str, Any]]

_KINDS: dict[str, type[TeegpuError]] = {
    kind.__name__: kind
    for kind in (
        errors.TeegpuError,
        errors.UsageError,
        errors.ConfigError,
        errors.ModelError,
        errors.UnsupportedModelError,
        errors.PromptError,
        errors.ConnectionFailedError,
        errors.MismatchError,
        errors.ServerRefusedError,
        errors.BadReplyError,
        errors.WireError,
    )
}


class Child:
    """Runs ``python -m MODULE``, which answers each line with a line. Use it with ``with``: leaving ends it.

    ``what`` names its work in messages. ``alone``: nothing else computes on this machine while it does.
    """

    def __init__(self, module: str, what: str, *, alone: bool = False) -> None:
        self.what = what
        given = machine.without_sharing(os.environ) if alone else None
        self._child = children.Child(["-m", module], given=given, text=True)

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``command``. Raises the ``TeegpuError`` that it answers with, or ``TeegpuError`` with the last
        line that it wrote where it has ended."""
        self.send(command)
        return self.answer()

    def send(self, command: dict[str, Any]) -> None:
        """Hands ``command`` over without waiting for the answer."""
        stdin = self._child.process.stdin
        assert stdin is not None  # a pipe
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """The answer to what was sent. Raises as ``ask``."""
        stdout = self._child.process.stdout
        assert stdout is not None  # a pipe
        line = stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _KINDS.get(answer["error"]["kind"], ConnectionFailedError)(answer["error"]["text"])
        return answer

    def _ended(self) -> TeegpuError:
        how = children.how_it_ended(self._child.process.wait())
        last = self._child.last_words()
        return TeegpuError(f"the process that measures {self.what} ended {how}{f' ({last})' if last else ''}")

    def close(self) -> None:
        """Ends the process at once: it has nothing to finish. May be called twice."""
        self._child.close(politely=False)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The child's side


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
