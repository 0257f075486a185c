"""Which servers there are, while that changes: names are resolved again, and files of endpoints read again.

A thread looks, since both may take their time; what it found is told to who uses the servers, who takes it in hand when
it suits. What can't be read, or resolved, changes nothing: the servers that were there go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from teegpu import endpoints
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, TeegpuError
from transports import resolving

FILE_SECONDS = 0.5
"""Between two looks at files; also the least time between two lookups of names."""

NAME_SECONDS = 10.0
"""Between two lookups of names where no server was lost."""

LOOKUP_SECONDS = 1.0
"""The longest that is waited for the name service."""

Tell = Callable[[list[Endpoint]], None]
"""Takes the servers as they are now. Raises ``TeegpuError`` where they can't be used."""


class Directory:
    """The servers that ``texts``, those of ``run.endpoints``, stand for. Close it, also where nothing is watched."""

    def __init__(self, texts: Sequence[str], resolve: Callable[[str], list[str]] = resolving.resolve) -> None:
        self._texts = texts
        self._resolve = resolve
        self._over = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._known: list[Endpoint] = []
        self._seen: list[tuple[int, int, int] | None] = []
        self._named: dict[str, list[str]] = {}
        self._files = [path for path in map(endpoints.file_of, texts) if path is not None]

    def first(self) -> list[Endpoint]:
        """The servers as they are when a run begins. Raises ``ConfigError``: a file or an endpoint that can't be read.

        A name that nobody knows stays a name: a connection to it says so, and is tried again."""
        self._seen = self._stamps()  # first: what is written meanwhile is seen later
        self._known = self._expanded()
        return self._known

    @property
    def changes(self) -> bool:
        """Whether there may be other servers later."""
        return bool(self._files or self._named)

    def watch(self, tell: Tell, note: Callable[[str], None]) -> None:
        """From now on ``tell`` is called, in another thread, whenever the servers are others; ``note`` gets a line
        where they can't be told or used."""
        if self.changes:
            self._thread = threading.Thread(target=self._work, args=(tell, note), name="directory", daemon=True)
            self._thread.start()

    def hurry(self) -> None:
        """A server was lost: there may be another already."""
        self._wake.set()

    def close(self) -> None:
        """Ends the watch. A lookup that is under way is not waited for: it may take as long as the name service likes,
        and nobody hears of it."""
        self._over.set()
        self._wake.set()

    # The thread

    def _work(self, tell: Tell, note: Callable[[str], None]) -> None:
        told, waited = "", 0.0
        while not self._over.wait(FILE_SECONDS):
            waited += FILE_SECONDS
            stamps = self._stamps()
            if self._named and (self._wake.is_set() or waited >= NAME_SECONDS):
                self._wake.clear()
                waited = 0.0
                self._named.clear()
            elif stamps == self._seen:
                continue
            self._seen = stamps
            try:
                found = self._expanded()
                if found != self._known and not self._over.is_set():
                    tell(found)
                    self._known = found
                told = ""
            except TeegpuError as error:
                if str(error) != told:
                    note(f"the servers stay as they are: {error}")
                    told = str(error)

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files]

    def _expanded(self) -> list[Endpoint]:
        found: list[Endpoint] = []
        for endpoint in endpoints.parse_all(self._texts):
            found += (replace(endpoint, address=address) for address in self._addresses(endpoint.address))
        return list(dict.fromkeys(found))

    def _addresses(self, address: str) -> list[str]:
        if not resolving.is_name(address):
            return [address]
        if address not in self._named:
            try:
                self._named[address] = self._looked_up(address)
            except OSError as error:
                if self._known:
                    raise ConfigError(f"{address} has no address now ({error.strerror or error})") from None
                self._named[address] = [address]
        return self._named[address]

    def _looked_up(self, address: str) -> list[str]:
        """Raises ``OSError``, also where the name service takes its time: nothing can interrupt it."""
        found: list[list[str] | OSError] = []

        def look() -> None:
            try:
                found.append(self._resolve(address))
            except OSError as error:
                found.append(error)

        thread = threading.Thread(target=look, name="name service", daemon=True)
        thread.start()
        thread.join(LOOKUP_SECONDS)
        result = found[0] if found else TimeoutError(f"the name service did not answer within {LOOKUP_SECONDS:g} s")
        if isinstance(result, OSError):
            raise result
        return result


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
