"""The slow codec that the ladder begins with: what goes in comes out, and what is not packed is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import pytest
import torch

import transports
from teegpu.bench.cases import from_values
from teegpu.bench.packed import PackedClient, PackedServer, pack, taken_apart
from teegpu.bench.packedserver import ENTRY
from teegpu.errors import ModelError, WireError
from teegpu.model.folder import ModelFolder
from teegpu.tee.embedded_server import EmbeddedServer
from tests.conftest import TinyModel
from transports.base import Client, Message, Reply, Server
from transports.errors import FrameError


def test_frames_come_out_as_they_went_in_and_may_be_written_to() -> None:
    frames = [b"head", memoryview(bytes(range(256))), bytearray()]
    parts = taken_apart([memoryview(pack(frames))])
    assert [bytes(part) for part in parts] == [bytes(frame) for frame in frames]
    assert torch.frombuffer(parts[1], dtype=torch.uint8).sum() == sum(range(256))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgpack.packb([b"a"]), msgpack.packb({"frames": b"a"}), msgpack.packb({"frames": ["a"]}),
     msgpack.packb({"others": [b"a"]}), pack([b"a"]) + b"more"],
)  # fmt: skip
def test_what_is_not_packed(body: bytes) -> None:
    with pytest.raises(WireError, match=r"msgpack|packed message"):
        taken_apart([memoryview(body)])


def test_more_than_one_frame_is_not_packed() -> None:
    with pytest.raises(WireError, match="a packed message is one map"):
        taken_apart([memoryview(pack([b"a"]))] * 2)


Answer = Callable[[Server], None]


@pytest.fixture
def serving() -> Iterator[Callable[..., Client]]:
    """``serving(answer, packed=True)`` → a client of a server that answers so, in a thread."""
    ends: list[Callable[[], None]] = []

    def start(answer: Callable[[list[bytes]], list[bytes]], *, packed: bool = True) -> Client:
        inner = transports.listen("tcp://127.0.0.1:0")
        server: Server = PackedServer(inner) if packed else inner
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                incoming = server.next(0.1)
                if incoming is not None:
                    server.reply(incoming, Message(answer([bytes(frame) for frame in incoming.frames])))
            server.close()

        thread = threading.Thread(target=serve)
        thread.start()
        client = transports.connect("zmq", server.address)
        ends.extend([client.close, stop.set, server.wake, thread.join])
        return client

    yield start
    for end in ends:
        end()


def test_both_sides_see_their_own_frames_and_the_link_one(serving: Callable[..., Client]) -> None:
    client = PackedClient(serving(lambda frames: [*reversed(frames), b"!"]))
    told: list[tuple[Message, int]] = []
    client.on_sent = lambda message, sent_ns: told.append((message, sent_ns))
    message = Message([b"a", b"bc"], max_reply_bytes=4)
    before = time.perf_counter_ns()
    reply = client.request(message)
    assert [bytes(frame) for frame in reply.frames] == [b"bc", b"a", b"!"]
    assert reply.bytes_up > len(pack([b"a", b"bc"])) > len(b"abc")
    # who keeps account of time is told of the message that it gave
    ((sent, sent_ns),) = told
    assert sent is message
    assert before < sent_ns == reply.sent_ns


def test_a_posted_request_too(serving: Callable[..., Client]) -> None:
    client = PackedClient(serving(lambda frames: frames))
    poll = client.post(Message([b"a" * 1000]))
    assert client.pending_bytes > 1000
    reply: Reply | None = None
    deadline = time.perf_counter() + 10
    while reply is None and time.perf_counter() < deadline:
        reply = poll()
    assert reply is not None
    assert [bytes(frame) for frame in reply.frames] == [b"a" * 1000]


def test_a_reply_that_is_not_packed(serving: Callable[..., Client]) -> None:
    client = PackedClient(serving(lambda _: [b"plain"], packed=False))
    with pytest.raises(FrameError, match="sent a reply that is not packed"):
        client.request(Message([b"a"]))


def test_a_request_that_is_not_packed_has_no_frames(serving: Callable[..., Client]) -> None:
    plain = serving(lambda frames: [f"{len(frames)}".encode()])
    (frame,) = plain.request(Message([b"a"])).frames
    assert [bytes(part) for part in taken_apart([frame])] == [b"0"]


@pytest.mark.extra
def test_a_server_that_can_not_load_its_model_says_so(tiny_model: TinyModel) -> None:
    nowhere = ModelFolder("nowhere", tiny_model("llama").path / "nowhere")
    with EmbeddedServer(nowhere, from_values({}), threads=1, entry=ENTRY) as server, pytest.raises(ModelError):
        server.wait()
