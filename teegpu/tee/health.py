"""Who answers at an endpoint, and how it is: for ``teegpu doctor``, and for choosing among several servers."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from teegpu import __version__
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import BadReplyError
from teegpu.options import client_options, wire_limits
from teegpu.tee.greeting import decode_reply, hello
from teegpu.wire import codec
from teegpu.wire.limits import MAX_HEADER_BYTES
from teegpu.wire.messages import Health, HealthReport, Welcome
from transports.base import Client, Message

ROUND_TRIPS = 5


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server says of itself, and the median round trip of a few small requests, in seconds."""

    welcome: Welcome
    health: HealthReport
    rtt_seconds: float


def ask(transport: Client, decoder: codec.Decoder, timeout_seconds: float) -> HealthReport:
    """One ``health`` exchange. Raises what ``greeting.decode_reply`` does, and ``BadReplyError`` for any other
    message."""
    encoded = codec.encode_health(Health(0, __version__))
    reply = transport.request(
        Message(encoded.frames, max_reply_bytes=MAX_HEADER_BYTES), timeout_seconds=timeout_seconds
    )
    answer = decode_reply(decoder, reply, transport.endpoint)
    if not isinstance(answer, HealthReport):
        raise BadReplyError(f"the server at {transport.endpoint} does not say how it is")
    return answer


def probe(endpoint: Endpoint, config: Config) -> Probe:
    """Asks the server at ``endpoint`` who and how it is, over a connection of its own.

    Raises ``TransportError`` when nobody answers, ``MismatchError`` for another protocol version, and
    ``ServerRefusedError`` or ``BadReplyError``.
    """
    import transports

    decoder = codec.Decoder(wire_limits(config))
    seconds = config.link.hello_timeout_seconds
    with transports.connect("zmq", endpoint.address, client_options(config, endpoint)) as transport:
        welcome = hello(transport, decoder, seconds)
        samples = []
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            health = ask(transport, decoder, seconds)
            samples.append(time.perf_counter() - start)
    return Probe(welcome, health, statistics.median(samples))
