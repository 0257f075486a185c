"""Calls of tools: how a model is asked for one, and how its words become one. Pure.

Two ways of saying it are known, by what a model's chat template writes: ``<tool_call>{"name": …, "arguments": …}
</tool_call>`` of Hermes and Qwen, and Llama's ``{"name": …, "parameters": …}``, which is all of an answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from teegpu.text import overlap

_JSON_OBJECT: Final = {"type": "object"}


@dataclass(frozen=True)
class Way:
    """``opens`` and ``closes`` stand around a call's JSON; ``arguments`` is the name of its arguments there."""

    opens: str
    closes: str
    arguments: str


HERMES: Final = Way("<tool_call>", "</tool_call>", "arguments")
LLAMA: Final = Way("", "", "parameters")


def way_of(template: str) -> Way | None:
    """How a model with this chat template says a call; None where its template knows of no tools."""
    if "tools" not in template:
        return None
    if HERMES.opens in template:
        return HERMES
    return LLAMA if '"parameters"' in template else None


def schema(way: Way, tools: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """What a call has to be, where one of ``tools`` has to be called; ``name``: this one."""
    wanted = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                way.arguments: function.get("parameters") or _JSON_OBJECT,
            },
            "required": ["name", way.arguments],
            "additionalProperties": False,
        }
        for function in wanted
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class Calls:
    """Divides an answer into text and calls, as it comes. ``forced``: it is one call's JSON and nothing else."""

    def __init__(self, way: Way, names: Collection[str], *, forced: bool) -> None:
        self._way = way
        self._names = frozenset(names)
        self._held = ""
        self._inside = forced
        self._forced = forced
        self.found: list[dict[str, Any]] = []

    def push(self, text: str) -> str:
        """What of the text so far is certain to be no call."""
        self._held += text
        if self._forced or not self._way.opens:
            # All of an answer is a call, or none of it is.
            if self._forced or not self._held.lstrip() or self._held.lstrip().startswith("{"):
                return ""
            return self._taken(len(self._held))
        plain = ""
        while True:
            if self._inside:
                end = self._held.find(self._way.closes)
                if end < 0:
                    return plain
                plain += self._call(self._held[:end], around=True)
                self._taken(end + len(self._way.closes))
                self._inside = False
            start = self._held.find(self._way.opens)
            if start < 0:
                return plain + self._taken(len(self._held) - overlap(self._held, self._way.opens))
            plain += self._taken(start)
            self._taken(len(self._way.opens))
            self._inside = True

    def finish(self) -> str:
        """What is left of the text."""
        held = self._taken(len(self._held))
        if self._inside or (not self._way.opens and held.lstrip().startswith("{")):
            return self._call(held, around=self._inside and not self._forced)
        return held

    def _taken(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _call(self, text: str, *, around: bool) -> str:
        """Takes ``text`` for a call; where it is none it is given back as text."""
        try:
            said = json.loads(text)
            name, arguments = said["name"], said[self._way.arguments]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = arguments = None
        if name not in self._names or not isinstance(arguments, dict):
            return f"{self._way.opens}{text}" if around else text
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        call = {"index": len(self.found), "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self.found.append({**call, "function": function})
        return ""
