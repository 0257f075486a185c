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
from teegpu.remote.client import decode_reply
from teegpu.remote.handshake import hello_message, read_welcome
from teegpu.wire import codec
from teegpu.wire.limits import MAX_HEADER_BYTES
from teegpu.wire.messages import Health, HealthReport, Welcome
from transports.base import Client, Message
from transports.errors import ConnectError
from transports.reach import why_silent

ROUND_TRIPS = 5

LOOK_SECONDS = 1.0
"""After so long without an answer it is looked whether anybody is there; that takes as long at most."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server says of itself, and the median round trip of a few small requests, in seconds."""

    welcome: Welcome
    health: HealthReport
    rtt_seconds: float


def ask(transport: Client, decoder: codec.Decoder, timeout_seconds: float) -> HealthReport:
    """One ``health`` exchange. Raises what ``decode_reply`` does, and ``BadReplyError`` for any other
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
        sent = transport.begin(hello_message(), timeout_seconds=seconds)
        look_at = time.monotonic() + min(LOOK_SECONDS, config.link.connect_timeout_seconds)
        while (reply := sent.poll()) is None and time.monotonic() < look_at:
            time.sleep(0.002)
        # Who asks wants to know how it is now: nobody who is not there is waited for, as a run does.
        if reply is None and (why := why_silent(endpoint.address, LOOK_SECONDS)):
            raise ConnectError(f"no server answers at {endpoint.address}: {why}")
        welcome = read_welcome(decoder, reply or sent.wait(), transport.endpoint)
        samples = []
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            health = ask(transport, decoder, seconds)
            samples.append(time.perf_counter() - start)
    return Probe(welcome, health, statistics.median(samples))
