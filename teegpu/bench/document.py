"""The JSON document ``teegpu.bench/1``: what every benchmark gives, whole or interrupted."""

from __future__ import annotations

import importlib.metadata
from datetime import UTC, datetime
from typing import Any

from teegpu import __version__, machine
from teegpu.model.spec import ModelSpec

SCHEMA = "teegpu.bench/1"

PACKAGES = ("torch", "transformers", "pyzmq", "msgpack", "zstandard", "numpy")

COMPLETE, INTERRUPTED, FAILED = "complete", "interrupted", "failed"


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
