"""A load of clients on an endpoint with OpenAI's HTTP interface, ours or another's, and what they wait for.

Closed loop: each client asks, reads the stream to its end, and asks again. Prompts are pieces of a built-in text, each
another one, so that no kept prefix helps."""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import h11

from teegpu.errors import ConnectionFailedError, UsageError
from teegpu.model.texts import evaluation_texts
from teegpu.units import printable

LETTERS_PER_TOKEN: Final = 4
"""Of English text. How many tokens a prompt came to is what the endpoint says."""

READ_SECONDS: Final = 600.0

_NOT_EVERYWHERE: Final = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""Fields that some endpoints refuse: they are asked again without."""

_REFUSED: Final = ("HTTP 400", "HTTP 422")


@dataclass(frozen=True)
class Load:
    """``prompt_tokens`` about, ``max_tokens`` exactly where the endpoint knows ``ignore_eos``. ``key``: of the API."""

    url: str
    model: str
    prompt_tokens: int
    max_tokens: int
    key: str = ""
    context: ssl.SSLContext | None = None


@dataclass(slots=True)
class Took:
    """One request: when it was sent, when text came, in seconds of one clock; and tokens as the endpoint counts, or,
    where it does not, as many as pieces of text came."""

    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    made: int = 0
    error: str = ""


async def run(load: Load, clients: int, requests: int, first: int = 0) -> tuple[list[Took], float]:
    """``requests`` requests of ``clients`` clients; what each took, and the seconds of all. ``first``: the number of
    the first prompt."""
    numbers = iter(range(first, first + requests))
    took: list[Took] = []

    async def client() -> None:
        for number in numbers:
            took.append(Took())
            await ask(load, number, took[-1])

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return took, time.perf_counter() - began


async def ask(load: Load, number: int, took: Took, *, stream: bool = True) -> None:
    """One request with the prompt of that ``number``; ``took`` is filled as its answer comes."""
    body = {"model": load.model, "prompt": prompt(load, number), "max_tokens": load.max_tokens, "temperature": 0}
    body["stream"] = stream
    await _read(load, body | _NOT_EVERYWHERE, took)
    if took.error.startswith(_REFUSED) and not took.pieces:
        await _read(load, body, took)
    if took.pieces and not took.made:
        took.made = len(took.pieces)


def prompt(load: Load, number: int) -> str:
    """Each number's is another one."""
    text, size = _text(), load.prompt_tokens * LETTERS_PER_TOKEN
    start = number * 997 % max(1, len(text) - size)
    return f"{number} {text[start : start + size]}"


@functools.cache
def _text() -> str:
    return " ".join(" ".join(each.split()) for each in evaluation_texts().values())


async def _read(load: Load, body: dict[str, Any], took: Took) -> None:
    took.sent, took.error = time.perf_counter(), ""
    try:
        async for event in _events(load, body):
            if "error" in event:
                took.error = str(event["error"].get("message", "an error"))
                break
            usage = event.get("usage")
            if usage:
                took.prompt_tokens, took.made = usage["prompt_tokens"], usage["completion_tokens"]
            if any(choice.get("text") for choice in event.get("choices", ())):
                took.pieces.append(time.perf_counter())
    except (OSError, EOFError, ValueError, KeyError, h11.ProtocolError, TimeoutError) as error:
        took.error = f"{type(error).__name__}: {error}"


async def _events(load: Load, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    buffered = b""
    async for part in exchange(load, "POST", "/v1/completions", json.dumps(body).encode()):
        buffered += part
        *lines, buffered = buffered.split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


async def exchange(load: Load, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
    """One request over a connection of its own; the body of the answer as it comes. An answer other than 200 comes as
    an event with its status and error."""
    address = urlsplit(load.url)
    secure = address.scheme == "https"
    port = address.port or (443 if secure else 80)
    context = (load.context or ssl.create_default_context()) if secure else None
    reader, writer = await asyncio.open_connection(address.hostname, port, ssl=context)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("host", address.netloc),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if load.key:
            headers.append(("authorization", f"Bearer {load.key}"))
        base = address.path.rstrip("/").removesuffix("/v1")
        request = h11.Request(method=method, target=base + path, headers=headers)
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        status, refusal = 0, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(READ_SECONDS):
                    connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data) and status == 200:
                yield bytes(event.data)
            elif isinstance(event, h11.Data):
                refusal += bytes(event.data)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                if status != 200:
                    error = {"error": {"message": f"HTTP {status}: {_told(refusal)}"}}
                    yield b"data: " + json.dumps(error).encode() + b"\n"
                return
    finally:
        writer.close()


def _told(refusal: bytes) -> str:
    """What an answer other than 200 says, in OpenAI's form or another."""
    text = refusal.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return printable(text, 200)


async def model_of(load: Load) -> str:
    """The first model that the endpoint offers. Raises ``ConnectionFailedError`` and ``UsageError``."""
    raw = b""
    try:
        async for part in exchange(load, "GET", "/v1/models"):
            raw += part
        found = json.loads(raw)["data"][0]["id"]
    except OSError as error:
        raise ConnectionFailedError(f"nothing answers at {load.url} ({error})") from None
    except (ValueError, KeyError, IndexError, TypeError, h11.ProtocolError):
        raise UsageError(f"{load.url} offers no model: is it an OpenAI endpoint, and is the key right?") from None
    return str(found)


def figures(clients: int, took: Sequence[Took], seconds: float) -> dict[str, Any]:
    """What ``took`` comes to, under the names that vLLM's benchmark has for it; times in ms."""
    good = [one for one in took if not one.error and one.pieces]
    made = sum(one.made for one in good)
    first = [one.pieces[0] - one.sent for one in good]
    gaps = [after - before for one in good for before, after in zip(one.pieces, one.pieces[1:], strict=False)]
    each = [(one.pieces[-1] - one.pieces[0]) / (one.made - 1) for one in good if one.made > 1]
    return {
        "max_concurrency": clients,
        "completed": len(good),
        "failed": len(took) - len(good),
        "errors": sorted({one.error for one in took if one.error})[:5],
        "duration": seconds,
        "total_input_tokens": sum(one.prompt_tokens for one in good),
        "total_output_tokens": made,
        "request_throughput": len(good) / seconds,
        "output_throughput": made / seconds,
        **_spread("ttft", first),
        **_spread("tpot", each),
        **_spread("itl", gaps),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)

    def at(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] * 1e3 if ordered else None

    return {f"p{number}_{name}_ms": at(number / 100) for number in (50, 95, 99)}


COLUMNS: Final = (
    ("clients", "max_concurrency", "{:d}"),
    ("done", "completed", "{:d}"),
    ("failed", "failed", "{:d}"),
    ("requests/s", "request_throughput", "{:.2f}"),
    ("tokens/s", "output_throughput", "{:.1f}"),
    ("TTFT p50", "p50_ttft_ms", "{:.0f} ms"),
    ("p95", "p95_ttft_ms", "{:.0f} ms"),
    ("ITL p50", "p50_itl_ms", "{:.0f} ms"),
    ("p95", "p95_itl_ms", "{:.0f} ms"),
    ("p99", "p99_itl_ms", "{:.0f} ms"),
)


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A table: a heading, and a row for each number of clients, with its throughput beside that of the first."""
    made = [[name for name, _, _ in COLUMNS] + ["×"]]
    base = results[0]["output_throughput"] if results else 0.0
    for result in results:
        cells = ["–" if result[key] is None else form.format(result[key]) for _, key, form in COLUMNS]
        made.append([*cells, f"{result['output_throughput'] / base:.1f}" if base else "–"])
    return made
