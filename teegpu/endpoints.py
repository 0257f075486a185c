"""Endpoints of GPU servers as ``run.endpoints`` writes them: ``tcp://host:port#layers=A-B,key=NAME,share=1``, or
``@/path/to/file.json#key=NAME`` for those that a file lists. ``operator=NAME`` says who runs a server;
``evidence=FILE`` and ``policy=FILE`` are to show a TEE behind its key. Syntax and the cover of the model's layers only;
whether an address can be used is for the transports to say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from teegpu import files
from teegpu.errors import ConfigError, nearest

Layers = tuple[int, int]
"""The first and the last layer of a range, both within it."""

_OPTIONS = ("layers", "key", "share", "operator", "evidence", "policy")
_SHARES = ("1", "2")
FORMAT = "teegpu.endpoints/1"
_MOST_BYTES = 1 << 20
_LAYERS = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: its address, the layers that it is to compute (None: all), the name of its public key (empty:
    ``link.server_key``), which of two shares it gets (0: not said), and who runs it. ``evidence`` and ``policy`` are
    files: evidence that its key is a TEE's, and what judges that."""

    address: str
    layers: Layers | None = None
    key: str = ""
    share: int = 0
    operator: str = ""
    evidence: str = ""
    policy: str = ""

    def __str__(self) -> str:
        options = [] if self.layers is None else [f"layers={self.layers[0]}-{self.layers[1]}"]
        if self.key:
            options.append(f"key={self.key}")
        if self.share:
            options.append(f"share={self.share}")
        who = {"operator": self.operator, "evidence": self.evidence, "policy": self.policy}
        options += [f"{name}={value}" for name, value in who.items() if value]
        return self.address + ("#" + ",".join(options) if options else "")


def parse(text: str) -> Endpoint:
    """The endpoint that ``text`` describes. Raises ``ConfigError``."""
    address, mark, rest = text.strip().partition("#")
    if "://" not in address:
        raise ConfigError(
            f"run.endpoints: '{text}' is not an address: write tcp://host:port or ipc:///path, and after a '#' "
            "layers=A-B, key=NAME or share=1; or @FILE, which lists such endpoints"
        )
    return _parse(text, address, rest if mark else None)


def _parse(text: str, address: str, rest: str | None) -> Endpoint:
    """``rest``: what stands after a '#', which may be missing."""
    given: dict[str, str] = {}
    for part in () if rest is None else rest.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in _OPTIONS:
            raise ConfigError(
                f"run.endpoints: '{text}': unknown option '{name}'{nearest(name, list(_OPTIONS))}; after the '#' come "
                f"{', '.join(f'{option}=…' for option in _OPTIONS)}, with a comma between them"
            )
        if name in given or not value:
            raise ConfigError(f"run.endpoints: '{text}': {name}= is {'there twice' if name in given else 'empty'}")
        given[name] = value
    share = given.get("share", "0")
    if "share" in given and share not in _SHARES:
        raise ConfigError(f"run.endpoints: '{text}': share={share} is neither share=1 nor share=2")
    layers = _layers(given["layers"], text) if "layers" in given else None
    who = {name: given.get(name, "") for name in ("operator", "evidence", "policy")}
    if not all(each.isprintable() for each in who.values()):
        raise ConfigError(f"run.endpoints: '{text}': there is a sign in it that nobody can read")
    if bool(who["evidence"]) != bool(who["policy"]) or (who["evidence"] and "key" not in given):
        raise ConfigError(
            f"run.endpoints: '{text}': evidence= and policy= go together, and with the key= that they are of"
        )
    return Endpoint(address, layers, given.get("key", ""), int(share), **who)


def _layers(value: str, text: str) -> Layers:
    match = _LAYERS.fullmatch(value)
    if match is None:
        raise ConfigError(
            f"run.endpoints: '{text}': layers={value} is not a range: write the first and the last one, as in "
            "layers=0-10"
        )
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ConfigError(f"run.endpoints: '{text}': layers={value} begins after its end")
    return first, last


