"""Frames in, frames out. ``connect`` and ``listen`` are all that a user of this package needs to call.

Importing it imports no transport: a name's module is loaded when the name is used.
"""

from __future__ import annotations

from transports.base import (
    Answered,
    Buffer,
    Changed,
    Client,
    ClientOptions,
    Compression,
    FrameKind,
    Incoming,
    Message,
    Reply,
    Sent,
    Server,
    ServerOptions,
)
from transports.registry import connect, listen, names

__all__ = [
    "Answered",
    "Buffer",
    "Changed",
    "Client",
    "ClientOptions",
    "Compression",
    "FrameKind",
    "Incoming",
    "Message",
    "Reply",
    "Sent",
    "Server",
    "ServerOptions",
    "connect",
    "listen",
    "names",
]
