"""What ``teegpu tune`` measures: the prices of a model's work here, at a server and on the link between them.

The first layers of the model run over a real connection, plan by plan and wire dtype by wire dtype, in lock step; then
a short prompt with its chunks in flight, for what both sides cost each other while they work at once; then real
activations go through zstd. ``metrics.profile`` keeps what comes of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from teegpu import __version__, machine
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.errors import UsageError
from teegpu.metrics.cost_model import CostModel, Phase, Settings
from teegpu.metrics.profile import Profile, Server, fingerprint
from teegpu.metrics.rates import Compression, Rates
from teegpu.metrics.traffic import Shape
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.tee import auto
from teegpu.tee.calibrate import Calibration, Step, shape_of
from teegpu.tee.runner import Runner
from teegpu.wire import dtypes
from transports.framecodec import FrameCodec

WIRES: Final = ("fp32", "bf16", "fp16", "int8")

MATRICES_BYTES: Final = 96 * 2**20
"""The matrices of the layers that are measured: more than a cache holds, as in a run of all layers."""
MOST_MATRICES_BYTES: Final = 1536 * 2**20
LAYERS: Final = (3, 8)
"""At least and at most. Fewer than three have no layer that is neither the first nor the last."""

SECONDS: Final = 30.0
"""After so long only what was not measured at all goes on, and after half of it nothing with many tokens begins."""

FAR_SECONDS: Final = 0.002
"""From this round trip on passes are slow, and what a cache holds matters little beside it: few layers are enough."""

MANY_TOKENS: Final = 128
PROMPT_TOKENS: Final = 512
OVERLAPPED: Final = (512, 64)
"""Tokens of a prompt and of its chunks that are measured in flight together."""
TURNS: Final = (1024, 256)
"""The same where both sides take turns with all cores: smaller chunks change hands more often than those chosen do."""
SLOWDOWNS: Final = (0.5, 3.0)
"""Within which a slowdown is looked for."""
SAMPLED_TOKENS: Final = 256
"""Of a real text, whose activations are compressed."""


def layers_of(shape: Shape) -> int:
    """How many layers are measured."""
    each = 4 * shape.layer_values
    wanted = min(-(-MATRICES_BYTES // each), max(1, MOST_MATRICES_BYTES // each))
    return max(1, min(shape.layers, max(LAYERS[0], min(LAYERS[1], wanted))))


class Tuning:
    """Measures ``folder``'s model with the servers of ``base``, or an embedded one where it names none.

    ``run`` gives the profile; ``facts`` says what was measured, and how long it took. Raises what a run raises, and
    ``UsageError`` for settings that can't be measured.
    """

    def __init__(self, folder: ModelFolder, base: Config) -> None:
        if base.run.transport == "inprocess":
            raise UsageError("the transport inprocess has no server to measure: use zmq or pipelined")
        self._folder = folder
        # What is sent here is random, or a text that comes with the package: it may be seen, and prices of plain
        # products are what private ones are reckoned from.
        run = replace(
            base.run,
            prefill_plan="fused",
            decode_plan="fused",
            transport="pipelined",
            prefix_cache_mib=0,
            max_tokens=1,
            privacy="none",
            verify="off",
        )
        self._config = replace(base, run=run)
        self._notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def run(self, notify: Notify = lambda _: None) -> Profile:
        began = time.perf_counter()
        threads_before = torch.get_num_threads()
        notify(Progress(0, 4, "tune", "loading"))
        try:
            with Runner(self._config, self._folder, notify=self._notes.append) as runner:
                profile = self._measure(runner, notify)
        finally:
            torch.set_num_threads(threads_before)
        self.facts["seconds"] = time.perf_counter() - began
        self.facts["notes"] = self._notes
        return profile

    def _measure(self, runner: Runner, notify: Notify) -> Profile:
        began = time.perf_counter()
        until = began + SECONDS
        wire = runner.settings_of("fused").wire_dtype
        look = runner.calibration(2)
        look.run([Step("fused", wire, 1, repeats=2)])
        far = look.observed.link().rtt_seconds > FAR_SECONDS
        calibration = runner.calibration(LAYERS[0] if far else layers_of(shape_of(runner.spec)))
        most, weighs_local = runner.spec.max_positions, auto.local_fits(runner.spec)
        passes = 0
        single, chunks, long, own = _steps(wire, most, weighs_local)
        # Between the others, so that a machine that is slow for some seconds is so for all of them.
        alone = runner.calibration(layers_of(shape_of(runner.spec)))
        passes += calibration.run(single, until=began + SECONDS / 3)
        passes += alone.run(own)
        passes += calibration.run(chunks, until=until)
        passes += alone.run(own)
        if time.perf_counter() < began + SECONDS / 2:
            passes += calibration.run(long, until=until)
            passes += alone.run(own)
        calibration.observed.merge(alone.observed)
        seconds = _usual(calibration, f"runner/decode.{wire}")
        notify(Progress(1, 4, "tune", "passes", f"{passes} passes in {time.perf_counter() - began:.1f} s"))
        chooser = runner.chooser()
        rates = chooser.rates(calibration.observed)
        if rates.cores:
            spent = _cpu_seconds_per_byte(calibration, Step("fused", wire, min(PROMPT_TOKENS, most), repeats=2))
            rates = replace(rates, moving_seconds=spent)
        notify(Progress(2, 4, "tune", "processor time", f"{rates.moving_seconds * 1e9:.2f} ns a byte"))
        rates = self._overlapped(runner, calibration, rates, wire)
        notify(Progress(3, 4, "tune", "chunks in flight", f"slower by {rates.slowdown:.2f} while both compute"))
        rates = replace(rates, compression=_compression(runner, calibration, self._config.compression.level))
        notify(Progress(4, 4, "tune", "compression", ", ".join(
            f"{name} to {known.up:.0%} up, {known.down:.0%} down" for name, known in rates.compression.items()
        )))  # fmt: skip
        welcome = runner.welcome
        self.facts |= {"layers": calibration.spec.layers, "passes": passes, "request_seconds": seconds}
        return Profile(
            self._config.run.endpoints,
            str(runner.link or ""),
            runner.spec.name,
            runner.digest,
            shape_of(runner.spec, runner.chooser().borders),
            fingerprint(),
            __version__,
            runner.threads.runner,
            Server("", "", 0) if welcome is None else Server(welcome.device, welcome.dtype, welcome.threads),
            doc.now(),
            rates,
        )

    def _overlapped(self, runner: Runner, calibration: Calibration, rates: Rates, wire: str) -> Rates:
        """``rates`` with what only a prompt whose chunks are in flight together shows. With several groups of servers
        it is left as it is: the first layers alone can't be run through them."""
        tokens, chunk = TURNS if rates.takes_turns else OVERLAPPED
        tokens = min(tokens, runner.spec.max_positions)
        if tokens <= chunk or runner.settings_of("fused").servers > 1:
            return rates
        prompt = texts.prompt_of(runner.tokenizer, tokens)
        model = CostModel(calibration.shape, replace(rates, slowdown=1.0))
        settings = Settings("fused", wire, "pipelined", chunk)
        expected = model.prefill(settings, tokens)
        alone = expected.work
        slow, added = [], []
        for repeat in range(3):
            total = calibration.overlapped(prompt, wire, chunk)
            if not repeat:
                continue
            if rates.takes_turns:  # what an operation took has in it what it waited for the other side
                slow.append(slowdown_of(calibration.shape, rates, settings, tokens, total.seconds))
                continue
            computed = total.tee_seconds + total.busy.gpu_seconds
            factor = max(1.0, computed / (alone.tee + alone.gpu)) if rates.cores else 1.0
            ours = total.serialization_seconds + total.other_seconds
            slow.append(factor)
            added.append(max(0.0, ours - factor * alone.serialization) / max(1, total.rpc_calls))
        return replace(
            rates, slowdown=statistics.median(slow), overlap_seconds=statistics.median(added) if added else 0.0
        )


