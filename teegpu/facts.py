"""What plans, wire dtypes, transports and privacy modes are: one table each, one row for each name.

Whoever wants to know something about one asks its row. Nothing here needs a package, so everything may import it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from teegpu.errors import ConfigError, nearest

Row = TypeVar("Row")

AUTO: Final = "auto"
"""In the place of a plan or a wire dtype: the runner chooses."""
INT8_WEIGHTS: Final = "+int8"
"""Stands after the dtype that products are computed in, where they are of int8 weights."""


def _look_up(table: Mapping[str, Row], name: str, what: str) -> Row:
    row = table.get(name)
    if row is None:
        raise ConfigError(f"unknown {what} '{name}'{nearest(name, list(table))}; there are {', '.join(table)}")
    return row


@dataclass(frozen=True, slots=True)
class Plan:
    """How a decoder layer is cut into programs.

    ``remote``: matrix products go to the GPU server. ``merged``: projections that share an input are one product.
    ``remote_attention``: QKᵀ and AV are products of the server, so scores cross the link. ``remote_embedding``: the
    server looks token ids up, and so sees them. ``fused``: the server goes on past the norms, with the residual.
    """

    name: str
    remote: bool = True
    merged: bool = True
    remote_attention: bool = False
    remote_embedding: bool = False
    fused: bool = False

    @property
    def offered(self) -> bool:
        """Whether ``auto`` and the advice may propose it: it shows the server neither token ids nor scores."""
        return not self.remote_attention

    @property
    def shows(self) -> str:
        """Why what it sends can be neither hidden nor checked to the bit, as the end of a message; empty: it can."""
        if self.remote_attention:
            return "the server looks token ids up, and multiplies queries with keys, a product with no weight in it"
        if self.fused:
            return "the server puts one product into the next, and a chain of two outgrows whole numbers modulo 2^32"
        return ""

    def rpc_calls(self, layers: int, groups: int = 1) -> int:
        """RPCs of one pass over the whole model in one chunk, its last logits included. ``groups``: over how many
        groups of servers the layers are cut."""
        if not self.remote:
            return 0
        if self.fused:
            return 2 * layers + 1 + (groups - 1)
        projections = 4 if self.merged else 7
        per_layer = projections + (2 if self.remote_attention else 0)
        return per_layer * layers + 1 + (1 if self.remote_embedding else 0)


LOCAL: Final = Plan("local", remote=False)
PER_OP: Final = Plan("per-op", merged=False, remote_attention=True, remote_embedding=True)
BATCHED: Final = Plan("batched", remote_attention=True, remote_embedding=True)
ATTENTION: Final = Plan("attention")
FUSED: Final = Plan("fused", fused=True)

PLANS: Final[Mapping[str, Plan]] = {plan.name: plan for plan in (LOCAL, PER_OP, BATCHED, ATTENTION, FUSED)}


def all_local(*plans: str) -> bool:
    """Whether each of the plans named is ``local``: then there is no server."""
    return set(plans) == {LOCAL.name}


def plan(name: str) -> Plan:
    """The plan called ``name``. Raises ``ConfigError``."""
    return _look_up(PLANS, name, "plan")


@dataclass(frozen=True, slots=True)
class WireDtype:
    """How a float tensor is encoded on the link.

    ``value_bytes`` for each value, and ``scale_bytes`` for each ``group`` of neighbouring values in a row (0: none).
    ``largest`` finite value. ``roundoff``: the largest relative error of a value that is rounded to it, of int8 the
    usual one, relative to the largest value of its group.
    """

    name: str
    value_bytes: int
    largest: float
    roundoff: float
    group: int = 0
    scale_bytes: int = 0

    @property
    def narrow_range(self) -> bool:
        """Whether activations may be beyond its range, so that rows have to be scaled on their way out."""
        return self.largest < 1e30

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of ``values``."""
        scales = self.scale_bytes * math.ceil(values / self.group) if self.group else 0
        return self.value_bytes * values + scales

    def for_register(self, register: str) -> WireDtype:
        """What ``register`` of a program travels in where this is the run's wire dtype: the residual and the logits
        are never narrower than fp16, since what is lost of them is lost for good."""
        return FP16 if self.group and register in RESIDUAL else self


