"""The endpoint's routes: requests in, answers and streams out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teegpu import __version__
from teegpu.api import asked as reading
from teegpu.api import tools
from teegpu.api.asked import Asked
from teegpu.api.attested import Attester, settings_of
from teegpu.api.choice import Choice
from teegpu.api.errors import ApiError, told
from teegpu.api.grammar import Grammar, Grammars
from teegpu.api.keys import ApiKeys
from teegpu.api.replies import DONE, Form, Piece, Usage, event
from teegpu.api.tools import Calls, Way
from teegpu.api.worker import READY, Queue, Worker
from teegpu.errors import TeegpuError
from teegpu.runner import Runner

log = logging.getLogger("teegpu.api")

BODY_SECONDS: Final = 30.0
"""How long a request's body may take to arrive."""

DISCARDED: Final = 8
"""Times the longest body that are read and thrown away, so that who sends too much reads why it is refused."""

PUBLIC: Final = frozenset({"/health", "/v1/attestation"})
"""What is asked without an API key; evidence, since who has not seen it should send no key."""


class Api:
    """Answers for one ``worker``. ``keys`` None: everybody may ask. ``active`` counts requests that are being answered.
    ``loaded_at`` is what ``/v1/models`` calls created."""

    def __init__(
        self,
        worker: Worker,
        *,
        keys: ApiKeys | None,
        padded: bool,
        body_bytes: int,
        attester: Attester,
        key_requests: int = 0,
    ) -> None:
        self._worker = worker
        self._attester = attester
        self._keys = keys
        self._padded = padded
        self._body_bytes = body_bytes
        self._key_requests = key_requests
        self._asking: Counter[str] = Counter()
        """Choices that are under way, by who asked for them."""
        self._loaded_at = int(time.time())
        self._grammars: Grammars | None = None
        self.active = 0
        routes = [
            Route("/health", self._health),
            Route("/version", self._version),
            Route("/v1/attestation", self._attestation),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _http_error, TeegpuError: _teegpu_error}
        self.app: ASGIApp = self._outermost(Starlette(routes=routes, exception_handlers=handlers))

    def _outermost(self, inner: ASGIApp) -> ASGIApp:
        """Keys, counting and the log, around everything."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            began, status = time.perf_counter(), 0

            async def seen(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            self.active += 1
            try:
                scope["teegpu.namespace"] = self._namespace(scope)
                await inner(scope, receive, seen)
            except ApiError as error:
                await _json(error)(scope, receive, seen)
            except (ClientDisconnect, ConnectionError):
                status = status or 499
            finally:
                self.active -= 1
                seconds = time.perf_counter() - began
                fields = {"event": "request", "status": status, "seconds": round(seconds, 3)}
                level = logging.DEBUG if scope["path"] in PUBLIC else logging.INFO
                path = scope["path"] if status != 404 else "(unknown path)"
                log.log(level, "%s %s %d in %.2f s", scope["method"], path, status, seconds, extra=fields)

        return app

    def _namespace(self, scope: Scope) -> str:
        """Whose request it is. Raises ``ApiError`` where it may be nobody's."""
        if self._keys is None or scope["path"] in PUBLIC:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        name = self._keys.whose(header)
        if name is None:
            what = "is not known here" if header else "is missing: send Authorization: Bearer KEY"
            raise ApiError(401, f"the API key {what}", code="invalid_api_key")
        return name

    # What is asked of the endpoint itself

    async def _health(self, _: Request) -> Response:
        worker = self._worker
        status = "stalled" if worker.state == READY and worker.stalled else worker.state
        body: dict[str, Any] = {"status": "ok" if status == READY else status}
        if worker.state == READY:
            body |= {"running": worker.ready.engine.running, "waiting": worker.ready.engine.waiting}
        return JSONResponse(body, 200 if status == READY else 503)

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _attestation(self, request: Request) -> Response:
        settings = settings_of(self._worker.ready)
        return JSONResponse(await self._attester.answer(request.query_params.get("nonce", ""), settings))

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        runner = self._worker.ready
        return {
            "id": runner.folder.name,
            "object": "model",
            "created": self._loaded_at,
            "owned_by": "teegpu",
            "max_model_len": runner.engine.most_positions,
        }

    def _check_model(self, name: str | None) -> None:
        own = self._worker.ready.folder.name
        if name is not None and name != own:
            message = f"there is no model of that name here, only '{own}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _tokenize(self, request: Request) -> Response:
        runner = self._worker.ready
        body = await self._body(request)
        if body.get("messages") is not None:
            wanted = reading.chat(body, runner.sampling_options, padded=False)
            ids = await _in_thread(runner.tokenizer.encode_messages, wanted.messages)
        elif isinstance(text := body.get("prompt"), str):
            ids = await _in_thread(runner.tokenizer.encode_raw if text else runner.tokenizer.encode_plain, text)
        else:
            raise ApiError(400, "'prompt' is not a text, and there are no messages", param="prompt")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": runner.engine.most_positions})

    async def _detokenize(self, request: Request) -> Response:
        runner = self._worker.ready
        ids = (await self._body(request)).get("tokens")
        if not isinstance(ids, list):
            raise ApiError(400, "'tokens' is not a list of token ids", param="tokens")
        _check_ids(ids, runner)
        return JSONResponse({"prompt": await _in_thread(runner.tokenizer.decode, ids)})

    async def _body(self, request: Request) -> reading.Body:
        raw, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= self._body_bytes:
                        raw += part
                    elif size > DISCARDED * self._body_bytes:
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        if size > self._body_bytes:
            raise ApiError(413, f"the body is longer than {self._body_bytes:,} bytes (api.body_mib)")
        return reading.parse(bytes(raw))

    # Answers

    async def _chat(self, request: Request) -> Response:
        runner = self._worker.ready
        wanted = reading.chat(await self._body(request), runner.sampling_options, padded=self._padded)
        self._check_model(wanted.model)
        tokenizer = runner.tokenizer
        way = tools.way_of(tokenizer.chat_template) if wanted.tools else None
        if wanted.tools and way is None:
            message = f"the chat template of model '{runner.folder.name}' knows of no tools"
            raise ApiError(400, message, param="tools", code="tools_not_supported")
        prompt = await _in_thread(tokenizer.encode_messages, wanted.messages, wanted.tools)
        if wanted.forced and way is not None:
            wanted = replace(wanted, schema=tools.schema(way, wanted.tools, wanted.tool))
            prompt += tokenizer.encode_plain(f"{way.opens}\n" if way.opens else "")
        return await self._answer(request, wanted, [prompt], Form(chat=True, model=runner.folder.name), way)

    async def _completion(self, request: Request) -> Response:
        runner = self._worker.ready
        wanted = reading.completion(await self._body(request), runner.sampling_options, padded=self._padded)
        self._check_model(wanted.model)
        prompts = []
        for prompt in wanted.prompts:
            if isinstance(prompt, str):
                prompts.append(await _in_thread(runner.tokenizer.encode_raw, prompt))
            else:
                _check_ids(prompt, runner)
                prompts.append(prompt)
        return await self._answer(request, wanted, prompts, Form(chat=False, model=runner.folder.name))

    async def _answer(
        self, request: Request, wanted: Asked, prompts: list[list[int]], form: Form, way: Way | None = None
    ) -> Response:
        """Begins every choice of every prompt. Raises ``ApiError`` and what ``Engine.add`` does."""
        worker, runner = self._worker, self._worker.ready
        who = request.scope["teegpu.namespace"]
        namespace = f"{who}/{wanted.cache_salt}"
        queue: Queue = asyncio.Queue()
        choices: list[Choice] = []
        for prompt in prompts:
            room = runner.engine.most_positions - len(prompt)
            most = max(1, room if wanted.max_tokens is None else min(room, wanted.max_tokens))
            for _ in range(wanted.choices):
                index = len(choices)

                def put(piece: Piece) -> None:
                    worker.put(queue, piece)

                grammar = await self._grammar(runner, wanted) if wanted.schema is not None else None
                names = [tool["function"]["name"] for tool in wanted.tools]
                calls = None if way is None else Calls(way, names, forced=wanted.forced)
                choices.append(
                    Choice(index, list(prompt), wanted, most, runner.tokenizer, namespace, put, grammar, calls)
                )
        # Nothing is waited for from here on: others with this key would find the same number.
        if self._key_requests and self._asking[who] + len(choices) > self._key_requests:
            message = f"this API key may have {self._key_requests} requests at once (api.key_requests): try again later"
            raise ApiError(429, message, code="key_busy")
        answer = _Answer(worker, choices, queue, form, wanted, self._asking, who)
        answer.begin()
        return answer

    async def _grammar(self, runner: Runner, wanted: Asked) -> Grammar:
        if self._grammars is None:
            self._grammars = Grammars(runner.tokenizer)
        param = "tools" if wanted.forced else "response_format"
        made: Grammar = await asyncio.to_thread(self._grammars.of, wanted.schema or {}, param)
        return made


