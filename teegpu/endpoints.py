"""Endpoints of GPU servers as ``run.endpoints`` writes them: ``tcp://host:port#layers=A-B,key=NAME,share=1``. Syntax
and the cover of the model's layers only; whether an address can be used is for the transports to say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from teegpu.errors import ConfigError, nearest

Layers = tuple[int, int]
"""The first and the last layer of a range, both within it."""

_OPTIONS = ("layers", "key", "share")
_SHARES = ("1", "2")
_LAYERS = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: its address, the layers that it is to compute (None: all), the name of its public key (empty:
    ``link.server_key``), and which of two shares it gets (0: not said)."""

    address: str
    layers: Layers | None = None
    key: str = ""
    share: int = 0

    def __str__(self) -> str:
        options = [] if self.layers is None else [f"layers={self.layers[0]}-{self.layers[1]}"]
        if self.key:
            options.append(f"key={self.key}")
        if self.share:
            options.append(f"share={self.share}")
        return self.address + ("#" + ",".join(options) if options else "")


def parse(text: str) -> Endpoint:
    """The endpoint that ``text`` describes. Raises ``ConfigError``."""
    address, mark, rest = text.strip().partition("#")
    if "://" not in address:
        raise ConfigError(
            f"run.endpoints: '{text}' is not an address: write tcp://host:port or ipc:///path, and after a '#' "
            "layers=A-B, key=NAME or share=1"
        )
    given: dict[str, str] = {}
    for part in rest.split(",") if mark else ():
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
    return Endpoint(address, layers, given.get("key", ""), int(share))


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


def parse_all(texts: Sequence[str]) -> list[Endpoint]:
    """``parse`` of each, in order. Raises ``ConfigError``, also where one stands there twice."""
    endpoints = [parse(text) for text in texts]
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
