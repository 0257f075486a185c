"""A runner's whole stack, sockets included, against servers that mean harm: the right answer or a clear error, within
its time and its memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import zstandard

import transports
from teegpu.endpoints import Endpoint
from teegpu.errors import BadReplyError, MismatchError, ServerRefusedError, TeegpuError
from teegpu.facts import plan as plan_of
from teegpu.remote.client import GpuClient
from teegpu.remote.connections import RetryPolicy
from teegpu.remote.handshake import ModelHandshake
from teegpu.remote.pool import Pool
from teegpu.tee.decoder import Decoder
from teegpu.tee.engine import Engine
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.wire import codec
from teegpu.wire.limits import MAX_HEADER_BYTES, Limits
from teegpu.wire.messages import PROTOCOL_VERSION
from tests.hostile import CutLine, Honest, HostileServer, Parts, positions
from tests.teegpu.conftest import Harness, random_ids
from transports import ClientOptions, envelope
from transports.errors import (
    EnvelopeVersionError,
    FrameError,
    LimitError,
    ReplyTimeoutError,
    TransportError,
)

PROMPT = random_ids(20).tolist()
TOKENS = 3
OPTIONS = ClientOptions(connect_timeout_seconds=5.0, reply_timeout_seconds=20.0)
QUICK = ClientOptions(connect_timeout_seconds=0.5, reply_timeout_seconds=0.2)
GROWTH_BYTES = 64 * 2**20
TRANSPORTS = ("zmq", "pipelined")

Run = Callable[..., list[int]]


@pytest.fixture
def generate(runner: Harness) -> Run:
    """``generate(address, "zmq")`` → the tokens that a run with a server there gives; greeted first, as in a run.
    ``budget``: seconds of retries."""

    def run(address: str, transport: str = "zmq", options: ClientOptions = OPTIONS, budget: float = 0.0) -> list[int]:
        policy = RetryPolicy(budget, 0.01, options.connect_timeout_seconds, options.reply_timeout_seconds)
        pool = Pool(
            [Endpoint(address)],
            runner.spec.layers,
            connect=lambda endpoint: transports.connect(transport, endpoint.address, options),
            handshake=ModelHandshake(codec.Decoder(Limits()), runner.spec, "digest"),
            policy=policy,
            recorder=runner.recorder,
        )
        with contextlib.closing(pool):
            pool.open()
            gpu = GpuClient(pool, runner.spec, wire_dtype="fp32", recorder=runner.recorder, limits=Limits())
            decoder = Decoder(runner.spec, runner.weights, runner.rotary, plan_of("fused"), gpu, runner.recorder)

            engine = Engine(
                decoder,
                decoder,
                spec=runner.spec,
                rotary=runner.rotary,
                recorder=runner.recorder,
                chunk_tokens=5,
                overlap=gpu.can_overlap,
            )
            return engine.generate(PROMPT, max_tokens=TOKENS, sampler=Sampler(SamplingOptions())).token_ids

    return run


@pytest.fixture
def right(runner: Harness) -> list[int]:
    """The tokens of an honest run."""
    return runner.engine("local").generate(PROMPT, max_tokens=TOKENS, sampler=Sampler(SamplingOptions())).token_ids


Hostile = Callable[..., HostileServer]


@pytest.fixture
def hostile(runner: Harness) -> Iterator[Hostile]:
    made: list[HostileServer] = []

    def make(script: Callable[[Honest], Iterable[Parts]], at: int, **more: Any) -> HostileServer:
        made.append(HostileServer(runner.client.servers[0], script, at=at, **more))
        return made[-1]

    yield make
    for server in made:
        server.close()


@contextlib.contextmanager
def bounded(seconds: float = 15.0, growth: int = GROWTH_BYTES) -> Iterator[None]:
    """Within it, neither time nor this process's memory grows beyond."""
    process = psutil.Process()
    before, started = process.memory_info().rss, time.monotonic()
    yield
    assert time.monotonic() - started < seconds
    assert process.memory_info().rss - before < growth


# Replies that can't be right


