"""What clients do that they should not, and servers that are lost: nothing is held, nothing hangs, the rest go on."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from teegpu import config
from teegpu.api.grammar import Grammar
from teegpu.cli import main as cli
from teegpu.record.store import open_store
from teegpu.remote.embedded import EmbeddedServer
from teegpu.stats.document import recorded
from tests.teegpu.api.conftest import Endpoint, StartEndpoint, until
from transports.netem.link import EmulatedLink, LinkSpec

MODEL = "tiny-llama"


def request(body: Any, path: str = "/v1/completions", **headers: str) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n").encode() + raw


@contextlib.contextmanager
def connected(endpoint: Endpoint) -> Iterator[socket.socket]:
    with socket.create_connection(endpoint.address, timeout=30) as connection:
        yield connection


@contextlib.contextmanager
def who_reads_little(endpoint: Endpoint) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(endpoint.address)
        yield connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def ask(endpoint: Endpoint, **body: Any) -> Any:
    raw = json.dumps({"prompt": "abc", "max_tokens": 5} | body).encode()
    with urllib.request.urlopen(urllib.request.Request(endpoint.url + "/v1/completions", raw), timeout=30) as reply:
        return json.loads(reply.read())


# Clients that go


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["prefill", "decode", "line"])
def test_who_goes_is_gone_within_one_step(where: str, stream: bool, start: StartEndpoint) -> None:
    endpoint = start(api__sequences=1, api__waiting=2, api__step_tokens=8)
    prompt = "x" * (500 if where == "prefill" else 3)
    with endpoint.gated() as gate:
        with connected(endpoint) as connection:
            if where == "line":
                first = connected(endpoint)
                first.__enter__().sendall(request({"prompt": "a", "max_tokens": 900, "ignore_eos": True}))
                until(lambda: endpoint.engine.waiting)
                gate.release(1)
                until(lambda: endpoint.engine.running)
            connection.sendall(request({"prompt": prompt, "max_tokens": 900, "ignore_eos": True, "stream": stream}))
            until(lambda: endpoint.engine.waiting)
            before = endpoint.runner.steps
            gate.release(3)
            until(lambda: endpoint.runner.steps == before + 3)
            sequence = (endpoint.engine._waiting if where == "line" else endpoint.engine._running)[0]
            assert sequence.reading == (where == "prefill")
        until(lambda: sequence.cancelled)
        assert not sequence.ended
        if where == "line":
            first.__exit__(None, None, None)
            until(lambda: all(one.cancelled for one in endpoint.engine._running))
        gate.release(2)  # the one that may be under way, and one
        until(lambda: sequence.ended)
        until(lambda: endpoint.engine.running == endpoint.engine.waiting == 0)
    assert ask(endpoint)["choices"]
    endpoint.end()


def test_who_does_not_read_is_given_up(start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.api.listening.UNREAD_SECONDS", 0.2)
    endpoint = start()
    with who_reads_little(endpoint) as connection:
        body = {"prompt": ["a"] * 16, "n": 2, "max_tokens": 1900, "ignore_eos": True, "stream": True, "logprobs": 20}
        connection.sendall(request(body))
        until(lambda: endpoint.engine.running)
        until(lambda: endpoint.engine.running == endpoint.engine.waiting == 0)
    assert endpoint.serving._api.active == 0
    endpoint.end()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        request({"prompt": "a"})[:-3],
    ],
)
def test_half_a_request(sent: bytes, start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.api.listening.HEAD_SECONDS", 0.3)
    monkeypatch.setattr("teegpu.api.app.BODY_SECONDS", 0.3)
    endpoint = start()
    with connected(endpoint) as connection:
        connection.sendall(sent)
        got = answer(connection)
    assert not got or b" 408 " in got.partition(b"\r\n")[0]
    assert ask(endpoint)["choices"]
    endpoint.end()


@pytest.mark.parametrize("sent", [b"GET /", b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"])
def test_a_head_that_comes_byte_by_byte(sent: bytes, start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does a body that nobody wants any more."""
    monkeypatch.setattr("teegpu.api.listening.HEAD_SECONDS", 1.0)
    endpoint = start()
    with connected(endpoint) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        connection.settimeout(0.2)
        for _ in range(50):
            with contextlib.suppress(TimeoutError):
                if not connection.recv(65536):
                    break
            connection.sendall(b"x")
        else:
            pytest.fail("it was waited for without end")
    endpoint.end()


