"""``teegpu tune --what-if``: what links, GPUs and processors that are not here would make of a model. Pure.

Bytes and rounds are counted (``stats.traffic``), work on both sides is arithmetic over assumed speeds, and
``stats.predict`` puts them together. Nothing here was measured with teegpu but what says so: peaks are the makers'
figures; what share of them a program reaches is assumed, and said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final, TypeVar

from teegpu import facts
from teegpu.bench import document as doc
from teegpu.errors import UsageError, nearest
from teegpu.model.shapes import SHAPES
from teegpu.stats import predict, traffic
from teegpu.stats.predict import Link, Work
from teegpu.stats.profile import Way
from teegpu.stats.traffic import Shape
from teegpu.tee.choose import TUNE_CHUNKS, pick, prefill_ways
from teegpu.units import human_seconds
from transports.netem.spec import LinkSpec

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

_AMX = "assumed: 0.6 TFLOP/s a core in bf16, which local takes there"
TEES: Final[Mapping[str, Tee]] = {
    "2-core-avx2": Tee(0.11e12, 20e9, 2, "of the order of what teegpu's products reach on this project's test machine"),
    "8-core-avx512": Tee(0.8e12, 100e9, 8, "assumed: 100 GFLOP/s a core in fp32, a third of eight memory channels"),
    "32-core-avx512": Tee(3.2e12, 200e9, 32, "assumed: 100 GFLOP/s a core in fp32, eight channels of DDR5 at 65 %"),
    "32-core-amx": Tee(20e12, 200e9, 32, _AMX, 2),
    "64-core-amx": Tee(40e12, 400e9, 64, _AMX, 2),
}

MODELS: Final[Mapping[str, Shape]] = {
    name: Shape(
        each.layers,
        each.hidden,
        each.intermediate,
        each.heads,
        each.kv_heads,
        each.head_dim,
        each.vocab,
        products=traffic.products_of(each.architecture),
    )
    for name, each in SHAPES.items()
}

GPU_SHARE: Final = 0.6
MEMORY_SHARE: Final = 0.75
KERNEL_SECONDS: Final = 6e-6
BUS_BYTES_PER_SECOND: Final = 20e9
HOST_COPY_BYTES_PER_SECOND: Final = 8e9
REQUEST_SECONDS: Final = 0.1e-3
"""Of either side."""
HANDOVER_SECONDS: Final = 0.15e-3
CALL_SECONDS: Final = 12e-6
VALUE_SECONDS: Final = 0.8e-9
QUANTISING: Final = 4.0
THREADS_THAT_HELP: Final = 8
ATTENTION_SHARE: Final = 0.3

SEARCHED_BYTES: Final = (1.25e4, 1.25e12)
"""Bandwidths, in bytes per second, between which a break-even is looked for: 100 kbit/s to 10 Tbit/s."""

MASKED_VALUE_SECONDS: Final = 8e-9
MASKED_REQUEST_SECONDS: Final = 0.2e-3
RING_ON_GPU: Final = 2.0
RING_IN_TEE: Final = 3.4

KEYS: Final = ("rtt", "bandwidth", "up", "down", "jitter", "model", "gpu", "tee", "servers", "privacy")
_PRIVACY: Final = {name: mode for name, mode in facts.PRIVACY.items() if mode.servers}

_FLOPS = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*(gflops|tflops|pflops)", re.IGNORECASE)
_PREFIXES = {"gflops": 1e9, "tflops": 1e12, "pflops": 1e15}
_GPU_BALANCE = 250.0
_TEE_BALANCE = 12.0


@dataclass(frozen=True)
class World:
    """One that is not here. ``wire``: of a private one, what takes as many bytes as its whole numbers."""

    model: str
    shape: Shape
    gpu_name: str
    gpu: Gpu
    tee_name: str
    tee: Tee
    link: LinkSpec
    servers: int
    wire: str = "bf16"
    privacy: facts.Privacy = facts.NO_PRIVACY

    @property
    def plans(self) -> list[str]:
        return [name for name in self.privacy.plans(verified=False) if facts.plan(name).offered]


def known(model: str) -> Shape:
    """The dimensions of a model that has a name. Raises ``UsageError``."""
    return _named("model", model, MODELS)


def parse(text: str, defaults: Mapping[str, str], wire: str, shape_of: Callable[[str], Shape] = known) -> World:
    """``rtt=20ms,bandwidth=10gbit,model=llama-3-8b,gpu=h200,tee=32-core-amx,servers=2,privacy=pads``; what is left out
    is as ``defaults`` have it. ``gpu`` and ``tee`` may be FLOP/s, such as 400tflops. ``shape_of`` looks models up.
    Raises ``UsageError``, ``LinkSpecError`` for a link that can't be, and what ``shape_of`` does."""
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
    privacy = _named("privacy", chosen.get("privacy", facts.NO_PRIVACY.name), _PRIVACY)
    gpu, tee = _flops(chosen["gpu"]), _flops(chosen["tee"])
    source = "given; its memory is assumed to move a byte for {:.0f} FLOP"
    return World(
        chosen["model"].rstrip("/").rpartition("/")[2],
        shape_of(chosen["model"]),
        chosen["gpu"],
        Gpu(gpu, gpu / _GPU_BALANCE, 0.0, source.format(_GPU_BALANCE)) if gpu else _named("gpu", chosen["gpu"], GPUS),
        chosen["tee"],
        Tee(tee, tee / _TEE_BALANCE, 16, source.format(_TEE_BALANCE) + ", and 16 cores")
        if tee
        else _named("tee", chosen["tee"], TEES),
        LinkSpec.parse(link or "loopback"),
        int(servers),
        facts.FP32.name if privacy.hides else wire,
        privacy,
    )