def file_of(text: str) -> Path | None:
    """The file that lists endpoints, where ``text`` names one."""
    address = text.strip().partition("#")[0]
    return files.expanded(address[1:], "run.endpoints") if address.startswith("@") else None


def _listed(text: str) -> list[Endpoint]:
    """``text``'s endpoint, or those in its file with what stands after its '#'. Raises ``ConfigError``."""
    path = file_of(text)
    if path is None:
        return [parse(text)]
    address, mark, rest = text.strip().partition("#")
    given = _parse(text, address, rest if mark else None)
    found = []
    for entry in _read(path):
        endpoint = parse(entry)
        if endpoint.share:
            # Who writes the file would decide which servers get both shares.
            raise ConfigError(
                f"{path}: '{entry}': a file has the servers of one operator, so share= stands outside of it: "
                f"@{path}#share={endpoint.share}, and the other operator's in a file of its own"
            )
        found.append(
            replace(
                endpoint,
                layers=endpoint.layers or given.layers,
                # Nor does it decide whom to believe, where the settings say it.
                key=given.key or endpoint.key,
                share=given.share,
                operator=given.operator or endpoint.operator,
                evidence=given.evidence or endpoint.evidence,
                policy=given.policy or endpoint.policy,
            )
        )
    return found


def _read(path: Path) -> list[str]:
    """The lines of endpoints in the file ``path``. Raises ``ConfigError``."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"run.endpoints: {path}: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(
            f"run.endpoints: {path} has more than {_MOST_BYTES >> 20} MiB: no list of endpoints is as long"
        )
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ConfigError(f"run.endpoints: {path} is no JSON: it is damaged, or half written") from None
    entries = value.get("endpoints") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(
            f'run.endpoints: {path} is no list of endpoints: write {{"format": "{FORMAT}", "endpoints": '
            '["tcp://host:port", …]}'
        )
    if not entries:
        raise ConfigError(f"run.endpoints: {path} lists no server")
    return entries


def write(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Puts a file of ``endpoints`` in the place of ``path``: who follows it reads the old one or the new one. Raises
    ``ValueError`` for what no such file may have, and ``OSError``."""
    if not endpoints or any(endpoint.share for endpoint in endpoints):
        raise ValueError("a file lists servers, and those of one operator: share= stands outside of it")
    document = {"format": FORMAT, "endpoints": [str(endpoint) for endpoint in endpoints]}
    files.replace(path, json.dumps(document, indent=2) + "\n", mode=0o644)


def parse_all(texts: Sequence[str]) -> list[Endpoint]:
    """The endpoints of all ``texts``, in order, those in files among them. Raises ``ConfigError``, also where one is
    there twice."""
    endpoints = [endpoint for text in texts for endpoint in _listed(text)]
    for number, endpoint in enumerate(endpoints):
        if any((endpoint.address, endpoint.layers) == (other.address, other.layers) for other in endpoints[:number]):
            raise ConfigError(f"run.endpoints: '{endpoint}' is there twice")
    return endpoints


def ranges(endpoints: Sequence[Endpoint], layers: int) -> list[Layers]:
    """The ranges into which ``endpoints`` cut a model of ``layers`` layers, in the model's order.

    Several endpoints may have the same range: one stands in for the other. Raises ``ConfigError`` for a gap, and for
    ranges that overlap without being the same.
    """
    found = sorted({endpoint.layers or (0, layers - 1) for endpoint in endpoints})
    expected = 0
    for first, last in found:
        if first > expected:
            raise ConfigError(f"run.endpoints: no server for {_named(expected, first - 1)} of the model's {layers}")
        if first < expected:
            raise ConfigError(
                f"run.endpoints: {_named(first, min(expected - 1, last))} would be on servers whose ranges differ: let "
                "ranges be the same (one stands in for the other) or apart"
            )
        if last >= layers:
            raise ConfigError(f"run.endpoints: layers={first}-{last}, and the model's layers end at {layers - 1}")
        expected = last + 1
    if expected < layers:
        raise ConfigError(f"run.endpoints: no server for {_named(expected, layers - 1)} of the model's {layers}")
    return found


def _named(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"