class _Answer(Response):
    """The answer to one request: in one piece, or as a stream. Whoever goes away ends it."""

    def __init__(
        self,
        worker: Worker,
        choices: list[Choice],
        queue: Queue,
        form: Form,
        wanted: Asked,
        asking: Counter[str],
        who: str,
    ) -> None:
        self._asking = asking
        self._who = who
        self._worker = worker
        self._choices = choices
        self._queue = queue
        self._form = form
        self._wanted = wanted
        self.background = None

    def begin(self) -> None:
        self._asking[self._who] += len(self._choices)
        try:
            for choice in self._choices:
                self._worker.add(choice.sequence)
        except BaseException:
            self._end()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            work.result()
        finally:
            self._end()
            for task in (work, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _end(self) -> None:
        """Whatever still runs is given up. Called once."""
        self._asking[self._who] -= len(self._choices)
        if not self._asking[self._who]:
            del self._asking[self._who]
        for choice in self._choices:
            self._worker.cancel(choice.sequence)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._wanted.stream:
            await self._stream(_Sender(send))
            return
        try:
            body = await self._whole()
        except ApiError as error:
            await _json(error)(scope, receive, send)
            return
        await JSONResponse(body)(scope, receive, send)

    async def _pieces(self) -> AsyncIterator[Piece]:
        """What comes, until every choice has ended. Raises ``ApiError`` where one ended by an error."""
        left = len(self._choices)
        while left:
            piece = await self._queue.get()
            ended = piece.finish is not None or piece.error is not None
            if piece.error is not None:
                raise told(piece.error)
            left -= ended
            yield piece

    async def _whole(self) -> dict[str, Any]:
        wholes = [Piece(index) for index in range(len(self._choices))]
        texts: list[list[str]] = [[] for _ in wholes]
        async for piece in self._pieces():
            whole = wholes[piece.choice]
            texts[piece.choice].append(piece.text)
            whole.logprobs += piece.logprobs
            whole.calls += piece.calls
            whole.finish = piece.finish or whole.finish
        for whole, text in zip(wholes, texts, strict=True):
            whole.text = "".join(text)
        return self._form.whole(wholes, self._usage())

    async def _stream(self, sender: _Sender) -> None:
        form, padded = self._form, self._wanted.padded
        await sender.begin()
        try:
            for index in range(len(self._choices)):
                if (first := form.first(index)) is not None:
                    await sender.send(event(first, padded=padded))
            async for piece in self._pieces():
                await sender.send(event(form.part(piece), padded=padded))
            if self._wanted.include_usage:
                await sender.send(event(form.last(self._usage()), padded=padded))
            await sender.send(DONE)
        except ApiError as error:
            await sender.send(event(error.body, padded=padded))
        await sender.end()

    def _usage(self) -> Usage:
        done = [choice.sequence.done for choice in self._choices]
        prompts = done[:: self._wanted.choices]
        return Usage(
            sum(one.prompt_tokens for one in prompts),
            sum(len(one.token_ids) for one in done),
            sum(one.reused_tokens for one in prompts),
        )


class _Sender:
    """The body of a stream."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def begin(self) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def end(self) -> None:
        await self.send(b"", more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _in_thread(function: Callable[..., list[int]] | Callable[..., str], *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


def _check_ids(ids: list[Any], runner: Runner) -> None:
    known = runner.tokenizer.vocab_size
    if not all(type(token) is int and 0 <= token < known for token in ids):
        raise ApiError(400, f"token ids are whole numbers from 0 to {known - 1}", code="invalid_value")


def _json(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _refused(_: Request, error: Exception) -> Response:
    return _json(told(error))


async def _teegpu_error(_: Request, error: Exception) -> Response:
    return _json(told(error))


async def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    messages = {404: "there is nothing at this path", 405: "this path does not take that method"}
    return _json(ApiError(status, messages.get(status, "this request can't be done")))
