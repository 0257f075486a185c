"""``teegpu bench serve`` against an endpoint: every client's requests are measured, errors are told."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from teegpu.cli.main import run
from tests.teegpu.api.conftest import Endpoint, StartEndpoint


def test_figures_of_a_load(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "serve", "--url", endpoint.url, "--prompt-tokens", "20", "--max-tokens", "8", "-q"]
    assert run([*arguments, "--clients", "1,3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    one, three = document["results"]
    assert document["model"] == "tiny-llama"
    assert (one["completed"], three["completed"], three["failed"]) == (2, 6, 0)
    assert three["total_output_tokens"] == 48
    assert three["output_throughput"] == pytest.approx(48 / three["duration"])
    assert 0 < one["p50_ttft_ms"] <= one["p99_ttft_ms"]
    assert run([*arguments, "--clients", "2"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_what_goes_wrong_is_told(start: StartEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"one").hexdigest())
    endpoint = start(api__keys=str(keys))
    assert run(["bench", "serve", "--url", endpoint.url, "-q"]) == 2
    assert "is the key right?" in capsys.readouterr().err
    given = ["bench", "serve", "--url", endpoint.url, "-q", "--key", "one", "--clients", "1", "--requests", "1"]
    assert run([*given, "--prompt-tokens", "5000", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"][0]["failed"] == 1
    assert "the model's context ends" in captured.err
    endpoint.end()
    assert run(["bench", "serve", "--url", endpoint.url, "-q"]) == 4
    assert run(["bench", "serve", "--clients", "0"]) == 2


class Plain(BaseHTTPRequestHandler):
    """An endpoint that knows no field beyond OpenAI's oldest ones, and counts no tokens."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked["model"] != "plain":
            self.answer(404, b'{"detail": "there is no such model"}')
        elif more := set(asked) - {"model", "prompt", "max_tokens", "temperature", "stream"}:
            self.answer(422, json.dumps({"detail": f"unexpected fields: {sorted(more)}"}).encode())
        else:
            pieces = [json.dumps({"choices": [{"text": text}]}) for text in ("a", "b", "c")]
            self.answer(200, "".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_an_endpoint_that_refuses_fields_is_asked_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        given = ["bench", "serve", "--url", f"http://127.0.0.1:{server.server_port}", "-q", "--clients", "2", "--json"]
        assert run([*given, "--model", "plain"]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 12)
        assert run([*given, "--model", "other"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["results"][0]["failed"] == 4
        assert "HTTP 404" in captured.err
        assert "there is no such model" in captured.err
        server.shutdown()
