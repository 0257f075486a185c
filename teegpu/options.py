"""Settings as the transports and the wire take them, and the frames of the wire as the transports do: one translation
for the runner, the server and the tools."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError
from teegpu.keys import client_curve, server_curve
from teegpu.machine import available_cores
from teegpu.wire.limits import REMEMBERED, REMEMBERED_TENSORS, Limits
from transports.base import ClientOptions, FrameKind, ServerOptions

MIB = 2**20


def wire_limits(config: Config) -> Limits:
    section = config.limits
    return Limits(
        message_bytes=section.message_mib * MIB,
        tensors=section.tensors,
        dimension=section.dimension,
        program_steps=section.program_steps,
        working_bytes=section.program_mib * MIB,
    )


def client_options(config: Config, endpoint: Endpoint | None = None) -> ClientOptions:
    """For a connection to ``endpoint``. Raises ``ConfigError`` where its keys can't be used."""
    return ClientOptions(
        connect_timeout_seconds=config.link.connect_timeout_seconds,
        reply_timeout_seconds=config.link.reply_timeout_seconds,
        # With one core, polling would keep it from those who bring the answer.
        spin_seconds=config.link.spin_seconds if available_cores() > 1 else 0.0,
        window_requests=config.link.window_requests,
        window_bytes=config.link.window_mib * MIB,
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        compression_level=config.compression.level,
        compression_min_bytes=config.compression.min_bytes,
        curve=client_curve(config, endpoint),
    )


def server_options(config: Config) -> ServerOptions:
    """Raises ``ConfigError`` where its keys can't be used."""
    return ServerOptions(
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        max_client_requests=config.limits.client_requests,
        max_client_bytes=config.limits.client_mib * MIB,
        max_clients=config.limits.clients,
        hello_timeout_seconds=config.limits.hello_timeout_seconds,
        idle_timeout_seconds=config.limits.idle_timeout_seconds,
        compression_level=config.compression.level,
        compression_min_bytes=config.compression.min_bytes,
        curve=server_curve(config),
    )


def wire_dtype(config: Config, server_dtypes: Iterable[str]) -> str:
    """``run.wire_dtype``, with ``auto`` decided for servers that compute in ``server_dtypes``.

    A server in bf16 rounds what it gets, and what it sends, to bf16. Then fp16 on the link keeps nothing more, costs
    both sides a conversion, and rounds twice."""
    asked = config.run.wire_dtype
    if asked != "auto":
        return asked
    return "bf16" if set(server_dtypes) == {"bf16"} else "fp16"


def held_layers(config: Config, layers: int) -> tuple[int, int] | None:
    """``server.layers`` as the first and the last layer, of a model that has ``layers``; None where it holds all.

    Raises ``ConfigError`` for layers that the model does not have."""
    if not config.server.layers:
        return None
    first, last = map(int, config.server.layers.split("-"))
    if not first <= last < layers:
        raise ConfigError(
            f"server.layers: {config.server.layers} is no range of this model's layers, which are 0-{layers - 1}"
        )
    return first, last


def frame_kinds(kinds: tuple[tuple[str, int], ...]) -> tuple[FrameKind, ...]:
    """``wire.codec.Encoded.kinds`` for a transport; made once for each layout of a message."""
    # One for the header. Peers choose names too: what is longer than ours is made each time.
    return (_frame_kinds if len(kinds) <= REMEMBERED_TENSORS + 1 else _frame_kinds.__wrapped__)(kinds)


@lru_cache(maxsize=REMEMBERED)
def _frame_kinds(kinds: tuple[tuple[str, int], ...]) -> tuple[FrameKind, ...]:
    return tuple(FrameKind(label, itemsize, random=label.endswith(_RANDOM)) for label, itemsize in kinds)


_RANDOM = ("/int32", "/seed")
"""Values modulo 2**32 are masked, and so as good as random. (Token ids are int32 too, and far too few to compress.)"""