def changed(array: bytes, value: float) -> bytes:
    values = np.frombuffer(array, np.float32).copy()
    values[0] = value
    return values.tobytes()


def with_times(honest: Honest, times: object) -> list[Parts]:
    return [honest.with_header(3, times)]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def bomb(honest: Honest, nbytes: int) -> list[Parts]:
    """A few KB of zstd that are ``nbytes`` of zeros."""
    packed = zstandard.ZstdCompressor().compress(bytes(nbytes))
    frames = [msgpack.packb(honest.header), *honest.frames[:-1], packed]
    lengths = [*map(len, frames[:-1]), nbytes]
    codecs = [*([0] * (len(frames) - 1)), envelope.ZSTD]
    return [[envelope.pack(honest.request_id, lengths, codecs, [1] * len(frames)), *frames]]


def reworked(honest: Honest, column: int, value: object) -> list[Parts]:
    table = honest.table
    table[0][column] = value
    return [honest.with_table(table)]


def transposed(honest: Honest) -> list[Parts]:
    return reworked(honest, 1, honest.table[0][1][::-1])


BAD: dict[str, tuple[Callable[[Honest], Iterable[Parts]], type[Exception], str]] = {
    "another shape": (transposed, BadReplyError, "register '.*expected"),
    "another register": (lambda h: reworked(h, 0, "w"), BadReplyError, "other registers"),
    "another dtype": (lambda h: reworked(h, 2, "int32"), BadReplyError, "as int32"),
    "an unknown dtype": (lambda h: reworked(h, 2, "complex"), BadReplyError, "wire dtype is one of"),
    "a register twice": (
        lambda h: [h.with_table([h.table[0]] * len(h.table), *[h.frames[0]] * len(h.table))],
        BadReplyError,
        "twice",
    ),
    "a table that claims more": (
        lambda h: [h.with_table([[name, [shape[0] * 2, *shape[1:]], kind] for name, shape, kind in h.table])],
        BadReplyError,
        "takes .* bytes, its frame holds",
    ),
    "a table that claims petabytes": (
        lambda h: reworked(h, 1, [2**24, 2**24]),
        BadReplyError,
        "over the limit of .* bytes",
    ),
    "a table of negative sizes": (lambda h: reworked(h, 1, [-4, -8]), BadReplyError, "a dimension is"),
    "a table of 4000 rows": (lambda h: [h.with_table([["x", [1], "fp32"]] * 4000)], BadReplyError, "at most 32"),
    "a table that is no bytes": (lambda h: [h.with_header(4, 7)], BadReplyError, "travels as bytes"),
    "a frame more": (lambda h: [h.sealed(*h.parts[1:], b"more")], BadReplyError, "frames? after the header"),
    "a frame less": (lambda h: [h.sealed(*h.parts[1:-1])], BadReplyError, "frames? after the header"),
    "swapped frames": (
        lambda h: [h.sealed(h.parts[1], h.frames[1][:-4], h.frames[0], *h.frames[2:])],
        BadReplyError,
        "its frame holds",
    ),
    "NaN": (lambda h: [h.sealed(h.parts[1], changed(h.frames[0], math.nan), *h.frames[1:])], BadReplyError, "finite"),
    "infinity": (
        lambda h: [h.sealed(h.parts[1], changed(h.frames[0], -math.inf), *h.frames[1:])],
        BadReplyError,
        "finite",
    ),
    "no operation of ours": (
        lambda h: with_times(h, [0, 0, 0, 0, {"RELU": [1, 0.0]}]),
        BadReplyError,
        "one of a program's",
    ),
    "an operation not asked for": (
        lambda h: with_times(h, [0, 0, 0, 0, {"MATMUL": [1, 0.0]}]),
        BadReplyError,
        "another count",
    ),
    "absurd counts": (lambda h: with_times(h, [0, 0, 0, 0, {"LINEAR": [2**62, 0]}]), BadReplyError, "another count"),
    "thousands of operations": (
        lambda h: with_times(h, [0, 0, 0, 0, {f"OP{n}": [1, 0.0] for n in range(4000)}]),
        BadReplyError,
        "one of a program's",
    ),
    "a negative time": (lambda h: with_times(h, [-1.0, 0, 0, 0, {}]), BadReplyError, "server time"),
    "NaN as time": (lambda h: with_times(h, [0, 0, math.nan, 0, {}]), BadReplyError, "server time"),
    "a time beyond all": (lambda h: with_times(h, [0, 1e300, 0, 0, {}]), BadReplyError, "server time"),
    "another wire id": (lambda h: [h.with_header(2, h.header[2] + 1)], BadReplyError, "another question"),
    "a negative wire id": (lambda h: [h.with_header(2, -1)], BadReplyError, "request id"),
    "a question": (lambda h: [h.with_header(1, "execute")], BadReplyError, "not valid"),
    "a welcome in the middle": (
        lambda h: [h.sealed(bytes(codec.encode_hello(codec.Hello(h.header[2], "x")).frames[0]))],
        BadReplyError,
        "another question",
    ),
    "another protocol version": (lambda h: [h.with_header(0, PROTOCOL_VERSION + 1)], MismatchError, "protocol version"),
    "a header that is no msgpack": (lambda h: [h.sealed(b"\xc1" * 50, *h.frames)], BadReplyError, "not valid msgpack"),
    "a header that nests deeply": (lambda h: [h.sealed(nested(200_000), *h.frames)], BadReplyError, "not valid"),
    "a header that nests a little less": (lambda h: [h.sealed(nested(500), *h.frames)], BadReplyError, "not valid"),
    "a header that claims 4 GiB": (lambda h: [h.sealed(b"\xdd\xff\xff\xff\xff")], BadReplyError, "not valid"),
    "a header of 10 MiB": (lambda h: [h.sealed(bytes(10 * 2**20), *h.frames)], FrameError, "can be"),
    "a header over the limit": (
        lambda h: [h.sealed(bytes(MAX_HEADER_BYTES + 1))],
        (BadReplyError, FrameError),
        "over the limit of 262144|can be right",
    ),
    "no frames": (lambda h: [h.sealed()], BadReplyError, "at least one frame"),
    "an empty header": (lambda h: [h.sealed(b"")], BadReplyError, "not valid"),
    "frames beyond number": (lambda h: [h.sealed(*[b""] * 5000)], LimitError, "limits.frames"),
    "a reply larger than it can be": (
        lambda h: [h.sealed(*h.parts[1:], bytes(8 * 2**20))],
        FrameError,
        "can be",
    ),
    "compressed frames that nobody asked for": (lambda h: bomb(h, len(h.frames[-1])), FrameError, "not asked for"),
    "a false length": (
        lambda h: [[envelope.pack(h.request_id, [1, *map(len, h.frames)]), *h.parts[1:]]],
        FrameError,
        "claims 1 bytes",
    ),
    "an unknown codec": (
        lambda h: [[envelope.pack(h.request_id, list(map(len, h.parts[1:])), [9] * len(h.parts[1:])), *h.parts[1:]]],
        FrameError,
        "unknown codec",
    ),
    "another magic": (lambda h: [[b"HTTP/1.1 200 OK", *h.parts[1:]]], FrameError, "is it a teegpu server"),
    "an envelope of another version": (
        lambda h: [[h.parts[0][:4] + b"\x09" + h.parts[0][5:], *h.parts[1:]]],
        EnvelopeVersionError,
        "install the same release",
    ),
    "an empty message": (lambda _: [[b""]], FrameError, "is it a teegpu server"),
    "impossible flags": (
        lambda h: [[h.parts[0][:5] + b"\xff" + h.parts[0][6:], *h.parts[1:]]],
        FrameError,
        "impossible flags",
    ),
    "a refusal with escapes": (
        lambda h: [h.sealed(msgpack.packb([PROTOCOL_VERSION, "refusal", 1, "teapot", "\x1b]0;owned\x07\nteegpu: ok"]))],
        ServerRefusedError,
        r"refused \(internal\):  \]0;owned  teegpu: ok$",
    ),
    "a refusal of its transport, with escapes": (
        lambda h: [envelope.pack_refusal(h.request_id, envelope.REFUSED_FRAMING, "\x1b[2J\u202e\n" * 400)],
        FrameError,
        r"could not read the request: [ -~]{1,500}$",
    ),
    "unasked replies without end": (
        lambda h: ([*h.sealed(b"x", request_id=10**6 + number)] for number in range(10**6)),
        FrameError,
        "what nobody asked",
    ),
    "large unasked replies": (
        lambda h: ([*h.sealed(bytes(2**20), request_id=10**6 + number)] for number in range(200)),
        FrameError,
        "what nobody asked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", BAD)
def test_a_reply_that_can_not_be_right_ends_the_run(what: str, transport: str, generate: Run, hostile: Hostile) -> None:
    script, kind, message = BAD[what]
    server = hostile(script, at=6)  # a reply with two outputs, whether chunks overlap or not
    with bounded(), pytest.raises(kind, match=message) as caught:
        generate(server.address, transport, budget=10.0)  # nothing of this is worth another attempt
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


HELLOS: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "another digest": (lambda w: w | {"digest": "other"}, MismatchError, "give both the same --model"),
    "other layers": (lambda w: w | {"dims": w["dims"] | {"layers": 3}}, MismatchError, "number of layers"),
    "a part of the layers": (lambda w: w | {"layers": [0, 0]}, MismatchError, "holds layers 0-0"),
    "layers that end before they begin": (lambda w: w | {"layers": [1, 0]}, BadReplyError, "before the first"),
    "a name without end": (lambda w: w | {"model": "x" * 10_000}, BadReplyError, "at most 256 characters"),
    "no limits": (lambda w: {k: v for k, v in w.items() if k != "limits"}, BadReplyError, "limits"),
    "limits of everything": (lambda w: w | {"limits": {f"l{n}": 1 for n in range(70)}}, BadReplyError, "limits"),
    "negative memory": (lambda w: w | {"memory_bytes": -1}, BadReplyError, "memory_bytes"),
    "a list": (lambda _: [], BadReplyError, "a map"),
}


