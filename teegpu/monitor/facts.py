"""From a record's ``meta.json`` to the monitor's ``Facts``. A record from another version may lack any of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teegpu.monitor.snapshot import Facts


def facts_of(meta: Mapping[str, Any]) -> Facts:
    """What ``meta`` says, and defaults for what it does not."""
    model, settings = _table(meta, "model"), _table(meta, "settings")
    server, tee = _table(meta, "server"), _table(meta, "tee")
    threads = _table(settings, "threads")
    endpoints = settings.get("endpoints")
    embedded = bool(server.get("embedded", not endpoints))
    return Facts(
        run_id=str(meta.get("id", "")),
        started_at=str(meta.get("started_at", "")),
        model=str(model.get("name", "")),
        layers=_whole(model.get("layers")),
        parameters=_whole(model.get("parameters")),
        prefill_plan=str(settings.get("prefill_plan", "")),
        decode_plan=str(settings.get("decode_plan", "")),
        transport=str(settings.get("transport", "")),
        wire_dtype=str(settings.get("wire_dtype", "")),
        privacy=str(settings.get("privacy") or "none"),
        verified=settings.get("verify") is True,
        link=str(settings.get("link", "")),
        endpoints=tuple(str(one) for one in endpoints) if isinstance(endpoints, (list, tuple)) else (),
        keys=_keys(settings, server),
        embedded=embedded and bool(server),
        device=str(server.get("device", "")),
        dtype=str(server.get("dtype", "")),
        server_threads=_whole(server.get("threads")) or _whole(threads.get("server")) or None,
        runner_threads=_whole(threads.get("runner")) or None,
        tee_kind=str(tee.get("kind", "none")),
        attested=bool(tee.get("attested", False)),
        note=str(meta.get("note", "") or ""),
        chunk_tokens=_whole(settings.get("chunk_tokens")),
        speculate=_whole(settings.get("speculate")),
        max_tokens=_whole(settings.get("max_tokens")),
    )


def _keys(settings: Mapping[str, Any], server: Mapping[str, Any]) -> bool | None:
    """Whether the link is encrypted, None where the record does not say."""
    for table in (settings, server):
        for name in ("keys", "curve", "encrypted"):
            if name in table:
                return bool(table[name])
    return None


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
