"""Who may connect to a server: the allow-list, and the thread that answers zmq when it asks.

The first message of the key exchange (``noise``) comes as the password of zmq's own handshake, and zmq hands that to a
handler (ZAP, inproc://zeromq.zap.01) before the client can send anything else. ``Gatekeeper`` is that handler. It opens
the message with the server's key, compares the client's with the allow-list, which it reads anew when the folder has
changed, and tells the log, at a bounded rate, who was turned away. Whom it lets in may still have recorded that message
somewhere: that it has the key is proved by what it sends next.

``User-Id``, which zmq sets on what comes over a connection and a client can't, says which exchange it goes on with:
``claim`` gives its keys, once. An established connection can't be ended by its key. So ``RouterServer`` asks ``admits``
for each message: a client that was taken off the list stays connected until it leaves, and gets nothing but refusals.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from transports.errors import BadKeyError, SealError
from transports.noise import FIRST_BYTES, Responder
from transports.sealing import PROTOCOL, Session
from transports.security import PUBLIC_SUFFIX, PublicKey, ServerKeys, read_public, writable_by_others
from transports.sockets import Wakeup, inner_address, read_event

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""How often the folder is looked at while nobody connects; it is with every handshake too."""

SETTLE_SECONDS = 2.0
"""A file's time stamp is coarse: a folder that changed a moment ago is read once more."""

REPEAT_SECONDS = 60.0
MAX_KINDS = 256
"""Bounds of the log of failures: one line a minute for each kind, and so many kinds; the others are one kind."""

MAX_FILES = 65536

ZAP_VERSION = b"1.0"
ZAP_OK, ZAP_REFUSED, ZAP_ERROR = b"200", b"400", b"500"
"""zmq tells a client the number, and nothing else: its key is not allowed, or what it says can't be opened."""

ZAP_DOMAIN = b"teegpu"

MAX_PLEDGES = 4096
"""Exchanges that have begun, and whose connection has said nothing yet. Beyond, the oldest is forgotten."""

Signature = tuple[tuple[str, int, int, int, int], ...]


class AllowList:
    """The public keys in a folder, one ``.pub`` file each; the file's name is the client's.

    Fails closed: what can't be read or trusted lets nobody in. Used by one thread, except for ``names``, which is
    replaced as a whole and may be read from any.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``BadKeyError`` where the folder can't be read, or where others could add a key to it."""
        self.folder = folder
        self.names: dict[str, str] = {}
        """The clients' names, by the hexadecimal digits of their keys."""
        self._signature: Signature | None = None
        self._changed_at = 0.0
        self._trouble = ""
        try:
            status = folder.stat()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadKeyError(f"{folder}: this folder of clients' keys can't be read: {reason}") from None
        if not stat.S_ISDIR(status.st_mode):
            raise BadKeyError(f"{folder}: this is to be a folder of clients' public keys, and it is a file")
        danger = writable_by_others(folder)
        if danger:
            raise BadKeyError(f"{folder}: others can admit clients there: {danger}")
        self.refresh()

    def refresh(self) -> None:
        """Read the folder if it has changed."""
        try:
            signature = self._look()
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            self._replace({})
            self._signature = None
            self._complain(f"the clients' keys in {self.folder} can't be read ({error.strerror}): nobody is admitted")
            return
        except OSError as error:
            # Too many open files, a fault of the disk: no reason to turn away those who were let in.
            self._complain(f"the clients' keys in {self.folder} can't be read now ({error.strerror}): the list stays")
            return
        self._trouble = ""
        now = time.time()
        if signature == self._signature and now - self._changed_at > SETTLE_SECONDS:
            return
        quiet = signature == self._signature
        if not quiet:
            self._signature, self._changed_at = signature, now
        self._replace(self._read([name for name, *_ in signature], quiet=quiet))

    def _look(self) -> Signature:
        found = []
        danger = writable_by_others(self.folder)
        if danger:
            raise PermissionError(errno.EPERM, danger)
        with os.scandir(self.folder) as entries:
            for entry in itertools.islice(entries, MAX_FILES):
                if entry.name.endswith(PUBLIC_SUFFIX) and not entry.name.startswith("."):
                    try:
                        status = os.stat(entry.path)
                    except FileNotFoundError:
                        continue  # removed a moment ago, or a link to nothing
                    found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        return tuple(sorted(found))

    def _read(self, files: list[str], *, quiet: bool) -> dict[str, str]:
        names: dict[str, str] = {}
        for name in files:
            try:
                key = read_public(self.folder / name)
            except BadKeyError as error:
                if not quiet:
                    log.warning("ignored in the list of clients: %s", error)
                continue
            names[key.raw.hex()] = name.removesuffix(PUBLIC_SUFFIX)
        return names

    def _replace(self, names: dict[str, str]) -> None:
        before, self.names = self.names, names
        for key, name in names.items():
            if key not in before:
                log.info("client %s may connect (key %s)", name, PublicKey(bytes.fromhex(key)))
        for key, name in before.items():
            if key not in names:
                log.info("client %s may not connect any more (key %s)", name, PublicKey(bytes.fromhex(key)))

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            log.error("%s", trouble)


