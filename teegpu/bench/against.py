"""Predictions held against measurements: every case of saved benchmark documents, and whether ``auto`` would have
chosen well. Pure but for reading files and ``packed_costs``.

Takes documents of ``teegpu bench ladder`` and of ``teegpu bench plans``. What the model does not know is not predicted:
rungs without KV or position cache, and transformers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgpack

from teegpu.bench import document as doc
from teegpu.bench.predictions import LOSSY, SCHEMA
from teegpu.errors import ConfigError, UsageError
from teegpu.metrics import chooser, profile
from teegpu.metrics.chooser import AUTO_PLANS
from teegpu.metrics.cost_model import CostModel, Settings
from teegpu.metrics.demand import LOCAL
from teegpu.metrics.predict import Link
from teegpu.metrics.profile import Profile
from teegpu.metrics.rates import Rates
from transports.linkspec import LinkSpec

BENCHMARKS: Final = ("ladder", "plans")
GOOD_ENOUGH: Final = 1.1
"""A choice is good where it took at most this times the best that was measured."""
MEDIAN_GOAL: Final = 0.2
PACKED_BYTES: Final = (1024, 8 * 2**20)
PACKED_REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """One phase of one case. Seconds of the prefill, or of a step of decode."""

    link: str
    label: str
    phase: str
    plan: str
    wire_dtype: str
    predicted_seconds: float
    measured_seconds: float
    bound_by: str

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured; below 0: predicted too quick."""
        return self.predicted_seconds / self.measured_seconds - 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``auto`` would choose for a phase on a link, and how that compares with the best that was measured."""

    link: str
    phase: str
    chosen: str
    chosen_seconds: float | None
    best: str
    best_seconds: float

    @property
    def ratio(self) -> float | None:
        return None if self.chosen_seconds is None else self.chosen_seconds / self.best_seconds


def read(path: Path) -> dict[str, Any]:
    """A benchmark's document. Raises ``UsageError`` for a file that is none of ours."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--against {path} can't be read: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError):
        raise UsageError(f"--against {path} is no JSON document of 'teegpu bench'") from None
    kind = found.get("benchmark") if isinstance(found, dict) else None
    if not isinstance(found, dict) or found.get("schema") != doc.SCHEMA or kind not in BENCHMARKS:
        raise UsageError(f"--against {path} is no document of 'teegpu bench ladder' or 'teegpu bench plans'")
    return found


def profile_for(document: Mapping[str, Any], path: Path) -> tuple[Profile, Rates]:
    """The stored profile of the document's servers and link, and its rates; where only one without the emulated link is
    there, with the link put in. Raises ``ConfigError`` where there is none, or it is not of this machine."""
    settings, model = document["settings"], document["model"]
    endpoints = tuple(filter(None, [settings.get("endpoint", "")]))
    link, digest = str(settings.get("link", "")), str(model["digest"])
    for tried in dict.fromkeys((link, "")):
        place = profile.path_of(endpoints, tried, digest)
        if not place.exists():
            continue
        found = profile.read(place)
        if reason := found.misfit(digest=digest):
            raise ConfigError(f"the stored profile can't be used, as {reason}: '{found.command}' renews it")
        if tried == link:
            return found, found.rates
        spec = LinkSpec.parse(link)
        return found, found.rates.over(Link(spec.rtt_seconds, spec.up_bytes_per_second, spec.down_bytes_per_second))
    raise ConfigError(
        f"there is no profile to predict {path} from: measure one with "
        f"'{profile.renewal(endpoints, link, str(model['name']))}'"
    )


