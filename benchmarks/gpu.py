"""What a CUDA device brings, within minutes: products modulo 2**32 by each way beside bf16's; runs of a large model.

Each part is a process of its own. One that has used up its time is ended, and what it had measured is kept; ``--out``
has the result after each. The model is made here, with random weights, while products are measured. Its servers are
there for all runs, on the one device.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import Script
from teegpu import facts, machine, ringkernels
from teegpu.errors import TeegpuError
from teegpu.model.folder import ModelFolder
from teegpu.model.shapes import parse, spec_of
from teegpu.model.spec import GROUPS, ModelSpec
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.tee.engine import Capacity
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Sequence as Tokens

Results = Iterator[dict[str, Any]]

PRODUCTS: Final = "products"
GRAPHS: Final = "graphs"
_REPEATS: Final = 7
_COLD_BYTES: Final = 2**28
"""Of copies of a matrix that take turns, more than a device's caches hold: as in a model."""
_CORNER: Final = 64
_GRAPH_ROWS: Final = (1, 8)
_GRAPH_SIZE: Final = 4096
_WARM_UP_TOKENS: Final = 2
_END_SECONDS: Final = 5.0
_SERVER_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Mode:
    """A run, with so many servers; of the tokens that are asked for one in ``cut`` is read or made."""

    plan: str
    servers: int
    privacy: str = "none"
    cut: int = 1


MODES: Final = {
    "fused": Mode(facts.FUSED.name, 1),
    "two-server": Mode(facts.ATTENTION.name, 2, facts.TWO_SERVER.name),
    "local": Mode(facts.LOCAL.name, 0),
    # What is made ahead takes the TEE as long as the products themselves.
    "pads": Mode(facts.ATTENTION.name, 1, facts.PADS.name, cut=8),
}
SECONDS: Final = {PRODUCTS: 150.0, GRAPHS: 40.0, "fused": 60.0, "two-server": 120.0, "local": 70.0, "pads": 90.0}
"""What each part may take."""


