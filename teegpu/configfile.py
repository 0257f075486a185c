"""Changing settings in a TOML file that belongs to somebody: other keys, comments and layout stay as they are. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from teegpu.config import to_toml
from teegpu.errors import ConfigError

_SECTION = re.compile(r"\s*\[\s*([A-Za-z0-9_]+)\s*\]\s*(?:#.*)?$")
_OTHER_SECTION = re.compile(r"\s*\[")


def updated(text: str, changes: Mapping[str, Any], place: str) -> str:
    """``text`` of the file at ``place`` with ``changes`` by dotted key (``"run.transport"``).

    A key that is there gets its new value where it stands, and keeps the comment behind it; one that stands there as a
    comment gets its line below that; others are added to the end of their section. Raises ``ConfigError`` for a file
    that is no TOML, or is written in a way that this can't change.
    """
    before = _parsed(text, place)
    lines = text.splitlines()
    for key, value in changes.items():
        section, name = key.split(".")
        lines = _set(lines, section, name, to_toml(value))
    made = "\n".join(lines) + "\n"
    expected = {section: dict(table) if isinstance(table, dict) else table for section, table in before.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        expected.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    try:
        fits = tomllib.loads(made) == expected
    except tomllib.TOMLDecodeError:
        fits = False
    if not fits:
        wanted = ", ".join(f"{key} = {to_toml(value)}" for key, value in changes.items())
        raise ConfigError(f"{place}: written in a way that can't be changed from here: set {wanted} by hand")
    return made


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place}: not a valid TOML file: {error}") from None


def _set(lines: list[str], section: str, name: str, value: str) -> list[str]:
    """``lines`` with ``name = value`` in ``section``."""
    span = _span(lines, section)
    if span is None:
        space = [""] if lines and lines[-1].strip() else []
        return [*lines, *space, f"[{section}]", f"{name} = {value}"]
    first, stop = span
    given = re.compile(rf"(\s*{re.escape(name)}\s*=\s*)(\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#\"'\[{{]*?)(\s*(?:#.*)?)$")
    commented = re.compile(rf"\s*#\s*{re.escape(name)}\s*=")
    after = None
    for index in range(first, stop):
        match = given.match(lines[index])
        if match is not None:
            return [*lines[:index], f"{match.group(1)}{value}{match.group(3)}", *lines[index + 1 :]]
        if commented.match(lines[index]):
            after = index
    if after is None:
        after = stop - 1
        while after >= first and not lines[after].strip():
            after -= 1
    return [*lines[: after + 1], f"{name} = {value}", *lines[after + 1 :]]


def _span(lines: list[str], section: str) -> tuple[int, int] | None:
    """The lines of ``section``, its heading left out; comments before the next heading belong to that."""
    first = None
    for index, line in enumerate(lines):
        if first is not None and _OTHER_SECTION.match(line):
            stop = index
            while stop > first and (not lines[stop - 1].strip() or lines[stop - 1].lstrip().startswith("# ")):
                stop -= 1
            return first, stop
        match = _SECTION.match(line)
        if first is None and match is not None and match.group(1) == section:
            first = index + 1
    return None if first is None else (first, len(lines))
