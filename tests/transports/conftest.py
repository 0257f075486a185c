"""Servers to test against: a good one that answers in a thread, and one that a test scripts frame by frame."""

from __future__ import annotations

import socket as sockets
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import zmq

from transports import Client, Incoming, Message, Reply, Server, ServerOptions, listen

WAIT_SECONDS = 10.0

Answer = Callable[[Server, Incoming], None]
Script = Callable[["Peer"], None]


def echo(server: Server, incoming: Incoming) -> None:
    server.reply(incoming, Message(incoming.frames))


def ask_all(client: Client, messages: Sequence[Message], *, timeout_seconds: float | None = None) -> list[Reply]:
    """The replies to ``messages``, which are in flight together, in their order."""
    sent = [client.begin(message, timeout_seconds=timeout_seconds) for message in messages]
    return [each.wait() for each in sent]


def free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Peer:
    """A bare ROUTER socket. ``receive`` and ``send`` deal in whole messages; the first part is the client's id."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def receive(self) -> list[bytes]:
        return self.socket.recv_multipart()

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """``serve(address, answer=echo, options=…)`` → a server whose requests ``answer(server, incoming)`` handles."""
    running: list[tuple[Server, threading.Thread, threading.Event]] = []

    def start(
        address: str = "tcp://127.0.0.1:0", answer: Answer = echo, options: ServerOptions | None = None
    ) -> Server:
        server = listen(address, options)
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                incoming = server.next()
                if incoming is not None:
                    answer(server, incoming)

        thread = threading.Thread(target=loop)
        thread.start()
        running.append((server, thread, stop))
        return server

    yield start
    for server, thread, stop in running:
        stop.set()
        server.wake()
        thread.join(WAIT_SECONDS)
        server.close()
        assert not thread.is_alive()


@pytest.fixture
def scripted() -> Iterator[Callable[[Script], str]]:
    """``scripted(script)`` → the address of a ROUTER socket that runs ``script(peer)`` in a thread."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    over = threading.Event()
    threads: list[threading.Thread] = []

    def start(script: Script) -> str:
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.RCVTIMEO, int(WAIT_SECONDS * 1000))
        port = socket.bind_to_random_port("tcp://127.0.0.1")

        def run() -> None:
            try:
                script(Peer(socket))
                over.wait(WAIT_SECONDS)
            finally:
                socket.close(linger=0)

        thread = threading.Thread(target=run)
        thread.start()
        threads.append(thread)
        return f"tcp://127.0.0.1:{port}"

    yield start
    over.set()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    context.destroy(linger=0)