@pytest.mark.parametrize("what", HELLOS)
def test_a_welcome_that_can_not_be_right(what: str, generate: Run, hostile: Hostile) -> None:
    change, kind, message = HELLOS[what]
    server = hostile(lambda honest: [honest.with_header(3, change(honest.header[3]))], at=0)
    with bounded(), pytest.raises(kind, match=message) as caught:
        generate(server.address)
    assert str(caught.value).isprintable()


# Replies that are right, at odd times


def again(honest: Honest) -> Iterator[Parts]:
    yield from [honest.parts] * 4


def stale(honest: Honest) -> Iterator[Parts]:
    yield from honest.before
    yield honest.parts


def unasked(honest: Honest) -> Iterator[Parts]:
    for number in range(3):
        yield honest.sealed(*honest.parts[1:], request_id=2**63 + number)
    yield honest.parts


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("script", [again, stale, unasked])
def test_what_was_not_asked_for_changes_nothing(
    script: Callable[[Honest], Iterable[Parts]], transport: str, generate: Run, hostile: Hostile, right: list[int]
) -> None:
    server = hostile(script, at=3, once=False)
    with bounded():
        assert generate(server.address, transport) == right


def test_replies_in_another_order(generate: Run, hostile: Hostile, right: list[int]) -> None:
    held: list[Parts] = []

    def two_at_a_time(honest: Honest) -> Iterator[Parts]:
        held.append(honest.parts)
        if len(held) == 2:
            yield from reversed(held)
            held.clear()

    # Chunks of the prompt are in flight together: each pair of their replies comes the other way round.
    server = hostile(two_at_a_time, at=1, once=False)
    with contextlib.suppress(ReplyTimeoutError):  # an odd one that is left waits in vain
        assert generate(server.address, "pipelined", QUICK) == right
    assert server.replies > 4


