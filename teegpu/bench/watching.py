"""``teegpu bench watch``: what it costs a run to be watched, and what the monitor costs.

The same prompt with a monitor attached and without, in pairs, each pair in the other order than the one before. All
runs are recorded: the monitor reads the record. It is the real one, ``teegpu watch`` in a process and on a terminal of
its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from teegpu import machine
from teegpu.bench import document as doc
from teegpu.bench.cases import Case
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.recording import ROWS, WARM_UP_PAIRS, beside_the_real_ones
from teegpu.bench.samples import Spread
from teegpu.config import Config
from teegpu.errors import PromptError, RecordError, TeegpuError, UsageError
from teegpu.metrics import environment
from teegpu.metrics.events import DECODE, PREFILL
from teegpu.metrics.runfolder import RunFolder
from teegpu.metrics.start import Start
from teegpu.metrics.store import RunStore
from teegpu.metrics.summary import PhaseTotal
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.options import MIB
from teegpu.tee.generate import Generation
from teegpu.tee.runner import Runner
from teegpu.units import human_bytes

SIZE = (120, 40)
"""Columns and rows of the monitor's terminal."""

_READY_SECONDS = 60.0
_DRAWN_BYTES = 4000
"""A first screen is larger; what comes before it are a few escape sequences."""


@dataclass(frozen=True, slots=True)
class WatchSample:
    """One run, in seconds. ``run`` is from the prompt to the last token as the caller sees it. The rest is of a run
    that was watched: the processor time and the memory of the monitor, and the bytes that it drew, during the run."""

    prefill: float
    decode: float
    run: float
    monitor_seconds: float = 0.0
    monitor_bytes: int = 0
    drawn_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WatchPair:
    off: WatchSample
    on: WatchSample

    def overhead(self, key: str) -> float:
        """How much longer the watched run took, as a fraction of the other."""
        without = float(getattr(self.off, key))
        return float(getattr(self.on, key)) / without - 1.0 if without else 0.0


