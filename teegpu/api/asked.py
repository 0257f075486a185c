"""A request's JSON, read strictly where it matters and leniently where clients differ. Pure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from teegpu.api.errors import ApiError
from teegpu.tee.sampling import SamplingOptions

MOST_CHOICES: Final = 16
MOST_STOPS: Final = 16
MOST_LOGPROBS: Final = 20
MOST_TOOLS: Final = 128
MOST_DEPTH: Final = 100
COMPLETION_TOKENS: Final = 16
"""What ``/v1/completions`` makes where a request does not say, as OpenAI's does."""

Body = Mapping[str, Any]

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Asked:
    """What is wanted of each choice. ``max_tokens`` None: as many as there is room for. ``logprobs``: how many of the
    likeliest tokens are told beside each one's own, None: nothing is. ``schema``: of the JSON that it has to be.
    ``forced``: one of ``tools`` has to be called, ``tool`` where that is a certain one."""

    model: str | None
    sampling: SamplingOptions
    max_tokens: int | None
    choices: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    padded: bool = True
    logprobs: int | None = None
    ignore_eos: bool = False
    cache_salt: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool: str | None = None
    forced: bool = False
    schema: dict[str, Any] | None = None
    prompts: list[str | list[int]] = field(default_factory=list)


def parse(raw: bytes) -> Body:
    """The JSON object in ``raw``."""
    try:
        body = _read(raw)
    except ValueError:
        raise ApiError(400, "the body is not valid JSON, or nested too deep", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return body


def _read(raw: bytes | str) -> Any:
    """Raises ``ValueError`` for what is no JSON, or nested deeper than all who write it again can follow."""
    try:
        value = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = list(itertools.chain.from_iterable(inner))
        if not level:
            return value
    raise ValueError("nested too deep")


def chat(body: Body, defaults: SamplingOptions, *, padded: bool) -> Asked:
    """A request to ``/v1/chat/completions``."""
    for name in ("functions", "function_call", "audio"):
        if body.get(name) is not None:
            raise _bad(name, "is not supported")
    most = _number(body, "max_completion_tokens", int, None, 1)
    if most is None:
        most = _number(body, "max_tokens", int, None, 1)
    wanted = _flag(body, "logprobs")
    top = _number(body, "top_logprobs", int, None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise _bad("top_logprobs", "needs logprobs to be true")
    messages = _messages(body.get("messages"))
    made = replace(_common(body, defaults, padded), messages=messages, max_tokens=most, **_tools(body))
    return replace(made, logprobs=(top or 0) if wanted else None)


def completion(body: Body, defaults: SamplingOptions, *, padded: bool) -> Asked:
    """A request to ``/v1/completions``."""
    for name in ("suffix", "echo"):
        if body.get(name):
            raise _bad(name, "is not supported")
    best = _number(body, "best_of", int, None, 1)
    if best is not None and best != (body.get("n") or 1):
        raise _bad("best_of", "is not supported")
    most = _number(body, "max_tokens", int, COMPLETION_TOKENS, 1)
    logprobs = _number(body, "logprobs", int, None, 0, MOST_LOGPROBS)
    return replace(
        _common(body, defaults, padded), prompts=_prompts(body.get("prompt")), max_tokens=most, logprobs=logprobs
    )


def _common(body: Body, defaults: SamplingOptions, padded: bool) -> Asked:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _bad("model", "is not a string")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "is not an object")
    salt = body.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise _bad("cache_salt", "is not a string")
    stream = _flag(body, "stream")
    obfuscation = options.get("include_obfuscation")
    return Asked(
        model=model,
        sampling=_sampling(body, defaults),
        max_tokens=None,
        choices=_number(body, "n", int, 1, 1, MOST_CHOICES) or 1,
        stop=_stop(body.get("stop")),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        padded=padded if obfuscation is None else bool(obfuscation),
        ignore_eos=_flag(body, "ignore_eos"),
        schema=_schema(body.get("response_format")),
        cache_salt=salt or "",
    )


def _sampling(body: Body, defaults: SamplingOptions) -> SamplingOptions:
    def number(name: str, low: float, high: float) -> float:
        found: float | None = _number(body, name, float, vars_of[name], low, high)
        return float(found or 0.0)

    vars_of = {name: getattr(defaults, name) for name in defaults.__slots__}
    top_p = number("top_p", 0.0, 1.0)
    penalty = number("repetition_penalty", 0.0, 100.0)
    if penalty == 0.0:
        raise _bad("repetition_penalty", "must be above 0")
    top_k = _number(body, "top_k", int, defaults.top_k, -1)
    seed = _number(body, "seed", int, defaults.seed, -(2**63), 2**63 - 1)
    return replace(
        defaults,
        temperature=number("temperature", 0.0, 2.0),
        top_p=max(top_p, 1e-9),
        top_k=max(0, top_k or 0),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=penalty,
        presence_penalty=number("presence_penalty", -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", -2.0, 2.0),
        bias=_bias(body.get("logit_bias")),
        seed=None if seed is None else seed % 2**63,
    )


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise _bad("logit_bias", "is not an object of token ids and numbers")
    found = []
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not -100 <= value <= 100 or not name.isdecimal() or len(name) > 9:
            raise _bad("logit_bias", "is not an object of token ids and numbers from -100 to 100")
        found.append((int(name), float(value)))
    return tuple(found)


def _stop(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > MOST_STOPS:
        raise _bad("stop", f"is not a string or a list of at most {MOST_STOPS} strings")
    return tuple(stop for stop in stops if stop)


def _prompts(given: Any) -> list[str | list[int]]:
    """A text, token ids, or several of either."""
    if isinstance(given, str) or _are_ids(given):
        return [given]
    several = isinstance(given, list) and 0 < len(given) <= MOST_CHOICES
    if several and all(isinstance(prompt, str) or _are_ids(prompt) for prompt in given):
        return list(given)
    raise _bad("prompt", f"is not a text, a list of token ids, or a list of at most {MOST_CHOICES} of these")


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(number) is int and number >= 0 for number in given)


# Messages


def _messages(given: Any) -> list[dict[str, Any]]:
    """The messages as chat templates take them: content is a text, and there is one system message, at the start."""
    if not isinstance(given, list) or not given:
        raise _bad("messages", "is not a list with at least one message")
    system: list[str] = []
    found: list[dict[str, Any]] = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad(where, "is not an object with a role")
        content = _content(message.get("content"), where)
        role = message["role"]
        if role in ("system", "developer"):
            system.append(content)
        elif role in ("user", "assistant", "tool"):
            found.append(_message(message, role, content, where))
        else:
            raise _bad(f"{where}.role", "is not system, developer, user, assistant or tool")
    return [{"role": "system", "content": "\n\n".join(system)}, *found] if system else found


def _message(message: Body, role: str, content: str, where: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": role, "content": content}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise _bad(f"{where}.tool_calls", "is not a list of objects")
        made["tool_calls"] = [_call(call, where) for call in calls]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            made[name] = message[name]
    return made


def _call(call: Body, where: str) -> dict[str, Any]:
    """Templates write a call's arguments as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(f"{where}.tool_calls", "has a call without a function's name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = _read(arguments)
        except ValueError:
            raise _bad(f"{where}.tool_calls", "has arguments that are not JSON") from None
    return {"type": "function", "id": call.get("id"), "function": {"name": function["name"], "arguments": arguments}}


def _content(given: Any, where: str) -> str:
    if given is None:
        return ""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise _bad(f"{where}.content", "is neither a text nor a list of parts")
    texts = []
    for number, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            what = f"is of type {kind}" if isinstance(kind, str) and len(kind) < 40 else "is no part"
            raise _bad(f"{where}.content[{number}]", f"{what}: this model takes text alone")
        texts.append(part[kind])
    return "".join(texts)


def _tools(body: Body) -> dict[str, Any]:
    """``tools``, ``forced`` and ``tool`` of what is asked. No tools where none may be called."""
    given, choice = body.get("tools"), body.get("tool_choice")
    if given is None or given == [] or choice == "none":
        return {}
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        raise _bad("tools", f"is not a list of at most {MOST_TOOLS} tools")
    for number, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if function is None or not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise _bad(f"tools[{number}]", "is not a function with a name of at most 64 letters, digits, '_' and '-'")
        if not isinstance(function.get("parameters") or {}, dict):
            raise _bad(f"tools[{number}].function.parameters", "is not an object")
    names = [tool["function"]["name"] for tool in given]
    if choice in (None, "auto", "required"):
        return {"tools": given, "forced": choice == "required"}
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if name not in names:
        raise _bad("tool_choice", "is not none, auto, required, or a function of 'tools'")
    return {"tools": given, "forced": True, "tool": name}


def _schema(given: Any) -> dict[str, Any] | None:
    """What ``response_format`` asks of the JSON; None where it asks for none."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = given.get("json_schema") if kind == "json_schema" else None
    found = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(found, dict):
        raise _bad("response_format", "is not of the type text, json_object, or json_schema with a schema")
    return found


# Values


def _number(
    body: Body, name: str, kind: type[Any], default: Any, low: float | None = None, high: float | None = None
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or (kind is int and value != int(value) if right and abs(value) < 2**64 else not right):
        raise _bad(name, "is not a number" if kind is float else "is not a whole number")
    if not -(2**64) < value < 2**64 or (low is not None and value < low) or (high is not None and value > high):
        bounds = f"from {low:g} on" if high is None else f"from {low:g} to {high:g}"
        raise _bad(name, f"is not {bounds}")
    return kind(value)


def _flag(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _bad(name, "is neither true nor false")
    return value


def _bad(param: str, what: str) -> ApiError:
    return ApiError(400, f"'{param}' {what}", param=param, code="invalid_value")
