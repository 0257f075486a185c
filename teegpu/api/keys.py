"""API keys: a file of their SHA-256 digests, a line each, as ``sha256sum`` writes them. The keys themselves are kept
nowhere."""

from __future__ import annotations

import hashlib
import hmac
import re

from teegpu.errors import ConfigError
from teegpu.files import expanded

_LINE = re.compile(r"([0-9a-fA-F]{64})(\s.*)?")


class ApiKeys:
    """Raises ``ConfigError`` for a file that can't be read, or has another line than a digest of a key."""

    def __init__(self, path: str) -> None:
        try:
            lines = expanded(path, "api.keys").read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api.keys: {path} can't be read ({error})") from None
        self._digests: list[bytes] = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise ConfigError(
                    f"api.keys: line {number} of {path} does not begin with a SHA-256 digest: make one with "
                    "printf %s KEY | sha256sum"
                )
            digest = bytes.fromhex(found[1])
            if digest == hashlib.sha256(b"").digest():
                raise ConfigError(
                    f"api.keys: line {number} of {path} is the digest of an empty key, which lets everybody "
                    "in: make it anew, of a KEY that is set"
                )
            self._digests.append(digest)
        if not self._digests:
            raise ConfigError(f"api.keys: {path} has no digest, so that nobody could use this endpoint")

    def whose(self, authorization: str) -> str | None:
        """The name under which the one with this ``Authorization`` header (read as Latin-1) is known here: the digest
        of its key, or None where there is no such key. It takes as long for all."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip(" \t").encode("latin-1")).digest()
        known = False
        for each in self._digests:
            known |= hmac.compare_digest(each, digest)
        return digest.hex() if known and scheme.lower() == "bearer" else None