# Products


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Those of a layer and lm_head, (outputs, columns); neighbours with one input are one."""
    found = {}
    for group in GROUPS:
        shapes = [spec.weights[f"layers.0.{projection}"] for projection in group]
        found[" ".join(group)] = (sum(rows for rows, _ in shapes), shapes[0][1])
    rows, columns = spec.weights["lm_head"]
    return found | {"lm_head": (rows, columns)}


def products(given: Any) -> Results:
    device = torch.device(given.device)
    if device.type == "cuda":
        yield {"part": PRODUCTS, "device": torch.cuda.get_device_name(device), "triton": _triton()}
    began = time.perf_counter()
    chosen = ringkernels.measured(device)
    yield {"part": PRODUCTS, "measured": chosen, "seconds": time.perf_counter() - began}
    for name, (outputs, columns) in matrices(spec_of(parse(given.shape), "")).items():
        for rows in given.rows:
            ways = compared(rows, outputs, columns, device)
            about = {"matrix": name, "outputs": outputs, "columns": columns, "rows": rows}
            yield {"part": PRODUCTS, **about, "chosen": ringkernels.quickest(rows, device), "ways": ways}


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def compared(rows: int, outputs: int, columns: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """What each way takes, and whether it is exact, for random values over the whole range; and bf16's product.

    A corner of the product is computed on the CPU as well, so that not even ``float64`` is taken on trust.
    """
    operand = torch.randint(-128, 128, (rows, 4 * columns), dtype=torch.int8, device=device).view(torch.int32)
    weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, device=device)
    operand[0], weight[0] = -(2**31), -127
    expected, out = (torch.empty((rows, outputs), dtype=torch.int32, device=device) for _ in range(2))
    ringkernels.float64(operand, weight, (expected,))
    corner = (slice(_CORNER), slice(_CORNER))
    wide = [values[:_CORNER].to("cpu", torch.int64) for values in (operand, weight)]
    right = torch.equal(expected[corner].cpu(), (wide[0] @ wide[1].t()).to(torch.int32))
    floats = operand.to(torch.bfloat16) / 2**31
    near = _copies(weight.to(torch.bfloat16))
    found: dict[str, dict[str, Any]] = {
        "bf16 itself": {"seconds": _times(partial(torch.nn.functional.linear, floats), near, device)}
    }
    del near
    weights = _copies(ringkernels.padded(weight) if weight.is_cuda else weight)
    for name in ("float64", *ringkernels.CANDIDATES[device.type]):

        def product(factor: torch.Tensor, way: ringkernels.Way = ringkernels.WAYS[name]) -> None:
            way(operand, factor, (out,))

        out.zero_()
        factors = [each.to(torch.int32) for each in weights] if name == "int32" else weights
        try:
            found[name] = {"seconds": _times(product, factors, device), "exact": right and torch.equal(out, expected)}
        except (RuntimeError, ImportError) as error:
            found[name] = {"error": str(error).partition("\n")[0]}
    return found


def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
    count = min(-(-_COLD_BYTES // weight.nbytes), 1 + _REPEATS) if weight.is_cuda else 1
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _times(
    product: Callable[[torch.Tensor], object], weights: Sequence[torch.Tensor], device: torch.device
) -> list[float]:
    """Of some calls, after one that prepares what is kept."""
    product(weights[0])
    turns = [weights[(1 + turn) % len(weights)] for turn in range(_REPEATS)]
    return [ringkernels.timed(partial(product, weight), device) for weight in turns]


def graphs(given: Any) -> Results:
    """Whether each way can be recorded, and what it then takes: as a decode step runs it."""
    device = torch.device(given.device)
    shape = (_GRAPH_SIZE, _GRAPH_SIZE)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    for rows in _GRAPH_ROWS:
        operand = torch.zeros((rows, _GRAPH_SIZE), dtype=torch.int32, device=device)
        expected, out = (torch.zeros((rows, _GRAPH_SIZE), dtype=torch.int32, device=device) for _ in range(2))
        for name in ringkernels.CANDIDATES["cuda"]:
            result: dict[str, Any] = {"part": GRAPHS, "way": name, "rows": rows}
            try:
                graph = torch.cuda.CUDAGraph()
                ringkernels.WAYS[name](operand, weight, (out,))
                torch.cuda.synchronize(device)
                with torch.cuda.graph(graph):
                    ringkernels.WAYS[name](operand, weight, (out,))
                operand.copy_(torch.randint(-(2**31), 2**31, operand.shape, device=device))
                seconds = [ringkernels.timed(graph.replay, device) for _ in range(_REPEATS)]
                ringkernels.float64(operand, weight, (expected,))
                result |= {"seconds": seconds, "exact": torch.equal(out, expected)}
            except (RuntimeError, ImportError) as error:
                result["error"] = str(error).partition("\n")[0]
            yield result


# Runs


def runs(name: str, given: Any, script: Script) -> Results:
    mode = MODES[name]
    settings = script.settings(
        run__prefill_plan=mode.plan,
        run__decode_plan=mode.plan,
        run__privacy=mode.privacy,
        run__transport="pipelined",
        run__wire_dtype="bf16",
        run__endpoints=tuple(given.endpoint[: mode.servers]) or None,
    )
    tokens, decode_tokens = (max(1, asked // mode.cut) for asked in (given.prompt_tokens, given.decode_tokens))
    most = max(given.batches)
    began = time.perf_counter()
    folder = ModelFolder(given.shape, Path(given.model))
    with Runner(settings, folder, capacity=Capacity(sequences=most, waiting=most, step_tokens=tokens)) as runner:
        opened = time.perf_counter() - began
        for batch in given.batches:
            for more in (min(_WARM_UP_TOKENS, decode_tokens), decode_tokens):
                found = measured(runner, batch, max(1, tokens // batch), more)
            yield {"part": name, "open_seconds": opened, "batch": batch, **found}


def measured(runner: Runner, batch: int, prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """Prompts that are read together, then ``decode_tokens`` more of each."""
    prompts = torch.randint(runner.spec.vocab_size, (batch, prompt_tokens)).tolist()
    greedy = SamplingOptions()
    errors: list[BaseException | None] = []
    asked = [Tokens(prompt, 1 + decode_tokens, Sampler(greedy), on_end=errors.append) for prompt in prompts]
    before = _offline(runner)
    began = time.perf_counter()
    for sequence in asked:
        runner.engine.add(sequence)
    while not all(sequence.made for sequence in asked) and not any(errors):
        runner.step()
    read, early = time.perf_counter(), sum(sequence.made for sequence in asked)
    while not all(sequence.ended for sequence in asked) and not any(errors):
        runner.step()
    seconds = time.perf_counter() - read
    if error := next(filter(None, errors), None):
        raise error
    offline = _offline(runner) - before
    made = sum(sequence.made for sequence in asked) - early
    return {
        "prompt_tokens": batch * prompt_tokens,
        "offline_seconds": offline,
        "prefill_seconds": read - began - offline,
        "decode_tokens": made,
        "decode_tokens_per_second": made / seconds,
    }


def _offline(runner: Runner) -> float:
    """What was made ahead so far took; of pads."""
    found = runner.report("complete")["settings"]["offline"]
    return found["seconds"] if found else 0.0


# Parts, each in a process


class Parts:
    """Runs parts until ``seconds`` are over, and keeps what they gave: ``results`` and ``notes``."""

    def __init__(self, script: Script, seconds: float) -> None:
        self._script = script
        self._over = time.perf_counter() + seconds
        self.results: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def left(self, most: float) -> float:
        """Of ``most`` seconds those that there still are."""
        return min(most, self._over - _END_SECONDS - time.perf_counter())

    def run(self, name: str, arguments: Sequence[str]) -> None:
        allowed = self.left(SECONDS[name])
        if allowed <= 0:
            self._note(f"{name}: left out, no time was left")
            return
        self._script.tell(f"{name}: at most {allowed:.0f} s")
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--part", name]
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=said, stderr=errors, cwd=Path(__file__).parents[1])
            try:
                code: int | None = child.wait(allowed)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                child.kill()
                child.wait()
            said.seek(0)
            lines = said.read().split("\n")[:-1]  # the last one is empty, or was being written
            self.results += map(json.loads, lines)
            errors.seek(0)
            last = (errors.read().strip() or "nothing").splitlines()[-1]
        if code is None:
            self._note(f"{name}: ended after {allowed:.0f} s with {len(lines)} results")
        elif code:
            self._note(f"{name}: failed after {len(lines)} results ({last})")
        self._script.save(self.notes, self.results, status="interrupted")

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self._script.tell(line)

    @contextlib.contextmanager
    def model(self, shape: str, folder: Path) -> Iterator[Callable[[], bool]]:
        """Makes it meanwhile; what it gives waits until that is done, and says whether it was."""
        command = [sys.executable, "-m", "teegpu", "model", "random", shape, "--out", str(folder)]
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def wait() -> bool:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, self.left(_SERVER_SECONDS)))
            if child.poll() != 0:
                self._note(f"no model of shape {shape}: runs are left out")
            else:
                self._script.tell(f"the model was there after {time.perf_counter() - began:.0f} s at most")
            return child.poll() == 0

        try:
            yield wait
        finally:
            child.kill()
            child.wait()

    @contextlib.contextmanager
    def servers(self, folder: Path, device: str) -> Iterator[list[str]]:
        """The addresses of two; none where they did not start in time."""
        settings = self._script.settings(server__device=device)
        threads = max(1, machine.available_cores() // 4)
        with contextlib.ExitStack() as stack:
            model = ModelFolder(folder.name, folder)
            found = [stack.enter_context(EmbeddedServer(model, settings, threads=threads)) for _ in range(2)]

            def end() -> None:
                for each in found:
                    each.close()

            limit = threading.Timer(max(0.0, self.left(_SERVER_SECONDS)), end)
            stack.callback(limit.cancel)
            limit.start()
            try:
                addresses = [str(each.wait()["address"]) for each in found]
                limit.cancel()
            except TeegpuError as error:
                self._note(f"no servers: {error}")
                addresses = []
            yield addresses


def table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Each way's time of bf16's own. *: not exact."""
    names = ("float64", *dict.fromkeys(name for names in ringkernels.CANDIDATES.values() for name in names))
    rows = [["matrix", "rows", "bf16 itself, ms", *names, "chosen"]]
    for result in results:
        if "ways" in result:
            base = statistics.median(result["ways"]["bf16 itself"]["seconds"])
            cells = []
            for name in names:
                way = result["ways"].get(name, {})
                told = f"{statistics.median(way['seconds']) / base:.2f} ×" if "seconds" in way else "–"
                cells.append(told if way.get("exact", True) else f"{told}*")
            rows.append([result["matrix"], str(result["rows"]), f"{base * 1e3:.3f}", *cells, result["chosen"]])
    return rows