def test_answers_that_nobody_reads(start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.api.listening.UNREAD_SECONDS", 0.3)
    endpoint = start()
    with who_reads_little(endpoint) as connection:
        connection.settimeout(1.0)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
        until(lambda: not endpoint.serving._server.server_state.connections)
    until(lambda: endpoint.serving._api.active == 0)
    endpoint.end()


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"transfer-encoding: chunked, chunked\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"content-length: +2\r\n",
        b"content-length: -2\r\n",
        b"content-length: 0x2\r\n",
        b" content-length: 2\r\n",
        b"content-length : 2\r\n",
        b"x: " + b"y" * 100_000 + b"\r\n",
        b"x: \x00\r\n",
    ],
)
def test_requests_within_requests(head: bytes, endpoint: Endpoint) -> None:
    """One answer at most for what is not clearly one request, and then the connection is closed."""
    with connected(endpoint) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n{}" + SMUGGLED)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        with contextlib.suppress(ConnectionError):
            got = answer(connection)
    assert b'"object":"list"' not in got or got.count(b"HTTP/1.1") <= 1
    assert b" 200 " not in got
    assert ask(endpoint)["choices"]


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 1000, b"HELLO\r\n\r\n", b"\r\n" * 50])
def test_what_is_no_http(junk: bytes, endpoint: Endpoint) -> None:
    with connected(endpoint) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            assert b" 200 " not in answer(connection)
    assert ask(endpoint)["choices"]


def test_a_thousand_connections(start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = start()
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(endpoint))
        assert ask(endpoint)["choices"]
    until(lambda: not endpoint.serving._server.server_state.connections)
    endpoint.end()


def test_an_answer_that_takes_too_long(start: StartEndpoint) -> None:
    endpoint = start(run__deadline_seconds=0.3)
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        asked: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIStatusError, match=r"may take 0\.3 s") as caught:
            client.completions.create(**asked)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"may take 0\.3 s"):
            list(client.completions.create(**asked, stream=True))
    endpoint.end()


def test_an_answer_that_can_not_be(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that comes to its end without one: that request is told so, and no other."""
    mask, steps = Grammar.mask, itertools.count()

    def until_the_third(self: Grammar, logits: torch.Tensor) -> torch.Tensor:
        return mask(self, logits) if next(steps) < 3 else torch.full_like(logits, float("-inf"))

    monkeypatch.setattr(Grammar, "mask", until_the_third)
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        beside = client.completions.create(model=MODEL, prompt="a", max_tokens=200, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        next(beside)
        with pytest.raises(openai.BadRequestError, match="can't be what was asked for"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}],
                                           response_format={"type": "json_object"})  # fmt: skip
        assert [chunk.choices[0].finish_reason for chunk in beside][-1] == "length"


def test_memory_that_is_not_there_for_all(start: StartEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other, and all are right."""
    monkeypatch.setattr("teegpu.api.serving.MIB", 1 << 16)
    endpoint = start(api__kv_mib=4, api__sequences=16, run__prefix_cache_mib=1)
    prompts = ["x" * 40 + str(number) for number in range(12)]
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=60) as client:

        def answer(prompt: str) -> str:
            return client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=200, extra_body={"ignore_eos": True}
            ).choices[0].text  # fmt: skip

        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(answer, prompts))
        assert together[::4] == [answer(prompt) for prompt in prompts[::4]]
    endpoint.end()
    requests = endpoint.runner.summary.requests
    assert requests.most_waiting
    assert requests.most_running < 12
    assert requests.most_kv_bytes <= 4 << 16


# The end


def test_an_end_answers_what_there_is_and_takes_nothing_new(start: StartEndpoint) -> None:
    endpoint = start()
    with endpoint.gated() as gate, openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=20, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        gate.release(5)
        next(stream)
        endpoint.serving.end()
        until(lambda: endpoint.serving._worker.state == "draining")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        gate.release(100)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    endpoint.join()
    assert (endpoint.error, endpoint.answered) == (None, 1)


def test_what_is_not_answered_in_time_is_told_so(start: StartEndpoint) -> None:
    endpoint = start(api__drain_seconds=0.2)
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0) as client, endpoint.gated() as gate:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=1900, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        gate.release(5)
        next(stream)
        endpoint.serving.end()
        until(lambda: endpoint.serving._worker._stopping)
        gate.release(1)
        with pytest.raises(openai.APIError, match="ending"):
            list(stream)
    endpoint.join()
    assert endpoint.error is None