RESIDUAL: Final = frozenset({"x", "z", "logits", "logits_x"})
"""The registers that hold the residual of a layer, in which errors add up over the layers, or logits."""

FP32: Final = WireDtype("fp32", 4, 3.4028234663852886e38, 2.0**-24)
BF16: Final = WireDtype("bf16", 2, 3.3895313892515355e38, 2.0**-8)
FP16: Final = WireDtype("fp16", 2, 65504.0, 2.0**-11)
INT8: Final = WireDtype("int8", 1, 127 * 65504.0, 0.0182, group=64, scale_bytes=2)

WIRE_DTYPES: Final[Mapping[str, WireDtype]] = {dtype.name: dtype for dtype in (FP32, BF16, FP16, INT8)}

INT32_BYTES: Final = 4
"""Bytes of a value of a masked product, and of a token id."""


def wire_dtype(name: str) -> WireDtype:
    """The wire dtype called ``name``. Raises ``ConfigError``."""
    return _look_up(WIRE_DTYPES, name, "wire dtype")


@dataclass(frozen=True, slots=True)
class Transport:
    """``overlaps``: many requests may be in flight. ``compresses``: large frames go through zstd. ``sockets``: it
    reaches another process."""

    name: str
    overlaps: bool = False
    compresses: bool = False
    sockets: bool = True

    @property
    def overlapping(self) -> Transport:
        """The one that is like it and has many requests in flight."""
        return PIPELINED_ZSTD if self.compresses else PIPELINED

    @property
    def compressing(self) -> Transport:
        """The one that is like it and compresses."""
        return PIPELINED_ZSTD if self.overlaps else ZMQ_ZSTD


ZMQ: Final = Transport("zmq")
ZMQ_ZSTD: Final = Transport("zmq+zstd", compresses=True)
PIPELINED: Final = Transport("pipelined", overlaps=True)
PIPELINED_ZSTD: Final = Transport("pipelined+zstd", overlaps=True, compresses=True)
INPROCESS: Final = Transport("inprocess", sockets=False)

TRANSPORTS: Final[Mapping[str, Transport]] = {
    transport.name: transport for transport in (ZMQ, ZMQ_ZSTD, PIPELINED, PIPELINED_ZSTD, INPROCESS)
}


def transport(name: str) -> Transport:
    """The transport called ``name``. Raises ``ConfigError``."""
    return _look_up(TRANSPORTS, name, "transport")


@dataclass(frozen=True, slots=True)
class Privacy:
    """How values are hidden from the servers.

    ``hides``: whether it does. ``servers``: how many it takes that do not tell each other what they got (0: none at
    all, the runner computes). ``pads``: it uses up pads that were made ahead.
    """

    name: str
    hides: bool = True
    servers: int = 1
    pads: bool = False

    @property
    def checkable(self) -> bool:
        """Whether there is a server whose products could be wrong."""
        return self.servers > 0

    def plans(self, *, verified: bool) -> tuple[str, ...]:
        """The plans that it takes, with the products ``verified`` or not."""
        return tuple(name for name, row in PLANS.items() if not row.shows or not (self.hides or verified))


NO_PRIVACY: Final = Privacy("none", hides=False)
TWO_SERVER: Final = Privacy("two-server", servers=2)
PADS: Final = Privacy("pads", pads=True)
REFERENCE: Final = Privacy("reference", servers=0)

PRIVACY: Final[Mapping[str, Privacy]] = {mode.name: mode for mode in (NO_PRIVACY, TWO_SERVER, PADS, REFERENCE)}
"""From the weakest to the strongest: each assumes less than those before it."""


def privacy(name: str) -> Privacy:
    """The privacy mode called ``name``. Raises ``ConfigError``."""
    return _look_up(PRIVACY, name, "privacy mode")