def told(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is in no row of the table."""
    for result in results:
        name = result["part"]
        if "batch" in result:
            rate = result["decode_tokens_per_second"]
            ahead = f", {result['offline_seconds']:.2f} s ahead" if result["offline_seconds"] else ""
            yield (
                f"{name}, batch {result['batch']}: {result['prompt_tokens']} prompt tokens in "
                f"{result['prefill_seconds']:.2f} s{ahead}, then {rate:.1f} tokens/s"
            )
        elif name == GRAPHS:
            ms = f"{statistics.median(result['seconds']) * 1e3:.3f} ms" if "seconds" in result else result["error"]
            exact = "" if result.get("exact", True) else ", not exact"
            yield f"recorded {result['way']}, {result['rows']} rows, {_GRAPH_SIZE} × {_GRAPH_SIZE}: {ms}{exact}"
        elif "device" in result:
            yield f"{result['device']}, triton {result['triton'] or 'is missing'}"


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "", model=False)
    add = script.parser.add_argument
    add("--device", default="cuda:0")
    add("--shape", default="llama-3-8b,layers=16", help="of the model, as teegpu model random takes it")
    add("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    add("--batches", type=int, nargs="+", default=[1, 32])
    add("--prompt-tokens", type=int, default=1024, help="of all prompts of a batch together")
    add("--decode-tokens", type=int, default=16)
    add("--seconds", type=float, default=470.0, help="for all of it")
    add("--part", help="that one alone, in this process, its results as lines of JSON")
    add("--model", help="of --part")
    add("--endpoint", action="append", default=[], help="of --part")
    given = script.parse(arguments)
    if given.part:
        alone = {PRODUCTS: products, GRAPHS: graphs}
        for result in alone[given.part](given) if given.part in alone else runs(given.part, given, script):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
        return
    own = list(sys.argv[1:] if arguments is None else arguments)
    parts = Parts(script, given.seconds)
    with tempfile.TemporaryDirectory(prefix="teegpu-gpu-") as scratch:
        folder = Path(scratch) / "model"
        with parts.model(given.shape, folder) as made:
            parts.run(PRODUCTS, own)
            if given.device != "cpu":
                parts.run(GRAPHS, own)
            ready = made()
        if ready:
            with parts.servers(folder, given.device) as addresses:
                endpoints = [flag for address in addresses for flag in ("--endpoint", address)]
                for name, mode in MODES.items():
                    if len(addresses) >= mode.servers:
                        parts.run(name, [*own, "--model", str(folder), *endpoints])
    results, notes = parts.results, parts.notes
    script.finish(table(results), [*told(results), *notes], results, status="failed" if notes else "complete")


if __name__ == "__main__":
    main()
