"""What it costs a run to be recorded, or to be watched: with and without, in pairs.

All runs of ``watch`` are recorded: the monitor reads the record. Single runs scatter by more than either costs, so the
figures to go by are the shares of a processor: of the thread that writes the record, and of the monitor's process.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness import Script, generate, in_pairs, model_of, new_record, prompt_of, scratch_store, spread
from benchmarks.watcher import SIZE, Watcher
from teegpu.bench.cases import Case
from teegpu.record.events import DECODE, PREFILL, TextMade
from teegpu.record.store import RunStore
from teegpu.runner import Runner
from teegpu.stats.totals import PhaseTotal
from teegpu.units import human_bytes

ROWS = ("prefill", "decode", "run")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run, in seconds: ``run`` is from the prompt to the last token as the caller sees it. ``cpu_seconds`` of the
    recorder's thread, or of the monitor; ``bytes`` of the record on disk, or of the monitor's memory."""

    prefill: float
    decode: float
    run: float
    cpu_seconds: float = 0.0
    bytes: int = 0
    events: int = 0


def recorded(runner: Runner, store: RunStore, prompt: Sequence[int], on: bool) -> Sample:
    """A run with a record and its text, or without one."""
    runner.restart_summary()
    record = new_record(store, runner, runner.report("running"), save_text=True) if on else None
    if record is None:
        runner.log_to(None)
    stream, recorder = runner.tokenizer.stream(prompt), runner.recorder

    def on_token(token: int) -> bool:
        text = stream.push(token)
        if record is not None:
            recorder.remark(TextMade(recorder.clock_ns(), text))
        return False

    seconds = generate(runner, prompt, on_token)
    if record is None:
        return Sample(*_phases(runner), seconds)
    record.finish(runner.report("complete"))
    record.close()
    reader = record.folder.events()
    events = len(reader.read())
    reader.close()
    size = sum(path.stat().st_size for path in record.folder.path.iterdir())
    runner.log_to(None)
    return Sample(*_phases(runner), seconds, record.cpu_seconds, size, events)


def watched(runner: Runner, store: RunStore, prompt: Sequence[int], on: bool) -> Sample:
    """A run that is recorded, with a monitor or without one."""
    runner.restart_summary()
    record = new_record(store, runner, runner.report("running"))
    with contextlib.ExitStack() as stack:
        stack.callback(record.close)
        watcher = stack.enter_context(Watcher(record.folder.path)) if on else None
        before = 0.0
        if watcher is not None:
            watcher.wait()
            before = watcher.cpu_seconds()
        seconds = generate(runner, prompt)
        sample = Sample(*_phases(runner), seconds)
        if watcher is not None:
            used = watcher.cpu_seconds() - before
            sample = Sample(*_phases(runner), seconds, used, watcher.resident_bytes())
        record.finish(runner.report("complete"))
    runner.log_to(None)
    return sample


def _phases(runner: Runner) -> tuple[float, float]:
    phases = runner.summary.phases
    return tuple(phases.get(name, PhaseTotal()).seconds for name in (PREFILL, DECODE))  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("what", choices=("record", "watch"))
    script.parser.add_argument("--pairs", type=int, default=10)
    script.parser.add_argument("--prompt-tokens", type=int, default=512)
    script.parser.add_argument("--decode-tokens", type=int, default=64)
    script.parser.add_argument("--link", help="emulate one: rtt=5ms,bandwidth=1gbit")
    given = script.parse(arguments)
    settings = Case("pairs").config(script.settings(run__link=given.link), given.decode_tokens)
    folder = model_of(settings)
    measure = recorded if given.what == "record" else watched
    pairs: list[tuple[Sample, Sample]] = []
    with scratch_store(settings) as store, Runner(settings, folder) as runner:
        prompt = prompt_of(runner, given.prompt_tokens)
        for pair in in_pairs(given.pairs, lambda on: measure(runner, store, prompt, on)):
            pairs.append(pair)
            script.tell(f"pair {len(pairs)} of {given.pairs}: {pair[0].run:.3f} s and {pair[1].run:.3f} s")
    rows = [["seconds", "without", f"with {given.what}", "overhead", "of pairs", "slower pairs"]]
    results: list[dict[str, Any]] = []
    for key in ROWS:
        off, on = ([float(getattr(each, key)) for each in side] for side in zip(*pairs, strict=True))
        overhead = spread([with_it / without - 1 for without, with_it in zip(off, on, strict=True)])
        slower = sum(with_it > without for without, with_it in zip(off, on, strict=True))
        rows.append(
            [
                key,
                f"{statistics.median(off):.3f}",
                f"{statistics.median(on):.3f}",
                f"{overhead['median']:+.2%}",
                f"{overhead['min']:+.1%} to {overhead['max']:+.1%}",
                f"{slower} of {len(pairs)}",
            ]
        )
        results.append({"part": key, "off": spread(off), "on": spread(on), "overhead": overhead})
    results.append({"part": "pairs", "samples": [[asdict(side) for side in pair] for pair in pairs]})
    share = statistics.median(on.cpu_seconds / on.run for _, on in pairs)
    size = human_bytes(statistics.median(on.bytes for _, on in pairs))
    if given.what == "record":
        events = statistics.median(on.events for _, on in pairs)
        note = f"the recorder's thread used {share:.2%} of a processor; {events:,.0f} events a run, {size} on disk"
    else:
        rate = f"{settings.monitor.refresh_hertz:g} a second"
        note = f"the monitor ({SIZE[0]}×{SIZE[1]}, {rate}) used {share:.1%} of a processor and {size}"
    script.finish(rows, [note], results, folder=folder)


if __name__ == "__main__":
    main()
