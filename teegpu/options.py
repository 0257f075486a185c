"""Settings as the transports and the wire take them, and the frames of the wire as the transports do: one translation
for the runner, the server and the tools."""

from __future__ import annotations

from functools import lru_cache

from teegpu.config import Config
from teegpu.wire.limits import Limits
from transports.base import ClientOptions, FrameKind, ServerOptions

MIB = 2**20


def wire_limits(config: Config) -> Limits:
    section = config.limits
    return Limits(
        message_bytes=section.message_mib * MIB,
        tensors=section.tensors,
        dimension=section.dimension,
        program_steps=section.program_steps,
    )


def client_options(config: Config) -> ClientOptions:
    return ClientOptions(
        connect_timeout_seconds=config.link.connect_timeout_seconds,
        reply_timeout_seconds=config.link.reply_timeout_seconds,
        spin_seconds=config.link.spin_seconds,
        window_requests=config.link.window_requests,
        window_bytes=config.link.window_mib * MIB,
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        compression_level=config.compression.level,
        compression_min_bytes=config.compression.min_bytes,
    )


def server_options(config: Config) -> ServerOptions:
    return ServerOptions(
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        max_client_requests=config.limits.client_requests,
        max_client_bytes=config.limits.client_mib * MIB,
        max_clients=config.limits.clients,
        compression_level=config.compression.level,
        compression_min_bytes=config.compression.min_bytes,
    )


@lru_cache(maxsize=4096)
def frame_kinds(kinds: tuple[tuple[str, int], ...]) -> tuple[FrameKind, ...]:
    """``wire.codec.Encoded.kinds`` for a transport; made once for each layout of a message."""
    return tuple(FrameKind(label, itemsize) for label, itemsize in kinds)
