"""GPU servers in memory and a network between that does what a test says, on a clock that the test owns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from teegpu.endpoints import Endpoint, parse
from teegpu.gpu.server import GpuServer
from teegpu.record.events import Event, Noted, Retried, Rpc
from teegpu.record.recorder import Recorder
from teegpu.remote.client import GpuClient
from teegpu.remote.connections import RetryPolicy
from teegpu.remote.handshake import ModelHandshake
from teegpu.remote.pool import Pool
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Welcome
from tests.teegpu.conftest import Harness
from transports.base import Answered, Client, Incoming, Message, Reply, Sent
from transports.errors import ConnectError, ConnectionLostError, ReplyTimeoutError

TRIP_SECONDS = 0.001


@dataclass
class Host:
    """What is at an address. ``faults`` are met by the next requests, ``refusals`` by the next hellos; None is a good
    one. ``restart`` makes every connection there a lost one."""

    answer: GpuServer
    up: bool = True
    instance: str = "first"
    digest: str = "digest"
    layers: tuple[int, int] = (0, 1)
    limits: dict[str, int] = field(default_factory=dict)
    trip_seconds: float = TRIP_SECONDS
    restarts: int = 0
    faults: deque[Exception | None] = field(default_factory=deque)
    refusals: deque[Exception | None] = field(default_factory=deque)
    served: list[bytes] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    """When each connection was begun, in seconds."""
    greeted: int = 0
    allowed: list[float | None] = field(default_factory=list)
    """The time-out that each request was given."""

    def restart(self, instance: str = "second") -> None:
        self.restarts += 1
        self.instance = instance


class World:
    """The clock, the servers by address, and what a runner among them recorded."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.now = 0
        self.hosts: dict[str, Host] = {}
        self.clients: list[ScriptedClient] = []
        self.events: list[Event] = []
        self.recorder = Recorder(self.events.extend, clock_ns=lambda: self.now)
        self._later: list[tuple[int, Callable[[], None]]] = []

    @property
    def seconds(self) -> float:
        return self.now / 1e9

    def host(self, address: str, **options: Any) -> Host:
        self.hosts[address] = Host(self.harness.client.servers[0], **options)
        return self.hosts[address]

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        self._later.append((int(seconds * 1e9), what))

    def pass_time(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        due = [entry for entry in self._later if entry[0] <= self.now]
        self._later = [entry for entry in self._later if entry[0] > self.now]
        for _, what in due:
            what()

    def connect(self, endpoint: Endpoint) -> ScriptedClient:
        self.clients.append(ScriptedClient(self, endpoint.address))
        return self.clients[-1]

    def pool(self, *endpoints: str, handshake: Any = None, **options: Any) -> Pool:
        """A pool that is not yet open. ``options`` are those of ``Pool`` and of ``RetryPolicy``."""
        names = RetryPolicy.__dataclass_fields__
        policy = RetryPolicy(**{name: options.pop(name) for name in names if name in options})
        spec = self.harness.spec
        return Pool(
            [parse(text) for text in endpoints],
            spec.layers,
            connect=self.connect,
            handshake=handshake or ModelHandshake(codec.Decoder(Limits()), spec, "digest"),
            policy=policy,
            recorder=self.recorder,
            layer_of=spec.layer_of,
            clock_ns=lambda: self.now,
            sleep=self.pass_time,
            **options,
        )

    def gpu(self, *endpoints: str, **options: Any) -> tuple[GpuClient, Pool]:
        """A client on an open pool, in a phase that is recorded."""
        pool = self.pool(*endpoints, **options)
        gpu = GpuClient(pool, self.harness.spec, wire_dtype="fp32", recorder=self.recorder, limits=Limits())
        pool.open()
        self.recorder.begin("decode")
        return gpu, pool

    def recorded(self, kind: type[Any]) -> list[Any]:
        self.recorder.flush()
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def retries(self) -> list[Retried]:
        return self.recorded(Retried)

    @property
    def rpcs(self) -> list[Rpc]:
        return self.recorded(Rpc)

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.recorded(Noted)]


class Opening(Sent):
    """The hello over a connection that is being opened."""

    def __init__(self, client: ScriptedClient) -> None:
        self._client = client
        self._reply: Reply | None = None
        self.sent_ns = client._world.now
        client._host.asked.append(client._world.seconds)

    def poll(self) -> Reply | None:
        self._reply = self._reply or self._client.hello(self.sent_ns)
        return self._reply

    def wait(self) -> Reply:
        raise AssertionError("nobody waits for a hello")


class ScriptedClient(Client):
    name = "scripted"
    overlaps = True

    def __init__(self, world: World, endpoint: str) -> None:
        self.endpoint = endpoint
        self.closed = False
        self.load = 0
        self._world = world
        self._host = world.hosts[endpoint]
        self._restarts: int | None = None

    @property
    def pending_bytes(self) -> int:
        return self.load

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        return Answered(self._ask(message, timeout_seconds)) if self._restarts is not None else Opening(self)

    async def begin_async(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        self.load += message.nbytes
        try:
            await asyncio.sleep(0)  # others go on meanwhile
            return self.begin(message, timeout_seconds=timeout_seconds)
        finally:
            self.load -= message.nbytes

    def hello(self, began: int) -> Reply | None:
        """The answer to a hello that was sent at ``began``, once it is there."""
        world, host = self._world, self._host
        if host.up:
            refusal = host.refusals.popleft() if host.refusals else None
            if refusal is not None:
                raise refusal
            self._restarts = host.restarts
            host.greeted += 1
            return self._reply(self._welcome(), began)
        if world.now - began >= 10e9:
            raise ConnectError(f"no server answers at {self.endpoint} within 10 s")
        return None

    def _ask(self, message: Message, timeout_seconds: float | None) -> Reply:
        world, host = self._world, self._host
        if self.closed:
            raise AssertionError("a request over a connection that is closed")
        sent_ns = world.now
        host.allowed.append(timeout_seconds)
        if timeout_seconds is not None and timeout_seconds < host.trip_seconds:
            world.pass_time(timeout_seconds)
            raise ReplyTimeoutError(f"no reply from {self.endpoint} within {timeout_seconds:g} s")
        world.pass_time(host.trip_seconds)
        if not host.up or host.restarts != self._restarts:
            raise ConnectionLostError(f"the connection to {self.endpoint} was lost")
        fault = host.faults.popleft() if host.faults else None
        if isinstance(fault, ReplyTimeoutError):
            world.pass_time(120.0)
        if fault is not None:
            raise fault
        frames = [memoryview(bytearray(frame)) for frame in message.frames]
        host.served.append(b"".join(map(bytes, frames)))
        answer = host.answer.answer(Incoming(frames, b"", None, sent_ns))
        return self._reply([bytes(frame) for frame in answer.frames], sent_ns)

    def close(self) -> None:
        self.closed = True

    def _welcome(self) -> list[bytes]:
        host, spec = self._host, self._world.harness.spec
        welcome = Welcome(
            request_id=0,
            software="1",
            instance=host.instance,
            model="tiny",
            digest=host.digest,
            dims={"layers": spec.layers},
            device="cpu",
            dtype="fp32",
            threads=1,
            memory_bytes=1,
            limits=host.limits,
            layers=host.layers,
        )
        return [bytes(frame) for frame in codec.encode_welcome(welcome).frames]

    def _reply(self, frames: list[bytes], sent_ns: int) -> Reply:
        return Reply([memoryview(bytearray(frame)) for frame in frames], sent_ns, self._world.now, 1, 1)
