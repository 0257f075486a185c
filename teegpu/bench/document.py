"""The JSON document ``teegpu.bench/1``: what every benchmark gives, whole or interrupted; and how it is read again."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teegpu import __version__, machine
from teegpu.bench.samples import Measured, Sample
from teegpu.errors import UsageError
from teegpu.model.spec import ModelSpec

SCHEMA = "teegpu.bench/1"
TUNE_SCHEMA = "teegpu.tune/1"

PACKAGES = ("torch", "transformers", "pyzmq", "msgpack", "zstandard", "numpy")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of teegpu and of what its speed depends on."""
    found = {"teegpu": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _model(spec: ModelSpec, digest: str) -> dict[str, Any]:
    return {
        "name": spec.name,
        "digest": digest,
        "architecture": spec.architecture,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "parameters": spec.parameters,
    }


def document(
    benchmark: str,
    *,
    status: str,
    started_at: str,
    spec: ModelSpec | None,
    digest: str,
    settings: dict[str, Any],
    results: list[dict[str, Any]],
    notes: list[str],
    **more: Any,
) -> dict[str, Any]:
    """``status`` is ``complete``, ``interrupted``, or ``failed`` where part of it failed; ``more`` are keys of this
    benchmark alone. ``spec`` None: it needs no model."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "status": status,
        "started_at": started_at,
        "ended_at": now(),
        "machine": machine.describe(),
        "tee": {"kind": machine.tee_kind(), "attested": False},
        "versions": versions(),
        "model": None if spec is None else _model(spec, digest),
        "settings": settings,
        **more,
        "notes": notes,
        "results": results,
    }


# Reading one again

_PARTS: dict[str, type] = {
    "status": str,
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "notes": list,
    "results": list,
}


def read(path: Path, benchmark: str = "") -> dict[str, Any]:
    """The document in ``path``; with ``benchmark``, one of that benchmark.

    Raises ``UsageError`` for a file that can't be read, and for what is not such a document.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} can't be read: {(error.strerror or 'no reason given').lower()}") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path} is no result of 'teegpu bench': it is not JSON (write it with --out FILE.json)"
        ) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no result of 'teegpu bench': its schema is not {SCHEMA}")
    if benchmark and document.get("benchmark") != benchmark:
        raise UsageError(
            f"{path} is a result of 'teegpu bench {document.get('benchmark')}', and one of 'teegpu bench {benchmark}' "
            "is needed"
        )
    for name, kind in _PARTS.items():
        if not isinstance(document.get(name), kind):
            raise damaged(path)
    return document


def damaged(*paths: Path) -> UsageError:
    names = " or ".join(map(str, paths))
    return UsageError(f"{names} is a result of 'teegpu bench' that is damaged: measure it again")


# Going on with one

FACTS = ("server", "threads", "chunk_tokens", "wire_dtype", "notes", "accuracy")
"""What a case's process said of itself."""


_MAY_DIFFER = ("repeats", "max_seconds")
_MACHINE = ("architecture", "cpu", "cores", "python")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Why the measurements of ``old`` can't be gone on with as ``new``: what is not the same. Empty where they can.

    More repeats and another bound on time are no obstacle, and no more is anything that has no part in the figures.
    """
    pairs = [("model", _at(old, "model", "digest"), _at(new, "model", "digest"))]
    pairs += [(f"machine ({key})", _at(old, "machine", key), _at(new, "machine", key)) for key in _MACHINE]
    pairs += [("versions", old.get("versions"), new.get("versions"))]
    keys = [key for key in new["settings"] if key not in _MAY_DIFFER]
    pairs += [(f"settings ({key})", _at(old, "settings", key), new["settings"][key]) for key in keys]
    for name, before, now in pairs:
        if isinstance(before, dict) and isinstance(now, dict):
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    return f"{name}: {key} was {before.get(key)!r} and is {now.get(key)!r}"
        elif before != now:
            return f"{name}: it was {_short(before)} and is {_short(now)}"
    return ""


def _at(document: Mapping[str, Any], *path: str) -> Any:
    value: Any = document
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def take_over(entry: Mapping[str, Any], measured: Measured) -> None:
    """Fills ``measured`` with what an entry of a saved document has of it. A failure is not kept: it is tried again.

    Raises ``ValueError`` for an entry that can't be one.
    """
    samples, warm_up = entry.get("samples"), entry.get("warm_up")
    if not isinstance(samples, list):
        raise ValueError("an entry has samples")
    measured.samples = [Sample.from_json(sample) for sample in samples]
    measured.warm_up = None if warm_up is None else Sample.from_json(warm_up)
    measured.facts = {name: entry[name] for name in FACTS if name in entry}
