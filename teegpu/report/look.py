"""Reading a ``teegpu.report/1`` document that may be old, damaged or made by somebody else.

What is missing, or is not of the kind that it should be, is None or empty: never an error, never another figure. Text
is made fit for a terminal here, once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from teegpu.errors import RecordError
from teegpu.units import printable

SCHEMA = "teegpu.report"
VERSION = 1
"""The newest version of the schema that is read here."""

MAX_BYTES = 64 * 2**20
"""A document is some tens of KiB; a file above this is something else."""

Document = Mapping[str, Any]


def at(document: Any, *path: str) -> Any:
    """The value at ``path``; None where a part of it is missing."""
    for name in path:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def number(document: Any, *path: str) -> float | None:
    """The finite number at ``path``."""
    value = at(document, *path)
    return value if _is_number(value) else None


def amount(document: Any, *path: str) -> float:
    """The number at ``path`` where it is not negative, else 0: for sums."""
    return max(0.0, number(document, *path) or 0.0)


def text(document: Any, *path: str) -> str:
    """The string (or number) at ``path``, printable and on one line; empty where there is none."""
    value = at(document, *path)
    if isinstance(value, str) or _is_number(value):
        return printable(str(value)).strip()
    return ""


def mapping(document: Any, *path: str) -> Mapping[str, Any]:
    value = at(document, *path)
    return value if isinstance(value, Mapping) else {}


def entries(document: Any, *path: str) -> list[Mapping[str, Any]]:
    """The objects of the list at ``path``."""
    value = at(document, *path)
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def lines(document: Any, *path: str) -> list[str]:
    """The strings at ``path``, which is one or a list of them."""
    value = at(document, *path)
    found = value if isinstance(value, list) else [value]
    return [printable(line).strip() for line in found if isinstance(line, str) and line.strip()]


def numbers(document: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in it with its dotted path; layers by their number, ``phases.decode.layers.3.gpu_seconds``."""
    if isinstance(document, Mapping):
        for name, value in document.items():
            if isinstance(name, str):
                yield from numbers(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(document, list):
        for place, entry in enumerate(document):
            if isinstance(entry, Mapping):
                own = number(entry, "layer")
                yield from numbers(entry, f"{prefix}.{place if own is None else int(own)}")
    elif _is_number(document):
        yield prefix, document


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check(document: object, where: str) -> dict[str, Any]:
    """``document`` if it is one that can be read here. Raises ``RecordError`` that names ``where`` it came from."""
    schema = document.get("schema") if isinstance(document, dict) else None
    named = re.fullmatch(rf"{re.escape(SCHEMA)}/(\d{{1,9}})", schema) if isinstance(schema, str) else None
    if not isinstance(document, dict) or named is None:
        raise RecordError(f"{where} is not a report: its schema is not {SCHEMA}/{VERSION}")
    if int(named[1]) > VERSION:
        raise RecordError(
            f"{where} was written by a newer teegpu ({schema}); this one reads up to {SCHEMA}/{VERSION}: update teegpu"
        )
    return document


def read(path: Path) -> dict[str, Any]:
    """The document in a file, as ``run --json`` prints it. Raises ``RecordError``."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is not a report: it is larger than {MAX_BYTES // 2**20} MiB")
        return check(json.loads(path.read_bytes()), str(path))
    except OSError as error:
        raise RecordError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise RecordError(f"{path} is not a report: it is not valid JSON") from None
