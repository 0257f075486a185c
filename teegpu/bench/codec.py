"""``teegpu bench codec``: what each wire dtype, and zstd behind it, makes of the model's own activations.

For a wire dtype: encoding and decoding speed, bytes, and error. For zstd, with the byte shuffle and without, at several
levels: ratio, speed both ways, and the bandwidth below which it pays. All in one process, on the threads of a runner
that has an embedded server beside it; zstd is on one thread, as in the transports.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from teegpu import machine
from teegpu.bench import activations
from teegpu.bench import document as doc
from teegpu.bench.measure import Notify, Progress
from teegpu.config import Config
from teegpu.errors import PromptError, UsageError, nearest
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.settings import WIRE_DTYPES
from teegpu.wire import dtypes
from teegpu.wire.layout import FrameLayout, Row, layout_of
from transports.framecodec import MAX_LEVEL, MIN_LEVEL, SHUFFLED_ITEMSIZES, FrameCodec

LEVELS: Final = (1, 3)
_VALUE_BYTES: Final = 4


@dataclass
class _Dtype:
    """One kind of activations in one wire dtype. Samples are seconds for all of its tensors.

    ``pieces`` are frames as a message has them, with the tensors that share each."""

    kind: str
    name: str
    groups: InitVar[Sequence[tuple[torch.Tensor, ...]]]
    pieces: list[tuple[FrameLayout, tuple[torch.Tensor, ...]]] = field(default_factory=list)
    frames: list[memoryview] = field(default_factory=list)
    encodings: list[float] = field(default_factory=list)
    decodings: list[float] = field(default_factory=list)
    deviation: dict[str, float] = field(default_factory=dict)

    def __post_init__(self, groups: Sequence[tuple[torch.Tensor, ...]]) -> None:
        for tensors in groups:
            layout = layout_of(tuple(Row(str(place), tuple(t.shape), self.name) for place, t in enumerate(tensors)))
            rest = iter(tensors)
            self.pieces += [(frame, tuple(itertools.islice(rest, len(frame.rows)))) for frame in layout.frames]
        # Received bytes can be written to, and lie elsewhere than the tensors.
        self.frames = [memoryview(bytearray(frame)) for frame in self._encoded()]
        values = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for _, tensors in self.pieces]
        self.deviation = deviation(values, self._decoded())

    def _encoded(self) -> list[memoryview]:
        return [dtypes.frame_of(layout.narrow(tensors)) for layout, tensors in self.pieces]

    def _decoded(self) -> list[torch.Tensor]:
        """In fp32, as the runner takes it: (n,) of each frame."""
        return [
            layout.decode(frame).to(torch.float32) for (layout, _), frame in zip(self.pieces, self.frames, strict=True)
        ]

    def measure(self, keep: bool) -> None:
        started = time.perf_counter()
        self._encoded()
        encoded = time.perf_counter()
        self._decoded()
        if keep:
            self.encodings.append(encoded - started)
            self.decodings.append(time.perf_counter() - encoded)

    def entry(self) -> dict[str, Any]:
        values = sum(sum(layout.sizes) for layout, _ in self.pieces)
        nbytes = sum(frame.nbytes for frame in self.frames)
        return {
            "label": f"{self.kind}, {self.name}",
            "activations": self.kind,
            "wire_dtype": self.name,
            "values": values,
            "bytes": nbytes,
            "bytes_share": nbytes / (values * _VALUE_BYTES),
            "encode": _speed(self.encodings, values, values * _VALUE_BYTES),
            "decode": _speed(self.decodings, values, values * _VALUE_BYTES),
            "deviation": self.deviation,
            "samples": {"encode_seconds": self.encodings, "decode_seconds": self.decodings},
        }


@dataclass
class _Compressed:
    """The frames of a ``_Dtype`` through zstd. Samples are seconds for all of them."""

    source: _Dtype
    level: int
    shuffled: bool
    codec: FrameCodec
    packed: list[tuple[bytes, int]] = field(default_factory=list)
    compressions: list[float] = field(default_factory=list)
    decompressions: list[float] = field(default_factory=list)

    @property
    def itemsize(self) -> int:
        return dtypes.itemsize(self.source.name) if self.shuffled else 1

    def measure(self, keep: bool) -> None:
        itemsize, codec = self.itemsize, self.codec
        raw: list[NDArray[np.uint8]] = [np.frombuffer(frame, np.uint8) for frame in self.source.frames]
        started = time.perf_counter()
        packed = [codec.encode(data, itemsize) for data in raw]
        compressed = time.perf_counter()
        for index, ((frame, kind), data) in enumerate(zip(packed, raw, strict=True)):
            codec.decode(memoryview(frame), kind, itemsize, data.size, index)
        if keep:
            self.compressions.append(compressed - started)
            self.decompressions.append(time.perf_counter() - compressed)
        self.packed = packed

    def entry(self) -> dict[str, Any]:
        source = self.source
        raw = sum(frame.nbytes for frame in source.frames)
        ratio = sum(len(frame) for frame, _ in self.packed) / raw
        name = f"{'shuffle + ' if self.shuffled else ''}zstd {self.level}"
        seconds = statistics.median(self.compressions) + statistics.median(self.decompressions)
        return {
            "label": f"{source.kind}, {source.name}, {name}",
            "activations": source.kind,
            "wire_dtype": source.name,
            "level": self.level,
            "shuffled": self.shuffled,
            "zstd": {
                "bytes": raw,
                "ratio": ratio,
                "compress_bytes_per_second": raw / statistics.median(self.compressions),
                "decompress_bytes_per_second": raw / statistics.median(self.decompressions),
                "break_even_bytes_per_second": break_even(ratio, seconds / raw),
            },
            "samples": {"compress_seconds": self.compressions, "decompress_seconds": self.decompressions},
        }


def break_even(ratio: float, seconds_per_byte: float) -> float:
    """Bytes per second of the link below which compressing pays: there the saved bytes would take longer than the codec
    does on both sides. 0 where nothing is saved."""
    return max(0.0, 1.0 - ratio) / seconds_per_byte


def deviation(tensors: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far ``decoded`` is from ``tensors``: the root mean square of the differences, and the largest of them, over
    the root mean square of all values."""
    square = largest = whole = 0.0
    for tensor, other in zip(tensors, decoded, strict=True):
        difference = (other - tensor).to(torch.float64)
        square += float(difference.square().sum())
        largest = max(largest, float(difference.abs().max()))
        whole += float(tensor.to(torch.float64).square().sum())
    values = sum(tensor.numel() for tensor in tensors)
    rms = math.sqrt(whole / values)
    if not rms:
        return {"relative_rms": 0.0, "largest": 0.0}
    return {"relative_rms": math.sqrt(square / whole), "largest": largest / rms}


