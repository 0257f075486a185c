"""What can go wrong while frames travel.

    TransportError
    ├── UnknownTransportError      no transport of that name (the message lists those that exist)
    ├── LinkSpecError              an emulated link's description can't be read, or such a link can't be
    ├── BadAddressError            the address can't be used: syntax, port taken, no permission
    ├── BadKeyError                a key or key file that can't be used: damaged, of the wrong kind, open to others
    ├── AuthenticationError        the two sides do not agree on their keys, or one of them has none
    ├── ConnectError               no server answered within connect_timeout_seconds
    ├── ConnectionLostError        the connection ended while a request was in flight, or the client is closed
    ├── ReplyTimeoutError          the server is connected, but this reply did not come in time
    ├── FrameError                 the peer broke the framing: bad envelope, bad compressed data, a false length
    │   ├── EnvelopeVersionError       the peer's envelope is of another version
    │   └── SealError                  a message of a link with keys can't be opened, or none can be sealed any more
    └── LimitError                 a message exceeds a limit of ours; nothing was sent or allocated

``ConnectError``, ``ConnectionLostError`` and ``ReplyTimeoutError`` are faults of the link: a request may be sent again,
because requests are idempotent (``retryable``). The others would only happen again.
"""

from __future__ import annotations

from typing import ClassVar


class TransportError(Exception):
    """Base of all transport errors. The message is one line, names the setting meant, and says what to do."""

    retryable: ClassVar[bool] = False


class UnknownTransportError(TransportError):
    pass


class LinkSpecError(TransportError):
    pass


class BadAddressError(TransportError):
    pass


class BadKeyError(TransportError):
    pass


class AuthenticationError(TransportError):
    pass


class ConnectError(TransportError):
    retryable = True


class ConnectionLostError(TransportError):
    retryable = True


class ReplyTimeoutError(TransportError):
    retryable = True


class FrameError(TransportError):
    pass


class EnvelopeVersionError(FrameError):
    pass


class SealError(FrameError):
    pass


class LimitError(TransportError):
    pass
