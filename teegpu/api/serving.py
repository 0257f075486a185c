"""The whole endpoint, from its settings to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from teegpu.api import attested
from teegpu.api.app import Api
from teegpu.api.attested import Attester
from teegpu.api.keys import ApiKeys
from teegpu.api.listening import Address, Server, tls
from teegpu.api.metrics import Metrics
from teegpu.api.worker import ENDED, READY, OpenRunner, Worker
from teegpu.config import Config
from teegpu.errors import ConfigError
from teegpu.options import MIB
from teegpu.runner import Runner
from teegpu.tee.engine import Capacity

log = logging.getLogger("teegpu.api")

STEP_SECONDS: Final = 5.0
"""How long the step that is under way may take when the time for answers is over. It may wait for a GPU server."""

AT_ONCE_SECONDS: Final = 1.0
"""The same, or a start, where the end is to be at once."""


@dataclass(frozen=True)
class Ready:
    """What is known when the endpoint takes requests: where, and for whom. ``attested``: what it proves to who asks, in
    words; ``genuine``: whether a TEE proves it."""

    url: str
    metrics_url: str
    keys: bool
    attested: str
    genuine: bool
    runner: Runner


def capacity(settings: Config) -> Capacity:
    api = settings.api
    return Capacity(
        sequences=api.sequences,
        waiting=api.waiting,
        kv_bytes=api.kv_mib * MIB,
        prefix_bytes=min(settings.run.prefix_cache_mib, api.kv_mib) * MIB,
        step_tokens=api.step_tokens,
        alone_tokens=2 * api.step_tokens,
        answer_seconds=settings.run.deadline_seconds or None,
    )


def check_access(settings: Config, *, insecure: bool) -> str:
    """Who can use the endpoint or read along who is not meant to; empty where nobody can.

    Raises ``ConfigError`` for an address that others can reach without TLS and keys, unless ``insecure``."""
    api = settings.api
    address = Address.parse(api.listen, "api.listen")
    metrics = Address.parse(api.metrics_listen, "api.metrics_listen") if api.metrics_listen else None
    if metrics is not None and metrics.path:
        raise ConfigError("api.metrics_listen: scrapers come over TCP: give host:port")
    tls_missing = not api.tls_cert and not attested.wanted(settings)
    needed = {"TLS (api.tls_cert, api.tls_key, or api.attest)": tls_missing, "API keys (api.keys)": not api.keys}
    missing = [name for name, lacks in needed.items() if lacks]
    if address.local or not missing:
        return ""
    risk = f"{api.listen} can be reached from other machines without {' and without '.join(missing)}"
    if not insecure:
        raise ConfigError(f"api.listen: {risk}: give them, or accept the risk with --insecure")
    return risk


class Serving:
    """``open_runner`` is called in the thread that computes, ``on_ready`` once when requests are taken. Raises
    ``ConfigError`` for an address, keys or certificates that can't be used."""

    def __init__(self, settings: Config, open_runner: OpenRunner, on_ready: Callable[[Ready], None]) -> None:
        self._settings = settings
        self._open_runner = open_runner
        self._on_ready = on_ready
        api = settings.api
        self._keys = ApiKeys(api.keys) if api.keys else None
        self._attesting = attested.choose(settings)
        own = self._attesting.identity
        self._context = tls(api.tls_cert, api.tls_key) if own is None else own.context
        self._address = Address.parse(api.listen, "api.listen")
        self._listener, self._binding = self._address.listen("api.listen")
        self._signals = 0
        self._answered = 0
        self._ending: asyncio.Task[None] | None = None
        self._patience_seconds: float | None = None
        self._left_behind = False

    def run(self) -> int:
        """Serves until it is told to end; how many sequences it computed. Raises what ended it otherwise, and
        ``KeyboardInterrupt`` where its thread was left behind in the middle of a step or of its start."""
        try:
            answered = asyncio.run(self._run())
        finally:
            self._binding.release()
        if self._left_behind:
            raise KeyboardInterrupt
        return answered

    def end(self) -> None:
        """As a signal does: the first time answers what there is, the second time ends at once. From any thread."""
        self._loop.call_soon_threadsafe(self._on_signal)

    async def _run(self) -> int:
        self._loop = asyncio.get_running_loop()
        api = self._settings.api
        metrics = Metrics()
        self._worker = worker = Worker(self._open_runner, self._loop, self._changed, self._count(metrics))
        self._metrics_url, metrics_server = "", None
        if api.metrics_listen:
            at = Address.parse(api.metrics_listen, "api.metrics_listen")
            try:
                metrics_server, port = metrics.serve(at.host, at.port, worker)
            except OSError as error:
                raise ConfigError(
                    f"api.metrics_listen: can't listen at {api.metrics_listen} ({error.strerror or error}); empty: none"
                ) from None
            self._metrics_url = f"http://{replace(at, port=port).text}/metrics"
        self._api = Api(
            worker,
            keys=self._keys,
            padded=api.obfuscation,
            body_bytes=api.body_mib * MIB,
            attester=Attester(self._attesting),
            key_requests=api.key_requests,
        )
        self._server = Server(self._api.app, self._context, self._on_signal)
        worker.start()
        try:
            await self._server.serve([self._listener])
        finally:
            self._left_behind = not await worker.stop(self._patience_seconds)
            if metrics_server is not None:
                metrics_server.shutdown()
                metrics_server.server_close()
        if worker.error is not None:
            raise worker.error
        return self._answered

    def _count(self, metrics: Metrics) -> Callable[[Any], None]:
        def ended(sequence: Any) -> None:
            self._answered += 1
            metrics.ended(sequence)

        return ended

    def _changed(self) -> None:
        """The worker's state did."""
        worker = self._worker
        if worker.state == READY and worker.runner is not None:
            scheme = "http" if self._context is None else "https"
            name = self._listener.getsockname()
            where = f"unix:{name}" if self._address.path else f"{scheme}://{replace(self._address, port=name[1]).text}"
            own = self._attesting
            kind = ("" if own.source else "nothing: ") + own.reason
            self._on_ready(Ready(where, self._metrics_url, self._keys is not None, kind, own.genuine, worker.runner))
        elif worker.state == ENDED:
            self._end_soon(0.5)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1 or self._worker.state != READY:
            self._patience_seconds = AT_ONCE_SECONDS
            self._server.should_exit = self._server.force_exit = True
            return
        self._worker.drain()
        self._end_soon(self._settings.api.drain_seconds)

    def _end_soon(self, seconds: float) -> None:
        """Ends when all that runs is answered, or after ``seconds``."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(seconds))

    async def _end(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._api.active and loop.time() < until:
            await asyncio.sleep(0.02)
        if self._api.active:
            self._patience_seconds = AT_ONCE_SECONDS
            await self._worker.stop(STEP_SECONDS)  # what still runs is told so
            await asyncio.sleep(0.1)
        self._server.should_exit = True
