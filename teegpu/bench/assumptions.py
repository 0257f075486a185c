"""What ``teegpu tune --what-if`` takes for granted: models' shapes, GPUs, processors of a TEE, and where each figure is
from. Pure.

Nothing here was measured with teegpu but what says so. Peaks are the makers' figures; what share of them a program
reaches is assumed, and said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from teegpu.errors import UsageError, nearest
from teegpu.metrics.predict import Link
from teegpu.metrics.rates import Rates, Units
from teegpu.metrics.traffic import FLOAT_BYTES, INT8_GROUP, Shape
from transports.linkspec import LinkSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense bf16 FLOP/s, bytes per second of its memory and how many it holds (0: not known), as its maker states
    them."""

    flops: float
    memory: float
    holds: float
    source: str


@dataclass(frozen=True, slots=True)
class Tee:
    """FLOP/s that its products reach and bytes per second of its memory, all cores together. ``value_bytes``: of a
    weight in the plan ``local``."""

    flops: float
    memory: float
    cores: int
    source: str
    value_bytes: int = 4


GPUS: Final[Mapping[str, Gpu]] = {
    "l4": Gpu(121e12, 300e9, 24e9, "NVIDIA L4 data sheet, without sparsity"),
    "l40s": Gpu(362e12, 864e9, 48e9, "NVIDIA L40S data sheet, without sparsity"),
    "a100": Gpu(312e12, 2.039e12, 80e9, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(989e12, 3.35e12, 80e9, "NVIDIA H100 SXM data sheet, without sparsity"),
    "h200": Gpu(989e12, 4.8e12, 141e9, "NVIDIA H200 SXM data sheet, without sparsity"),
    "b200": Gpu(2.25e15, 7.7e12, 180e9, "NVIDIA HGX B200 data sheet, without sparsity"),
}

TEES: Final[Mapping[str, Tee]] = {
    "2-core-avx2": Tee(0.11e12, 20e9, 2, "of the order of what teegpu's products reach on this project's test machine"),
    "8-core-avx512": Tee(0.8e12, 100e9, 8, "assumed: 100 GFLOP/s a core in fp32, a third of eight memory channels"),
    "32-core-avx512": Tee(3.2e12, 200e9, 32, "assumed: 100 GFLOP/s a core in fp32, eight channels of DDR5 at 65 %"),
    "32-core-amx": Tee(
        20e12, 200e9, 32, "assumed: 0.6 TFLOP/s a core in bf16; teegpu's local computes in fp32 today", 2
    ),
    "64-core-amx": Tee(
        40e12, 400e9, 64, "assumed: 0.6 TFLOP/s a core in bf16; teegpu's local computes in fp32 today", 2
    ),
}

MODELS: Final[Mapping[str, Shape]] = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 64, 32000),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
"""As the models' own configurations have them."""

GPU_SHARE: Final = 0.6
MEMORY_SHARE: Final = 0.75
KERNEL_SECONDS: Final = 6e-6
BUS_BYTES_PER_SECOND: Final = 20e9
HOST_COPY_BYTES_PER_SECOND: Final = 8e9
REQUEST_SECONDS: Final = 0.05e-3
TENSOR_SECONDS: Final = 8e-6
HANDOVER_SECONDS: Final = 0.15e-3
CALL_SECONDS: Final = 12e-6
VALUE_SECONDS: Final = 0.8e-9
QUANTISING: Final = 4.0
THREADS_THAT_HELP: Final = 8
ATTENTION_SHARE: Final = 0.3

KEYS: Final = ("rtt", "bandwidth", "up", "down", "jitter", "model", "gpu", "tee", "servers")

_FLOPS = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*(gflops|tflops|pflops)", re.IGNORECASE)
_PREFIXES = {"gflops": 1e9, "tflops": 1e12, "pflops": 1e15}
_GPU_BALANCE = 250.0
_TEE_BALANCE = 12.0


@dataclass(frozen=True, slots=True)
class Assumption:
    what: str
    value: str
    source: str