def _speed(seconds: Sequence[float], values: int, nbytes: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "bytes_per_second": nbytes / median,
        "seconds_per_value": median / values,
        "seconds_per_value_min": min(seconds) / values,
    }


class CodecBenchmark:
    """Measures ``wire_dtypes`` and zstd at ``levels`` on ``kinds`` of activations (of ``activations.NAMES``) of a
    prefill of ``prompt_tokens`` tokens, ``repeats`` times in turn.

    Raises ``UsageError`` and ``PromptError`` for what can't be measured, and what reading the model raises.
    """

    name = "codec"
    failures: tuple[str, ...] = ()

    def __init__(
        self,
        folder: ModelFolder,
        base: Config,
        *,
        prompt_tokens: int,
        repeats: int,
        kinds: Sequence[str] = activations.NAMES,
        wire_dtypes: Sequence[str] = WIRE_DTYPES,
        levels: Sequence[int] = LEVELS,
    ) -> None:
        for flag, value in (("--prompt-tokens", prompt_tokens), ("--repeats", repeats)):
            if value < 1:
                raise UsageError(f"{flag} {value} is below the least, 1")
        for level in levels:
            if not MIN_LEVEL <= level <= MAX_LEVEL:
                raise UsageError(f"--level {level} is not between {MIN_LEVEL} and {MAX_LEVEL}")
        self._kinds = _checked(kinds, activations.NAMES, "--activations")
        self._wire_dtypes = _checked(wire_dtypes, WIRE_DTYPES, "--wire-dtype")
        self._levels = tuple(dict.fromkeys(levels))
        self._spec = read_spec(folder)
        if prompt_tokens > self._spec.max_positions:
            raise PromptError(
                f"--prompt-tokens {prompt_tokens} is more than the context of {self._spec.name}, which ends at "
                f"{self._spec.max_positions}: give less"
            )
        self._folder = folder
        self._base = base
        self._prompt_tokens, self._repeats = prompt_tokens, repeats
        runner, server = machine.thread_split(embedded=True)
        self._threads = base.run.threads or runner, base.server.threads or server
        self._digest = ""
        self._dtypes: list[_Dtype] = []
        self._compressed: list[_Compressed] = []
        self._started_at = doc.now()

    def run(self, notify: Notify = lambda _: None) -> None:
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads[0])
        try:
            with torch.inference_mode():
                notify(Progress(0, self._repeats, "activations", "capturing"))
                self._capture()
                self._measure(notify)
        finally:
            torch.set_num_threads(threads_before)

    def _capture(self) -> None:
        self._digest, found = activations.capture(
            self._folder, self._spec, self._base, self._prompt_tokens, server_threads=self._threads[1]
        )
        machine.keep_freed_memory()
        self._dtypes = [_Dtype(kind, name, found[kind]) for kind in self._kinds for name in self._wire_dtypes]
        codecs = {level: FrameCodec(level) for level in self._levels}
        self._compressed = [
            _Compressed(source, level, shuffled, codecs[level])
            for source in self._dtypes
            for level in self._levels
            for shuffled in ((False, True) if dtypes.itemsize(source.name) in SHUFFLED_ITEMSIZES else (False,))
        ]

    def _measure(self, notify: Notify) -> None:
        cells: list[_Dtype | _Compressed] = [*self._dtypes, *self._compressed]
        started = time.perf_counter()
        for done in range(self._repeats + 1):  # the first warms up
            for each in cells:
                each.measure(keep=done > 0)
            left = (time.perf_counter() - started) / (done + 1) * (self._repeats - done)
            stage = f"repeat {done} of {self._repeats}" if done else "warm-up"
            notify(Progress(done, self._repeats, "codecs", stage, "done", left))

    def document(self, status: str) -> dict[str, Any]:
        results = [each.entry() for each in self._dtypes if each.decodings]
        results += [each.entry() for each in self._compressed if each.decompressions]
        return doc.document(
            self.name,
            status=status,
            started_at=self._started_at,
            spec=self._spec,
            digest=self._digest,
            settings={
                "prompt_tokens": self._prompt_tokens,
                "repeats": self._repeats,
                "layers": activations.sampled_layers(self._spec.layers),
                "threads": {"runner": self._threads[0], "server": self._threads[1]},
                "compression_min_bytes": self._base.compression.min_bytes,
            },
            notes=list(_NOTES) if results else [],
            results=results,
        )


_NOTES: Final = (
    "GB/s are of values in fp32 for wire dtypes, of the frame's bytes for zstd; errors are over the RMS of the values",
    "fp32 is not converted: its frame is the tensor's own memory, both ways",
    "where runs send int8, the residual stays fp16; frames below compression.min_bytes are never compressed",
    "pays below: where the saved bytes would take longer on the link than zstd takes, on both sides together",
)


def _checked(given: Sequence[str], known: Sequence[str], flag: str) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise UsageError(f"{flag} {name} is not one of {', '.join(known)}{nearest(name, list(known))}")
    return tuple(dict.fromkeys(given))
