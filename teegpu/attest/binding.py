"""What evidence speaks for: the 64 bytes that a TEE has its processor sign, and their preimage. Pure.

A quote by itself says that some program runs in some TEE. It speaks for a connection because what is signed has the
digest of that connection's key, the asker's nonce, and the settings that decide what is private."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from teegpu.errors import EvidenceError

DOMAIN: Final = b"teegpu-attest/1"

ENDPOINT: Final = "endpoint"
"""The role of who answers applications; its key is that of TLS."""

SERVER: Final = "gpu-server"
"""The role of a GPU server; its key is that of its links, an X25519 key."""

ROLES: Final = (ENDPOINT, SERVER)

SETTINGS: Final = ("privacy", "verify", "model", "version")
"""What decides whether a prompt is safe with an endpoint: ``privacy`` is ``local`` where no GPU server takes part, else
the mode of ``run.privacy``; ``verify`` is ``on`` or ``off``; ``model`` is the model's digest."""

NONCE_BYTES: Final = 32
MAX_VALUE: Final = 200
"""Characters of a value of a setting."""

_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)
_MIN_NONCE_BYTES, _MAX_NONCE_BYTES = 16, 64


@dataclass(frozen=True)
class Binding:
    """The preimage. ``key`` is the SHA-256 of a public key, ``nonce`` is the asker's; ``settings`` has ``SETTINGS`` for
    an endpoint, and nothing for a GPU server, which keeps nothing secret from its operator."""

    role: str
    key: bytes
    nonce: bytes
    settings: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise EvidenceError(f"the evidence is for the role {self.role!r}, which is none of {', '.join(ROLES)}")
        if len(self.key) != 32:
            raise EvidenceError(f"the evidence's key is a digest of {len(self.key)} bytes, not of 32")
        if not _MIN_NONCE_BYTES <= len(self.nonce) <= _MAX_NONCE_BYTES:
            raise EvidenceError(
                f"a nonce has {_MIN_NONCE_BYTES} to {_MAX_NONCE_BYTES} bytes, as hexadecimal digits; this one has "
                f"{len(self.nonce)}"
            )
        wanted = SETTINGS if self.role == ENDPOINT else ()
        if set(self.settings) != set(wanted):
            raise EvidenceError(f"the evidence's settings are not {', '.join(wanted) or 'empty'}")
        if any(not isinstance(each, str) or len(each) > MAX_VALUE for each in self.settings.values()):
            raise EvidenceError("a setting of the evidence is no text, or longer than any that there is")

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that are signed. Each part stands behind its length, so that no two preimages are the same
        bytes."""
        settings = json.dumps(dict(self.settings), sort_keys=True, separators=(",", ":")).encode()
        found = hashlib.sha512(DOMAIN)
        for part in (self.role.encode(), self.key, self.nonce, hashlib.sha256(settings).digest()):
            found.update(len(part).to_bytes(4, "big"))
            found.update(part)
        return found.digest()

    def to_json(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "key": self.key.hex(),
            "nonce": self.nonce.hex(),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, raw: Any) -> Binding:
        """Raises ``EvidenceError``."""
        if not isinstance(raw, dict) or set(raw) != {"role", "key", "nonce", "settings"}:
            raise EvidenceError("the evidence's binding is not role, key, nonce and settings")
        if not isinstance(raw["role"], str) or not isinstance(raw["settings"], dict):
            raise EvidenceError("the evidence's binding has a role or settings of another kind")
        return cls(raw["role"], unhex(raw["key"], "key"), unhex(raw["nonce"], "nonce"), raw["settings"])


def unhex(text: object, what: str) -> bytes:
    """The bytes that lower-case hexadecimal digits say. Raises ``EvidenceError``."""
    if not isinstance(text, str) or len(text) > 2 * _MAX_NONCE_BYTES or not _HEX.fullmatch(text):
        raise EvidenceError(f"the {what} is not in hexadecimal digits of lower case")
    return bytes.fromhex(text)
