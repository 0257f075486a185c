"""The GPU servers of a run: where they are, those that it starts itself, and the connections to them.

There is one pool of servers, or with privacy ``two-server`` two, between which nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transports
from teegpu import endpoints, facts, machine
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, TeegpuError
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import ModelSpec
from teegpu.options import client_options, whole_numbers
from teegpu.record.recorder import Recorder
from teegpu.remote.directory import Directory
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.identities import Identity, identify, proves
from teegpu.remote.sides import check_apart, divide, is_open
from transports.addresses import is_local
from transports.base import Client
from transports.netem.link import EmulatedLink, LinkSpec

if TYPE_CHECKING:
    from teegpu.remote.connections import Handshake
    from teegpu.remote.pool import Pool
    from teegpu.wire.messages import Welcome

Notify = Callable[[str], None]

Wrap = Callable[[Endpoint, Client], Client]
"""What a client is to go through, for audits: gets a connection as it is made, and gives what the runner uses."""

_QUANTISING_SECONDS = 600.0
"""How long a hello of a shielded run may take at least: the server makes its int8 weights before it answers."""


@dataclass(slots=True)
class Threads:
    """``server``: of each embedded server; None where there is none. ``servers``: how many there are."""

    runner: int
    server: int | None
    cores: int
    servers: int = 1

    def to_json(self) -> dict[str, Any]:
        return {"runner": self.runner, "server": self.server, "cores": self.cores, "shared": self.shared}

    @property
    def oversubscribed(self) -> bool:
        if self.server is None:
            return False
        return machine.oversubscribed(self.runner, self.servers * self.server, self.cores, shared=self.shared)

    @property
    def shared(self) -> bool:
        """Whether threads sleep while they wait, so that runner and server may both have all cores."""
        return machine.shares_cores()


class Servers:
    """Starts the servers that nobody named, and connects to all. ``close`` ends both; it may be called twice.

    It is here without torch, so that a server which the run starts can load its weights while the runner loads torch.
    ``notify`` is told what a user should know, ``wrap`` gets each connection.
    Raises ``ConfigError``, ``BadKeyError`` and ``ShieldError`` for endpoints and keys that can't be used,
    ``UsageError`` where no embedded server can be started.
    """

    def __init__(
        self, config: Config, folder: ModelFolder, notify: Notify, wrap: Wrap = lambda _, client: client
    ) -> None:
        self._config = config
        self._wrap = wrap
        self.link = LinkSpec.parse(config.run.link) if config.run.link else None
        self._notify = notify
        self._stack = contextlib.ExitStack()
        self.pools: list[Pool] = []
        self.embedded: list[EmbeddedServer] = []
        self.identities: list[Identity] = []
        self._directory = Directory(())
        self._reached: dict[str, str] = {}
        self.threads = _split_threads(config, notify, _count(config))
        with self._stack as stack:
            if config.run.endpoints:
                self._directory = Directory(config.run.endpoints)
                stack.callback(self._directory.close)
                self.endpoints = self._directory.first()
                self.identities = identify(config, self.endpoints)  # keys that can't be used are told of first
            else:
                self.endpoints = self._start(folder)
            self.sides = divide(config.run.privacy, self.endpoints)
            self._numbered = [str(endpoint) for endpoint in self.endpoints]
            if not self.embedded:
                for line in check_apart(config, self.sides):
                    notify(line)
            self._stack = stack.pop_all()

    def _start(self, folder: ModelFolder) -> list[Endpoint]:
        threads = self.threads
        server_threads = threads.server or 1
        several = f"{threads.servers} embedded GPU servers" if threads.servers > 1 else "embedded GPU server"
        each = " each" if threads.servers > 1 else ""
        self._notify(f"no endpoint given: {several} (threads: runner {threads.runner}, server {server_threads}{each})")
        if threads.servers > 1:
            self._notify(
                "both servers run on this machine, in one hand: this shows how two-server works, and hides nothing "
                "from who runs it (for servers of two operators, give --endpoint twice)"
            )
        for _ in range(threads.servers):
            self.embedded.append(
                self._stack.enter_context(EmbeddedServer(folder, self._config, threads=server_threads))
            )
        return [Endpoint(server.endpoint) for server in self.embedded]

    def __str__(self) -> str:
        """Where they are, and by which keys they are known."""
        told = ", ".join(f"{each.address} ({each})" for each in self.identities)
        return "started by this run" if self.embedded else told

    def check_layers(self, layers: int) -> None:
        """Raises ``ConfigError`` where the endpoints, of each share, do not cover a model of ``layers`` layers."""
        for side in self.sides:
            endpoints.ranges(side.endpoints, layers)

    # Connections

    def connect(self, spec: ModelSpec, recorder: Recorder, handshake: Callable[[int], Handshake]) -> None:
        """Opens ``pools``, one for each side. ``handshake`` gives who greets the servers of a share. Raises what
        ``Pool.open`` does."""
        from teegpu.remote.connections import RetryPolicy
        from teegpu.remote.deadline import Deadline
        from teegpu.remote.pool import Pool

        config = self._config
        for server in self.embedded:
            server.wait()
        if not self.embedded:
            self._tell_what_is_open()
        hello_seconds = config.link.hello_timeout_seconds
        if whole_numbers(config):
            hello_seconds = max(hello_seconds, _QUANTISING_SECONDS)
        connect = self._connector()
        for side in self.sides:
            pool = Pool(
                side.endpoints,
                spec.layers,
                connect=connect,
                handshake=handshake(side.share),
                policy=RetryPolicy(
                    budget_seconds=config.link.retry_budget_seconds,
                    backoff_seconds=config.link.retry_backoff_seconds,
                    connect_timeout_seconds=config.link.connect_timeout_seconds,
                    hello_timeout_seconds=hello_seconds,
                ),
                recorder=recorder,
                spread=config.run.spread,
                layer_of=spec.layer_of,
                gone=self._embedded_end,
                indices=side.indices,
                number=self._number,
                on_loss=self._directory.hurry,
                deadline=Deadline(
                    pass_seconds=config.link.pass_timeout_seconds,
                    answer_seconds=config.run.deadline_seconds or math.inf,
                    reply_seconds=config.link.reply_timeout_seconds,
                ),
                say=self._notify,
            )
            self._stack.callback(pool.close)
            self.pools.append(pool)
            pool.open()
        self._directory.watch(self._expect, self.pools[0].tell)

    def _expect(self, found: list[Endpoint]) -> None:
        """These are the servers now: a pool takes them in hand. Raises ``TeegpuError`` where they can't be used."""
        config = self._config
        sides = divide(config.run.privacy, found)
        check_apart(config, sides)
        identities = identify(config, found)
        least = min(map(proves, self.identities))
        if weaker := next((each for each in identities if proves(each) < least), None):
            raise ConfigError(f"run.endpoints: {weaker.address} ({weaker}) proves less than the servers before it")
        pairs = list(zip(self.pools, sides, strict=True))
        for pool, side in pairs:
            pool.check_cut(side.endpoints)
        for pool, side in pairs:
            pool.expect(side.endpoints)
        self.identities = identities

    def _number(self, endpoint: Endpoint) -> int:
        """That of ``endpoint``, which joins, in the record."""
        self._numbered.append(str(endpoint))
        return len(self._numbered) - 1

    @property
    def addresses(self) -> list[str]:
        """All that were used, by their numbers in the record; none where they are embedded."""
        return [] if self.embedded else self._numbered

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it, ``run.deadline_seconds`` counts."""
        with contextlib.ExitStack() as stack:
            for pool in self.pools:
                stack.enter_context(pool.deadline.answering())
            yield

    def tell_who_answered(self) -> None:
        """Says which servers the run goes on without, and which share cores with it."""
        for pool in self.pools:
            for replica in pool.replicas:
                if replica.client is None:
                    self._notify(
                        f"going on without the server at {replica.address}: {replica.error or 'no answer yet'}"
                    )
                elif replica.welcome is not None:
                    self._check_threads(replica.address, replica.welcome)

    def _connector(self) -> Callable[[Endpoint], Client]:
        """Makes clients of endpoints; where a link is emulated, each endpoint is behind one of its own."""
        config = self._config

        def connect(endpoint: Endpoint) -> Client:
            options = client_options(config, endpoint)
            return self._wrap(
                endpoint, transports.connect(config.run.transport, self._reach(endpoint.address), options)
            )

        return connect

    def _reach(self, address: str) -> str:
        """Where ``address`` is reached."""
        if self.link is None:
            return address
        if address not in self._reached:
            self._reached[address] = self._stack.enter_context(EmulatedLink(self.link, address)).endpoint
        return self._reached[address]

    def _tell_what_is_open(self) -> None:
        """Say where prompts could be read, or answers changed, on the way."""
        if len(self.sides) > 1:
            return  # that is refused, or told as what it is, by ``check_apart``
        for endpoint in self.endpoints:
            if is_open(self._config, endpoint):
                self._notify(
                    f"the link to {endpoint.address} has no keys: who is on the way can {self._what_can_be_read()} and "
                    "answer in the server's place (run --server-key)"
                )

    def _what_can_be_read(self) -> str:
        privacy = self._config.run.privacy
        return "read the activations" if privacy == facts.NO_PRIVACY.name else "read lengths and times"

    def _check_threads(self, address: str, welcome: Welcome) -> None:
        beside = self.threads.server is None and welcome.device == "cpu" and is_local(address)
        ours = self.threads
        if beside and machine.oversubscribed(ours.runner, welcome.threads, ours.cores, shared=ours.shared):
            self._notify(
                f"the server at {address} computes on this machine with {welcome.threads} threads, the runner "
                f"with {ours.runner}, and there are {ours.cores} cores: expect both to be slow "
                "(serve --threads, run --threads)"
            )

    # What is known of them

    @property
    def borders(self) -> tuple[int, ...]:
        """The layers that another server holds than the layer before."""
        return tuple(sorted({border for pool in self.pools for border in pool.borders}))

    @property
    def welcome(self) -> Welcome | None:
        """What the first server of those in use says of itself."""
        return self.pools[0].welcome if self.pools else None

    @property
    def dtypes(self) -> list[str]:
        """In what those that have answered compute."""
        replicas = (replica for pool in self.pools for replica in pool.replicas)
        return [replica.welcome.dtype for replica in replicas if replica.welcome is not None]

    @property
    def encrypted(self) -> bool:
        """Whether all that goes to servers elsewhere is encrypted, and they proved to be who they are."""
        return not self.embedded and all(each.key for each in self.identities)

    def lost(self) -> TeegpuError | None:
        """After a lost connection: why, where it was to an embedded server that has ended."""
        return next((server.failure() for server in self.embedded if server.ended), None)

    @property
    def last_words(self) -> str:
        """The last line that an embedded server wrote for its operator, who is nobody; may be empty."""
        return next((server.last_words for server in self.embedded if server.last_words), "")

    def _embedded_end(self) -> TeegpuError | None:
        """Why nobody will answer any more: an embedded server is ours, and nobody starts it again."""
        return next((server.failure() for server in self.embedded if server.gone), None)

    def close(self) -> None:
        self._stack.close()


def _count(config: Config) -> int:
    return 2 if config.run.privacy == facts.TWO_SERVER.name else 1


def split_threads(config: Config, notify: Notify) -> Threads:
    """The threads of a run without servers."""
    return _split_threads(config, notify, 0)


def _split_threads(config: Config, notify: Notify, servers: int) -> Threads:
    cores = machine.available_cores()
    embedded = servers > 0 and not config.run.endpoints
    runner, server = machine.thread_split(embedded, cores, max(1, servers))
    runner = config.run.threads or runner
    server = config.server.threads or server
    threads = Threads(runner, server if embedded else None, cores, max(1, servers))
    if threads.oversubscribed:
        notify(
            f"runner ({runner}) and server ({server}{' each' if servers > 1 else ''}) have more threads than this "
            f"machine's {cores} cores: expect {'all' if servers > 1 else 'both'} to be slow (run.threads, "
            "server.threads)"
        )
    return threads
