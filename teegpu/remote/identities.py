"""Who a run's servers are said to be: by whom they are run, and what each proves of that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError
from teegpu.options import client_options

PINNED: Final = "pinned"
ATTESTED: Final = "attested"


@dataclass(frozen=True)
class Identity:
    """Of the server at ``address``. ``key`` is the fingerprint of the key that it must prove to have, or empty;
    ``proof`` is empty without one, ``pinned``, or ``attested`` and by which kind of TEE."""

    address: str
    operator: str
    share: int
    key: str
    proof: str

    def __str__(self) -> str:
        key = f"key {self.key}" if self.key else "no key"
        return ", ".join([key, *([f"operator {self.operator}"] if self.operator else []),
                          *([self.proof] if self.proof.startswith(ATTESTED) else [])])  # fmt: skip


def proves(identity: Identity) -> int:
    """How much a server proves of itself: the more, the higher."""
    return bool(identity.proof) + identity.proof.startswith(ATTESTED)


def identify(config: Config, endpoints: Sequence[Endpoint]) -> list[Identity]:
    """One for each of ``endpoints``. Raises ``ConfigError`` for keys and files that can't be used, ``EvidenceError``
    and ``AttestationError`` where evidence does not hold."""
    found = []
    for endpoint in endpoints:
        keys = client_options(config, endpoint).keys
        proof = "" if keys is None else PINNED
        if keys is not None and endpoint.evidence:
            proof = f"{ATTESTED}: {_attested(endpoint, keys.server.raw)}"
        key = "" if keys is None else keys.server.fingerprint
        found.append(Identity(endpoint.address, endpoint.operator, endpoint.share, key, proof))
    return found


def _attested(endpoint: Endpoint, key: bytes) -> str:
    """The kind of TEE that ``key`` is proved to be in."""
    # Most runs have no evidence to judge, and start sooner without what that takes.
    from teegpu.attest.binding import SERVER
    from teegpu.attest.evidence import Evidence, read_json
    from teegpu.attest.policy import Policy
    from teegpu.attest.verify import VENDORS, Wanted, judge

    try:
        evidence = Evidence.from_json(read_json(Path(endpoint.evidence).read_bytes()))
    except OSError as error:
        raise ConfigError(f"run.endpoints: evidence={endpoint.evidence} can't be read: {error.strerror}") from None
    wanted = Wanted(SERVER, hashlib.sha256(key).digest(), None)
    judge(evidence, Policy.read(Path(endpoint.policy)), wanted, int(time.time()), roots=VENDORS)
    return evidence.kind