def slowdown_of(shape: Shape, rates: Rates, settings: Settings, tokens: int, measured_seconds: float) -> float:
    """The slowdown with which the cost model gives ``measured_seconds`` for the prefill of ``tokens``. Over a slow link
    it may be below 1: there the pauses of lock step had made both sides slower than they are without. 1 where it is not
    the cores that bind the prefill, or where it is quicker than any slowdown explains: then it says nothing of them."""

    def phase(slowdown: float) -> Phase:
        return CostModel(shape, replace(rates, slowdown=slowdown)).prefill(settings, tokens)

    least, most = SLOWDOWNS
    if rates.link.rtt_seconds <= FAR_SECONDS:
        least = 1.0
    if phase(1.0).bound_by != "cores" or phase(least).seconds > measured_seconds:
        return 1.0
    for _ in range(20):
        middle = (least + most) / 2
        least, most = (middle, most) if phase(middle).seconds < measured_seconds else (least, middle)
    return most


def _steps(wire: str, most: int, local: bool) -> tuple[list[Step], list[Step], list[Step], list[Step]]:
    """What to measure over the link, in the order of its weight: single tokens, then many, then many more where time is
    left; and what does without the link, and is measured between these."""
    one, late = min(PROMPT_TOKENS, most - 1), min(1024, most - 1)
    many = min(MANY_TOKENS, most)
    single = [Step("fused", each, 1, one, 8) for each in WIRES]
    single += [Step("attention", wire, 1, one, 8), Step("batched", "fp32", 1, one, 8)]
    chunks = [Step("fused", each, many, 0, 3) for each in WIRES]
    chunks += [Step("attention", wire, many, 0, 3), Step("batched", "fp32", many, 0, 3)]
    if late > one:
        single += [Step("batched", "fp32", 1, late, 4), Step("fused", wire, 1, late, 4)]
    if most > 2 * many:
        after = min(1024, most) - many
        chunks += [Step("fused", wire, many, after, 2), Step("batched", "fp32", many, after, 2)]
    long: list[Step] = []
    own = [Step("local", wire, 1, one, 4), Step("local", wire, many, 0, 2)] if local else []
    if most >= PROMPT_TOKENS:
        # What most predictions are about: over a slow link both sides wake up anew for each request, which the price of
        # a value would have in it if it were known from smaller chunks alone.
        chunks += [Step("fused", each, PROMPT_TOKENS, 0, 2) for each in dict.fromkeys((wire, "int8"))]
        long += [Step("fused", "fp32", PROMPT_TOKENS, 0, 2), Step("batched", "fp32", PROMPT_TOKENS, 0, 1)]
        own += [Step("local", wire, PROMPT_TOKENS, 0, 1)] if local else []
    return single, chunks, long, own


