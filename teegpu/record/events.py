"""The typed events of a run. Times are readings of one monotonic clock in nanoseconds, on the runner.

The runner's thread does one thing at a time, so its time is a line without gaps: each ``Lap`` covers the stretch from
the end of the one before it to its own end, whatever the number of requests in flight.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TEE: Final = "tee"
SERIALIZATION: Final = "serialization"
WAIT: Final = "wait"
OTHER: Final = "other"

PREFILL: Final = "prefill"
DECODE: Final = "decode"

NO_LAYER: Final = -1
"""The layer of what belongs to none: embedding, lm_head, sampling."""


class PhaseBegan(NamedTuple):
    """``tokens``: of the prompt that are to be computed, or in decode the most that will be generated. ``chunks``: that
    the prefill is cut into."""

    at_ns: int
    phase: str
    tokens: int = 0
    chunks: int = 1


class PhaseEnded(NamedTuple):
    """``tokens``: processed in prefill, generated in decode. ``passes``: forward passes that the phase took."""

    at_ns: int
    phase: str
    tokens: int
    passes: int


class Lap(NamedTuple):
    """The runner's thread did ``op`` (of part ``tee``, ``serialization``, ``wait`` or ``other``) since the last lap.

    ``request_id`` of a ``wait`` is the request whose reply ended it, that of a ``SEND`` the one that is now on its way.
    """

    start_ns: int
    end_ns: int
    part: str
    op: str
    layer: int
    chunk: int
    request_id: int


class Rpc(NamedTuple):
    """One request and its reply.

    ``sent_ns`` to ``received_ns`` is the time on the link and at the server. Server seconds are the server's own
    claims. ``operations`` maps report names to (logical operations, seconds). ``bytes_*`` crossed the link; ``raw_*``
    are the same frames before compression. ``tried_bytes`` went through the runner's codec, samples included, and
    ``compressed_bytes`` are those, before compression, that crossed the link compressed, either way. ``endpoint`` is
    the index of the server that answered, ``attempts`` how often the request was sent.
    """

    request_id: int
    label: str
    layer: int
    chunk: int
    sent_ns: int
    received_ns: int
    bytes_up: int
    bytes_down: int
    raw_bytes_up: int
    raw_bytes_down: int
    compression_seconds: float
    queue_seconds: float
    decode_seconds: float
    compute_seconds: float
    encode_seconds: float
    operations: dict[str, tuple[int, float]]
    tried_bytes: int = 0
    compressed_bytes: int = 0
    endpoint: int = 0
    attempts: int = 1


class Retried(NamedTuple):
    """A request was lost and will be sent again. ``reason`` is the name of the transport's error."""

    at_ns: int
    request_id: int
    layer: int
    chunk: int
    endpoint: int
    reason: str


class TokensMade(NamedTuple):
    """``tokens`` were handed to the user at once (more than one only with speculation). Their ids stay in the TEE."""

    at_ns: int
    tokens: int


class Speculated(NamedTuple):
    """A decode pass carried ``drafted`` guessed tokens, of which ``accepted`` were right."""

    drafted: int
    accepted: int


class TextMade(NamedTuple):
    """Generated text, piece by piece. Recorded only where the user asked that text be saved."""

    at_ns: int
    text: str


class Sampled(NamedTuple):
    """The memory of both processes in bytes, and the runner's CPU time so far. 0: not known (a server elsewhere)."""

    at_ns: int
    runner_bytes: int
    server_bytes: int
    cpu_seconds: float


class Noted(NamedTuple):
    """One line for the user: what takes time, what went wrong and was mended."""

    at_ns: int
    text: str


# Of an engine that serves several at once. Requests are numbered as they come; nothing says whose they are.


class Arrived(NamedTuple):
    """A request came in line: a prompt of ``prompt_tokens``, after which ``max_tokens`` are made at most."""

    at_ns: int
    request: int
    prompt_tokens: int
    max_tokens: int


class Admitted(NamedTuple):
    """A request is computed from now on; ``reused_tokens`` of its prompt were still known."""

    at_ns: int
    request: int
    reused_tokens: int


class GaveWay(NamedTuple):
    """A request is in line again, as there was no room for the keys and values of all."""

    at_ns: int
    request: int


class Stepped(NamedTuple):
    """A step was computed. ``rows``: (request, rows that went through the model, tokens that were made) of each in it.
    ``running`` were being computed before it and ``waiting`` are in line after it; ``kv_bytes`` are taken by keys and
    values, kept ones included."""

    at_ns: int
    began_ns: int
    rows: tuple[tuple[int, int, int], ...]
    running: int
    waiting: int
    kv_bytes: int


class Left(NamedTuple):
    """A request has ended. ``reason``: ``stop`` or ``length``, ``abort`` where it was given up, ``error`` where what it
    needed could not be had."""

    at_ns: int
    request: int
    reason: str


Event = (
    PhaseBegan
    | PhaseEnded
    | Lap
    | Rpc
    | Retried
    | TokensMade
    | Speculated
    | TextMade
    | Sampled
    | Noted
    | Arrived
    | Admitted
    | GaveWay
    | Stepped
    | Left
)
