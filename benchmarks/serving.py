"""What ``teegpu api`` promises of itself while many ask at once; each part is a subcommand.

The endpoint is a process of its own, with an embedded server in ``--dtype``; the load is that of ``teegpu bench
serve``, from this process. ``--add`` puts the samples beside those that ``--out`` has already, so that a long
measurement can be had in pieces. Exits with 9 where a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import Script, model_of, ms, spread
from benchmarks.soak import growth
from teegpu import children, facts, machine
from teegpu.api.asked import completion
from teegpu.api.choice import Choice
from teegpu.bench import document as doc
from teegpu.bench import load
from teegpu.bench.load import Load, Took
from teegpu.bench.samples import quantile
from teegpu.cli.common import sigterm_as_interrupt
from teegpu.config import Config
from teegpu.errors import TeegpuError, ThresholdError, UsageError
from teegpu.kernels import DTYPES
from teegpu.model import random
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore, load_matrix
from teegpu.record.events import Arrived, Event, Left, Stepped
from teegpu.record.store import RunStore
from teegpu.tee.plans import LM_HEAD, programs
from teegpu.tee.sampling import SamplingOptions
from teegpu.units import human_bytes

Samples = list[dict[str, Any]]

STREAMS: Final = 16
"""Beside which a long prompt arrives, or somebody goes."""

SETTLED_TOKENS: Final = 4
"""Of each stream, before anything is measured."""

BEFORE_TOKENS: Final = 16
OVER: Final = "over its bound: "
MAX_TIMES: Final = 3.0
MAX_GROWTH: Final = 0.02
MAX_OWN: Final = 0.03
OWN_CLIENTS: Final = 32
OWN_STEPS: Final = 60

_START_SECONDS: Final = 120.0
_END_SECONDS: Final = 30.0
_WAIT_SECONDS: Final = 120.0
_PRODUCTS_TIMES: Final = 3
_PREFIX_MIB: Final = 4
"""For the tiny model: kept prefixes fill it within the first requests, and memory is flat from then on."""


class Others:
    """What other processes than this one and those that it started do meanwhile."""

    def __init__(self) -> None:
        self._seconds, self._began = self._now(), time.perf_counter()

    @staticmethod
    def _now() -> float:
        ours, left = 0.0, [os.getpid()]
        while left:
            pid = left.pop()
            with contextlib.suppress(OSError):  # it may have ended since
                for task in Path(f"/proc/{pid}/task").iterdir():
                    left += map(int, (task / "children").read_text().split())
                ours += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return machine.machine_cpu_seconds()[1] - ours / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float:
        """How many cores they had since this was made."""
        return max(0.0, self._now() - self._seconds) / (time.perf_counter() - self._began)


class Served:
    """``teegpu api`` as its operator starts it, with a record of its own. Use it with ``with``: leaving ends it, and
    then ``events`` are those of its record."""

    def __init__(self, folder: ModelFolder, flags: Sequence[object], **settings: object) -> None:
        self._state = tempfile.TemporaryDirectory(prefix="teegpu-serving-")
        arguments = ["-m", "teegpu", "api", "--config", os.devnull, "--model", folder.path, "--listen", "127.0.0.1:0",
                     "--metrics-listen", "", *flags]  # fmt: skip
        given = {name: value for name, value in os.environ.items() if not name.startswith("TEEGPU_")}
        given |= {f"TEEGPU_{name.upper()}": str(value) for name, value in settings.items()}
        self._child = children.Child(
            [str(argument) for argument in arguments],
            given=given | {"XDG_STATE_HOME": self._state.name},
            stdout=subprocess.DEVNULL,
            wait_seconds=_END_SECONDS,
        )
        self.events: list[Event] = []
        try:
            self.url = self._ready()
        except BaseException:
            self._child.close(politely=False)
            self._state.cleanup()
            raise

    def _ready(self) -> str:
        deadline = time.perf_counter() + _START_SECONDS
        while time.perf_counter() < deadline and not self._child.gone:
            for line in self._child.said().splitlines():
                if line.startswith("teegpu api ready at "):
                    return line.split()[-1]
            time.sleep(0.05)
        raise TeegpuError(f"the endpoint did not start: {self._child.last_words()}")

    @property
    def resident_bytes(self) -> int:
        return machine.resident_bytes(pid=self._child.pid)

    @property
    def loop_seconds(self) -> float:
        """Of a processor, that the event loop's thread has used: the first one of the process."""
        return int(Path(f"/proc/{self._child.pid}/task/{self._child.pid}/schedstat").read_text().split()[0]) / 1e9

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._child.process.send_signal(signal.SIGTERM)
            self._child.process.wait(_END_SECONDS)
            reader = RunStore(Path(self._state.name) / "teegpu" / "runs").find("last").events()
            with contextlib.closing(reader):
                self.events = reader.read()
        finally:
            self._child.close(politely=False)
            self._state.cleanup()