@dataclass(frozen=True)
class WhatIf:
    """A world that is not here."""

    model: str
    shape: Shape
    gpu_name: str
    gpu: Gpu
    tee_name: str
    tee: Tee
    link: LinkSpec
    servers: int


def parse(text: str, defaults: Mapping[str, str]) -> WhatIf:
    """``rtt=20ms,bandwidth=10gbit,model=llama-3-8b,gpu=h200,tee=32-core-amx,servers=2``; what is left out is as
    ``defaults`` have it. ``gpu`` and ``tee`` may be FLOP/s, such as 400tflops. Raises ``UsageError``, and
    ``LinkSpecError`` for a link that can't be."""
    given: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in KEYS:
            raise UsageError(f"--what-if: unknown key '{key}'{nearest(key, list(KEYS))}; keys are {', '.join(KEYS)}")
        if not equals or not value:
            raise UsageError(f"--what-if: '{key}' has no value: write for example rtt=20ms,bandwidth=10gbit,gpu=h200")
        if key in given:
            raise UsageError(f"--what-if: '{key}' is given twice: leave one of them out")
        given[key] = value
    chosen = dict(defaults) | given
    link = ",".join(f"{key}={given[key]}" for key in ("rtt", "bandwidth", "up", "down", "jitter") if key in given)
    servers = chosen.get("servers", "1")
    if not servers.isdigit() or not 1 <= int(servers) <= 1024:
        raise UsageError(f"--what-if: servers={servers} is not a number from 1 to 1024")
    return WhatIf(
        chosen["model"],
        _named("model", chosen["model"], MODELS),
        chosen["gpu"],
        _gpu(chosen["gpu"]),
        chosen["tee"],
        _tee(chosen["tee"]),
        LinkSpec.parse(link or "loopback"),
        int(servers),
    )