def _named(key: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise UsageError(f"--what-if: unknown {key} '{name}'{nearest(name, list(known))}; known are {', '.join(known)}")
    return known[name]


def _flops(text: str) -> float:
    """FLOP/s, 0 where ``text`` is a name."""
    match = _FLOPS.fullmatch(text.strip())
    if match is None:
        return 0.0
    flops = float(match.group(1)) * _PREFIXES[match.group(2).lower()]
    if flops <= 0.0:
        raise UsageError(f"--what-if: {text} is no speed: give a number above 0")
    return flops


# What a pass costs each side


def _work(world: World, plan: facts.Plan, passes: Sequence[tuple[int, int]], sent: traffic.Traffic) -> Work:
    """``passes``: (tokens, position of the first) of each."""
    shape, tee, gpu = world.shape, world.tee, world.gpu
    products = shape.layers * shape.layer_values * (shape.fused_work if plan.fused else 1.0)
    head = shape.vocab * shape.hidden
    value = VALUE_SECONDS / min(tee.cores, THREADS_THAT_HELP)
    # SiLU costs twice and rotary three times what a norm does; after the fused plan's products comes a factor each.
    values = 4 * shape.hidden + 2 * shape.intermediate + 3 * (shape.q + shape.kv)
    if plan.fused:
        values += shape.q + 2 * shape.kv + 2 * shape.intermediate - 2 * shape.hidden
    # In the ring a weight is one byte, and its product several of int8.
    masked = world.privacy.hides and plan.remote
    weight_bytes, ring = (1, RING_ON_GPU) if masked else (2, 1.0)
    own = server = 0.0
    for tokens, start in passes:
        seen = tokens * start + tokens * (tokens + 1) / 2
        own += shape.layers * (10 * CALL_SECONDS + values * tokens * value)
        own += shape.layers * 4 * shape.q * seen / (tee.flops * ATTENTION_SHARE)
        own += shape.layers * 8 * shape.kv * (start + tokens) / tee.memory
        if plan.remote:
            server += shape.layers * 7 * KERNEL_SECONDS + weight_bytes * products / (gpu.memory * MEMORY_SHARE)
            server += ring * 2 * products * tokens / (gpu.flops * GPU_SHARE)
        else:
            own += shape.layers * 4 * CALL_SECONDS + products * (tee.value_bytes / tee.memory + 2 * tokens / tee.flops)
    if not plan.remote:
        return Work(tee=own + head * (tee.value_bytes / tee.memory + 2 / tee.flops))
    server += weight_bytes * head / (gpu.memory * MEMORY_SHARE)
    wire = facts.wire_dtype(world.wire)
    crossed = (sent.bytes_up + sent.bytes_down) / world.privacy.servers
    if masked:
        own += sent.rpc_calls / world.privacy.servers * MASKED_REQUEST_SECONDS
        own += crossed / wire.value_bytes * MASKED_VALUE_SECONDS / min(tee.cores, THREADS_THAT_HELP)
    factor = 0.0 if wire is facts.FP32 else QUANTISING if wire.group else 0.5
    coding = sent.rpc_calls * REQUEST_SECONDS
    return Work(
        own,
        coding + crossed / wire.value_bytes * value * factor,
        0.0,
        server,
        coding + crossed / BUS_BYTES_PER_SECOND + crossed / HOST_COPY_BYTES_PER_SECOND,
    )


def _predicted(world: World, way: Way, tokens: int, start: int, bandwidth: float | None = None) -> dict[str, Any]:
    """A prefill of ``tokens``, or where ``way`` has no chunk one step of decode at ``start``."""
    plan, spec, shape = facts.plan(way.plan), world.link, world.shape
    up, down = (bandwidth or each for each in (spec.up_bytes_per_second, spec.down_bytes_per_second))
    link = Link(spec.rtt_seconds, up, down, HANDOVER_SECONDS)
    edges = traffic.chunk_edges(start, start + tokens, way.chunk_tokens or tokens)
    passes = [(end - begin, begin) for begin, end in pairwise(edges)]
    sent = traffic.Traffic()
    if plan.remote:
        sent = traffic.prefill(
            shape,
            plan.name,
            world.wire,
            tokens=tokens,
            chunk_tokens=way.chunk_tokens or tokens,
            overlaps=True,
            start=start,
        )
        if world.privacy.servers > 1:  # the others get a seed, and answer with as much
            both = world.privacy.servers
            sent = replace(sent, rpc_calls=both * sent.rpc_calls, bytes_down=both * sent.bytes_down)
    work = _work(world, plan, passes, sent)
    if not plan.remote:
        found = predict.Prediction(work.runner, "runner")
    elif len(passes) == 1:
        found = predict.lock_step(sent, link, work)
    else:
        work = replace(
            work,
            serialization=work.serialization + sent.rpc_calls * REQUEST_SECONDS / 2,  # what an event loop adds
            gpu=work.gpu / world.servers,
            server_serialization=work.server_serialization / world.servers,
        )
        wider = replace(link, up_bytes_per_second=up * world.servers, down_bytes_per_second=down * world.servers)
        found = predict.overlapped(sent, wider, work, len(passes))
    return {
        "plan": way.plan,
        "chunk_tokens": way.chunk_tokens,
        "seconds": found.seconds,
        "bound_by": found.bound_by,
        "tee_seconds": work.tee,
        "serialization_seconds": work.serialization,
        "server_seconds": work.server,
        "up_seconds": link.up_seconds(sent),
        "down_seconds": link.down_seconds(sent),
        "rounds": sent.rounds,
    }


def _ranked(
    world: World, plans: Iterable[str], phase: str, tokens: tuple[int, int], bandwidth: float | None = None
) -> list[dict[str, Any]]:
    prompt, after = tokens
    if phase == "prefill":
        ways = prefill_ways(plans, prompt, TUNE_CHUNKS, overlaps=True)
        rows = [_predicted(world, way, prompt, 0, bandwidth) for way in ways]
    else:
        rows = [_predicted(world, Way(plan, 0), 1, prompt + after // 2, bandwidth) for plan in plans]
    return sorted(rows, key=lambda row: float(row["seconds"]))


# The document


def document(worlds: Sequence[World], prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """``teegpu.tune/1`` of kind ``what-if``, one entry of ``results`` for each of ``worlds``."""
    assumptions = {(each["what"], each["value"]): each for world in worlds for each in _assumptions(world)}
    return {
        "schema": doc.TUNE_SCHEMA,
        "kind": "what-if",
        "made_at": doc.now(),
        "versions": doc.versions(),
        "model": {"name": "what if"},
        "settings": {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens},
        "basis": "assumptions: every figure is a prediction",
        "assumptions": list(assumptions.values()),
        "results": [_result(world, (prompt_tokens, decode_tokens)) for world in worlds],
        "notes": [
            "all figures are predictions from the assumptions above; nothing of this was measured",
            *dict.fromkeys(note for world in worlds for note in _memory_notes(world)),
            *dict.fromkeys(
                f"{world.model} with pads: those of one prompt and its answer take {size / 1e9:,.1f} GB in the TEE, "
                f"which makes them in {human_seconds(seconds)} before it begins"
                for world in worlds
                if world.privacy.pads
                for size, seconds in [_pads(world, prompt_tokens, decode_tokens)]
            ),
        ],
    }


def _result(world: World, tokens: tuple[int, int]) -> dict[str, Any]:
    rows = {phase: _ranked(world, world.plans, phase, tokens) for phase in ("prefill", "decode")}
    chosen = {
        phase: pick([Way(row["plan"], row["chunk_tokens"], row["seconds"]) for row in found])
        for phase, found in rows.items()
    }
    local = {phase: next(row for row in found if row["plan"] == facts.LOCAL.name) for phase, found in rows.items()}
    pads = _pads(world, *tokens) if world.privacy.pads else (None, None)
    return {
        "model": world.model,
        "gpu": world.gpu_name,
        "tee": world.tee_name,
        "link": str(world.link),
        "servers": world.servers,
        "privacy": world.privacy.name,
        **dict(zip(("pads_bytes", "pads_seconds"), pads, strict=True)),
        "wire_dtype": world.wire,
        **rows,
        "local": {
            "prefill_seconds": local["prefill"]["seconds"],
            "decode_step_seconds": local["decode"]["seconds"],
        },
        "offloaded": {
            phase: next(row for row in found if row["plan"] != facts.LOCAL.name) for phase, found in rows.items()
        },
        "choice": {phase: way.plan for phase, way in chosen.items()},
        "total_seconds": chosen["prefill"].seconds + tokens[1] * chosen["decode"].seconds,
        "break_even": {
            f"{phase}_bytes_per_second": _least_bandwidth(world, phase, tokens, local[phase]["seconds"])
            for phase in rows
        },
    }


def _pads(world: World, prompt: int, after: int) -> tuple[float, float]:
    """What pads for a prompt and its answer take of the TEE's memory, in bytes, and the seconds that it makes them."""
    shape = world.shape
    outputs = shape.layers * (shape.q + 2 * shape.kv + 2 * shape.hidden + 2 * shape.intermediate)
    values = (prompt + after) * outputs + (after + 1) * shape.vocab
    products = (prompt + after) * shape.layers * shape.layer_values + (after + 1) * shape.vocab * shape.hidden
    seconds = RING_IN_TEE * 2 * products / world.tee.flops
    return float(facts.INT32_BYTES * values), seconds


def _least_bandwidth(world: World, phase: str, tokens: tuple[int, int], local: float) -> float | None:
    """The least bandwidth each way, in bytes per second, from which the best offloading plan is as quick as all in the
    TEE; None where none is enough, 0 where any is."""
    plans = [name for name in world.plans if facts.plan(name).remote]

    def pays(bandwidth: float) -> bool:
        return float(_ranked(world, plans, phase, tokens, bandwidth)[0]["seconds"]) <= local

    low, high = SEARCHED_BYTES
    if not pays(high):
        return None
    if pays(low):
        return 0.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class _Assumption:
    what: str
    value: str
    source: str


def _assumptions(world: World) -> list[dict[str, str]]:
    """Every assumption, with its source."""
    gpu, tee = world.gpu, world.tee
    return [
        asdict(_Assumption(*each))
        for each in (
            (
                f"GPU {world.gpu_name}",
                f"{gpu.flops / 1e12:,.0f} TFLOP/s bf16, {gpu.memory / 1e9:,.0f} GB/s",
                gpu.source,
            ),
            ("of which products reach", f"{GPU_SHARE:.0%} of the FLOP/s, {MEMORY_SHARE:.0%} of the GB/s", "assumed"),
            ("a kernel", f"{KERNEL_SECONDS * 1e6:.0f} µs", "assumed"),
            (
                "bytes into and out of the GPU",
                f"{BUS_BYTES_PER_SECOND / 1e9:.0f} GB/s over the bus, {HOST_COPY_BYTES_PER_SECOND / 1e9:.0f} GB/s in "
                "its host's memory",
                "assumed",
            ),
            (
                f"TEE {world.tee_name}",
                f"{tee.flops / 1e12:,.2g} TFLOP/s, {tee.memory / 1e9:,.0f} GB/s, {tee.cores} cores, weights of "
                f"{tee.value_bytes} bytes",
                tee.source,
            ),
            (
                "norms, SiLU, rotary in the TEE",
                f"{CALL_SECONDS * 1e6:.0f} µs a call and {VALUE_SECONDS * 1e9:.1f} ns a value on one core, up to "
                f"{THREADS_THAT_HELP} cores",
                "assumed, near what an AVX2 core does",
            ),
            (
                "a request",
                f"{2 * REQUEST_SECONDS * 1e3:.2f} ms on both sides, {HANDOVER_SECONDS * 1e3:.2f} ms to hand it over",
                "near docs/benchmarks.md, overhead of a request",
            ),
            ("the link", "as given; bytes of TCP/IP headers and losses are left out", "assumed"),
            *(_PRIVATE if world.privacy.hides else ()),
        )
    ]


_PRIVATE: Final = (
    (
        "masking, unmasking, verification",
        f"{MASKED_REQUEST_SECONDS * 1e3:.1f} ms a request and {MASKED_VALUE_SECONDS * 1e9:.0f} ns a value on one core",
        "near docs/benchmarks.md, what the runner does beyond a plain run",
    ),
    (
        "products in the ring",
        f"{RING_ON_GPU:.0f} × those in bf16 on a GPU, {RING_IN_TEE} × the TEE's own for pads, which it makes ahead",
        "assumed: four int8 products at twice the rate; docs/benchmarks.md",
    ),
    ("servers of two-server", "work at once, over the one link of the runner", "assumed"),
)


def _memory_notes(world: World) -> list[str]:
    """What the weights take on each side, and whether that is there; norms are left out."""
    shape = world.shape
    count = shape.layers * shape.layer_values + 2 * shape.vocab * shape.hidden
    notes = [
        f"{world.model}: weights of {2 * count / 1e9:,.1f} GB in bf16 on the server; all in the TEE takes "
        f"{world.tee.value_bytes * count / 1e9:,.1f} GB there"
    ]
    holds = world.gpu.holds * world.servers
    if holds and 2 * count > holds:
        least = -(-2 * count // int(world.gpu.holds * 0.9))
        notes.append(
            f"{world.model} does not fit into {world.servers} × {world.gpu_name} ({holds / 1e9:,.0f} GB): it takes its "
            f"layers over servers={least} or more"
        )
    return notes
