"""Programs on a CUDA device: queued without waiting, timed by the device's own events, synchronised once.

A program of a decode step is some ten kernels of a few microseconds each, and to launch them one after the other takes
longer than they run. So one that comes again with few rows is recorded as a CUDA graph, copies and timing events
included, and from then on replayed by a single launch. On an H100 the program after attention of TinyLlama's shape took
0.30 ms launched and 0.11 ms replayed, for one row; for 128 rows it made little difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Generic, TypeVar

import torch

Mark = Callable[[], None]
Queue = Callable[[Mapping[str, torch.Tensor], Mark], Sequence[torch.Tensor]]
"""Queues a program on its inputs, which are on the device, and returns its frames, there too. Calls the mark when the
inputs have been converted, and after each kernel."""

REPLAYED_ROWS: Final = 16
"""Programs of more rows are launched: their kernels are long enough to hide the next launch."""

REPLAYS: Final = 512
"""Recorded programs that are kept. A model of 80 layers has 161 for a decode step, and as many for each length of a
speculated one; a client that invents more pushes out the oldest."""


REPLAY_BYTES: Final = 2**26
REPLAYS_BYTES: Final = 2**30
"""Registers of one recorded program, and of all: inputs and outputs stay in pinned memory. The largest of ours, the
logits of 16 rows over 150,000 words, has 20 MB."""

T = TypeVar("T")


class Recorded(Generic[T]):
    """What came once, and the recordings of what came again. The oldest go when there are more than ``REPLAYS``, or
    when they hold more than ``REPLAYS_BYTES``."""

    def __init__(self) -> None:
        self.found: OrderedDict[Hashable, T | None] = OrderedDict()
        self.nbytes = 0
        self._sizes: dict[Hashable, int] = {}

    def get(self, key: Hashable, nbytes: int, record: Callable[[], T | None]) -> T | None:
        """The recording of ``key``, which holds ``nbytes``, made now if this is the second time that it comes; None
        the first time, and where it is too large or ``record`` gives none."""
        if nbytes > REPLAY_BYTES:
            return None
        if key not in self.found:
            self.found[key] = None
            if len(self.found) > REPLAYS:
                self._drop()
            return None
        self.found.move_to_end(key)
        known = self.found[key]
        if known is None and (known := record()) is not None:
            self.found[key], self._sizes[key] = known, nbytes
            self.nbytes += nbytes
            while self.nbytes > REPLAYS_BYTES:
                self._drop()
        return known

    def _drop(self) -> None:
        key, _ = self.found.popitem(last=False)
        self.nbytes -= self._sizes.pop(key, 0)


class Device:
    """Runs programs on ``device``. One thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self.recorded: Recorded[_Replay] = Recorded()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self.replays = True
        """Whether programs are recorded. Off once the driver has refused to record one."""

    def run(
        self, key: Hashable, nbytes: int, inputs: Mapping[str, torch.Tensor], queue: Queue
    ) -> tuple[list[torch.Tensor], list[float]]:
        """The frames of the program ``queue``, on the CPU, and the seconds between its marks: the first value is up to
        the first mark, the uploads included, the last one from the last mark to the end of the downloads.

        ``key`` stands for the program and the shapes and dtypes of its inputs, ``nbytes`` is the size of its registers;
        ``inputs`` are on the CPU.
        """
        with torch.cuda.device(self.device):
            if self.replays and all(_rows(tensor) <= REPLAYED_ROWS for tensor in inputs.values()):
                replay = self.recorded.get(key, nbytes, lambda: self._record(inputs, queue))
                if replay is not None:
                    return replay.run(inputs)
            return self._launch(inputs, queue)

    def _launch(self, inputs: Mapping[str, torch.Tensor], queue: Queue) -> tuple[list[torch.Tensor], list[float]]:
        events, used = self._events, 0

        def mark() -> None:
            nonlocal used
            if used == len(events):
                events.append(torch.cuda.Event(enable_timing=True))
            events[used].record()
            used += 1

        mark()
        # Through pinned memory: torch's host allocator keeps such blocks, and hands them out again once the device has
        # read them.
        there = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        frames = [_downloaded(frame) for frame in queue(there, mark)]
        mark()
        events[used - 1].synchronize()
        return frames, _seconds(events[:used])

    def _record(self, inputs: Mapping[str, torch.Tensor], queue: Queue) -> _Replay | None:
        if self._stream is None or self._pool is None:
            self._stream = torch.cuda.Stream(self.device)
            # One pool for all: nothing of a program is read once the next one runs.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Replay(self.device, self._stream, self._pool, inputs, queue)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError:  # a driver or a library that can't record: launched programs do the same, later
            self.replays = False
            return None


class _Replay:
    """A program recorded for inputs of one shape and dtype, with memory of its own to read them from."""

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream,
        pool: Any,
        inputs: Mapping[str, torch.Tensor],
        queue: Queue,
    ) -> None:
        self._staged = {name: torch.empty_like(tensor, pin_memory=True) for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._staged[name].copy_(tensor)
        self._marks: list[torch.cuda.Event] = []

        def mark() -> None:
            # External: an event that the graph records anew each time, and that can be read.
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            self._marks.append(event)

        def upload() -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in self._staged.items()}

        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Once for real: libraries take the workspaces of a stream at their first call on it.
            self._frames = [_downloaded(frame) for frame in queue(upload(), lambda: None)]
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                frames = queue(upload(), mark)
                for pinned, frame in zip(self._frames, frames, strict=True):
                    pinned.copy_(frame, non_blocking=True)
            finally:
                self._graph.capture_end()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
        for name, tensor in inputs.items():
            self._staged[name].copy_(tensor)
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        # Copies: a frame may still be on its way to the client when the next replay writes here.
        return [frame.clone() for frame in self._frames], _seconds([self._begin, *self._marks, self._end])


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[-1] if tensor.dim() > 1 else tensor.numel()


def _downloaded(frame: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory; complete after the next synchronisation."""
    pinned = torch.empty(frame.shape, dtype=frame.dtype, pin_memory=True)
    return pinned.copy_(frame, non_blocking=True)


def _seconds(events: Sequence[torch.cuda.Event]) -> list[float]:
    return [first.elapsed_time(second) / 1e3 for first, second in pairwise(events)]