class Watcher:
    """``teegpu watch`` of ``run`` with ``options``, on a pseudo-terminal that somebody reads. Use it with ``with``."""

    def __init__(self, run: RunFolder, *options: str) -> None:
        self.drawn_bytes = 0
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "teegpu", "watch", run.id, *options],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                env={**os.environ, "TEEGPU_RECORD_DIR": str(run.path.parent), "TERM": "xterm-256color",
                     "PYTHONPATH": path},
            )  # fmt: skip
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._terminal = ours
        self._tail = b""
        self._reader = threading.Thread(target=self._read, name="terminal", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._terminal, 65536):
                self.drawn_bytes += len(data)
                self._tail = (self._tail + data)[-2000:]

    def wait(self) -> None:
        """Until it has drawn its first screen. Raises ``TeegpuError`` where it does not."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.drawn_bytes < _DRAWN_BYTES:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._tail.decode("utf-8", "replace").strip().splitlines()
                raise TeegpuError(f"the monitor does not start: {said[-1] if said else 'it says nothing'}")
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """What it has used of a processor so far."""
        # What follows the name, which is in brackets and may hold anything: state is the third field, utime the 14th.
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_bytes(self) -> int:
        """What it has read from files and elsewhere so far."""
        for line in Path(f"/proc/{self._process.pid}/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
        return 0

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def resident_bytes(self) -> int:
        return machine.resident_bytes(pid=self._process.pid)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        os.close(self._terminal)


class WatchBenchmark:
    """``pairs`` runs that are watched and as many that are not, with the settings ``base``.

    Raises ``UsageError`` for numbers that can't be, ``PromptError`` for more tokens than the model's context has, and
    what reading the model raises.
    """

    name = "watch"
    failures: tuple[str, ...] = ()

    def __init__(
        self, folder: ModelFolder, base: Config, *, prompt_tokens: int, decode_tokens: int, pairs: int
    ) -> None:
        for flag, value in (("--prompt-tokens", prompt_tokens), ("--decode-tokens", decode_tokens), ("--pairs", pairs)):
            if value < 1:
                raise UsageError(f"{flag} {value} is below the least, 1")
        self._folder = folder
        self._spec = read_spec(folder)
        if prompt_tokens + decode_tokens > self._spec.max_positions:
            raise PromptError(
                f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} are more than the context of "
                f"{self._spec.name}, which ends at {self._spec.max_positions}: give less"
            )
        self._config = Case(self.name).config(base, decode_tokens)
        self._prompt_tokens = prompt_tokens
        self._decode_tokens = decode_tokens
        self._count = pairs
        self._pairs: list[WatchPair] = []
        self._facts: dict[str, Any] = {}
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        notify(Progress(0, self._count, self.name, "loading"))
        try:
            with contextlib.ExitStack() as stack:
                store = stack.enter_context(beside_the_real_ones(self._config))
                runner = stack.enter_context(Runner(self._config, self._folder))
                self._facts = runner.report("running")
                self._measure(runner, store, notify)
        finally:
            torch.set_num_threads(threads_before)

    def _measure(self, runner: Runner, store: RunStore, notify: Notify) -> None:
        prompt = texts.prompt_of(runner.tokenizer, self._prompt_tokens)
        started = time.perf_counter()
        for number in range(-WARM_UP_PAIRS, self._count):
            # The first of a pair is the other one each time.
            made = {on: self._sample(runner, store, prompt, watched=on) for on in (bool(number % 2), not number % 2)}
            if number < 0:
                continue
            self._pairs.append(WatchPair(made[False], made[True]))
            done = number + 1
            left = (time.perf_counter() - started) / (done + WARM_UP_PAIRS) * (self._count - done)
            overhead = statistics.median(one.overhead("run") for one in self._pairs)
            notify(Progress(done, self._count, self.name, "pairs", f"overhead {overhead:+.2%}", left))

    def _sample(self, runner: Runner, store: RunStore, prompt: Sequence[int], *, watched: bool) -> WatchSample:
        runner.restart_summary()
        meta = {
            **{key: self._facts[key] for key in ("model", "settings", "tee", "server")},
            "clock": {"perf_counter_ns": time.perf_counter_ns(), "unix_ns": time.time_ns()},
        }
        record = store.create(Start.now().id, meta, events_bytes=self._config.record.events_mib * MIB)
        server_pid = runner.embedded.pid if runner.embedded is not None else None
        record.sink.sample = lambda: environment.sampled(server_pid)
        runner.log_to(record.sink)
        with contextlib.ExitStack() as stack:
            stack.callback(record.close)
            watcher = stack.enter_context(Watcher(record.folder)) if watched else None
            if watcher is not None:
                watcher.wait()
            cpu_before = watcher.cpu_seconds() if watcher is not None else 0.0
            drawn_before = watcher.drawn_bytes if watcher is not None else 0
            started = time.perf_counter()
            runner.generate(
                prompt, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
            )
            runner.recorder.flush()
            seconds = time.perf_counter() - started
            phases = runner.summary.phases
            prefill, decode = (phases.get(name, PhaseTotal()).seconds for name in (PREFILL, DECODE))
            sample = WatchSample(prefill, decode, seconds)
            if watcher is not None:
                used = watcher.cpu_seconds() - cpu_before
                drawn = watcher.drawn_bytes - drawn_before
                sample = WatchSample(prefill, decode, seconds, used, watcher.resident_bytes(), drawn)
            record.finish(runner.report("complete"))
            if record.failure is not None:
                raise RecordError(f"the run could not be recorded: {record.failure} in {store.root}")
        runner.log_to(None)
        store.remove(record.folder)
        return sample

    def document(self, status: str) -> dict[str, Any]:
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=str(self._facts.get("model", {}).get("digest", "")),
            settings={
                "prompt_tokens": self._prompt_tokens,
                "decode_tokens": self._decode_tokens,
                "pairs": self._count,
                "link": self._config.run.link,
                **{key: self._facts[key] for key in ("settings",) if self._facts},
            },
            notes=self._notes() if self._pairs else [],
            results=[self._row(key, label) for key, label in ROWS] if self._pairs else [],
            server=self._facts.get("server", {}),
            monitor=self._monitor() if self._pairs else {},
            pairs=[asdict(pair) for pair in self._pairs],
        )

    def _row(self, key: str, label: str) -> dict[str, Any]:
        overheads = [pair.overhead(key) for pair in self._pairs]
        return {
            "part": key,
            "label": label,
            "off_seconds": Spread.of(getattr(pair.off, key) for pair in self._pairs).to_json(),
            "on_seconds": Spread.of(getattr(pair.on, key) for pair in self._pairs).to_json(),
            "overhead": Spread.of(overheads).to_json(),
            "slower_pairs": sum(overhead > 0 for overhead in overheads),
            "pairs": len(overheads),
        }

    def _monitor(self) -> dict[str, Any]:
        """Its share of one core, its memory, and what it drew in a second."""
        watched = [pair.on for pair in self._pairs]
        return {
            "cpu_share": Spread.of(sample.monitor_seconds / sample.run for sample in watched).to_json(),
            "resident_bytes": Spread.of(sample.monitor_bytes for sample in watched).to_json(),
            "drawn_bytes_per_second": Spread.of(sample.drawn_bytes / sample.run for sample in watched).to_json(),
        }

    def _notes(self) -> list[str]:
        run, monitor = self._facts["settings"], self._monitor()
        share = monitor["cpu_share"]
        return [
            f"{run['prefill_plan']}/{run['decode_plan']}, {run['transport']}, {run['wire_dtype']} wire; threads: "
            f"{run['threads']['runner']} for the runner, {run['threads']['server'] or 'others'} for the server",
            f"the monitor ({SIZE[0]}×{SIZE[1]}, {self._config.monitor.refresh_hertz:g} a second) used "
            f"{share['median']:.1%} of a core ({share['min']:.1%} to {share['max']:.1%}) and "
            f"{human_bytes(monitor['resident_bytes']['median'])}, and drew "
            f"{human_bytes(monitor['drawn_bytes_per_second']['median'])} a second",
        ]
