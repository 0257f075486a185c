"""What decides an answer has one digest: that of a list of digests, one for each file beside the weights, one of all
weights, and one of the dimensions that were made of the configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from teegpu.errors import ModelError
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import ModelSpec

WEIGHTS, SPEC = "weights", "spec"
"""The entries that are no file's."""


def manifest(folder: ModelFolder, spec: ModelSpec, weights_digest: str) -> dict[str, str]:
    """SHA-256 of every part of the model by its name, in the names' order; of the pinned ``folder``, those bytes that
    are used. ``weights_digest``: ``WeightStore.digest``. Raises ``ModelError``."""
    parts = {name: hashlib.sha256(content).hexdigest() for name, content in (folder.pinned().files or {}).items()}
    parts |= {WEIGHTS: weights_digest, SPEC: hashlib.sha256(spec.canonical().encode()).hexdigest()}
    return dict(sorted(parts.items()))


def digest_of(parts: Mapping[str, str]) -> str:
    """Hex SHA-256 of a manifest as ``sha256sum`` would write it: a line for each part, in the names' order."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(parts.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def check_pin(folder: ModelFolder, spec: ModelSpec, weights_digest: str, pin: str) -> str:
    """The model's digest. Raises ``ModelError`` where ``pin`` (the setting ``model.digest``) is another one."""
    found = digest_of(manifest(folder, spec, weights_digest))
    if pin and found != pin:
        raise ModelError(
            f"model '{folder.name}' has the digest {found}, and model.digest asks for {pin}: nothing was computed or "
            f"sent; 'teegpu model info {folder.name} --json' lists what it is made of"
        )
    return found
