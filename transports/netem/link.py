"""An emulated link: round-trip time, bandwidth each way and jitter between two programs on one machine.

    with EmulatedLink(LinkSpec.parse("rtt=5ms,bandwidth=1gbit"), target="tcp://127.0.0.1:5555") as link:
        client = connect("zmq", link.endpoint)

Up is from the listening side to the target (TEE runner to GPU server), down is back. Bandwidth counts the bytes that
the programs exchange: the headers of TCP and IP are not emulated, nor are packet loss, slow start, and the round trip
that opening a connection costs. The relay runs in a process of its own (``transports.netem.process``, started anew, not
forked), because in this one it would wait for the interpreter lock whenever Python code computes. That process ends
with the link, or with the program that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transports.errors import BadAddressError, ConnectionLostError, LinkSpecError
from transports.netem.spec import LinkSpec

__all__ = ["EmulatedLink", "LinkMeasurement", "LinkSpec", "LinkSpecError", "LinkStats", "measure"]

START_TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 2.0

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What the link carried since it started. ``cpu_seconds`` is the processor time of its process."""

    connections: int
    accepted: int
    bytes_up: int
    bytes_down: int
    cpu_seconds: float


class EmulatedLink:
    """Relays connections to ``listen`` on to ``target``, as ``spec`` says, in a process of its own.

    Addresses are ``tcp://host:port`` (port 0: any free one) or ``ipc:///path``. Use it in a ``with`` statement, or call
    ``start`` and ``close``. Methods may be called from any thread.

    Raises ``BadAddressError`` at the start for an address that can't be used. A target where nobody listens is no
    error: like a cut link, it ends each connection that is made.
    """

    def __init__(self, spec: LinkSpec, target: str, *, listen: str = "tcp://127.0.0.1:0") -> None:
        self.spec = spec
        self.target = target
        self._listen = listen
        self._endpoint: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Where it listens, with the real port. Raises ``ConnectionLostError`` when it is not running."""
        if self._endpoint is None:
            raise ConnectionLostError("the emulated link is not running: start it first")
        return self._endpoint

    @property
    def pid(self) -> int | None:
        """The relay's process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> EmulatedLink:
        if self._process is not None:
            return self
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "transports.netem.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        setup = {
            "listen": self._listen,
            "target": self.target,
            "rtt_seconds": self.spec.rtt_seconds,
            "jitter_seconds": self.spec.jitter_seconds,
            # as text, because JSON knows no infinity
            "up_bytes_per_second": str(self.spec.up_bytes_per_second),
            "down_bytes_per_second": str(self.spec.down_bytes_per_second),
        }
        try:
            with self._lock:
                self._endpoint = self._ask(setup, START_TIMEOUT_SECONDS)["endpoint"]
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the relay and every connection through it. May be called twice."""
        process, self._process, self._endpoint = self._process, None, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # the relay ends when its standard input does
        try:
            process.wait(CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> EmulatedLink:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def stall(self, seconds: float) -> None:
        """Carry nothing for ``seconds`` from now; what was on its way stays so, and connections stay open."""
        if not 0.0 <= seconds < math.inf:
            raise LinkSpecError(f"link: cannot stall for {seconds} seconds: give a time of 0 or more")
        self._command({"do": "stall", "seconds": seconds})

    def drop(self) -> int:
        """Reset all connections; new ones are accepted. Returns how many there were."""
        return self._command({"do": "drop"})["connections"]

    def cut(self) -> int:
        """Reset all connections, and each new one at once, until ``restore``. Returns how many there were."""
        return self._command({"do": "cut"})["connections"]

    def restore(self) -> None:
        """End a cut or a stall."""
        self._command({"do": "restore"})

    def open(self, target: str, *, listen: str = "tcp://127.0.0.1:0") -> str:
        """Listen on one more address, for another target behind the same link; returns the address."""
        return self._command({"do": "open", "listen": listen, "target": target})["endpoint"]

    def stats(self) -> LinkStats:
        return LinkStats(**self._command({"do": "stats"}))

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Wait until the relay's process ends by itself; its exit status, or None when it still runs."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return self._ask(command, ANSWER_TIMEOUT_SECONDS)

    def _ask(self, command: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ConnectionLostError("the emulated link is not running: start it first")
        line = b""
        deadline = time.monotonic() + timeout_seconds
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            while not line.endswith(b"\n"):
                if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise ConnectionLostError(
                        f"the emulated link's process did not answer within {timeout_seconds:.0f} s: start it anew"
                    )
                received = process.stdout.read(65536)
                if not received:
                    raise ConnectionLostError("the emulated link's process has ended: start the link anew")
                line += received
        except BrokenPipeError as error:
            raise ConnectionLostError("the emulated link's process has ended: start the link anew") from error
        answer = json.loads(line)
        if "error" in answer:
            raise BadAddressError(answer["error"])
        return answer


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """What a link does, seen from outside: RTT of a small message, and bytes per second of a long one each way."""

    rtt_seconds: float
    up_bytes_per_second: float
    down_bytes_per_second: float

    def __str__(self) -> str:
        return (
            f"rtt {self.rtt_seconds * 1e3:.3f} ms, up {self.up_bytes_per_second * 8 / 1e6:.1f} Mbit/s, "
            f"down {self.down_bytes_per_second * 8 / 1e6:.1f} Mbit/s"
        )


def measure(link: EmulatedLink, *, seconds: float = 0.5) -> LinkMeasurement:
    """Measure ``link`` with a plain TCP connection through it, in about ``seconds`` for each of RTT, up and down.

    RTT is the median round trip of 64 bytes. Bandwidth is taken between the first and the last byte that arrive, so the
    delay is not in it. Both ends are in this process; other traffic of the link shares it with the measurement.
    """
    with _probe(link) as (near, far):
        rtts: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(rtts) < 5 or (time.perf_counter() < deadline and len(rtts) < 200):
            started = time.perf_counter()
            # One thread plays both ends, so that no hand-over between threads is part of the time.
            near.sendall(b"\0" * 64)
            _receive(far, 64)
            far.sendall(b"\0" * 64)
            _receive(near, 64)
            rtts.append(time.perf_counter() - started)
        up = _throughput(near, far, link.spec.up_bytes_per_second, seconds)
        down = _throughput(far, near, link.spec.down_bytes_per_second, seconds)
    return LinkMeasurement(statistics.median(rtts), up, down)


@contextlib.contextmanager
def _probe(link: EmulatedLink) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through ``link``: the one that opened it, the one that accepted it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        host, port = link.open(f"tcp://127.0.0.1:{listener.getsockname()[1]}").removeprefix("tcp://").split(":")
        near = stack.enter_context(socket.create_connection((host, int(port))))
        listener.settimeout(ANSWER_TIMEOUT_SECONDS)
        far = stack.enter_context(listener.accept()[0])
        for end in (near, far):
            end.settimeout(ANSWER_TIMEOUT_SECONDS + link.spec.rtt_seconds)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield near, far


def _receive(end: socket.socket, size: int) -> None:
    while size:
        received = len(end.recv(size))
        if not received:
            raise ConnectionLostError("the emulated link closed the connection that measures it: measure again")
        size -= received


def _throughput(sender: socket.socket, receiver: socket.socket, expected: float, seconds: float) -> float:
    size = int(min(max(expected * seconds, 4096), 256 * 2**20))
    block = bytes(min(size, 2**20))
    buffer = bytearray(2**18)

    def send() -> None:
        left = size
        with contextlib.suppress(OSError):  # the receiving side then runs into its time-out, and says so
            while left:
                left -= sender.send(memoryview(block)[:left])

    thread = threading.Thread(target=send, name="link-measure", daemon=True)
    thread.start()
    first_bytes = received = receiver.recv_into(buffer)
    first_at = last_at = time.perf_counter()
    while received < size:
        count = receiver.recv_into(buffer)
        if not count:
            raise ConnectionLostError("the emulated link closed the connection that measures it: measure again")
        received += count
        last_at = time.perf_counter()
    thread.join()
    return (received - first_bytes) / max(last_at - first_at, 1e-9)
