"""The thread that computes: it opens the runner and takes the engine from step to step.

What comes of a step goes to the event loop all at once, so that a step of many wakes it once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from teegpu.api.errors import ApiError
from teegpu.api.replies import Piece
from teegpu.errors import ShieldError, TeegpuError, VerificationError
from teegpu.runner import Runner
from teegpu.tee.sequence import Sequence
from transports.errors import TransportError

log = logging.getLogger(__name__)

LOADING: Final = "loading"
READY: Final = "ready"
DRAINING: Final = "draining"
ENDED: Final = "ended"

STALLED_SECONDS: Final = 60.0
"""A step that takes longer makes no progress that anybody should wait for."""

_IDLE_SECONDS: Final = 0.5

Queue = asyncio.Queue[Piece]

OpenRunner = Callable[[], AbstractContextManager[Runner]]


class Worker:
    """``open_runner`` is called in the thread. ``on_change`` is called on ``loop`` when the state changes; ``error`` is
    then what ended it. ``on_request_end`` gets each sequence that has ended, in the thread."""

    def __init__(
        self,
        open_runner: OpenRunner,
        loop: asyncio.AbstractEventLoop,
        on_change: Callable[[], None],
        on_request_end: Callable[[Sequence], None],
    ) -> None:
        self._open = open_runner
        self._loop = loop
        self._on_change = on_change
        self._on_request_end = on_request_end
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)  # it may be left behind
        self._stopping = False
        self._outbox: list[tuple[Queue, Piece]] = []
        self._stepped_ns = time.monotonic_ns()
        self.state = LOADING
        self.error: BaseException | None = None
        self.runner: Runner | None = None

    # From the event loop

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """From now on nothing new is taken."""
        if self.state == READY:
            self.state = DRAINING

    async def stop(self, seconds: float | None = None) -> bool:
        """Ends the thread after its step, or its start; whatever still runs is ended. False where that takes longer
        than ``seconds``: what it waits for can't be interrupted."""
        self._stopping = True
        until = None if seconds is None else self._loop.time() + seconds
        while self._thread.is_alive():
            if until is not None and self._loop.time() > until:
                return False
            await asyncio.sleep(0.02)
        return True

    @property
    def ready(self) -> Runner:
        """The runner. Raises ``ApiError`` where there is none to be asked."""
        if self.runner is None or self.state != READY:
            raise ApiError(503, f"the endpoint is {self.state}: try again later", code=self.state)
        return self.runner

    @property
    def busy(self) -> int:
        """Requests that run or wait."""
        return 0 if self.runner is None else self.runner.engine.running + self.runner.engine.waiting

    @property
    def stalled(self) -> bool:
        """Whether there is work, and none of it was done for long."""
        return self.busy > 0 and (time.monotonic_ns() - self._stepped_ns) / 1e9 > STALLED_SECONDS

    def add(self, sequence: Sequence) -> None:
        """Raises ``ApiError`` and what ``Engine.add`` does."""
        on_end = sequence.on_end

        def ended(error: BaseException | None) -> None:
            self._on_request_end(sequence)
            on_end(error)

        sequence.on_end = ended
        self.ready.engine.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        if self.runner is not None and not sequence.ended:
            self.runner.engine.cancel(sequence)

    def put(self, queue: Queue, piece: Piece) -> None:
        """Called by sequences, in the thread: ``piece`` reaches ``queue`` when the step is over."""
        self._outbox.append((queue, piece))

    # In the thread

    def _run(self) -> None:
        try:
            with self._open() as runner:
                self.runner = runner
                self._change(READY)
                try:
                    self._serve(runner)
                finally:
                    self._end_all(runner, ApiError(503, "the endpoint is ending", code=DRAINING))
        except BaseException as error:  # noqa: BLE001 (told to who waits for the thread)
            self.error = error
        self._change(ENDED)

    def _serve(self, runner: Runner) -> None:
        while not self._stopping:
            busy = False
            try:
                busy = runner.step()
            except (ShieldError, VerificationError):
                raise
            except (TeegpuError, TransportError) as error:
                log.warning("a step was lost: %s", error, extra={"event": "lost"})
                runner.engine.fail(error)
                if runner.lost is not None:
                    raise
            except Exception as error:  # noqa: BLE001 (a bug of ours ends the requests of a step, not the endpoint)
                place = traceback.extract_tb(error.__traceback__)[-1]
                log.error("%s in %s, line %s", type(error).__name__, place.filename, place.lineno)
                runner.engine.fail(ApiError(500, "this is a bug in teegpu", code="internal_error"))
            self._stepped_ns = time.monotonic_ns()
            self._flush()
            if not busy:
                runner.engine.wait(_IDLE_SECONDS)
                self._stepped_ns = time.monotonic_ns()

    def _end_all(self, runner: Runner, error: ApiError) -> None:
        self.state = ENDED
        runner.engine.fail(error, waiting=True)
        self._flush()

    def _flush(self) -> None:
        if self._outbox:
            pieces, self._outbox = self._outbox, []
            self._on_loop(_deliver, pieces)

    def _change(self, state: str) -> None:
        self.state = state
        self._on_loop(self._on_change)

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: this thread was left behind
            self._loop.call_soon_threadsafe(function, *arguments)


def _deliver(pieces: list[tuple[Queue, Piece]]) -> None:
    for queue, piece in pieces:
        queue.put_nowait(piece)