def _named(key: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise UsageError(f"--what-if: unknown {key} '{name}'{nearest(name, list(known))}; known are {', '.join(known)}")
    return known[name]


def _gpu(name: str) -> Gpu:
    flops = _flops(name)
    if flops is None:
        return _named("gpu", name, GPUS)
    return Gpu(
        flops, flops / _GPU_BALANCE, 0.0, f"given; its memory is assumed to move a byte for {_GPU_BALANCE:.0f} FLOP"
    )


def _tee(name: str) -> Tee:
    flops = _flops(name)
    if flops is None:
        return _named("tee", name, TEES)
    source = f"given; its memory is assumed to move a byte for {_TEE_BALANCE:.0f} FLOP, and 16 cores"
    return Tee(flops, flops / _TEE_BALANCE, 16, source)


def _flops(text: str) -> float | None:
    match = _FLOPS.fullmatch(text.strip())
    if match is None:
        return None
    flops = float(match.group(1)) * _PREFIXES[match.group(2).lower()]
    if flops <= 0.0:
        raise UsageError(f"--what-if: {text} is no speed: give a number above 0")
    return flops


def rates(world: WhatIf) -> Rates:
    """The prices of a world, as the cost model takes them."""
    gpu, tee, spec = world.gpu, world.tee, world.link
    threads = min(tee.cores, THREADS_THAT_HELP)
    flops, memory = gpu.flops * GPU_SHARE, gpu.memory * MEMORY_SHARE
    value = VALUE_SECONDS / threads
    prices: dict[str, Units] = {
        "server/LINEAR": (KERNEL_SECONDS, 2 / memory, 2 / flops),
        "server/MATMUL": (KERNEL_SECONDS, 2 / memory, 2 / flops),
        "server/SUM": (KERNEL_SECONDS, 6 / memory, 0.0),
        "tee/LINEAR": (CALL_SECONDS, tee.value_bytes / tee.memory, 2 / tee.flops),
        "tee/ATTENTION": (2 * CALL_SECONDS, 4 / tee.memory, 2 / (tee.flops * ATTENTION_SHARE)),
        "tee/RMSNORM": (CALL_SECONDS, value, 0.0),
        "tee/SILU": (CALL_SECONDS, 2 * value, 0.0),
        "tee/ROTARY": (2 * CALL_SECONDS, 3 * value, 0.0),
        "tee/OTHER": (0.0, 0.0, 0.0),
    }
    for wire in (*FLOAT_BYTES, "int8"):
        size = FLOAT_BYTES.get(wire, 1 + 2 / INT8_GROUP)
        ours = 0.0 if wire == "fp32" else value * (QUANTISING if wire == "int8" else 0.5)
        theirs = size / BUS_BYTES_PER_SECOND + size / HOST_COPY_BYTES_PER_SECOND
        for place, own in (("runner/encode", ours), ("runner/decode", ours), ("server/decode", theirs),
                           ("server/encode", theirs)):  # fmt: skip
            prices[f"{place}.{wire}"] = (REQUEST_SECONDS, TENSOR_SECONDS, own)
    return Rates(
        prices,
        Link(spec.rtt_seconds, spec.up_bytes_per_second, spec.down_bytes_per_second, HANDOVER_SECONDS),
        overlap_seconds=REQUEST_SECONDS,
    )


def parameters(shape: Shape) -> int:
    """Of the layers, the embedding and lm_head; norms are left out."""
    return shape.layers * shape.layer_values + 2 * shape.vocab * shape.hidden


def memory_notes(world: WhatIf) -> list[str]:
    """What the weights take on each side, and whether that is there."""
    count = parameters(world.shape)
    notes = [
        f"{world.model}: weights of {2 * count / 1e9:,.0f} GB in bf16 on the server; all in the TEE takes "
        f"{world.tee.value_bytes * count / 1e9:,.0f} GB there"
    ]
    holds = world.gpu.holds * world.servers
    if holds and 2 * count > holds:
        least = -(-2 * count // int(world.gpu.holds * 0.9))
        notes.append(
            f"{world.model} does not fit into {world.servers} × {world.gpu_name} ({holds / 1e9:,.0f} GB): it takes its "
            f"layers over servers={least} or more"
        )
    return notes


def listed(world: WhatIf) -> list[Assumption]:
    """Every assumption, with its source."""
    gpu, tee = world.gpu, world.tee
    return [
        Assumption("model", world.model, "the model's own configuration"),
        Assumption("link", str(world.link), "given; bytes of TCP/IP headers and losses are left out"),
        Assumption(
            f"GPU {world.gpu_name}", f"{gpu.flops / 1e12:,.0f} TFLOP/s bf16, {gpu.memory / 1e9:,.0f} GB/s", gpu.source
        ),
        Assumption(
            "of which products reach", f"{GPU_SHARE:.0%} of the FLOP/s, {MEMORY_SHARE:.0%} of the GB/s", "assumed"
        ),
        Assumption("a kernel", f"{KERNEL_SECONDS * 1e6:.0f} µs", "assumed"),
        Assumption(
            "bytes into and out of the GPU",
            f"{BUS_BYTES_PER_SECOND / 1e9:.0f} GB/s over the bus, {HOST_COPY_BYTES_PER_SECOND / 1e9:.0f} GB/s in its "
            "host's memory",
            "assumed",
        ),
        Assumption(
            f"TEE {world.tee_name}",
            f"{tee.flops / 1e12:,.2g} TFLOP/s, {tee.memory / 1e9:,.0f} GB/s, {tee.cores} cores, weights of "
            f"{tee.value_bytes} bytes",
            tee.source,
        ),
        Assumption(
            "norms, SiLU, rotary in the TEE",
            f"{CALL_SECONDS * 1e6:.0f} µs a call and {VALUE_SECONDS * 1e9:.1f} ns a value on one core, up to "
            f"{THREADS_THAT_HELP} cores",
            "assumed, near what an AVX2 core does",
        ),
        Assumption(
            "a request",
            f"{4 * REQUEST_SECONDS * 1e3:.2f} ms on both sides, {HANDOVER_SECONDS * 1e3:.2f} ms to hand it over",
            "near docs/benchmarks.md, overhead of a request",
        ),
        Assumption("servers that share the chunks under way", str(world.servers), "given"),
    ]
