"""Settings as the transports and the wire take them, and the frames of the wire as the transports do: one translation
for the runner, the server and the tools."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from teegpu import facts
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, ShieldError
from teegpu.facts import AUTO, BF16, FP16, FP32
from teegpu.keys import client_keys, server_keys
from teegpu.machine import available_cores, shares_cores
from teegpu.wire.limits import REMEMBERED, REMEMBERED_TENSORS, Limits
from transports.addresses import is_local
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
        program_macs=section.program_macs,
    )


def client_options(config: Config, endpoint: Endpoint | None = None) -> ClientOptions:
    """For a connection to ``endpoint``. Raises ``ConfigError`` where its keys can't be used."""
    return ClientOptions(
        connect_timeout_seconds=config.link.connect_timeout_seconds,
        reply_timeout_seconds=config.link.reply_timeout_seconds,
        spin_seconds=0.0 if _polling_harms(endpoint) else config.link.spin_seconds,
        window_requests=config.link.window_requests,
        window_bytes=config.link.window_mib * MIB,
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        compression_level=config.compression.level,
        keys=client_keys(config, endpoint),
    )


def _polling_harms(endpoint: Endpoint | None) -> bool:
    """Whether who polls keeps a core from those who bring the answer: a server here that computes on all of them."""
    beside = endpoint is not None and is_local(endpoint.address) and shares_cores()
    return beside or available_cores() == 1


def server_options(config: Config) -> ServerOptions:
    """Raises ``ConfigError`` where its keys can't be used."""
    return ServerOptions(
        max_message_bytes=config.limits.message_mib * MIB,
        max_frames=config.limits.frames,
        max_client_requests=config.limits.client_requests,
        max_client_bytes=config.limits.client_mib * MIB,
        max_client_connections=config.limits.client_connections,
        max_clients=config.limits.clients,
        hello_timeout_seconds=config.limits.hello_timeout_seconds,
        idle_timeout_seconds=config.limits.idle_timeout_seconds,
        compression_level=config.compression.level,
        keys=server_keys(config),
    )


def hidden(config: Config) -> bool:
    """Whether servers must not see the values."""
    return facts.privacy(config.run.privacy).hides


def verified(config: Config) -> bool:
    """Whether the servers' products are checked. ``reference`` has none to check."""
    wanted = config.run.verify
    if not facts.privacy(config.run.privacy).checkable:
        return False
    return wanted == "on" or (wanted == "auto" and hidden(config))


def check_required_privacy(config: Config) -> None:
    """Raises ``ShieldError`` where a run would hide less than ``run.require_privacy`` asks for."""
    run = config.run
    local = facts.all_local(run.prefill_plan, run.decode_plan)
    # The table is in the order of strength: each mode assumes less than those before it.
    modes = list(facts.PRIVACY)
    if not local and modes.index(run.privacy) < modes.index(run.require_privacy):
        raise ShieldError(
            f"run.privacy = {run.privacy} is weaker than run.require_privacy = {run.require_privacy}, which "
            f"{config.source('run.require_privacy')} asks for: give --privacy {run.require_privacy}"
        )


def whole_numbers(config: Config) -> bool:
    """Whether products are those of whole numbers, which can be hidden, and checked to the bit: servers need int8
    weights for them."""
    return hidden(config) or verified(config)


def wire_dtype(config: Config, server_dtypes: Iterable[str]) -> str:
    """``run.wire_dtype``, with ``auto`` decided for servers that compute in ``server_dtypes``.

    A server in bf16 rounds what it gets, and what it sends, to bf16. Then fp16 on the link keeps nothing more, costs
    both sides a conversion, and rounds twice."""
    asked = config.run.wire_dtype
    if asked != AUTO:
        return asked
    computed = {dtype.removesuffix(facts.INT8_WEIGHTS) for dtype in server_dtypes}
    return BF16.name if computed == {BF16.name} else FP16.name


def local_dtype(config: Config) -> str:
    """``run.local_dtype``: ``auto`` stands for the processor's quickest, but not where fp32 was asked for elsewhere."""
    asked = config.run.local_dtype
    return FP32.name if asked == AUTO and FP32.name in (config.run.wire_dtype, config.server.dtype) else asked


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
