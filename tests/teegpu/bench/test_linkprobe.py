"""What is concluded about a link: a real server's answers over a link whose times are calculated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import transports
from teegpu.bench.linkprobe import (
    FEWEST,
    MOST_BYTES,
    TRANSFER_ROUND_TRIPS,
    TRANSFER_SECONDS,
    Crossing,
    LinkProbe,
    LinkSamples,
    measure,
)
from teegpu.errors import BadReplyError, ServerRefusedError
from teegpu.gpu import server as gpu
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.remote.handshake import hello
from teegpu.wire.codec import Decoder
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from tests.conftest import TinyModel
from transports.base import Answered, Client, Incoming, Message, Reply
from transports.netem.spec import LinkSpec

SERVER_NS = 3_000_000


class CalculatedLink(Client):
    """Hands messages to a server, and takes for each exactly as long as ``spec`` says and ``SERVER_NS``."""

    name = "calculated"
    endpoint = "calculated"

    def __init__(self, server: gpu.GpuServer, spec: LinkSpec) -> None:
        self.server = server
        self.spec = spec
        self.now_ns = 0
        self.longest_up = self.longest_down = 0
        self.tamper: Callable[[list[memoryview]], list[memoryview]] = lambda frames: frames

    def seconds(self) -> float:
        return self.now_ns / 1e9

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Answered:
        frames = [memoryview(bytearray(frame)) for frame in message.frames]
        incoming = Incoming(frames, b"", None, 0)
        answer = self.tamper([memoryview(bytearray(frame)) for frame in self.server.answer(incoming).frames])
        up, down = message.nbytes, sum(frame.nbytes for frame in answer)
        assert down <= message.max_reply_bytes
        self.longest_up, self.longest_down = max(self.longest_up, up), max(self.longest_down, down)
        spec, sent_ns = self.spec, self.now_ns
        transfer = up / spec.up_bytes_per_second + down / spec.down_bytes_per_second
        self.now_ns += round((spec.rtt_seconds + transfer) * 1e9) + SERVER_NS
        return Answered(Reply(answer, sent_ns, self.now_ns, up, down, server_ns=SERVER_NS))

    def close(self) -> None:
        pass


Over = Callable[..., tuple[LinkProbe, CalculatedLink]]


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel) -> Iterator[gpu.GpuServer]:
    folder, limits = tiny_model("llama"), Limits()
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        executor, identity = gpu.load(store, spec, device="cpu", dtype="fp32", limits=limits)
    with transports.listen("inprocess://link-probe") as transport:
        yield gpu.GpuServer(transport, executor, identity, limits)


@pytest.fixture
def over(server: gpu.GpuServer) -> Over:
    def make(text: str, **limits: int) -> tuple[LinkProbe, CalculatedLink]:
        client = CalculatedLink(server, LinkSpec.parse(text))
        welcome = hello(client, Decoder(Limits()), 1.0)
        client.now_ns = client.longest_up = client.longest_down = 0
        welcome = replace(welcome, limits=welcome.limits | limits)
        return LinkProbe(client, welcome, Limits()), client

    return make


@pytest.mark.parametrize(
    "text",
    [
        "rtt=5ms,bandwidth=1gbit",
        "rtt=200us,bandwidth=2gbit",
        "rtt=20ms,bandwidth=200mbit",
        "rtt=40ms,up=5mbit,down=50mbit",
        "rtt=1ms,bandwidth=100kbit",
    ],
)
def test_a_link_is_found_as_it_is(over: Over, text: str) -> None:
    probe, client = over(text)
    samples = LinkSamples()
    measure(probe, samples, round_trips=5, transfers=2, clock=client.seconds)
    assert str(samples.spec()) == text
    for crossing in (*samples.small, *samples.up, *samples.down):
        assert crossing.server_seconds == SERVER_NS / 1e9
    for crossing in (samples.up[0], samples.down[0]):
        assert crossing.network_seconds > 0.8 * max(TRANSFER_SECONDS, TRANSFER_ROUND_TRIPS * client.spec.rtt_seconds)


def test_a_quick_link_is_measured_by_the_longest_message(over: Over) -> None:
    probe, client = over("rtt=100us,bandwidth=20gbit")
    samples = LinkSamples()
    measure(probe, samples, round_trips=3, transfers=1, clock=client.seconds)
    assert str(samples.spec()) == "rtt=100us,bandwidth=20gbit"
    assert MOST_BYTES <= client.longest_up <= MOST_BYTES + MAX_HEADER_BYTES


def test_no_message_is_longer_than_the_server_takes(over: Over) -> None:
    probe, client = over("rtt=1ms,bandwidth=10gbit", message_bytes=2**20)
    measure(probe, LinkSamples(), round_trips=3, transfers=1, clock=client.seconds)
    assert 2**19 < client.longest_up <= 2**20
    assert 2**19 < client.longest_down <= 2**20
    probe, client = over("rtt=1ms,bandwidth=10gbit", dimension=1000)
    measure(probe, LinkSamples(), round_trips=3, transfers=1, clock=client.seconds)
    assert client.longest_up <= 8 * 1000 + MAX_HEADER_BYTES
    probe, client = over("rtt=1ms,bandwidth=10gbit", dimension=1)
    samples = LinkSamples()
    measure(probe, samples, round_trips=3, transfers=1, clock=client.seconds)
    assert samples.spec().up_bytes_per_second > 0


def test_a_slow_link_gives_something_in_the_time_there_is(over: Over) -> None:
    probe, client = over("rtt=500ms,bandwidth=10kbit")
    samples, told = LinkSamples(), []
    measure(
        probe,
        samples,
        round_trips=100,
        transfers=100,
        seconds=3.0,
        told=lambda what, done, of, _: told.append((what, done, of)),
        clock=client.seconds,
    )
    assert len(samples.small) == FEWEST
    assert len(samples.up) == len(samples.down) == 1
    assert client.seconds() < 20
    assert str(samples.spec()) == "rtt=500ms,bandwidth=10kbit"
    assert told == [("round trip", done, 100) for done in (1, 2, 3)] + [("bandwidth", 1, 100)]


def test_what_is_not_known_is_not_told() -> None:
    samples = LinkSamples()
    with pytest.raises(ValueError, match="no round trip"):
        _ = samples.small_seconds
    samples.small.append(Crossing(100, 100, 0.004, 0.0))
    assert samples.rtts == [0.004]
    with pytest.raises(ValueError, match="no bandwidth"):
        samples.spec()


def test_noise_makes_no_link_that_can_not_be() -> None:
    """A large message that was quicker than the small ones, and round trips without end."""
    samples = LinkSamples([Crossing(100, 100, 90.0, 0.0)], [Crossing(5000, 100, 1.0, 0.0)], [Crossing(9, 7000, 2.0, 0)])
    spec = samples.spec()
    assert spec.rtt_seconds == 60.0
    assert all(math.isfinite(rate) for rate in (spec.up_bytes_per_second, spec.down_bytes_per_second))


def test_another_answer_than_the_one_asked_for_is_refused(over: Over) -> None:
    probe, client = over("rtt=1ms")
    health: list[list[memoryview]] = []
    client.tamper = lambda frames: health.append(frames) or frames  # type: ignore[func-returns-value]
    probe.small()
    client.tamper = lambda _: health[0]
    with pytest.raises(BadReplyError, match="another question"):
        probe.up(1000)
    with pytest.raises(BadReplyError, match="another question"):
        probe.small()


def test_a_refusal_is_told(over: Over) -> None:
    """A server whose limits are less than it said."""
    probe, client = over("rtt=1ms")
    client.server._executor.limits = Limits(working_bytes=1000)
    try:
        with pytest.raises(ServerRefusedError, match="too-large"):
            probe.down(100_000)
    finally:
        client.server._executor.limits = Limits()
