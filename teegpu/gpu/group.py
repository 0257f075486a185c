"""The other ranks of a server: child processes that load their part of the weights and follow rank 0.

Rank 0 watches them. One that ends or hangs leaves the others in the middle of a program, out of step for good, so then
all of them end, and whoever has the group begins anew.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from teegpu import machine
from teegpu.children import Child, how_it_ended
from teegpu.errors import ModelError
from teegpu.gpu.executor import Executor
from teegpu.gpu.ranks import Ranks
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.weights import DeviceWeights
from teegpu.kernels import DTYPES
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import Cut, WeightStore
from teegpu.wire.limits import Limits

HUNG_SECONDS: Final = 60.0
"""How long rank 0 waits for others in the middle of a program: six times as long as a program may take where
``limits.program_macs`` is not set, and half of what runners wait for an answer."""

_LOOK_SECONDS: Final = 0.1
_SEEN_SECONDS: Final = 1.0
"""A lost connection is seen a moment before the process that held it is seen to have ended."""


class Group:
    """``ranks`` processes, of which this is the first. ``lost`` is called, once, with what happened, when they can't go
    on together and the others have been ended; it does not return. Use it with ``with``."""

    def __init__(self, ranks: int, lost: Callable[[str], NoReturn]) -> None:
        self.ranks = ranks
        self._lost = lost
        self._children: list[Child] = []
        self._stack = ExitStack()
        self._ranks: Ranks | None = None
        self._closing = threading.Event()
        self._losing = threading.Lock()

    @property
    def cut(self) -> Cut:
        """The part of the weights that this process has."""
        return Cut(0, self.ranks)

    def start(self, **about: Any) -> None:
        """Starts the others, which load their part: ``about`` is what ``main`` reads."""
        for cut in self.cut.others()[1:]:
            argument = json.dumps({"rank": cut.rank, "ranks": cut.ranks} | about)
            child = Child(["-m", "teegpu.gpu.group", argument], text=True)
            self._children.append(self._stack.enter_context(child))

    def meet(self, device: torch.device) -> Ranks:
        """Waits until all have loaded, and joins them. Raises ``ModelError`` where one of them could not."""
        for rank, child in enumerate(self._children, start=1):
            if child.process.stdout is None or not child.process.stdout.readline():
                ended = how_it_ended(child.process.wait())
                raise ModelError(f"rank {rank} ended while it loaded the model {ended}: {child.last_words()}")
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()
        with tempfile.TemporaryDirectory(prefix="teegpu-") as folder:
            for child in self._children:
                if child.process.stdin is not None:
                    with suppress(OSError):  # one that is gone by now is the watch's to find
                        child.process.stdin.write(f"{folder}\n")
                        child.process.stdin.flush()
            self._ranks = Ranks(self.cut, device, Path(folder), self.lose)
        return self._ranks

    def lose(self, reason: str) -> NoReturn:
        """Ends the others, and says so to ``lost``."""
        self._losing.acquire()  # for good: who comes second waits for the end of this process
        deadline = time.monotonic() + _SEEN_SECONDS
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        for child in self._children:
            child.close(politely=False)
        self._lost(gone or reason)

    def _gone(self) -> str:
        for rank, child in enumerate(self._children, start=1):
            if child.gone:
                return f"rank {rank} ended {how_it_ended(child.process.returncode)} {child.last_words()}".rstrip()
        return ""

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            since = None if self._ranks is None else self._ranks.waits_since
            if self._gone() or (since is not None and time.monotonic() - since > HUNG_SECONDS):
                self.lose(f"no word from other ranks for {HUNG_SECONDS:.0f} s")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._stack.close()


def main(argument: str) -> None:
    """Is one of the others until standard input ends. ``argument``: JSON, as ``Group.start`` makes it."""
    # A signal to all processes of the server ends rank 0, when it has answered what it has; then its children end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_life_line, args=(told,), daemon=True, name="life line").start()
    about = json.loads(argument)
    machine.keep_freed_memory()
    torch.set_num_threads(about["threads"])
    cut, layers = Cut(about["rank"], about["ranks"]), tuple(about["layers"])
    device = torch.device(about["device"], cut.rank) if about["device"] == "cuda" else torch.device("cpu")
    folder = ModelFolder(about["model"], Path(about["path"]))
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        held = DeviceWeights(
            store, spec, device=device, dtype=DTYPES[about["dtype"]], layers=layers, int8=about["int8"], cut=cut
        )
    ring = RingWeights(store.reopen, spec, device=device, layers=layers, cut=cut) if about["ring"] else None
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    Executor(held, Limits(), ring=ring, ranks=Ranks(cut, device, Path(told.get()))).follow()


def _life_line(told: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        told.put(line.rstrip("\n"))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