def test_a_second_signal_waits_for_no_server(start: StartEndpoint, link: EmulatedLink) -> None:
    """What a step waits for can't be interrupted: it is left behind."""
    endpoint = start(**remote(link, link__retry_budget_seconds=3600))
    with connected(endpoint) as connection:
        connection.sendall(request({"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}))
        connection.recv(1)
        link.cut()
        endpoint.serving.end()
        until(lambda: endpoint.serving._worker.state == "draining")
        endpoint.end()
    assert isinstance(endpoint.error, KeyboardInterrupt)
    link.restore()
    until(lambda: not endpoint.serving._worker._thread.is_alive())


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_a_server(end: signal.Signals, start: StartEndpoint) -> None:
    """The command itself, before it takes any request: its record says that it was interrupted."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "teegpu", "api", "--model", str(start().folder.path), "--listen",
                   "127.0.0.1:0", "--metrics-listen", "", "--endpoint", server]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, silent.accept()[0]:
            process.send_signal(end)
            assert process.wait(30) == 128 + signal.SIGINT
    assert open_store(config.load({})).find("last").status == "interrupted"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_process_with_streams(
    end: signal.Signals, start: StartEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself: what runs is answered, or nobody is left to; its record is readable in both cases."""
    folder = start().folder
    command = [sys.executable, "-m", "teegpu", "api", "--model", str(folder.path), "--plan", "local", "--listen",
               "127.0.0.1:0", "--metrics-listen", "", "--threads", "1"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stderr is not None
        url = next(line for line in process.stderr if "ready at" in line).split()[-1]
        body = json.dumps({"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
        replies = [urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", body)) for _ in range(16)]
        for reply in replies:
            reply.readline()
        if end == signal.SIGKILL:
            until(lambda: _recorded().get("requests", {}).get("arrived") == 16)
        process.send_signal(end)
        for reply in replies:
            with reply, contextlib.suppress(ConnectionError, http.client.IncompleteRead):
                assert reply.read().endswith(b"data: [DONE]\n\n") or end == signal.SIGKILL
        code = process.wait(30)
        said = process.stderr.read()
    found = _recorded()
    assert "abc" not in json.dumps(found)
    assert found["requests"]["arrived"] == 16
    capsys.readouterr()
    assert cli.run(["report", "last"]) == 0
    told = capsys.readouterr().out
    assert "Requests" in told
    if end == signal.SIGKILL:
        assert (code, found["status"]) == (-signal.SIGKILL, "interrupted")
        assert "16 are under way" in told
        assert not found["record"]["damage"]
    else:
        assert (code, found["status"], found["requests"]["ended"]) == (0, "complete", {"length": 16})
        assert found["requests"]["made_tokens"] == 16 * 300
        assert "stopped after 16 requests" in said


def _recorded() -> dict[str, Any]:
    return recorded(open_store(config.load({})).find("last"))


# Servers


@pytest.fixture(scope="module")
def link(start: StartEndpoint) -> Iterator[EmulatedLink]:
    folder = start().folder
    with (
        EmbeddedServer(folder, config.load({"server.dtype": "fp32"}), threads=1) as server,
        EmulatedLink(LinkSpec.parse("rtt=0ms"), server.wait()["address"]) as link,
    ):
        yield link


def remote(link: EmulatedLink, **more: object) -> dict[str, object]:
    plan = {"run__prefill_plan": "fused", "run__decode_plan": "fused", "run__wire_dtype": "fp32"}
    return plan | {"run__endpoints": (link.endpoint,), "link__retry_backoff_seconds": 0.01} | more


def test_a_server_lost_and_back_costs_time_only(start: StartEndpoint, link: EmulatedLink) -> None:
    endpoint = start(**remote(link))
    expected = [ask(endpoint, prompt=prompt, max_tokens=60)["choices"][0]["text"] for prompt in ("a", "bc", "def")]
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        streams = [
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=60, stream=True)
            for prompt in ("a", "bc", "def")
        ]
        first = [next(stream).choices[0].text for stream in streams]
        link.cut()
        threading.Timer(0.3, link.restore).start()
        texts = [
            one + "".join(chunk.choices[0].text for chunk in stream) for one, stream in zip(first, streams, strict=True)
        ]
    assert texts == expected
    endpoint.end()


def test_without_a_server_each_is_told_and_the_endpoint_recovers(start: StartEndpoint, link: EmulatedLink) -> None:
    endpoint = start(**remote(link, link__retry_budget_seconds=0.3))
    expected = ask(endpoint)["choices"][0]["text"]
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=1500, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        next(stream)
        link.cut()
        with pytest.raises(openai.APIError, match="GPU server"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="GPU server") as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503
        link.restore()

        def recovered() -> bool:
            with contextlib.suppress(openai.InternalServerError):
                made = client.completions.create(model=MODEL, prompt="abc", max_tokens=5)
                assert made.choices[0].text == expected
                return True
            return False

        until(recovered)
    endpoint.end()


def test_an_embedded_server_that_dies_ends_the_endpoint(start: StartEndpoint) -> None:
    endpoint = start(run__prefill_plan="fused", run__decode_plan="fused", run__endpoints=())
    server = endpoint.runner.embedded
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        ask(endpoint)
    endpoint.join()
    assert endpoint.error is not None
    assert "embedded" in str(endpoint.error)
