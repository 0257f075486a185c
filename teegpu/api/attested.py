"""What the endpoint proves of itself: where it can, under which key, and with which settings."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

from teegpu import __version__, facts, machine
from teegpu.api.errors import ApiError
from teegpu.attest import collateral, identity, sources
from teegpu.attest.binding import ENDPOINT, Binding, unhex
from teegpu.attest.evidence import FORMAT, Collateral
from teegpu.attest.identity import Identity
from teegpu.attest.sources import Source
from teegpu.config import Config
from teegpu.errors import ConfigError, EvidenceError
from teegpu.files import expanded
from teegpu.options import verified
from teegpu.runner import Runner

AUTO: Final = "auto"
OFF: Final = "off"
SIMULATED: Final = "simulated"

_WAITING: Final = 16
"""Who may wait for evidence at once: it needs no key, and takes the processor some milliseconds."""


@dataclass(frozen=True)
class Attesting:
    """``source`` None: nothing is attested, for the ``reason``; else it gives evidence, which ``reason`` says in words.
    ``identity`` is the TLS key that was made for that; it stays where evidence could not be had in the end."""

    reason: str
    source: Source | None = None
    identity: Identity | None = None
    collateral: Collateral = field(default_factory=Collateral)

    @property
    def genuine(self) -> bool:
        """Whether there is a TEE behind it."""
        return self.source is not None and not isinstance(self.source, sources.Simulated)


def wanted(settings: Config) -> bool:
    """Whether a TLS key is made to be attested. Raises ``ConfigError`` where it is to be, and can't be."""
    return _source(settings)[0] is not None


def choose(settings: Config) -> Attesting:
    """What ``api.attest`` comes to here. Raises ``ConfigError`` and ``EvidenceError`` where evidence is required, and
    can't be had."""
    source, reason = _source(settings)
    if source is None:
        return Attesting(reason)
    given = settings.api.collateral
    beside = collateral.read(expanded(given, "api.collateral")) if given else Collateral()
    try:
        kind = source.quote(secrets.token_bytes(64)).kind  # what does not work is told at the start
    except EvidenceError as error:
        if settings.api.attest != AUTO:
            raise
        return Attesting(f"no evidence can be had: {error}", identity=identity.new())
    words = f"{kind} by {source.describe}" if kind != SIMULATED else "SIMULATED, which proves nothing"
    return Attesting(words, source, identity.new(), beside)


def _source(settings: Config) -> tuple[Source | None, str]:
    """Where evidence comes from; where it does not, why."""
    api = settings.api
    if api.attest == OFF:
        return None, "api.attest is off"
    source = sources.Simulated() if api.attest == SIMULATED else sources.find()
    if api.tls_cert or api.tls_key:
        obstacle = "the TLS key is in a file, which whoever owns the disk has: leave api.tls_cert and api.tls_key out"
    elif api.listen.startswith("unix:"):
        obstacle = "evidence speaks for a TLS key, and a unix socket has none: give api.listen a host and port"
    elif source is None:
        obstacle = f"none: {machine.tee().note}"
    else:
        return source, ""
    if api.attest == AUTO:
        return None, obstacle
    raise ConfigError(f"api.attest is {api.attest}, and nothing can be attested: {obstacle}")


def settings_of(runner: Runner) -> dict[str, str]:
    """What of the settings decides whether a prompt is safe here, as ``attest.binding.SETTINGS`` names it."""
    mode = runner.config.run.privacy
    local = mode == facts.REFERENCE.name or not (runner.prefill_plan.remote or runner.decode_plan.remote)
    return {
        "privacy": "local" if local else mode,
        "verify": "on" if local or verified(runner.config) else "off",
        "model": runner.model_digest,
        "version": __version__,
    }


class Attester:
    """Gives evidence for one connection's question at a time."""

    def __init__(self, attesting: Attesting) -> None:
        self._attesting = attesting
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def answer(self, nonce: str, settings: dict[str, str]) -> dict[str, Any]:
        """The document for who asks with ``nonce`` (hexadecimal). Raises ``ApiError``."""
        attesting = self._attesting
        if attesting.source is None or attesting.identity is None:
            return {"format": FORMAT, "kind": "none", "note": attesting.reason}
        try:
            binding = Binding(ENDPOINT, attesting.identity.key, unhex(nonce, "nonce"), settings)
        except EvidenceError as error:
            raise ApiError(400, str(error), param="nonce") from None
        if self._waiting >= _WAITING:
            raise ApiError(429, "many ask for evidence at once: try again later", code="attestation_busy")
        self._waiting += 1
        try:
            async with self._lock:
                made = await asyncio.to_thread(sources.evidence, attesting.source, binding, attesting.collateral)
        except EvidenceError as error:
            raise ApiError(503, str(error), code="no_evidence") from None
        finally:
            self._waiting -= 1
        return made.to_json()