def compared(document: Mapping[str, Any], model: CostModel, packed: tuple[float, float]) -> Iterator[Compared]:
    """Each case's phases. ``packed``: seconds a request and a byte that the ladder's packed codec adds."""
    settings = document["settings"]
    tokens, link = int(settings["prompt_tokens"]), str(settings.get("link") or "loopback")
    for entry in document["results"]:
        case = entry["case"]
        if case.get("kind") != "teegpu" or entry.get("error") or not _known(case):
            continue
        wire = str(entry.get("wire_dtype") or case.get("wire_dtype") or "fp32")
        transport = str(case.get("transport") or "zmq")
        chunk = int(entry.get("chunk_tokens") or tokens)
        extra = packed if case.get("codec") == "packed" else (0.0, 0.0)
        base = Settings(str(case["prefill_plan"]), wire, transport, chunk)
        if "prefill" in entry and _covers(model, base):
            found = model.prefill(base, tokens)
            yield Compared(
                link, entry["label"], "prefill", base.plan, wire, found.seconds + _extra(found.traffic, extra),
                float(entry["prefill"]["seconds"]["median"]), found.bound_by,
            )  # fmt: skip
        later = replace(base, plan=str(case["decode_plan"]), rows=_rows(entry))
        if entry.get("decode") and _covers(model, later):
            steps = max(1, int(entry["decode"]["steps"]))
            found = model.decode(later, tokens + steps // 2)
            yield Compared(
                link, entry["label"], "decode", later.plan, wire, found.seconds + _extra(found.traffic, extra),
                float(entry["decode"]["seconds"]["median"]) / steps, found.bound_by,
            )  # fmt: skip


def _known(case: Mapping[str, Any]) -> bool:
    return case.get("kv_cache", True) is True and case.get("position_cache", True) is True


def _covers(model: CostModel, settings: Settings) -> bool:
    return model.knows(settings.plan, settings.wire_dtype)


def _extra(traffic: Any, packed: tuple[float, float]) -> float:
    each, byte = packed
    return traffic.rpc_calls * each + (traffic.bytes_up + traffic.bytes_down) * byte


def _rows(entry: Mapping[str, Any]) -> int:
    """Tokens of a pass, guessed ones included, on average."""
    samples = entry.get("samples") or [entry.get("warm_up")]
    sample = samples[0] or {}
    passes = max(1, int(sample.get("decode", {}).get("passes", 1)))
    return 1 + round(int(sample.get("drafted_tokens", 0)) / passes)


def verdicts(found: Sequence[Compared], model: CostModel, tokens: int, own_wire: str) -> Iterator[Verdict]:
    """What ``auto`` would have chosen over ``pipelined`` in ``own_wire``, against the cases that were measured without
    a loss that ``auto`` would not take."""
    base = Settings("fused", own_wire, "pipelined", 0)
    allowed = [each for each in found if each.plan in AUTO_PLANS and each.wire_dtype not in LOSSY]
    for phase in ("prefill", "decode"):
        measured = [each for each in allowed if each.phase == phase]
        if not measured:
            continue
        plans = [plan for plan in AUTO_PLANS if plan != LOCAL or any(each.plan == LOCAL for each in measured)]
        if phase == "prefill":
            ranked = chooser.prefills(model, base, tokens=tokens, plans=plans)
        else:
            ranked = chooser.decodes(model, base, position=tokens, plans=plans)
        chosen = chooser.pick(ranked).plan
        best = min(measured, key=lambda each: each.measured_seconds)
        own = [each.measured_seconds for each in measured if each.plan == chosen]
        yield Verdict(
            best.link, phase, chosen, min(own) if own else None, f"{best.plan} ({best.label})", best.measured_seconds
        )


def packed_costs() -> tuple[float, float]:
    """What the codec that the ladder begins with costs here, both sides together: seconds a message and a byte.

    All frames of a message travel as one msgpack map there, with a copy at each step (``bench.rungs``)."""
    times = []
    for size in PACKED_BYTES:
        frame = bytes(size)
        least = float("inf")
        for _ in range(PACKED_REPEATS):
            began = time.perf_counter()
            body = msgpack.packb({"frames": [bytes(memoryview(frame))]})
            for part in msgpack.unpackb(body)["frames"]:
                bytearray(part)
            least = min(least, time.perf_counter() - began)
        times.append(least)
    (small, large), (first, second) = PACKED_BYTES, times
    byte = max(0.0, (second - first) / (large - small))
    return 2 * max(0.0, first - byte * small), byte


def against(paths: Sequence[Path], packed: tuple[float, float]) -> dict[str, Any]:
    """The document. Raises what reading raises."""
    rows: list[Compared] = []
    judged: list[Verdict] = []
    notes: list[str] = []
    names: list[str] = []
    for path in paths:
        document = read(path)
        found, rates = profile_for(document, path)
        model = CostModel(found.shape, rates)
        try:
            own = list(compared(document, model, packed))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"--against {path} is damaged ({error!r}): measure it anew") from None
        rows += own
        wire = "bf16" if found.server.dtype == "bf16" else "fp16"
        judged += verdicts(own, model, int(document["settings"]["prompt_tokens"]), wire)
        names.append(str(document["model"]["name"]))
        dtypes = {str((entry.get("server") or {}).get("dtype", "")) for entry in document["results"]} - {""}
        if dtypes and found.server.dtype not in dtypes:
            notes.append(f"{path}: servers computed in {', '.join(sorted(dtypes))}, the profile's in "
                         f"{found.server.dtype}")  # fmt: skip
        skipped = [entry["label"] for entry in document["results"] if not _known(entry["case"])]
        if skipped:
            notes.append(f"not predicted: {', '.join(skipped)}")
    errors = [abs(each.error) for each in rows]
    return {
        "schema": SCHEMA,
        "kind": "against",
        "made_at": doc.now(),
        "versions": doc.versions(),
        "model": {"name": ", ".join(dict.fromkeys(names))},
        "settings": {"files": [str(path) for path in paths]},
        "basis": "stored profiles",
        "results": [asdict(each) | {"error_share": each.error} for each in rows],
        "verdicts": [asdict(each) | {"ratio": each.ratio} for each in judged],
        "median_error": statistics.median(errors) if errors else None,
        "median_goal": MEDIAN_GOAL,
        "notes": list(dict.fromkeys(notes)),
    }
