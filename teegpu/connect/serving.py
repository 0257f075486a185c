"""The proxy as a command runs it: from the first verdict to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from teegpu.api.listening import Address, Server
from teegpu.connect.proxy import Proxy
from teegpu.connect.upstream import Seen, Upstream
from teegpu.errors import ConfigError


class Serving:
    """Listens at ``listen`` for applications of this machine. ``on_ready`` is told once where, and what was proved.
    Raises ``ConfigError`` for an address that others reach: prompts come to it in the clear."""

    def __init__(self, listen: str, upstream: Upstream, on_ready: Callable[[str, Seen], None]) -> None:
        self._address = Address.parse(listen, "--listen")
        if not self._address.local:
            raise ConfigError(
                f"--listen {listen}: others can reach that, and prompts come there in the clear: let each machine have "
                "its own proxy, at 127.0.0.1 or unix:/path"
            )
        self._upstream = upstream
        self._on_ready = on_ready
        self._listener, self._binding = self._address.listen("--listen")

    def run(self) -> None:
        """Serves until it is told to end. Raises what the first connection to the endpoint does."""
        asyncio.run(self._run())

    def end(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._server.should_exit = True

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = Server(Proxy(self._upstream), None, self._stop)
        try:
            link = await self._upstream.connect()
            name = self._listener.getsockname()
            where = f"unix:{name}" if self._address.path else f"http://{self._address.host}:{name[1]}"
            if link.seen is not None:
                self._on_ready(where, link.seen)
            self._upstream.keep(link)
            await self._server.serve([self._listener])
        finally:
            self._listener.close()
            self._binding.release()
            self._upstream.close()
