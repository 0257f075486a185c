"""The file of ``run.operators``: who runs the GPU servers, and by which key each is known. For a person to read.

    [[operator]]
    name = "Alpha"
    share = 1
    servers = ["tcp://gpu.alpha.example:5555"]
    key = "its public key, as 'teegpu keys show' prints it"

Each server becomes an endpoint of ``run.endpoints``. An operator may also give ``evidence`` that a TEE of his speaks
for the key, which is judged by ``policy``; both are files, beside this one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

from teegpu.endpoints import Endpoint, parse
from teegpu.errors import ConfigError, nearest

_NEEDED: Final = ("name", "servers", "key")
_KNOWN: Final = (*_NEEDED, "share", "evidence", "policy")


def read(path: Path) -> tuple[str, ...]:
    """The endpoints that the file describes, as ``run.endpoints`` has them. Raises ``ConfigError``."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"run.operators: {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"run.operators: {path} is not a valid TOML file: {error}") from None
    listed = document.pop("operator", None)
    if document or not isinstance(listed, list) or not listed:
        raise ConfigError(f"run.operators: {path} is a list of [[operator]], and nothing else")
    found: list[str] = []
    names: set[str] = set()
    for number, raw in enumerate(listed, 1):
        each = _checked(raw, f"run.operators: {path}: operator {number}")
        if each["name"] in names:
            raise ConfigError(f"run.operators: {path}: operator '{each['name']}' is there twice")
        names.add(each["name"])
        found += [_endpoint(server, each, path) for server in each["servers"]]
    return tuple(found)


def _checked(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is no table")
    for name, value in raw.items():
        if name not in _KNOWN:
            raise ConfigError(f"{where}: unknown key '{name}'{nearest(name, list(_KNOWN))}")
        kind = {"servers": list, "share": int}.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool) or not value:
            raise ConfigError(f"{where}: {name} is not {'a list' if kind is list else 'what it should be'}")
        if isinstance(value, str) and (not value.isprintable() or "," in value or value != value.strip()):
            raise ConfigError(f"{where}: {name} has a comma in it, or a sign that nobody can read")
    if missing := next((name for name in _NEEDED if name not in raw), None):
        raise ConfigError(f"{where}: there is no {missing}")
    if not all(isinstance(server, str) for server in raw["servers"]):
        raise ConfigError(f"{where}: servers is a list of addresses")
    return raw


def _endpoint(server: str, operator: dict[str, Any], path: Path) -> str:
    """One server of ``operator``; the layers that it has stand behind its address."""
    known = parse(server)
    files = {name: str(path.parent / operator[name]) for name in ("evidence", "policy") if name in operator}
    made = Endpoint(known.address, known.layers, operator["key"], operator.get("share", 0), operator["name"], **files)
    where = f"run.operators: {path}: operator '{operator['name']}'"
    if str(known) != str(Endpoint(known.address, known.layers)):
        raise ConfigError(f"{where}: '{server}' has more than layers= behind its address")
    if parse(str(made)) != made:
        raise ConfigError(f"{where}: the folder of the file has a comma in its name")
    return str(made)
