"""The user's keys: names ↔ files in ``$XDG_CONFIG_HOME/teegpu/keys``, and the keys that the settings mean.

``NAME.key`` is a secret key, ``NAME.pub`` the public one; a public key without a secret one is somebody else's, of a
server for example.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, nearest
from teegpu.files import expanded, user_folder
from transports import security
from transports.errors import BadKeyError
from transports.security import PUBLIC_SUFFIX, SECRET_SUFFIX, ClientKeys, KeyPair, PublicKey, ServerKeys

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Found:
    """A name in the folder of keys. ``fingerprint`` is empty where the key can't be used, and ``trouble`` says why."""

    name: str
    has_secret: bool
    fingerprint: str
    trouble: str


def folder() -> Path:
    """Where the user's keys are, whether it exists or not."""
    return user_folder("config") / "keys"


def new(name: str, *, replace: bool = False) -> KeyPair:
    """Makes a pair and keeps it. Raises ``ConfigError`` for a bad name, ``BadKeyError`` where it can't be written."""
    if not NAME.fullmatch(name) or name.endswith((PUBLIC_SUFFIX, SECRET_SUFFIX)):
        raise ConfigError(f"'{name}' is no name for a key: up to 100 letters, digits, '.', '_', '-' and '@'")
    pair = security.new_pair()
    security.write_pair(pair, public_path(name), secret_path(name), replace=replace)
    return pair


def public_path(name: str) -> Path:
    return folder() / (name + PUBLIC_SUFFIX)


def secret_path(name: str) -> Path:
    return folder() / (name + SECRET_SUFFIX)


def all_keys() -> list[Found]:
    """Every key of the folder, by name, those that can't be used included. Raises ``ConfigError`` where the folder
    can't be read."""
    try:
        files = [name for name in os.listdir(folder()) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        files = []
    except OSError as error:
        raise ConfigError(f"the keys in {folder()} can't be read: {error.strerror}") from None
    names = {name[:-4] for name in files if name.endswith((PUBLIC_SUFFIX, SECRET_SUFFIX))}
    return [_find(name) for name in sorted(names)]


def folder_trouble() -> str:
    """Why the folder itself is no place for secrets; empty where it is one, or is not there."""
    return security.unsafe(folder(), folder().stat()) if os.path.isdir(folder()) else ""


def _find(name: str) -> Found:
    """Secret and public file as they are, and whether they belong together."""
    has_secret = os.path.lexists(secret_path(name))
    troubles: list[str] = []
    fingerprints: list[str] = []
    if has_secret:
        try:
            fingerprints.append(security.read_secret(secret_path(name)).public.fingerprint)
        except BadKeyError as error:
            troubles.append(str(error))
    if os.path.lexists(public_path(name)) or not has_secret:
        try:
            fingerprints.append(security.read_public(public_path(name)).fingerprint)
        except BadKeyError as error:
            troubles.append(str(error))
    if len(set(fingerprints)) > 1:
        troubles.append(f"{public_path(name)} is not the public key of {secret_path(name)}: remove or rename one")
    return Found(name, has_secret, fingerprints[0] if fingerprints else "", "; ".join(troubles))


def public(name: str) -> PublicKey:
    """The public key ``name``; that of the pair where only the secret file is there. Raises ``ConfigError`` and
    ``BadKeyError``."""
    if os.path.lexists(public_path(name)) or not os.path.lexists(secret_path(name)):
        return _public(name, "keys show")
    return security.read_secret(secret_path(name)).public


# ---- what the settings mean


def client_keys(config: Config, endpoint: Endpoint | None = None) -> ClientKeys | None:
    """The keys of a connection to ``endpoint``; None where it has none, as with a run's own server: that listens in a
    folder which nobody else can enter.

    Raises ``ConfigError`` and ``BadKeyError``.
    """
    link = config.link
    if endpoint is None or not config.run.endpoints:
        return None
    wanted = endpoint.key or link.server_key
    if not wanted:
        if link.client_key:
            raise ConfigError(
                "link.client_key is set and link.server_key is not: a link is encrypted only where the server's public "
                "key is known, so set that too (run --server-key)"
            )
        return None
    if not link.client_key:
        raise ConfigError(
            "link.server_key is set and link.client_key is not: the server has to know who asks ('teegpu keys new "
            "NAME' makes a pair; then run --client-key NAME)"
        )
    where = "run.endpoints, key=" if endpoint.key else "link.server_key"
    return ClientKeys(_secret(link.client_key, "link.client_key"), _public(wanted, where))


def server_keys(config: Config) -> ServerKeys | None:
    """The keys of the server; None where it has none. Raises ``ConfigError`` and ``BadKeyError``."""
    server = config.server
    if not server.key:
        if server.auth_dir:
            raise ConfigError(
                "server.auth_dir is set and server.key is not: clients can be told apart only where the server has a "
                "key of its own ('teegpu keys new NAME' makes one; then serve --key NAME)"
            )
        return None
    clients = expanded(server.auth_dir, "server.auth_dir") if server.auth_dir else None
    return ServerKeys(_secret(server.key, "server.key"), clients)


def _secret(value: str, setting: str) -> KeyPair:
    if security.is_key_text(value):
        raise ConfigError(
            f"{setting} is a key itself: a secret key belongs into a file of its own, and the file's name here"
        )
    path = _path(value, setting, secret_path, SECRET_SUFFIX)
    try:
        return security.read_secret(path)
    except BadKeyError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _public(value: str, setting: str) -> PublicKey:
    try:
        if security.is_key_text(value):
            return security.parse_public(value, setting)
        return security.read_public(_path(value, setting, public_path, PUBLIC_SUFFIX))
    except BadKeyError as error:
        raise ConfigError(str(error) if str(error).startswith(setting) else f"{setting}: {error}") from None


def _path(value: str, setting: str, path_of: Callable[[str], Path], suffix: str) -> Path:
    """The file that ``value`` means: a path where it has a slash, else a name."""
    if "/" in value:
        return expanded(value, setting)
    path = path_of(value.removesuffix(suffix))
    if not os.path.lexists(path):
        known = [found.name for found in all_keys() if os.path.lexists(path_of(found.name))]
        raise ConfigError(
            f"{setting}: there is no key '{value}' in {folder()}{nearest(value, known)} ('teegpu keys list' shows "
            "those that there are; a file is given with its path)"
        )
    return path
