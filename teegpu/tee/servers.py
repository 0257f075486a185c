"""The GPU servers of a run: where they are, those that it starts itself, and the connections to them.

There is one fleet of servers, or with privacy ``two-server`` two, between which nothing is exchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transports
from teegpu import endpoints, machine
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import TeegpuError
from teegpu.metrics.recorder import Recorder
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import ModelSpec
from teegpu.options import client_options
from teegpu.tee.connections import Greets, RetryPolicy
from teegpu.tee.embedded_server import EmbeddedServer
from teegpu.tee.fleet import Fleet
from teegpu.tee.shield import modes
from teegpu.tee.shield.sides import check_apart, divide
from teegpu.wire.messages import Welcome
from transports.base import Client
from transports.link import EmulatedLink, LinkSpec

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

    ``link`` is emulated before each of them. ``notify`` is told what a user should know, ``wrap`` gets each connection.
    Raises ``ConfigError``, ``BadKeyError`` and ``ShieldError`` for endpoints and keys that can't be used,
    ``UsageError`` where no embedded server can be started.
    """

    def __init__(self, config: Config, folder: ModelFolder, link: LinkSpec | None, notify: Notify, wrap: Wrap) -> None:
        self._config = config
        self._wrap = wrap
        self._link = link
        self._notify = notify
        self._stack = contextlib.ExitStack()
        self.fleets: list[Fleet] = []
        self.embedded: list[EmbeddedServer] = []
        self.threads = _split_threads(config, notify, _count(config))
        with self._stack as stack:
            if config.run.endpoints:
                self.endpoints = endpoints.parse_all(config.run.endpoints)
                for endpoint in self.endpoints:
                    client_options(config, endpoint)  # keys that can't be used are told of before anything is loaded
            else:
                self.endpoints = self._start(folder)
            self.sides = divide(config.run.privacy, self.endpoints)
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

    def check_layers(self, layers: int) -> None:
        """Raises ``ConfigError`` where the endpoints, of each share, do not cover a model of ``layers`` layers."""
        for side in self.sides:
            endpoints.ranges(side.endpoints, layers)

    # Connections

    def connect(self, spec: ModelSpec, recorder: Recorder, greeter: Callable[[int], Greets]) -> None:
        """Opens ``fleets``, one for each side. ``greeter`` gives who greets the servers of a share. Raises what
        ``Fleet.open`` does."""
        config = self._config
        for server in self.embedded:
            server.wait()
        if not self.embedded:
            self._tell_what_is_open()
        hello_seconds = config.link.hello_timeout_seconds
        if modes.shielded(config):
            hello_seconds = max(hello_seconds, _QUANTISING_SECONDS)
        connect = self._connector()
        for side in self.sides:
            fleet = Fleet(
                side.endpoints,
                spec.layers,
                connect=connect,
                greeter=greeter(side.share),
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
            )
            self._stack.callback(fleet.close)
            self.fleets.append(fleet)
            fleet.open()

    def tell_who_answered(self) -> None:
        """Says which servers the run goes on without, and which share cores with it."""
        for fleet in self.fleets:
            for member in fleet.members:
                if member.client is None:
                    self._notify(f"going on without the server at {member.address}: {member.error or 'no answer yet'}")
                elif member.welcome is not None:
                    self._check_threads(member.address, member.welcome)

    def _connector(self) -> Callable[[Endpoint], Client]:
        """Makes clients of endpoints; where a link is emulated, each endpoint is behind one of its own."""
        config = self._config
        reached = {endpoint.address: endpoint.address for endpoint in self.endpoints}
        if self._link is not None:
            for address in reached:
                reached[address] = self._stack.enter_context(EmulatedLink(self._link, address)).endpoint

        def connect(endpoint: Endpoint) -> Client:
            options = client_options(config, endpoint)
            return self._wrap(endpoint, transports.connect(config.run.transport, reached[endpoint.address], options))

        return connect

    def _tell_what_is_open(self) -> None:
        """Say where prompts could be read, or answers changed, on the way."""
        for endpoint in self.endpoints:
            if not (endpoint.key or self._config.link.server_key or same_machine(endpoint.address)):
                self._notify(
                    f"the link to {endpoint.address} has no keys: who is on the way can {self._what_can_be_read()} and "
                    "answer in the server's place (run --server-key)"
                )

    def _what_can_be_read(self) -> str:
        privacy = self._config.run.privacy
        if privacy == modes.NONE:
            return "read the activations"
        if privacy == modes.TWO_SERVER:
            return "read one share, and with the other one everything,"
        return "read lengths and times"

    def _check_threads(self, address: str, welcome: Welcome) -> None:
        beside = self.threads.server is None and welcome.device == "cpu" and same_machine(address)
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
        return tuple(sorted({border for fleet in self.fleets for border in fleet.borders}))

    @property
    def welcome(self) -> Welcome | None:
        """What the first server of those in use says of itself."""
        return self.fleets[0].welcome if self.fleets else None

    @property
    def dtypes(self) -> list[str]:
        """In what those that have answered compute."""
        members = (member for fleet in self.fleets for member in fleet.members)
        return [member.welcome.dtype for member in members if member.welcome is not None]

    @property
    def encrypted(self) -> bool:
        """Whether all that goes to servers elsewhere is encrypted, and they proved to be who they are."""
        if self.embedded:
            return False
        return all(endpoint.key or self._config.link.server_key for endpoint in self.endpoints)

    @property
    def on_this_machine(self) -> bool:
        return all(same_machine(endpoint.address) for endpoint in self.endpoints)

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
    return 2 if config.run.privacy == modes.TWO_SERVER else 1


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


def same_machine(endpoint: str) -> bool:
    return endpoint.startswith(("ipc://", "inprocess://", "tcp://127.", "tcp://localhost", "tcp://[::1]"))
