"""Several passes over rows, a block at a time that stays in a core's own cache, and large ones on all cores.

Such passes are numpy's, each a vectorised loop in the thread that asks for it. torch hands more than 32,768 values to
threads that sleep where cores are shared (``machine.share_cores``): to wake them for each of a few passes takes longer
than the passes, so here they are woken once, for all of them, and only where that is worth it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

import torch

VALUES: Final = 2**15
"""Values of a block."""

_WORTH: Final = 2**17
"""Values for which a thread is woken, at least."""
_MOST_THREADS: Final = 256
"""Of this module. None is started before it is needed."""


def blocks(rows: slice, columns: int, values: int = VALUES) -> Iterator[slice]:
    """``rows``, as many at once as have about ``values`` values."""
    step = max(1, values // max(1, columns))
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def spread(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Has ``work`` done for all of ``rows``: at once, or for parts of them on as many threads as torch has."""
    parts = min(rows * columns // _WORTH, rows)
    if parts < 2 or (parts := min(parts, torch.get_num_threads())) < 2:
        work(slice(0, rows))
        return
    edges = [rows * number // parts for number in range(parts + 1)]
    others = [_threads(os.getpid()).submit(work, slice(*edges[number : number + 2])) for number in range(1, parts)]
    work(slice(0, edges[1]))
    for other in others:
        other.result()


@cache
def _threads(pid: int) -> ThreadPoolExecutor:  # noqa: ARG001 (a fork has none of its parent's threads)
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="passes")