class FailureLog:
    """Failures by kind: the first of each at once, the others counted and told once a minute. Its memory is bounded."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}

    def failed(self, kind: str) -> None:
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = "failed handshakes of more kinds than are told apart"
        told_at, count = self._kinds.get(kind, (None, 0))
        if told_at is None:
            self._write(kind)
            told_at = self._clock()
        else:
            count += 1
        self._kinds[kind] = (told_at, count)
        self.tick()

    def tick(self) -> None:
        """Tell what was counted a minute ago, and forget what has not come again."""
        now = self._clock()
        for kind, (told_at, count) in list(self._kinds.items()):
            if now - told_at < REPEAT_SECONDS:
                continue
            if count:
                self._write(f"{kind} ({count:,} time{'s' * (count != 1)} more in {now - told_at:.0f} s)")
                self._kinds[kind] = (now, 0)
            else:
                del self._kinds[kind]


@dataclass(frozen=True, slots=True)
class Pledge:
    """A key exchange that has begun: whose it says that it is (the hexadecimal digits of the key), the ``answer`` to
    send, and what will be sealed with. ``since`` is a reading of ``time.monotonic``."""

    client: str
    answer: bytes
    session: Session
    since: float


class Gatekeeper:
    """Answers zmq's questions about the clients of ``socket`` in a thread of its own, until ``close``.

    Make it before ``socket`` is bound: it sets the socket's options too. Raises ``BadKeyError`` for a folder of keys
    that can't be used.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        options: ServerKeys,
        hello_timeout_seconds: float,
    ) -> None:
        self._own = options.own
        self._pledges: dict[str, Pledge] = {}
        self._numbers = itertools.count(1)
        self._hello_seconds = hello_timeout_seconds
        self._look_at = 0.0
        self.failures = FailureLog(lambda line: log.warning("%s", line))
        self._cuts = FailureLog(lambda line: log.info("%s", line))
        self._list = AllowList(options.clients) if options.clients is not None else None
        self._closed = False
        self._signal = Wakeup()
        self._zap = context.socket(zmq.REP)
        self._monitor = context.socket(zmq.PAIR)
        try:
            self._zap.setsockopt(zmq.LINGER, 0)
            self._monitor.setsockopt(zmq.LINGER, 0)
            self._zap.bind("inproc://zeromq.zap.01")
            # A socket has one monitor, and that is the guard's: it hands on the handshakes that failed.
            self.handshakes = inner_address("handshakes")
            self._monitor.bind(self.handshakes)
            socket.setsockopt(zmq.PLAIN_SERVER, 1)
            socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            # Without it zmq lets everybody in where no handler answers.
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._loop, name="teegpu-gatekeeper", daemon=True)
        self._thread.start()

    def admits(self, user: str) -> bool:
        """Whether the client with the key ``user`` (hexadecimal digits) may still be served."""
        return self._list is None or user in self._list.names

    def claim(self, user_id: str) -> Pledge | None:
        """The exchange that a connection's ``User-Id`` stands for. Once: a second session with the same keys would use
        the same numbers again."""
        return self._pledges.pop(user_id, None)

    def close(self) -> None:
        """From now on no handshake is answered. ``socket`` is still to be closed, and only after this."""
        self._closed = True
        self._signal.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._zap.close(0)
        self._monitor.close(0)
        self._signal.close()

    def _loop(self) -> None:
        poller = zmq.Poller()
        for source in (self._zap, self._monitor, self._signal.fd):
            poller.register(source, zmq.POLLIN)
        while not self._closed:
            ready = dict(poller.poll(int(CHECK_SECONDS * 1000)))
            try:
                if self._monitor in ready:
                    self._on_event(self._monitor.recv_multipart())
                if self._list is not None and (self._zap not in ready or time.monotonic() > self._look_at):
                    # By the clock too: those who are turned away may keep it from ever being idle.
                    self._list.refresh()
                    self._look_at = time.monotonic() + CHECK_SECONDS
                self._forget(self._hello_seconds)
                self.failures.tick()
                self._cuts.tick()
            except Exception:
                log.exception("the list of clients could not be looked after")
            if self._zap in ready:
                self._zap.send_multipart(self._answer(self._zap.recv_multipart()))

    def _on_event(self, parts: list[bytes]) -> None:
        event, cause = read_event(parts)
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # The other side may have seen first that it is of no use; or somebody looked whether the port is open.
            self._cuts.failed("a connection ended before any key was shown: a client without keys, or no client at all")
        elif cause == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self.failures.failed(
                "turned away: a client that uses no keys (link.server_key on its side), or is of an older release"
            )
        else:
            self.failures.failed("turned away: something that is not a client of teegpu")

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """ZAP's reply: version, request, status, text, user, metadata. Never raises: the socket would be stuck."""
        request = question[1] if len(question) > 1 else b""
        try:
            status, text, user = self._judge(question)
        except Exception:
            log.exception("a client's key could not be checked")
            status, text, user = ZAP_ERROR, b"the server could not check the key", b""
        return [ZAP_VERSION, request, status, text, user, b""]

    def _judge(self, question: list[bytes]) -> tuple[bytes, bytes, bytes]:
        version, _, _, address, _, mechanism, *credentials = question
        if version != ZAP_VERSION or mechanism != b"PLAIN" or len(credentials) != 2:
            return ZAP_ERROR, b"not a handshake of ours", b""
        name, message = credentials
        if name != PROTOCOL:
            self.failures.failed("turned away: a client of another release, or something that is none")
            return ZAP_ERROR, b"another release", b""
        try:
            exchange = self._opened(message)
        except SealError:
            self.failures.failed("turned away: a client that expects another key of this server, or has a broken one")
            return ZAP_ERROR, b"another key", b""
        key = PublicKey(exchange.client)
        user = key.raw.hex()
        where = address.decode("ascii", "replace")
        if self._list is not None:
            self._list.refresh()
            if user not in self._list.names:
                self.failures.failed(f"turned away: {where or 'a local client'} with key {key}, which is not allowed")
                return ZAP_REFUSED, b"key not allowed", b""
            log.debug("client %s connected from %s (key %s)", self._list.names[user], where, key)
        return ZAP_OK, b"OK", self._pledge(user, exchange).encode()

    def _opened(self, message: bytes) -> Responder:
        if len(message) != FIRST_BYTES:  # before a key is made for it
            raise SealError("it is not as long as a first message is")
        exchange = Responder(self._own.secret, PROTOCOL)
        exchange.read(message)
        return exchange

    def _pledge(self, user: str, exchange: Responder) -> str:
        if len(self._pledges) >= MAX_PLEDGES:
            for oldest in list(self._pledges)[:1]:  # others take from them meanwhile
                self._pledges.pop(oldest, None)
        answer, sending, receiving = exchange.write()
        number = str(next(self._numbers))
        self._pledges[number] = Pledge(user, answer, Session(sending, receiving), time.monotonic())
        return number

    def _forget(self, seconds: float) -> None:
        """Those whose connection has said nothing for so long."""
        now = time.monotonic()
        for number, pledge in list(self._pledges.items()):
            if now - pledge.since <= seconds:
                break  # those after it are younger
            self._pledges.pop(number, None)
