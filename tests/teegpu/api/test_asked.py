"""What clients send, as they send it: read, or refused by the name of the parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from teegpu.api import asked
from teegpu.api.errors import ApiError
from teegpu.tee.sampling import SamplingOptions

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**body: Any) -> asked.Asked:
    return asked.chat({"messages": [USER], **body}, SamplingOptions(), padded=True)


def messages(*given: Any) -> list[dict[str, Any]]:
    return chat(messages=list(given)).messages


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert messages({"role": "user", "content": parts}) == [{"role": "user", "content": "Hello"}]


def test_system_and_developer_are_one_message_at_the_start() -> None:
    found = messages({"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"})
    assert found == [{"role": "system", "content": "a\n\nb"}, USER]


def test_no_content_beside_calls_of_tools() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = messages(USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "c1", "content": "2"})  # fmt: skip
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found[2] == {"role": "tool", "content": "2", "tool_call_id": "c1"}


def test_null_is_as_if_it_were_not_there() -> None:
    names = ["max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "stream",
             "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "stream_options", "tools",
             "response_format", "model", "tool_choice", "cache_salt", "user"]  # fmt: skip
    assert chat(**dict.fromkeys(names)) == chat()


def test_what_nobody_knows_is_left_aside() -> None:
    assert chat(store=True, metadata={"a": "b"}, parallel_tool_calls=False, unheard_of=[1]) == chat()


def test_the_newer_name_of_the_most_tokens_comes_first() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert asked.completion({"prompt": "x"}, SamplingOptions(), padded=True).max_tokens == 16


def test_what_is_not_said_is_as_the_settings_have_it() -> None:
    defaults = SamplingOptions(temperature=0.7, top_p=0.9, seed=5)
    made = asked.chat({"messages": [USER], "temperature": 0}, defaults, padded=True).sampling
    assert (made.temperature, made.top_p, made.seed) == (0.0, 0.9, 5)


def test_tools_that_may_be_called_and_that_have_to_be() -> None:
    assert chat(tools=[TOOL]).tools == [TOOL]
    assert not chat(tools=[TOOL], tool_choice="auto").forced
    assert chat(tools=[TOOL], tool_choice="none").tools == []
    assert chat(tools=[TOOL], tool_choice="required").forced
    named = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    assert (named.forced, named.tool) == (True, "f")


def test_prompts_of_completions() -> None:
    def prompts(given: Any) -> list[str | list[int]]:
        return asked.completion({"prompt": given}, SamplingOptions(), padded=True).prompts

    assert prompts("a") == ["a"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]
    for wrong in ([], None, 5, [1, "a"], [[-1]], [True], ["a"] * 100):
        with pytest.raises(ApiError, match="'prompt'"):
            prompts(wrong)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1e400}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 50}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": 5}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"model": 5}, "model"),
        ({"cache_salt": 5}, "cache_salt"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_object_of_json(raw: bytes) -> None:
    with pytest.raises(ApiError, match="not"):
        asked.parse(raw)
    assert asked.parse(json.dumps({"a": 1}).encode()) == {"a": 1}


@pytest.mark.parametrize("deep", ['{"a":' * 200 + "1" + "}" * 200, "[" * 985 + "]" * 985, "[" * 100_000])
def test_what_is_nested_too_deep_to_be_handed_on_is_refused(deep: str) -> None:
    with pytest.raises(ApiError, match="nested too deep"):
        asked.parse(b'{"messages": ' + deep.encode() + b"}")
    call = {"function": {"name": "f", "arguments": deep}}
    with pytest.raises(ApiError, match="arguments that are not JSON"):
        messages({"role": "assistant", "tool_calls": [call]})


def test_a_usual_depth_is_taken() -> None:
    assert asked.parse(b'{"a": ' + b"[" * 90 + b"]" * 90 + b"}")
