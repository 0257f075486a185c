"""What the scripts share: flags, settings, a runner, runs that take turns, a table and a JSON file."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from teegpu import config, formats, machine
from teegpu.bench import document as doc
from teegpu.bench.samples import quantile
from teegpu.cli.models import find_model
from teegpu.config import Config
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.options import MIB
from teegpu.record.events import Event
from teegpu.record.store import RunStore, open_store
from teegpu.record.writer import RunWriter
from teegpu.runner import Runner
from teegpu.stats import environment
from teegpu.stats.environment import Start
from teegpu.tee.sequence import Generation

Made = TypeVar("Made")


class Script:
    """A benchmark's flags, and its result. ``model``: whether it needs one."""

    def __init__(self, description: str, *, model: bool = True) -> None:
        self.parser = argparse.ArgumentParser(description=description.strip().partition("\n")[0])
        if model:
            self.parser.add_argument("--model", help="as teegpu run takes it")
        self.parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there too")
        self.given = argparse.Namespace()
        self._started_at = doc.now()

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        self.given = self.parser.parse_args(arguments)
        return self.given

    def settings(self, **values: object) -> Config:
        """The settings in force with ``values``, by dotted key with ``__``; and this process takes its cores so."""
        machine.share_cores()
        flags = {name.replace("__", "."): value for name, value in values.items()}
        return config.load({"model.name": getattr(self.given, "model", None), **flags}, None)

    def tell(self, line: str) -> None:
        """Progress."""
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def finish(
        self,
        rows: Sequence[Sequence[str]],
        notes: Sequence[str],
        results: list[dict[str, Any]],
        *,
        folder: ModelFolder | None = None,
        status: str = "complete",
    ) -> None:
        """Prints ``rows`` (headings first) and ``notes`` as Markdown; ``results`` go to the file of ``--out``."""
        document = self.save(notes, results, folder=folder, status=status)
        where = document["machine"]
        said = [f"{where['cpu']}, {where['cores']} cores, teegpu {document['versions']['teegpu']}", *notes]
        sys.stdout.write(formats.markdown(rows) + "\n\n" + "".join(f"- {line}\n" for line in said))

    def save(
        self,
        notes: Sequence[str],
        results: list[dict[str, Any]],
        *,
        folder: ModelFolder | None = None,
        status: str,
    ) -> dict[str, Any]:
        """The result so far as a document, which goes to the file of ``--out``."""
        described = {name: value for name, value in vars(self.given).items() if name != "out"}
        document = doc.document(
            self.parser.prog,
            status=status,
            started_at=self._started_at,
            spec=None if folder is None else read_spec(folder),
            digest="",
            settings=described,
            notes=list(notes),
            results=results,
        )
        if self.given.out is not None:
            self.given.out.write_text(formats.as_json(document), encoding="utf-8")
        return document


def model_of(settings: Config) -> ModelFolder:
    return find_model(settings, quiet=False)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p95": quantile(values, 0.95), "min": min(values), "max": max(values)}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def in_pairs(count: int, measure: Callable[[bool], Made]) -> Iterator[tuple[Made, Made]]:
    """``count`` times (``measure(False)``, ``measure(True)``) after one to warm up; the first of a pair is the other
    one each time, so that what drifts hits both alike."""
    for number in range(-1, count):
        made = {on: measure(on) for on in (bool(number % 2), not number % 2)}
        if number >= 0:
            yield made[False], made[True]


def prompt_of(runner: Runner, tokens: int) -> list[int]:
    return texts.prompt_of(runner.tokenizer, tokens)


def generate(runner: Runner, prompt: Sequence[int], on_token: Callable[[int], bool] = lambda _: False) -> float:
    """One greedy run of ``run.max_tokens`` tokens. → seconds as its caller sees them."""
    sampler = runner.sampler()
    began = time.perf_counter()
    runner.generate(prompt, sampler=sampler, on_token=on_token, result=Generation(), ignore_end=True)
    runner.recorder.flush()
    return time.perf_counter() - began


@contextlib.contextmanager
def scratch_store(settings: Config) -> Iterator[RunStore]:
    """A store on the disk that records go to, gone afterwards. Its name is one that the real store sweeps up, should
    this process be killed."""
    root = open_store(settings).root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".bench-", suffix=".old", dir=root) as path:
        yield RunStore(Path(path))


def new_record(store: RunStore, runner: Runner, known: Mapping[str, Any], **options: Any) -> RunWriter:
    """A record that ``runner`` writes to from now on, as ``teegpu run`` makes one."""
    meta = {
        **{key: known[key] for key in ("model", "settings", "tee", "server")},
        "clock": {"perf_counter_ns": time.perf_counter_ns(), "unix_ns": time.time_ns()},
    }
    options = {"events_bytes": runner.config.record.events_mib * MIB} | options
    record = store.create(Start.now().id, meta, **options)
    server_pid = runner.embedded.pid if runner.embedded is not None else None

    def sample() -> Event:
        return environment.sampled(server_pid)

    record.sample = sample
    runner.log_to(record)
    return record
