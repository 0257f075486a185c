"""Which servers a shielded run may use, and what they must not be.

With two servers privacy rests on their not being the same: whoever has a share and the seed of the other has the
values. Nobody can prove that two servers don't talk to each other, but what is visibly one server is refused: by
address and by key before anything is sent, by the instance that each says it is whenever a connection is made, so also
where an address is answered by another server in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teegpu import facts
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, ShieldError
from teegpu.options import client_options
from transports import addresses

if TYPE_CHECKING:
    from teegpu.remote.connections import Handshake
    from teegpu.wire.messages import Welcome
    from transports.base import Reply


@dataclass(frozen=True)
class Side:
    """The endpoints that stand in for each other. ``share``: which share they get, 1 or 2, or 0 where there are none;
    ``indices`` are the endpoints' places in the settings."""

    share: int
    endpoints: tuple[Endpoint, ...]
    indices: tuple[int, ...]


def divide(privacy: str, endpoints: Sequence[Endpoint]) -> list[Side]:
    """The sides of a run: two where ``privacy`` is ``two-server``, else one. Raises ``ConfigError``."""
    shares = [endpoint.share for endpoint in endpoints]
    if privacy != facts.TWO_SERVER.name:
        if any(shares):
            raise ConfigError(
                f"run.endpoints: '{next(each for each in endpoints if each.share)}': shares are for run.privacy = "
                f"{facts.TWO_SERVER.name}, and it is {privacy}"
            )
        return [Side(0, tuple(endpoints), tuple(range(len(endpoints))))]
    if not any(shares) and len(endpoints) == 2:
        shares = [1, 2]
    if not all(shares) or set(shares) != {1, 2}:
        raise ConfigError(
            f"run.privacy = {facts.TWO_SERVER.name} takes two endpoints, of which the first gets one share and the "
            f"second the other, or more that are each marked #share=1 or #share=2; run.endpoints has {len(endpoints)}"
            f"{', marked in part' if any(shares) and not all(shares) else ''}"
        )
    return [
        Side(
            share,
            tuple(each for each, marked in zip(endpoints, shares, strict=True) if marked == share),
            tuple(index for index, marked in enumerate(shares) if marked == share),
        )
        for share in (1, 2)
    ]


def check_apart(config: Config, sides: Sequence[Side]) -> list[str]:
    """What a user should know of ``sides`` that are not well apart, in lines. Raises ``ShieldError`` where two of them
    share an address or a key, and for a link without keys that others can reach, unless ``link.insecure`` is set."""
    if len(sides) != 2:
        return []
    first, second = sides
    lines = []
    for one in first.endpoints:
        for other in second.endpoints:
            host, other_host = _host(one), _host(other)
            if (host, _port(one)) == (other_host, _port(other)):
                raise ShieldError(
                    f"{one.address} and {other.address} are one server, and it would get both shares, which is all "
                    f"that it needs to read them: run.privacy = {facts.TWO_SERVER.name} takes servers of two operators"
                )
            if one.operator and one.operator == other.operator:
                raise ShieldError(
                    f"{one.address} and {other.address} are both run by '{one.operator}', who would have both shares: "
                    f"run.privacy = {facts.TWO_SERVER.name} takes servers of two operators"
                )
            if _key(config, one) is not None and _key(config, one) == _key(config, other):
                raise ShieldError(
                    f"{one.address} and {other.address} are to prove the same key, so they are one server or share its "
                    "secrets: give each its own with #key=NAME in run.endpoints"
                )
            if host == other_host or not host or not other_host:
                lines.append(
                    f"{one.address} and {other.address} are on one machine: who runs it can put the two shares "
                    "together and read everything"
                )
    for each in (*first.endpoints, *second.endpoints):
        if is_open(config, each):
            told = f"the link to {each.address} has no keys, and who can read both links has both shares"
            if not config.link.insecure:
                raise ShieldError(
                    f"{told}: give --client-key NAME and '#key=NAME' after each endpoint, or accept it with --insecure"
                )
            lines.append(f"warning: --insecure: {told}")
    return lines


def is_open(config: Config, endpoint: Endpoint) -> bool:
    """Whether others can be on the way to ``endpoint``, and no keys keep them out."""
    return not (endpoint.key or config.link.server_key or addresses.is_local(endpoint.address))


def _host(endpoint: Endpoint) -> str:
    """The machine of ``endpoint`` by name; empty for this one."""
    address = addresses.parse(endpoint.address)
    return "" if address.local else address.host.lower()


def _port(endpoint: Endpoint) -> tuple[str, int]:
    address = addresses.parse(endpoint.address)
    return (address.path, address.port)


def _key(config: Config, endpoint: Endpoint) -> str | None:
    keys = client_options(config, endpoint).keys
    return None if keys is None else str(keys.server)


class Instances:
    """Which servers have been met on which side of a run. One that was met on one is never taken on the other."""

    def __init__(self) -> None:
        self._sides: dict[str, tuple[int, str]] = {}

    def meet(self, share: int, instance: str, address: str) -> None:
        """Raises ``ShieldError`` where ``instance`` was met on the other side."""
        known, where = self._sides.setdefault(instance, (share, address))
        if known != share:
            raise ShieldError(
                f"the server that answers at {address} is the one that answers at {where}, and it would get both "
                "shares, which is all that it needs to read them: look at where these addresses lead"
            )


class ApartHandshake:
    """Says hello to the servers of one side as ``handshake`` does, and checks that they are not those of the other."""

    def __init__(self, handshake: Handshake, share: int, instances: Instances) -> None:
        self.message = handshake.message
        self._handshake = handshake
        self._share = share
        self._instances = instances

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome:
        """Who answered. Raises what ``handshake`` does, and ``ShieldError``."""
        welcome = self._handshake.check(reply, endpoint)
        self._instances.meet(self._share, welcome.instance, endpoint.address)
        return welcome
