"""The endpoint as applications use it: OpenAI's own client, over a socket."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from teegpu.errors import ConfigError
from teegpu.tee.sampling import Sampler, SamplingOptions
from tests.teegpu.api.conftest import Endpoint, StartEndpoint, until

MODEL = "tiny-llama"
MESSAGES: Any = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def post(endpoint: Endpoint, path: str, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, raw, {"content-type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat(client: openai.OpenAI, endpoint: Endpoint) -> None:
    made = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
    (choice,) = made.choices
    ids = endpoint.runner.tokenizer.encode_chat(MESSAGES[0]["content"])
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 12)
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert made.object == "chat.completion"


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24)
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=24, stream=True, stream_options=options
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_lines_of_a_stream(endpoint: Endpoint) -> None:
    body = {"messages": MESSAGES, "max_tokens": 5, "stream": True}
    request = urllib.request.Request(endpoint.url + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = reply.read().split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all((len(event) + 2) % 64 == 0 for event in events[:-2])
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events[:-2])


def test_split_characters_never_appear(client: openai.OpenAI, endpoint: Endpoint) -> None:
    """A model that says bytes: pieces of a stream are whole characters, logprobs have the bytes themselves."""
    letters = [endpoint.runner.tokenizer.encode_plain(byte_text)[0] for byte_text in "ab"]
    bias: Any = {str(token): 50 for token in endpoint.runner.tokenizer.encode_plain("é")} | {str(letters[0]): 49}
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=40, logit_bias=bias, temperature=1.0, seed=3, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    whole = client.completions.create(
        model=MODEL, prompt="x", max_tokens=40, logit_bias=bias, temperature=1.0, seed=3, logprobs=0
    )
    assert "".join(pieces) == whole.choices[0].text
    assert "é" in whole.choices[0].text
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=40, logit_bias=bias, temperature=1.0, seed=3, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    raw = b"".join(bytes(each.bytes or []) for each in content.content)
    assert raw.decode("utf-8", "replace") == chat.choices[0].message.content
    assert {0xC3, 0xA9} <= set(raw)
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in content.content)
    assert len(content.content) == 40


def test_stop_strings_and_stop_tokens(client: openai.OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt="abc", max_tokens=30).choices[0].text
    assert len(free) > 6
    stop = free[4:6]
    for given in (stop, [stop, "nowhere"]):
        made = client.completions.create(model=MODEL, prompt="abc", max_tokens=30, stop=given).choices[0]
        assert (made.text, made.finish_reason) == (free[: free.index(stop)], "stop")
    bias: Any = {"260": 100}  # <|assistant|>, which is never text
    made = client.completions.create(model=MODEL, prompt="abc", stop="<|assistant|>", logit_bias=bias).choices[0]
    assert (made.text, made.finish_reason) == ("", "stop")
    ended = client.completions.create(model=MODEL, prompt="abc", logit_bias={"257": 100}, max_tokens=9)
    assert ended.choices[0].finish_reason == "stop"
    more: Any = {"ignore_eos": True}
    on = client.completions.create(model=MODEL, prompt="abc", logit_bias={"257": 100}, max_tokens=9, extra_body=more)
    assert on.choices[0].finish_reason == "length"


def test_several_choices_and_a_seed(client: openai.OpenAI) -> None:
    def texts() -> list[str]:
        made = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=10, n=3, temperature=1.0, seed=7
        )
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        return [choice.message.content or "" for choice in made.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=10, n=3, temperature=1.0, seed=7, stream=True
    )
    joined = ["", "", ""]
    for chunk in stream:
        joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert joined == first


def test_penalties_and_bias(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0, logprobs=0,
        logit_bias={"65": 20, "66": 20},
    )  # fmt: skip
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(set(logprobs.tokens)) >= 2


def test_many_clients_at_once_get_what_each_gets_alone(endpoint: Endpoint) -> None:
    prompts = [f"{number} " * (1 + number * 3) for number in range(10)]
    expected = [
        post(endpoint, "/v1/completions", {"prompt": prompt, "max_tokens": 12})["choices"][0]["text"]
        for prompt in prompts
    ]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:

            async def one(prompt: str, *, stream: bool) -> str:
                if stream:
                    pieces = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in pieces])
                made = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=12)
                return made.choices[0].text

            jobs = [one(prompt, stream=bool(number % 2)) for number, prompt in enumerate(prompts)]
            return list(await asyncio.gather(*jobs))

    assert asyncio.run(ask()) == expected


def test_lists_of_prompts(client: openai.OpenAI) -> None:
    both = client.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=6)
    each = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=6) for prompt in ("ab", "cd")]
    assert [choice.text for choice in both.choices] == [one.choices[0].text for one in each]


def test_tokens_there_and_back(endpoint: Endpoint) -> None:
    made = post(endpoint, "/tokenize", {"prompt": "Grüße"})
    assert made["count"] == 7
    assert post(endpoint, "/detokenize", {"tokens": made["tokens"]}) == {"prompt": "Grüße"}
    chat = post(endpoint, "/tokenize", {"messages": MESSAGES})
    assert chat["tokens"] == endpoint.runner.tokenizer.encode_chat(MESSAGES[0]["content"])


def test_a_system_message_and_a_developer_are_the_same(client: openai.OpenAI) -> None:
    made = [
        client.chat.completions.create(
            model=MODEL, messages=[{"role": role, "content": "Be brief."}, *MESSAGES], max_tokens=8
        )
        .choices[0]
        .message.content
        for role in ("system", "developer")  # type: ignore[misc]
    ]
    assert made[0] == made[1]


def test_prefixes_are_used_again_by_the_same_asker_only(endpoint: Endpoint) -> None:
    def cached(salt: str | None) -> int:
        body = {"prompt": "A long beginning that comes again. " * 4, "max_tokens": 2, "cache_salt": salt}
        found: int = post(endpoint, "/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("a"), cached("b"), cached(None)] == [0, 0, 0]
    assert min(cached("a"), cached("b"), cached(None)) > 100


# What can't be done


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "invalid_prompt"),
    ],
)
def test_errors_as_the_client_knows_them(
    body: dict[str, Any], kind: type[openai.APIStatusError], code: str, client: openai.OpenAI
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**({"model": MODEL, "messages": MESSAGES, "stream": True} | body))
    assert caught.value.code == code
    assert caught.value.body is not None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b'{"x": "' + b"x" * (10 << 20) + b'"}', 413),
        ("/v1/completions", {"prompt": [99999]}, 400),
        ("/v1/completions", {"prompt": "half of a character: \ud800"}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ],
)
def test_statuses(path: str, body: Any, status: int, endpoint: Endpoint) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(endpoint, path, body)
    assert caught.value.code == status
    error = json.loads(caught.value.read())["error"]
    caught.value.close()
    assert set(error) == {"message", "type", "param", "code"}


def test_a_template_that_refuses_is_told_in_its_words(
    client: openai.OpenAI, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint.runner.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_a_line_that_is_full_is_told_to_try_again(start: StartEndpoint) -> None:
    endpoint = start(api__sequences=1, api__waiting=1)
    with endpoint.gated() as gate, openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0) as client:
        streams = [client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="try again") as caught:
            client.completions.create(model=MODEL, prompt="a", max_tokens=3)
        assert caught.value.response.headers["retry-after"]
        gate.release(100)
        assert [len(list(stream)) > 1 for stream in streams] == [True, True]
    endpoint.end()


# Who may ask


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()}\n" for key in ("one", "two")))
    return str(path)


def test_keys_over_tls(start: StartEndpoint, keys: str, tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key.pem", "-out",
         tmp_path / "cert.pem", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    endpoint = start(api__keys=keys, api__tls_cert=str(tmp_path / "cert.pem"), api__tls_key=str(tmp_path / "key.pem"))
    import ssl

    assert endpoint.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    def ask(path: str, *, key: str | None = None, body: Any = None) -> Any:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(endpoint.url + path, raw, headers)
        with urllib.request.urlopen(request, context=context, timeout=30) as reply:
            return json.loads(reply.read())

    assert ask("/health")["status"] == "ok"
    for key in (None, "three"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask("/v1/models", key=key)
        assert caught.value.code == 401
        caught.value.close()
    body = {"prompt": "The same beginning for both of them. " * 3, "max_tokens": 2}

    def cached(key: str) -> int:
        found: int = ask("/v1/completions", key=key, body=body)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert (cached("one"), cached("two")) == (0, 0)
    assert min(cached("one"), cached("two")) > 50
    endpoint.end()


def test_one_key_does_not_take_all_places(start: StartEndpoint, keys: str) -> None:
    endpoint = start(api__keys=keys, api__key_requests=2)
    one, two = (openai.OpenAI(base_url=endpoint.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two"))
    with one, two, endpoint.gated() as gate:
        held = one.completions.create(model=MODEL, prompt="a", n=2, max_tokens=3, stream=True)
        with pytest.raises(openai.RateLimitError, match="this API key") as caught:
            one.completions.create(model=MODEL, prompt="a")
        assert caught.value.code == "key_busy"
        other = two.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
        gate.release(100)
        assert [bool(list(stream)) for stream in (held, other)] == [True, True]
        until(lambda: not endpoint.serving._api._asking)
        assert one.completions.create(model=MODEL, prompt="a", n=2, max_tokens=2).choices
    endpoint.end()


def test_one_key_does_not_take_all_places_while_grammars_are_made(start: StartEndpoint, keys: str) -> None:
    endpoint = start(api__keys=keys, api__key_requests=1)
    body = {"prompt": "a", "max_tokens": 3, "response_format": {"type": "json_object"}}

    def status(_: int) -> int:
        try:
            post(endpoint, "/v1/completions", body, authorization="Bearer one")
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        return 200

    with endpoint.gated() as gate, ThreadPoolExecutor(4) as pool:
        statuses = [pool.submit(status, number) for number in range(4)]
        until(lambda: sum(each.done() for each in statuses) == 3 or endpoint.engine.waiting > 1)
        assert endpoint.engine.waiting == 1
        gate.release(100)
    assert sorted(each.result() for each in statuses) == [200, 429, 429, 429]
    endpoint.end()


def test_addresses_that_others_reach_need_tls_and_keys(keys: str) -> None:
    from teegpu import config
    from teegpu.api.serving import check_access

    def check(insecure: bool = False, **given: object) -> str:
        return check_access(config.load({f"api.{key}": value for key, value in given.items()}), insecure=insecure)

    assert check() == ""
    assert check(listen="unix:/tmp/x") == ""
    assert check(listen="[::1]:80") == ""
    for listen in ("0.0.0.0:80", "*:80", "10.0.0.1:80", "[::]:80", "example.com:80"):
        with pytest.raises(ConfigError, match=r"without TLS .* and without API keys"):
            check(listen=listen)
        with pytest.raises(ConfigError, match=r"without TLS \("):
            check(listen=listen, keys=keys)
        assert "can be reached" in check(insecure=True, listen=listen)
        assert check(listen=listen, keys=keys, tls_cert="c", tls_key="k") == ""
    for wrong in ("", "80", "localhost", "unix:x", "unix:/tmp/a\0b", "tcp://a:1"):
        with pytest.raises(ConfigError, match=r"api\.listen"):
            check(listen=wrong)


def test_a_unix_socket(start: StartEndpoint, tmp_path: Path) -> None:
    import socket

    path = tmp_path / "api.sock"
    endpoint = start(api__listen=f"unix:{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    endpoint.end()
    assert not path.exists()


def test_files_of_nobodys_home_are_told() -> None:
    from teegpu.api.keys import ApiKeys
    from teegpu.api.listening import tls
    from teegpu.endpoints import file_of

    for read in (ApiKeys, lambda path: tls(path, path), lambda path: file_of("@" + path)):
        with pytest.raises(ConfigError, match=r"'~nobody-has-this/x' names a user without a home folder"):
            read("~nobody-has-this/x")


def test_a_unix_socket_takes_the_place_of_one_that_was_left_alone(tmp_path: Path) -> None:
    import socket

    from teegpu.api.listening import Address

    path = tmp_path / "api.sock"
    address = Address(path=str(path))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # as a process leaves it that was killed
    listener, binding = address.listen("api.listen")
    with listener, pytest.raises(ConfigError, match=r"api\.listen: can't listen on unix:/.*: another server listens"):
        address.listen("api.listen")
    assert path.is_socket()
    binding.release()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="there is a file of that name that is not a socket"):
        address.listen("api.listen")
    assert path.read_text() == "precious"


# What is seen of it


def test_metrics_are_at_an_address_of_their_own(start: StartEndpoint) -> None:
    endpoint = start(api__metrics_listen="127.0.0.1:0")
    post(endpoint, "/v1/completions", {"prompt": "abc", "max_tokens": 7})
    with urllib.request.urlopen(endpoint.metrics_url, timeout=30) as reply:
        text = reply.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["teegpu_generation_tokens_total"]) == 7
    assert float(values["teegpu_prompt_tokens_total"]) == len(endpoint.runner.tokenizer.encode_raw("abc"))
    assert float(values['teegpu_request_success_total{finished_reason="length"}']) == 1
    assert float(values["teegpu_time_to_first_token_seconds_count"]) == 1
    assert 0 < float(values["teegpu_kv_cache_usage"]) < 1
    assert float(values["teegpu_tee_seconds_total"]) > 0
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(endpoint.url + "/metrics", timeout=30)
    assert caught.value.code == 404
    caught.value.close()
    endpoint.end()


def test_no_text_is_in_any_log(endpoint: Endpoint, client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        secret = "Zwölfboxkämpfer"
        made = client.completions.create(model=MODEL, prompt=secret, max_tokens=9)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=MODEL, messages=[{"role": secret, "content": secret}])  # type: ignore[list-item, misc]
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(endpoint, "/Zw%C3%B6lfbox?q=Zwoelf", {})
        caught.value.close()
        until(lambda: "404" in caplog.text)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("teegpu", "uvicorn")))
    assert "POST /v1/completions 200" in ours
    for hidden in (secret, "Zw", made.choices[0].text):
        assert hidden not in ours


def test_health_says_progress(start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = start()
    with urllib.request.urlopen(endpoint.url + "/health", timeout=30) as reply:
        assert json.loads(reply.read()) == {"status": "ok", "running": 0, "waiting": 0}
    monkeypatch.setattr("teegpu.api.worker.STALLED_SECONDS", 0.0)
    with endpoint.gated() as gate, openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x") as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(endpoint.url + "/health", timeout=30)
        assert (caught.value.code, json.loads(caught.value.read())["status"]) == (503, "stalled")
        caught.value.close()
        gate.release(100)
        list(stream)
    endpoint.end()


def test_sampling_is_the_engines(endpoint: Endpoint, client: openai.OpenAI) -> None:
    """What a seed gives here is what it gives in the runner."""
    made = client.completions.create(model=MODEL, prompt="abcdef", max_tokens=12, temperature=0.9, top_p=0.8, seed=11)
    ids = endpoint.runner.tokenizer.encode_raw("abcdef")
    options = SamplingOptions(temperature=0.9, top_p=0.8, seed=11, vocabulary=endpoint.runner.tokenizer.vocab_size)
    engine = endpoint.runner._engine()
    ends = endpoint.runner.tokenizer.eos_token_ids
    tokens = engine.generate(ids, max_tokens=12, sampler=Sampler(options), end_ids=ends).token_ids
    assert made.choices[0].text == endpoint.runner.tokenizer.decode(tokens)


# JSON and tools

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "size": {"enum": ["s", "m", "l"]}, "n": {"type": "integer",
                   "minimum": 0, "maximum": 99}},
    "required": ["sure", "size", "n"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait"}},
]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
)


def fits(value: Any) -> bool:
    return isinstance(value["sure"], bool) and value["size"] in ("s", "m", "l") and 0 <= value["n"] <= 99


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_of_a_schema(temperature: float, client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format=wanted, max_tokens=300, temperature=temperature, seed=4,
            **more,
        )  # fmt: skip

    made = ask(n=3)
    assert all(choice.finish_reason == "stop" and fits(json.loads(choice.message.content)) for choice in made.choices)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
    assert streamed == made.choices[0].message.content


def test_any_json_object(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=40, temperature=1.0, seed=1
    )
    assert (made.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://example.com/x"}, {"not": {}}])
def test_schemas_that_can_not_be_followed(schema: dict[str, Any], client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="can't be followed") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=wanted)
    assert caught.value.param == "response_format"


def test_tools_that_have_to_be_called(
    client: openai.OpenAI, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint.runner.tokenizer, "chat_template", TEMPLATE)

    def ask(choice: Any, **more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=300, temperature=1.0, seed=2,
            **more,
        )  # fmt: skip

    (made,) = ask({"type": "function", "function": {"name": "look_up"}}).choices
    assert (made.finish_reason, made.message.content) == ("tool_calls", None)
    (call,) = made.message.tool_calls
    assert call.function.name == "look_up"
    assert fits(json.loads(call.function.arguments))
    chunks = list(ask({"type": "function", "function": {"name": "look_up"}}, stream=True))
    (told,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert told[0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    answered = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "42"},
    ]
    more = client.chat.completions.create(model=MODEL, messages=answered, tools=TOOLS, max_tokens=5)
    assert more.choices[0].finish_reason == "length"
    assert more.choices[0].message.tool_calls is None


def test_a_template_without_tools_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="knows of no tools"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS)
