"""The first exchange with a server: who it is, and whether it is the one that was meant."""

from __future__ import annotations

from collections.abc import Callable

from teegpu import __version__, facts
from teegpu.endpoints import Endpoint
from teegpu.errors import BadReplyError, MismatchError
from teegpu.model.spec import ModelSpec
from teegpu.remote.client import decode_reply
from teegpu.settings import SERVER_DTYPES
from teegpu.wire import codec
from teegpu.wire.limits import MAX_HEADER_BYTES
from teegpu.wire.messages import Hello, Welcome
from transports.base import Client, Message, Reply


def hello_message(*, ring: bool = False) -> Message:
    return Message(codec.encode_hello(Hello(0, __version__, ring)).frames, max_reply_bytes=MAX_HEADER_BYTES)


def read_welcome(decoder: codec.Decoder, reply: Reply, endpoint: str) -> Welcome:
    """The answer to a hello. Raises what ``decode_reply`` does, and ``BadReplyError`` for any other message."""
    answer = decode_reply(decoder, reply, endpoint)
    if not isinstance(answer, Welcome):
        raise BadReplyError(f"what answers at {endpoint} is not a teegpu GPU server")
    return answer


def hello(transport: Client, decoder: codec.Decoder, timeout_seconds: float) -> Welcome:
    """One ``hello`` exchange."""
    reply = transport.request(hello_message(), timeout_seconds=timeout_seconds)
    return read_welcome(decoder, reply, transport.endpoint)


class ModelHandshake:
    """Says hello for a runner of the model ``spec`` with ``digest``, and checks who answers.

    ``ring_digest`` gives what a server that holds layers from a first to a last one has to say of its int8 weights;
    None where the runner has no programs in the ring."""

    def __init__(
        self,
        decoder: codec.Decoder,
        spec: ModelSpec,
        digest: str,
        ring_digest: Callable[[tuple[int, int]], str] | None = None,
    ) -> None:
        self.message = hello_message(ring=ring_digest is not None)
        self._ring_digest = ring_digest
        self._decoder = decoder
        self._spec = spec
        self._digest = digest
        self._dtypes: dict[Endpoint, str] = {}

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome:
        """Who answered. Raises ``MismatchError`` for another protocol version, for another model than ours, and where
        the server does not hold the layers that ``endpoint`` names; else as ``read_welcome``."""
        welcome = read_welcome(self._decoder, reply, endpoint.address)
        spec, where = self._spec, f"the server at {endpoint.address}"
        check_digest(welcome, spec, self._digest, endpoint.address)
        if welcome.dtype.removesuffix(facts.INT8_WEIGHTS) not in SERVER_DTYPES[1:]:
            raise BadReplyError(f"{where} says that it computes in '{welcome.dtype}', which no server does")
        before = self._dtypes.setdefault(endpoint, welcome.dtype)
        if welcome.dtype != before:
            raise MismatchError(
                f"{where} computed in {before} when the run began, and says {welcome.dtype} now: start it as it was"
            )
        if welcome.dims.get("layers") != spec.layers or welcome.layers[1] >= spec.layers:
            raise MismatchError(f"{where} has another number of layers than model '{spec.name}'")
        first, last = endpoint.layers or (0, spec.layers - 1)
        if welcome.layers[0] > first or welcome.layers[1] < last:
            raise MismatchError(
                f"{where} holds layers {welcome.layers[0]}-{welcome.layers[1]}, and is to compute {first}-{last}: "
                "give it '#layers=…' in run.endpoints, or 'serve --layers' to match"
            )
        if self._ring_digest is not None:
            ours = self._ring_digest(welcome.layers)
            if welcome.ring_digest != ours:
                raise MismatchError(
                    f"{where} has other int8 weights (digest {welcome.ring_digest[:12] or 'none'}) than this runner "
                    f"makes of '{spec.name}' (digest {ours[:12]}): install the same teegpu release on both sides"
                )
        return welcome


def check_digest(welcome: Welcome, spec: ModelSpec, digest: str, endpoint: str) -> None:
    """Raises ``MismatchError`` where the server holds another model than ours."""
    if welcome.digest != digest:
        raise MismatchError(
            f"the server at {endpoint} serves {welcome.model!r} (digest {welcome.digest[:12]}), "
            f"this runner has {spec.name!r} (digest {digest[:12]}): give both the same --model"
        )