@dataclass(frozen=True)
class Measured:
    """What a part measures with: ``served`` and the load on it; ``numbers``: those of prompts that nobody asked yet."""

    served: Served
    folder: ModelFolder
    wanted: Load
    numbers: Iterator[int]

    @contextlib.asynccontextmanager
    async def streams(self, count: int, max_tokens: int) -> Any:
        """``count`` streams, that have all begun; leaving gives them up."""
        streams = [Took() for _ in range(count)]
        asked = replace(self.wanted, max_tokens=max_tokens)
        tasks = [asyncio.create_task(load.ask(asked, next(self.numbers), took)) for took in streams]
        try:
            await made(streams, SETTLED_TOKENS)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [took.error for took in streams if took.error]
        if errors:
            raise TeegpuError(f"a stream failed: {errors[0]}")


async def made(streams: Sequence[Took], more: int) -> None:
    """Waits until each of ``streams`` has made that many pieces more."""
    counts = [len(took.pieces) + more for took in streams]
    async with asyncio.timeout(_WAIT_SECONDS):
        while any(len(took.pieces) < count for took, count in zip(streams, counts, strict=True)):
            await asyncio.sleep(0.005)


# Clients: what so many bring together


class Products:
    """The products of the model by themselves, on all cores: what no engine on this machine is quicker than."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype) -> None:
        spec = read_spec(folder)
        self._dtype = dtype
        with contextlib.closing(WeightStore(folder, spec)) as store:
            self._layers = [load_matrix(store, spec, one.weights, dtype)
                            for layer in programs(spec, facts.LOCAL) for one in layer.plain]  # fmt: skip
            self._head = load_matrix(store, spec, LM_HEAD.weights, dtype)

    def seconds(self, rows: int, wanted: int) -> float:
        """Of ``rows`` rows, ``wanted`` of which go through lm_head too."""
        found = []
        inputs = {matrix.shape[1]: torch.ones(rows, matrix.shape[1], dtype=self._dtype) for matrix in self._layers}
        last = torch.ones(wanted, self._head.shape[1], dtype=self._dtype)
        for _ in range(_PRODUCTS_TIMES):
            began = time.perf_counter()
            for matrix in self._layers:
                matrix.product(inputs[matrix.shape[1]])
            self._head.product(last)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def throughput(self, count: int, prompt_tokens: int, max_tokens: int) -> float:
        """Tokens/s of ``count`` clients, all of whom are read, two prompts a step, and then generate together."""
        together = min(count, 2)
        read = self.seconds(together * prompt_tokens, together) * count / together
        return count * max_tokens / (read + (max_tokens - 1) * self.seconds(count, count))


def clients(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    counts = [int(part) for part in given.clients.split(",")]
    products = None if given.privacy or given.link else Products(measured.folder, DTYPES[given.dtype])
    for _ in range(given.repeats):
        for count in counts:
            asked = count * given.requests
            first = next(itertools.islice(measured.numbers, asked - 1, None)) - asked + 1
            took, seconds = asyncio.run(load.run(measured.wanted, count, asked, first))
            sample = load.figures(count, took, seconds)
            if products is not None:
                tokens = round(statistics.median(one.prompt_tokens for one in took))
                sample["products_throughput"] = products.throughput(count, tokens, measured.wanted.max_tokens)
            yield sample


def told_of_clients(samples: Samples) -> tuple[list[list[str]], list[str]]:
    counts = sorted({sample["max_concurrency"] for sample in samples})
    found = {count: [sample for sample in samples if sample["max_concurrency"] == count] for count in counts}
    rates = {count: statistics.median(one["output_throughput"] for one in found[count]) for count in counts}
    rows = [["clients", "repeats", "tokens/s", "min–max", "of one", "first token, ms", "between tokens, ms", "p95",
             "the products alone, tokens/s"]]  # fmt: skip
    for count in counts:
        each = [sample["output_throughput"] for sample in found[count]]
        times = [
            f"{statistics.median(sample[key] for sample in found[count]):.0f}"
            for key in ("p50_ttft_ms", "p50_itl_ms", "p95_itl_ms")
        ]
        rows.append([str(count), str(len(each)), f"{rates[count]:.1f}", f"{min(each):.1f}–{max(each):.1f}",
                     f"{rates[count] / rates[counts[0]]:.1f} ×", *times, _alone(found[count])])  # fmt: skip
    failed = sum(sample["failed"] for sample in samples)
    return rows, [f"{OVER}{failed} requests failed"] if failed else []


def _alone(samples: Samples) -> str:
    each = [sample["products_throughput"] for sample in samples if "products_throughput" in sample]
    return f"{statistics.median(each):.1f}" if each else "–"


# Arrival: what those who generate wait while a long prompt is read


def arrival(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    for _ in range(given.repeats):
        yield asyncio.run(_arrival(given.long_tokens, measured))


async def _arrival(long_tokens: int, measured: Measured) -> dict[str, Any]:
    long = replace(measured.wanted, prompt_tokens=long_tokens, max_tokens=1)
    async with measured.streams(STREAMS, 400) as streams:
        began = time.perf_counter()
        await made(streams, BEFORE_TOKENS)
        took = Took()
        await load.ask(long, next(measured.numbers), took)
        over = time.perf_counter()
        await made(streams, 1)
    if took.error:
        raise TeegpuError(f"the long prompt failed: {took.error}")
    gaps = [pair for one in streams for pair in itertools.pairwise(one.pieces)]
    return {
        "prompt_tokens": took.prompt_tokens,
        "read_seconds": over - took.sent,
        "before_seconds": [to - since for since, to in gaps if began <= since and to <= took.sent],
        "during_seconds": [to - since for since, to in gaps if to > took.sent and since < over],
    }


def told_of_arrival(samples: Samples) -> tuple[list[list[str]], list[str]]:
    rows = [["between tokens, ms", "median", "p95"]]
    found = {}
    for key, name in (("before_seconds", "16 streams alone"), ("during_seconds", "while the prompt is read")):
        each = [seconds for sample in samples for seconds in sample[key]]
        found[key] = (statistics.median(each), quantile(each, 0.95))
        rows.append([name, *(f"{seconds * 1e3:.0f}" for seconds in found[key])])
    times = [during / before for before, during in zip(*found.values(), strict=True)]
    rows.append(["times", *(f"{one:.2f} ×" for one in times)])
    tokens = statistics.median(sample["prompt_tokens"] for sample in samples)
    seconds = statistics.median(sample["read_seconds"] for sample in samples)
    notes = [f"{tokens:,.0f} tokens, first token after {seconds:.2f} s; {len(samples)} prompts"]
    if max(times) > MAX_TIMES:
        notes.append(f"{OVER}{max(times):.2f} times, where {MAX_TIMES:g} are promised")
    return rows, notes


# Memory: flat over thousands of requests


def memory(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    yield {"readings": asyncio.run(_memory(given.count, measured))}


async def _memory(count: int, measured: Measured) -> Samples:
    wanted = replace(measured.wanted, prompt_tokens=16, max_tokens=8)
    found: Samples = []
    done = failed = 0
    while done < count:
        took, _ = await load.run(wanted, 32, min(max(1, count // 100), count - done), done)
        done, failed = done + len(took), failed + sum(bool(one.error) for one in took)
        found.append({"requests": done, "failed": failed, "resident_bytes": measured.served.resident_bytes})
    return found


def told_of_memory(samples: Samples) -> tuple[list[list[str]], list[str]]:
    readings = samples[-1]["readings"]
    tenth = max(1, len(readings) // 10)
    rows = [["requests", "memory"]]
    for reading in readings[tenth - 1 :: tenth]:
        rows.append([f"{reading['requests']:,}", human_bytes(reading["resident_bytes"])])
    grown = growth([reading["resident_bytes"] for reading in readings])
    notes = [f"growth after warming up: {'unknown' if grown is None else f'{grown:+.2%}'}"]
    if grown is not None and abs(grown) > MAX_GROWTH:
        notes.append(f"{OVER}{grown:+.2%}, where {MAX_GROWTH:.0%} are promised")
    if failed := readings[-1]["failed"]:
        notes.append(f"{OVER}{failed} requests failed")
    return rows, notes


# Own: what the endpoint takes of a step beside the engine's work


def own(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    text = text_seconds(measured.folder)
    for _ in range(given.repeats):
        yield asyncio.run(_own(measured)) | {"text_seconds": text}


async def _own(measured: Measured) -> dict[str, Any]:
    async with measured.streams(OWN_CLIENTS, 400) as streams:
        began, used = time.perf_counter_ns(), measured.served.loop_seconds
        await made(streams, OWN_STEPS)
        used, ended = measured.served.loop_seconds - used, time.perf_counter_ns()
    return {"began_ns": began, "ended_ns": ended, "loop_seconds": used}


def own_of_events(sample: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """``sample`` with its steps, and the times between them."""
    steps = [
        event
        for event in events
        if isinstance(event, Stepped) and sample["began_ns"] <= event.began_ns and event.at_ns <= sample["ended_ns"]
    ]
    return sample | {
        "rows": [len(step.rows) for step in steps],
        "step_seconds": [(step.at_ns - step.began_ns) / 1e9 for step in steps],
        "between_seconds": [(after.began_ns - step.at_ns) / 1e9 for step, after in itertools.pairwise(steps)],
    }


def text_seconds(folder: ModelFolder) -> list[float]:
    """What it takes to make what is sent of a token, by itself, a thousand times."""
    with contextlib.closing(Tokenizer(folder)) as tokenizer:
        body = {"prompt": "a", "stream": True, "max_tokens": 2000}
        asked = completion(body, SamplingOptions(), padded=True)
        choice = Choice(0, [], asked, 2000, tokenizer, "", lambda _: None)
        ids, found = tokenizer.encode_raw(load.prompt(Load("", "", 1024, 0), 0))[:1000], []
        for token in ids:
            began = time.perf_counter()
            choice.sequence.on_token(token)
            found.append(time.perf_counter() - began)
        return found


def told_of_own(samples: Samples) -> tuple[list[list[str]], list[str]]:
    step = statistics.median(seconds for sample in samples for seconds in sample["step_seconds"])
    between = statistics.median(seconds for sample in samples for seconds in sample["between_seconds"])
    text = OWN_CLIENTS * statistics.median(seconds for sample in samples for seconds in sample["text_seconds"])
    wall = sum(sample["ended_ns"] - sample["began_ns"] for sample in samples) / 1e9
    loop = step * sum(sample["loop_seconds"] for sample in samples) / wall
    rows = [["of a step", "ms", "share"], [f"a step of {OWN_CLIENTS}", ms(step), "100 %"]]
    for name, seconds in (("between two steps", between), (f"text of {OWN_CLIENTS} tokens", text)):
        rows.append([name, ms(seconds), f"{seconds / step:.2%}"])
    rows.append(["events of streams, in a thread beside it", ms(loop), f"{loop / step:.2%}"])
    total = (between + text) / step
    notes = [f"what a step waits for: {total:.2%}; with the thread's processor time {total + loop / step:.2%}"]
    if total > MAX_OWN:
        notes.append(f"{OVER}{total:.2%}, where {MAX_OWN:.0%} are promised")
    return rows, notes


# Gone: how soon a place is free when a client has left

GOING: Final = {"prefill": (1024, 0.6), "decode": (16, 2.5)}
"""Tokens of the prompt, and after how many seconds its client goes."""


def gone(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    for _ in range(given.repeats):
        yield {"clients": asyncio.run(_gone(measured))}


async def _gone(measured: Measured) -> Samples:
    found: Samples = []
    async with measured.streams(STREAMS - 1, 1000) as streams:
        for (where, (tokens, seconds)), stream in itertools.product(GOING.items(), (True, False)):
            asked = replace(measured.wanted, prompt_tokens=tokens, max_tokens=1000)
            sent_ns = time.perf_counter_ns()
            task = asyncio.create_task(load.ask(asked, next(measured.numbers), Took(), stream=stream))
            await asyncio.sleep(seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found.append({"where": where, "stream": stream, "sent_ns": sent_ns, "gone_ns": time.perf_counter_ns()})
            await made(streams, 3)
    return found


def gone_of_events(sample: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    return sample | {"clients": [_freed(client, events) for client in sample["clients"]]}


def _freed(client: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """``client`` with when its place was free, and the steps that began after it had gone and computed it."""
    number = next(e.request for e in events if isinstance(e, Arrived) and e.at_ns >= client["sent_ns"])
    steps = [e for e in events if isinstance(e, Stepped) and any(row[0] == number for row in e.rows)]
    left = next(e for e in events if isinstance(e, Left) and e.request == number)
    tokens = sum(row[2] for e in steps for row in e.rows if row[0] == number)
    if left.reason != "abort" or not steps or (tokens > 0) != (client["where"] == "decode"):
        raise TeegpuError(f"a client that was to go in {client['where']} went at another moment ({left.reason})")
    return client | {
        "freed_seconds": (left.at_ns - client["gone_ns"]) / 1e9,
        "step_seconds": statistics.median((e.at_ns - e.began_ns) / 1e9 for e in steps),
        "steps_after": sum(e.began_ns > client["gone_ns"] for e in steps),
    }


def told_of_gone(samples: Samples) -> tuple[list[list[str]], list[str]]:
    clients = [client for sample in samples for client in sample["clients"]]
    rows = [
        ["the client goes", "its place is free after, ms: median", "max", "a step, ms", "steps begun since, with it"]
    ]
    for where, stream in itertools.product(GOING, (True, False)):
        mine = [client for client in clients if (client["where"], client["stream"]) == (where, stream)]
        freed, step = (spread([client[key] for client in mine]) for key in ("freed_seconds", "step_seconds"))
        rows.append([f"in {where}, {'streaming' if stream else 'not streaming'}", f"{freed['median'] * 1e3:.0f}",
                     f"{freed['max'] * 1e3:.0f}", f"{step['median'] * 1e3:.0f}",
                     str(max(client["steps_after"] for client in mine))])  # fmt: skip
    most = max(client["steps_after"] for client in clients)
    # The one step that may begin while the news is on its way from the socket.
    return rows, [f"{OVER}{most} steps, where one is promised"] if most > 1 else []


# Alone: one client of the endpoint beside 'teegpu run', with the same prompt


def alone(given: Any, measured: Measured) -> Iterator[dict[str, Any]]:
    flags = [
        *flags_of(given)[2:],
        "--raw",
        "--ignore-eos",
        "--max-tokens",
        given.max_tokens,
        "--json",
        "-q",
        "--no-record",
    ]
    for repeat in range(given.repeats):
        number = next(measured.numbers)
        for way in ("run", "api")[:: 1 if repeat % 2 else -1]:
            if way == "run":
                text = load.prompt(measured.wanted, number)
                took = _run(["run", "--config", os.devnull, "--model", measured.folder.path, *flags, text])
            else:
                (one,), seconds = asyncio.run(load.run(measured.wanted, 1, 1, number))
                figures = load.figures(1, [one], seconds)
                took = {"first_seconds": figures["p50_ttft_ms"] / 1e3, "token_seconds": figures["p50_tpot_ms"] / 1e3}
            yield {"way": way, **took}


def _run(arguments: Sequence[object]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "teegpu", *map(str, arguments)],
        capture_output=True, text=True, check=True, env=children.environment(),
    )  # fmt: skip
    document = json.loads(done.stdout)
    decode = document["phases"]["decode"]
    return {"first_seconds": document["latency"]["ttft_seconds"], "token_seconds": decode["seconds"] / decode["tokens"]}


def told_of_alone(samples: Samples) -> tuple[list[list[str]], list[str]]:
    rows = [["one prompt", "repeats", "first token, ms", "ms a token: median", "min", "max"]]
    for way in ("run", "api"):
        mine = [sample for sample in samples if sample["way"] == way]
        if mine:
            first = statistics.median(sample["first_seconds"] for sample in mine)
            token = spread([sample["token_seconds"] for sample in mine])
            rows.append([way, str(len(mine)), ms(first), *(ms(token[key]) for key in ("median", "min", "max"))])
    return rows, []


# All of it


@dataclass(frozen=True)
class Part:
    measure: Callable[[Any, Measured], Iterator[dict[str, Any]]]
    told: Callable[[Samples], tuple[list[list[str]], list[str]]]
    of_events: Callable[[dict[str, Any], Sequence[Event]], dict[str, Any]] = lambda sample, _: sample
    timed: bool = True
    settings: Mapping[str, object] = field(default_factory=dict)


PARTS: Final = {
    "clients": Part(clients, told_of_clients),
    "arrival": Part(arrival, told_of_arrival),
    "memory": Part(memory, told_of_memory, timed=False, settings={"run_prefix_cache_mib": _PREFIX_MIB}),
    "alone": Part(alone, told_of_alone),
    "own": Part(own, told_of_own, own_of_events),
    "gone": Part(gone, told_of_gone, gone_of_events),
}


def flags_of(given: Any) -> list[object]:
    flags: list[object] = ["--sequences", 32]
    if given.part == "memory":
        return [*flags, "--plan", "fused"]
    flags += ["--plan", "attention" if given.privacy else "fused"]
    flags += ["--privacy", given.privacy] if given.privacy else ["--dtype", given.dtype]
    return [*flags, *(["--link", given.link] if given.link else [])]


def before(given: Any, described: dict[str, Any]) -> Samples:
    """The samples of the same measurement that are there already."""
    if not given.add or given.out is None or not given.out.exists():
        return []
    found = doc.read(given.out)
    if found["settings"] != described:
        raise UsageError(f"{given.out} has samples of another measurement: {found['settings']}")
    return [dict(sample) for sample in found["results"]]


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    add = script.parser.add_argument
    add("part", choices=PARTS)
    add("--repeats", type=int, default=5)
    add("--clients", default="1,16,32", help="numbers of clients that take turns (clients)")
    add("--requests", type=int, default=1, help="of each client and repeat (clients)")
    add("--prompt-tokens", type=int, default=128)
    add("--max-tokens", type=int, default=64)
    add("--long-tokens", type=int, default=1160, help="about, of the prompt that arrives: 1,024 (arrival)")
    add("--count", type=int, default=10_000, help="requests (memory)")
    add("--dtype", choices=DTYPES, default="bf16", help="of the server; fp32 where the processor has no other")
    add("--link", help="emulate one: rtt=5ms,bandwidth=1gbit")
    add("--privacy", choices=("two-server", "pads"))
    add("--other-cores", type=float, default=0.15, help="what is timed while others had more of them is left out")
    add("--add", action="store_true", help="beside the samples that are in --out already")
    given = script.parse(arguments)
    settings: Config = script.settings()
    part = PARTS[given.part]
    with contextlib.ExitStack() as stack:
        if given.part == "memory" and given.model is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = random.write("layers=2,hidden=64,heads=4,kv_heads=2,intermediate=128", scratch / "tiny")
        else:
            folder = model_of(settings)
        described = {name: value for name, value in vars(given).items() if name not in ("out", "add", "repeats")}
        samples = before(given, described)
        new: Samples = []
        with Served(folder, flags_of(given), **part.settings) as served:
            wanted = Load(served.url, folder.name, given.prompt_tokens, given.max_tokens)
            measured = Measured(served, folder, wanted, itertools.count(1000 * len(samples)))
            # The first requests make kernels, buffers and the programs that a server remembers.
            asyncio.run(load.run(replace(wanted, max_tokens=4), 4, 4, 10**6))
            others = Others()
            try:
                with sigterm_as_interrupt():
                    for sample in part.measure(given, measured):
                        cores = others.cores()
                        left_out = part.timed and cores > given.other_cores
                        script.tell(f"{given.part}: {len(new)}, others {cores:.2f} cores{', left out' * left_out}")
                        if not left_out:
                            new.append(sample | {"other_cores": cores})
                        others = Others()
            except KeyboardInterrupt:
                script.tell(f"interrupted: {len(new)} samples are kept")
    samples += [part.of_events(sample, served.events) for sample in new]
    if not samples:
        raise TeegpuError("nothing was measured: other processes had the cores all the time")
    rows, notes = part.told(samples)
    script.given = argparse.Namespace(**described, out=given.out)
    script.finish(rows, notes, samples)
    if any(note.startswith(OVER) for note in notes):
        sys.exit(ThresholdError.exit_code)


if __name__ == "__main__":
    main()