def test_values_that_are_finite_and_absurd(generate: Run, hostile: Hostile) -> None:
    def absurd(honest: Honest) -> Iterator[Parts]:
        yield honest.sealed(
            honest.parts[1], *(np.full(len(frame) // 4, 3e38, np.float32).tobytes() for frame in honest.frames)
        )

    with bounded(), pytest.raises(BadReplyError, match=r"finite|not numbers"):
        generate(hostile(absurd, at=2, once=False).address)


def test_claimed_times_are_held_against_the_clock(generate: Run, hostile: Hostile, runner: Harness) -> None:
    server = hostile(lambda h: with_times(h, [9e8, 9e8, 9e8, 9e8, {"LINEAR": [h_count(h), 9e8]}]), at=1, once=False)
    started = time.monotonic()
    generate(server.address)
    seconds = time.monotonic() - started
    for phase in runner.summary.phases.values():
        parts = phase.tee_seconds + phase.serialization_seconds + phase.wait_seconds + phase.other_seconds
        assert parts == pytest.approx(phase.seconds, rel=1e-6)
        assert phase.gpu_seconds <= phase.wait_seconds <= seconds
        assert phase.busy.gpu_seconds <= phase.busy.round_trip_seconds <= 10 * seconds
        assert all(total.seconds <= 10 * seconds for total in phase.ops.values())


def h_count(honest: Honest) -> int:
    count: int = honest.header[3][4]["LINEAR"][0]
    return count


# Compressed frames


@pytest.mark.parametrize("transport", ["zmq+zstd", "pipelined+zstd"])
@pytest.mark.parametrize("nbytes", [64 * 2**20, 2**30])
def test_a_bomb_is_not_unpacked(nbytes: int, transport: str, generate: Run, hostile: Hostile) -> None:
    packed = bomb(Honest(0, [], [b""]), nbytes)[0]

    def throw(honest: Honest) -> Iterator[Parts]:
        lengths = [len(honest.parts[1]), nbytes]
        yield [envelope.pack(honest.request_id, lengths, [0, 1], [1, 1]), honest.parts[1], packed[-1]]

    with bounded(), pytest.raises(FrameError, match="can be right"):
        generate(hostile(throw, at=3).address, transport)


# Connections that end, stall or trickle


@pytest.fixture
def served(hostile: Hostile) -> str:
    """The address of an honest server."""
    return hostile(lambda honest: [honest.parts], at=0).address


@pytest.fixture
def line(served: str) -> Iterator[Callable[..., CutLine]]:
    made: list[CutLine] = []

    def make(cut: int | None, **more: Any) -> CutLine:
        made.append(CutLine(served, cut, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_connection_that_ends_at_any_byte_is_mended(
    generate: Run, line: Callable[..., CutLine], right: list[int]
) -> None:
    whole = line(None)
    assert generate(whole.address) == right
    stream = bytes(whole.seen)
    cuts = sorted({position for position in positions(stream, 2) if position < len(stream)})
    assert len(cuts) > 25
    with bounded(60.0):
        for number, cut in enumerate(cuts):
            relay = line(cut)
            assert generate(relay.address, TRANSPORTS[number % 2], budget=20.0) == right, cut
            assert relay.accepted > 1, cut


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_a_budget_a_connection_that_ends_is_a_clear_error(
    transport: str, generate: Run, line: Callable[..., CutLine]
) -> None:
    for cut in (30, 300, 5000):
        with bounded(), pytest.raises(TransportError) as caught:
            generate(line(cut, connections=10**6).address, transport, QUICK)
        assert caught.value.retryable
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("how", [{"stall": True}, {"drip_seconds": 0.01}])
def test_a_server_that_stalls_or_trickles_is_not_waited_for(
    how: dict[str, Any], transport: str, generate: Run, line: Callable[..., CutLine]
) -> None:
    for cut in (40, 3000):
        with bounded(5.0), pytest.raises((TransportError, TeegpuError), match=r"within 0\.[25] s"):
            generate(line(cut, connections=10**6, **how).address, transport, QUICK)
