"""``teegpu bench recording``: what it costs a run to be recorded.

The same prompt with the record on and off, in pairs, each pair in the other order than the one before: whatever drifts
hits both alike. One process and one connection serve all, so that nothing else differs. On means everything: events,
samples of memory, and the text too.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from teegpu.bench import document as doc
from teegpu.bench.cases import Case
from teegpu.bench.measure import Notify, Progress
from teegpu.bench.samples import Spread
from teegpu.config import Config
from teegpu.errors import PromptError, RecordError, UsageError
from teegpu.metrics import environment
from teegpu.metrics.events import DECODE, PREFILL, TextMade
from teegpu.metrics.start import Start
from teegpu.metrics.store import RunStore, open_store
from teegpu.metrics.summary import PhaseTotal
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.options import MIB
from teegpu.tee.generate import Generation
from teegpu.tee.runner import Runner
from teegpu.units import human_bytes

WARM_UP_PAIRS = 1

ROWS = (("prefill", "prefill"), ("decode", "decode"), ("run", "both"))
"""Key and name of what is compared."""


@dataclass(frozen=True, slots=True)
class RecordingSample:
    """One run. ``run`` is from the prompt to the last token as the caller sees it. The rest is of a run that was
    recorded: events, bytes on disk before and after compression, what the recorder's thread used of a processor, and
    what concluding the record took after the run."""

    prefill: float
    decode: float
    run: float
    events: int = 0
    plain_bytes: int = 0
    compressed_bytes: int = 0
    thread_seconds: float = 0.0
    conclude_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    off: RecordingSample
    on: RecordingSample

    def overhead(self, key: str) -> float:
        """How much longer the recorded run took, as a fraction of the other."""
        without = float(getattr(self.off, key))
        return float(getattr(self.on, key)) / without - 1.0 if without else 0.0


class RecordingBenchmark:
    """``pairs`` runs with a record and as many without, with the settings ``base``.

    Raises ``UsageError`` for numbers that can't be, ``PromptError`` for more tokens than the model's context has, and
    what reading the model raises.
    """

    name = "recording"
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
        self._config = Case("recording").config(base, decode_tokens)
        self._prompt_tokens = prompt_tokens
        self._decode_tokens = decode_tokens
        self._count = pairs
        self._pairs: list[Pair] = []
        self._facts: dict[str, Any] = {}
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        notify(Progress(0, self._count, "recording", "loading"))
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
            order = (False, True) if number % 2 else (True, False)
            made = {on: self._sample(runner, store if on else None, prompt) for on in order}
            pair = Pair(made[False], made[True])
            if number < 0:
                continue
            self._pairs.append(pair)
            done = number + 1
            left = (time.perf_counter() - started) / (done + WARM_UP_PAIRS) * (self._count - done)
            overhead = statistics.median(one.overhead("run") for one in self._pairs)
            notify(Progress(done, self._count, "recording", "pairs", f"overhead {overhead:+.2%}", left))

    def _sample(self, runner: Runner, store: RunStore | None, prompt: Sequence[int]) -> RecordingSample:
        runner.restart_summary()
        record = None
        if store is not None:
            record = store.create(Start.now().id, {}, events_bytes=self._config.record.events_mib * MIB, save_text=True)
            server_pid = runner.embedded.pid if runner.embedded is not None else None
            record.sink.sample = lambda: environment.sampled(server_pid)
        runner.log_to(record.sink if record is not None else None)
        stream, recorder = runner.tokenizer.stream(prompt), runner.recorder

        def on_token(token: int) -> bool:
            text = stream.push(token)
            if record is not None:
                recorder.remark(TextMade(recorder.clock_ns(), text))
            return False

        started = time.perf_counter()
        runner.generate(prompt, sampler=runner.sampler(), on_token=on_token, result=Generation(), ignore_end=True)
        recorder.flush()
        seconds = time.perf_counter() - started
        phases = runner.summary.phases
        prefill, decode = (phases.get(name, PhaseTotal()).seconds for name in (PREFILL, DECODE))
        if record is None:
            return RecordingSample(prefill, decode, seconds)
        started = time.perf_counter()
        record.finish(runner.report("complete"))
        plain = sum(path.stat().st_size for path in record.folder.path.glob("events.*"))
        record.close()
        concluded = time.perf_counter() - started
        if record.failure is not None:
            raise RecordError(f"the run could not be recorded: {record.failure} in {store.root if store else ''}")
        reader = record.folder.events()
        events = len(reader.read())
        reader.close()
        compressed = sum(path.stat().st_size for path in record.folder.path.glob("events.*"))
        return RecordingSample(prefill, decode, seconds, events, plain, compressed, record.sink.cpu_seconds, concluded)

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

    def _notes(self) -> list[str]:
        def median(key: str) -> float:
            return statistics.median(float(getattr(pair.on, key)) for pair in self._pairs)

        run = self._facts["settings"]
        thread, whole = median("thread_seconds"), median("run")
        return [
            f"{run['prefill_plan']}/{run['decode_plan']}, {run['transport']}, {run['wire_dtype']} wire; threads: "
            f"{run['threads']['runner']} for the runner, {run['threads']['server'] or 'others'} for the server",
            f"{median('events'):,.0f} events a run; {human_bytes(int(median('plain_bytes')))} on disk, "
            f"{human_bytes(int(median('compressed_bytes')))} when compressed",
            f"the recorder's thread used {thread * 1e3:.1f} ms of a processor in a run of {whole:.3f} s "
            f"({thread / whole:.2%})",
            f"concluding the record took {median('conclude_seconds') * 1e3:.0f} ms after the run",
        ]


@contextlib.contextmanager
def beside_the_real_ones(config: Config) -> Any:
    """A store on the disk that records go to, gone afterwards. Its name is one that the real store sweeps up, should
    this process be killed. Raises ``RecordError``."""
    root = open_store(config).root
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(prefix=".bench-", suffix=".old", dir=root)
    except OSError as error:
        raise RecordError(f"no record can be kept in {root}: {error.strerror or error} (record.dir)") from None
    with folder as path:
        yield RunStore(Path(path))
