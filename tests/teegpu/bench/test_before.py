"""How it was done before: what is packed comes out as it went in, and without caches the tokens are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import pytest
import torch

import transports
from teegpu.bench.before import AnglesAnew, PackedClient, PackedServer, WholeContextEngine, pack, taken_apart
from teegpu.bench.cases import from_values
from teegpu.bench.pool import PACKED_ENTRY
from teegpu.errors import ModelError, WireError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_config
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import PARTS, Parts, Runner
from teegpu.tee.decoder import Decoder, Step
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.sequence import Generation
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
    message = Message([b"a", b"bc"], max_reply_bytes=4)
    before = time.perf_counter_ns()
    sent = client.begin(message)
    reply = sent.wait()
    assert [bytes(frame) for frame in reply.frames] == [b"bc", b"a", b"!"]
    assert reply.bytes_up > len(pack([b"a", b"bc"])) > len(b"abc")
    assert before < sent.sent_ns == reply.sent_ns


def test_a_posted_request_too(serving: Callable[..., Client]) -> None:
    client = PackedClient(serving(lambda frames: frames))
    poll = client.begin(Message([b"a" * 1000])).poll
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
    with EmbeddedServer(nowhere, from_values({}), threads=1, entry=PACKED_ENTRY) as server, pytest.raises(ModelError):
        server.wait()


# Without caches

PROMPT = list(range(40, 60))


@pytest.mark.parametrize("rope", [None, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}])  # fmt: skip
def test_angles_are_the_same_as_from_the_table(tiny_model: TinyModel, rope: dict[str, object] | None) -> None:
    config = read_config(tiny_model("llama", **({} if rope is None else {"rope_parameters": rope})))
    table, anew = RotaryTable(config), AnglesAnew(config)
    for each in (table, anew):
        each.prepare(100)
    for ours, theirs in zip(anew.at(7, 90), table.at(7, 90), strict=True):
        assert torch.equal(ours, theirs)


def tokens(tiny_model: TinyModel, parts: Parts, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    forward = Decoder.forward

    async def counted(self: Decoder, work: Step) -> torch.Tensor | None:
        widths.append(work.ids.shape[0])
        return await forward(self, work)

    monkeypatch.setattr(Decoder, "forward", counted)
    plan = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.threads": 1, "run.max_tokens": 5}
    with Runner(from_values(plan), tiny_model("llama"), parts=parts) as runner:
        made = runner.generate(
            PROMPT, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
        )
    return made.token_ids


def test_each_step_computes_the_whole_context(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: list[int] = []
    whole: list[int] = []
    expected = tokens(tiny_model, PARTS, cached, monkeypatch)
    monkeypatch.undo()
    made = tokens(tiny_model, Parts(rotary=AnglesAnew, engine=WholeContextEngine), whole, monkeypatch)
    assert made == expected
    assert cached == [20, 1, 1, 1, 1]
    assert whole == [20, 21, 22, 23, 24]