def _usual(calibration: Calibration, place: str) -> float:
    times = [seconds for each in calibration.observed.places.get(place, {}).values() for seconds in each]
    return statistics.median(times) if times else 0.0


# What moving bytes costs the processor


def _cpu_seconds_per_byte(calibration: Calibration, step: Step) -> float:
    """Processor time of both sides and of an emulated link between them, beyond what runner and server computed, for
    each byte that crossed."""
    observed = calibration.observed
    crossed = len(observed.network)
    worked = _worked(observed.places)
    before = machine.cpu_seconds()
    calibration.run([step])
    spent = machine.cpu_seconds() - before
    # The pass that only warms up was observed by nobody: it is taken for one like the others.
    share = (step.repeats + 1) / step.repeats
    moved = sum(up + down for up, down, _ in observed.network[crossed:]) * share
    computing = (_worked(observed.places) - worked) * share
    return max(0.0, spent - computing * torch.get_num_threads()) / moved if moved else 0.0


def _worked(places: Mapping[str, Mapping[Any, Sequence[float]]]) -> float:
    return sum(seconds for rows in places.values() for times in rows.values() for seconds in times)


# Compression of real activations


def _compression(runner: Runner, calibration: Calibration, level: int) -> dict[str, Compression]:
    """What zstd makes of the tensors that a real text sends through the middle of the layers measured."""
    tokens = min(SAMPLED_TOKENS, runner.spec.max_positions)
    up, down = calibration.tensors(texts.prompt_of(runner.tokenizer, tokens))
    codec = FrameCodec(level)
    found = {}
    for wire in WIRES:
        ratios, compress, decompress, total = [], 0.0, 0.0, 0
        for tensors in (up, down):
            before = after = 0
            for tensor in tensors:
                data = np.frombuffer(dtypes.encode(tensor, wire), np.uint8)
                size = dtypes.itemsize(wire)
                compressed, kind = codec.encode(data, size)
                compress += _timed(lambda data=data, size=size: codec.encode(data, size))  # type: ignore[misc]
                frame = memoryview(compressed)
                decompress += _timed(
                    lambda frame=frame, kind=kind, size=size, data=data: codec.decode(  # type: ignore[misc]
                        frame, kind, size if kind == 2 else 1, data.size, 0
                    )
                )
                before, after, total = before + data.size, after + len(compressed), total + data.size
            ratios.append(min(1.0, after / max(1, before)))
        found[wire] = Compression(ratios[0], ratios[1], compress / max(1, total), decompress / max(1, total))
    return found


def _timed(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
