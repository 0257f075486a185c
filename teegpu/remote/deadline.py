"""How long servers may take in all. Each request has a time-out of its own; a server that means harm, or is too slow to
be of use, could take nearly that long for each of them, and never be told from one that works."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from teegpu.errors import ConnectionFailedError
from teegpu.remote.calls import Call


class Deadline:
    """``pass_seconds`` for all requests of one pass through the layers, of each chunk by itself; ``answer_seconds``
    for what is within ``answering``. A request may take ``reply_seconds`` at most anyway."""

    def __init__(
        self,
        *,
        pass_seconds: float = math.inf,
        answer_seconds: float = math.inf,
        reply_seconds: float = math.inf,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._pass_seconds = pass_seconds
        self._answer_seconds = answer_seconds
        self._reply_seconds = reply_seconds
        self._clock_ns = clock_ns
        self._ends_ns = math.inf
        self._passes: dict[int, tuple[int, float]] = {}
        """By chunk: the layer of its last request, and what its pass has waited, in seconds."""

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it, a prompt is answered."""
        self._ends_ns = self._clock_ns() + self._answer_seconds * 1e9
        try:
            yield
        finally:
            self._ends_ns = math.inf

    def allow(self, call: Call) -> float | None:
        """Seconds that the next request of ``call`` may take; None: as many as any.

        Raises ``ConnectionFailedError`` where there are none left."""
        layer, waited = self._passes.get(call.chunk, (call.layer, 0.0))
        if call.layer < layer:  # it begins with the first layer again
            waited = 0.0
        self._passes[call.chunk] = (call.layer, waited)
        left, setting = self._pass_seconds - waited, f"link.pass_timeout_seconds, {self._pass_seconds:g}, allows a pass"
        if self._ends_ns < math.inf:
            until = (self._ends_ns - self._clock_ns()) / 1e9
            if until < left:
                left, setting = until, f"run.deadline_seconds, {self._answer_seconds:g}, allows an answer"
        if left <= 0:
            raise ConnectionFailedError(f"the servers have taken longer than {setting}: take quicker ones, or raise it")
        return left if left < self._reply_seconds else None

    def spend(self, call: Call, seconds: float) -> None:
        """``call`` has been waited for."""
        layer, waited = self._passes.get(call.chunk, (call.layer, 0.0))
        self._passes[call.chunk] = (layer, waited + seconds)
