"""Calls of tools in what a model says, wherever the borders of its tokens are."""

from __future__ import annotations

import json

import pytest

from teegpu.api.tools import HERMES, LLAMA, Calls, Way, way_of

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "ü"]}}\n</tool_call>'
OTHER = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'


def divided(way: Way, text: str, size: int, *, forced: bool = False) -> tuple[str, list[tuple[str, object]]]:
    calls = Calls(way, ["f", "g"], forced=forced)
    plain = "".join(calls.push(text[at : at + size]) for at in range(0, len(text), size)) + calls.finish()
    assert [call["index"] for call in calls.found] == list(range(len(calls.found)))
    assert len({call["id"] for call in calls.found}) == len(calls.found)
    functions = [call["function"] for call in calls.found]
    return plain, [(function["name"], json.loads(function["arguments"])) for function in functions]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_calls_of_hermes(size: int) -> None:
    assert divided(HERMES, "Let me see. " + ONE + OTHER + " <b>done", size) == (
        "Let me see.  <b>done",
        [("f", {"x": [1, "ü"]}), ("g", {})],
    )
    for text in ("no call", "<tool_cal", "a < b", "<tool_call>{nothing</tool_call>", "<tool_call>", "</tool_call>"):
        plain, found = divided(HERMES, text, size)
        assert not found
        assert plain.removesuffix("</tool_call>") == text.removesuffix("</tool_call>")
    assert divided(HERMES, ONE.replace('"f"', '"unknown"'), size)[1] == []
    assert divided(HERMES, ONE.removesuffix("</tool_call>"), size)[1] == [("f", {"x": [1, "ü"]})]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_of_llama(size: int) -> None:
    call = '{"name": "f", "parameters": {"x": 1}}'
    assert divided(LLAMA, f"\n{call}", size) == ("", [("f", {"x": 1})])
    for text in ("Hello {x}", '{"a": 1}', "{", "{" * 5000, "", f"{call} and more"):
        assert divided(LLAMA, text, size) == (text, [])


@pytest.mark.parametrize("way", [HERMES, LLAMA])
def test_a_call_that_was_forced_is_nothing_but_its_json(way: Way) -> None:
    text = json.dumps({"name": "g", way.arguments: {"a": None}})
    assert divided(way, text, 4, forced=True) == ("", [("g", {"a": None})])
    assert divided(way, text[:-3], 4, forced=True) == (text[:-3], [])


def test_what_a_template_says_of_tools() -> None:
    assert way_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert way_of('{% if tools %}{"name": x, "parameters": y}{% endif %}') is LLAMA
    assert way_of("{{ messages }}") is None
