"""The profile of a model on a machine over a link: what ``teegpu tune`` measured, kept for later runs.

    <state>/profiles/<key>.json        the key: endpoints, emulated link, model digest

It holds predictions: for each way to run a phase, the seconds at several lengths. Only its user may read it. A file
that is there but was made on another machine, by another version or of another model is refused with the command that
renews it; so is one whose server computes differently now.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from teegpu import __version__, files, machine
from teegpu.errors import ConfigError

SCHEMA: Final = "teegpu.profile/2"

FAR: Final = 2.0
"""Nothing is said of a prompt that is more than so many times longer than the longest that was measured."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run a phase: a plan, and for prefill the tokens of a chunk at most (decode: 0). ``seconds`` of the
    prompt, or of one step."""

    plan: str
    chunk_tokens: int
    seconds: float = math.nan


@dataclass(frozen=True, slots=True)
class Measured:
    """What ways take over one transport and in one wire dtype: of ``phase``, a prompt of ``tokens`` or a step of decode
    at that position."""

    phase: str
    transport: str
    wire_dtype: str
    tokens: int
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Server:
    """What the server said of itself: a profile is of this one."""

    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Profile:
    """``measured`` are those of ``model`` (its name) with ``digest``, run by ``runner_threads`` here and ``server``
    behind ``endpoints`` and ``link`` (an emulated one, or empty). No endpoint: the server was embedded."""

    endpoints: tuple[str, ...]
    link: str
    model: str
    digest: str
    machine: Mapping[str, Any]
    version: str
    runner_threads: int
    server: Server
    created_at: str
    measured: tuple[Measured, ...]

    @property
    def command(self) -> str:
        """What measures it again."""
        return renewal(self.endpoints, self.link, self.model)

    def ways(self, phase: str, transport: str, wire_dtype: str, tokens: int) -> list[Way]:
        """What each way takes at ``tokens``, quickest first: in a straight line between the lengths that were measured.
        Empty where that transport or wire dtype was not measured, or the prompt is far longer."""
        known = sorted(
            (
                row
                for row in self.measured
                if (row.phase, row.transport, row.wire_dtype) == (phase, transport, wire_dtype)
            ),
            key=lambda row: row.tokens,
        )
        if not known or tokens > known[-1].tokens * FAR:
            return []
        points: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in known:
            for way in row.ways:
                points.setdefault((way.plan, way.chunk_tokens), []).append((row.tokens, way.seconds))
        found = [Way(plan, chunk, _between(line, tokens)) for (plan, chunk), line in points.items()]
        return sorted(found, key=lambda way: way.seconds)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """What ``to_json`` gave. Raises ``ValueError`` for anything else."""
        if (schema := value.get("schema") if isinstance(value, Mapping) else None) != SCHEMA:
            raise ValueError(f"it is of schema {schema!r}, and this version reads {SCHEMA}")
        try:
            server = value["server"]
            return cls(
                tuple(map(str, value["endpoints"])),
                str(value["link"]),
                str(value["model"]),
                str(value["digest"]),
                dict(value["machine"]),
                str(value["version"]),
                int(value["runner_threads"]),
                Server(str(server["device"]), str(server["dtype"]), int(server["threads"])),
                str(value["created_at"]),
                tuple(_measured(row) for row in value["measured"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is damaged ({error!r})") from None

    def misfit(self, *, digest: str, runner_threads: int = 0, server: Server | None = None) -> str:
        """Why it does not hold for this machine, this version, this model and ``server``; empty where it does."""
        if self.digest != digest:
            return f"it is of another model ({self.model}, digest {self.digest[:12]})"
        if dict(self.machine) != fingerprint():
            return f"it was made on another machine ({self.machine.get('cpu')}, {self.machine.get('cores')} cores)"
        if self.version != __version__:
            return f"it was made by teegpu {self.version}, and this is {__version__}"
        if runner_threads and self.runner_threads != runner_threads:
            return f"the runner had {self.runner_threads} threads then, and has {runner_threads} now"
        if server is not None and server != self.server:
            then, now = (f"{each.dtype} on {each.device} with {each.threads} threads" for each in (self.server, server))
            return f"the server computed in {then}, and does in {now} now"
        return ""


def _measured(value: Mapping[str, Any]) -> Measured:
    ways = tuple(Way(str(way["plan"]), int(way["chunk_tokens"]), _seconds(way["seconds"])) for way in value["ways"])
    return Measured(str(value["phase"]), str(value["transport"]), str(value["wire_dtype"]), int(value["tokens"]), ways)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a time")
    return float(value)


def _between(line: Sequence[tuple[int, float]], tokens: int) -> float:
    """The seconds at ``tokens`` on the lines through the points of ``line``, which are sorted; never less than 0."""
    if len(line) == 1:
        return line[0][1]
    place = next((index for index, point in enumerate(line[1:-1], 1) if tokens <= point[0]), len(line) - 1)
    (left, low), (right, high) = line[place - 1], line[place]
    return max(0.0, low + (high - low) * (tokens - left) / (right - left))


def fingerprint() -> dict[str, Any]:
    """What a profile's machine is known by; nothing in it names the machine or its user."""
    return {
        "architecture": machine.describe()["architecture"],
        "cpu": machine.cpu_name(),
        "cpu_features": list(machine.cpu_features()),
        "cores": machine.available_cores(),
    }


def renewal(endpoints: Sequence[str], link: str, model: str) -> str:
    """The command that measures such a profile."""
    words = ["teegpu", "tune", "--model", model]
    for endpoint in endpoints:
        words += ["--endpoint", endpoint]
    if link:
        words += ["--link", link]
    return shlex.join(words)


def path_of(endpoints: Sequence[str], link: str, digest: str) -> Path:
    """Where the profile of these is kept, whether it exists or not."""
    key = hashlib.sha256(json.dumps([sorted(endpoints), link, digest]).encode()).hexdigest()[:20]
    return files.user_folder("state") / "profiles" / f"{key}.json"


def read(path: Path) -> Profile:
    """The profile in ``path``. Raises ``ConfigError`` for one that can't be read."""
    try:
        return Profile.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"the profile {path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the profile {path} can't be used: {error}; 'teegpu tune' makes a new one") from None


def stored(
    endpoints: Sequence[str], link: str, digest: str, runner_threads: int, server: Server | None
) -> tuple[Profile | None, str]:
    """The profile that fits, if there is one; else None and, where there is one that does not, why."""
    path = path_of(endpoints, link, digest)
    if not files.there(path):
        return None, ""
    try:
        found = read(path)
    except ConfigError as error:
        return None, str(error)
    if reason := found.misfit(digest=digest, runner_threads=runner_threads, server=server):
        return None, f"the stored profile is not used, as {reason}: '{found.command}' renews it"
    return found, ""


def write(profile: Profile) -> Path:
    """Keeps ``profile`` in its place, whole or not at all; returns where. Raises ``ConfigError``."""
    path = path_of(profile.endpoints, profile.link, profile.digest)
    try:
        files.private_folder(path.parent)
        files.replace(path, json.dumps(profile.to_json(), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"the profile can't be kept in {path}: {error.strerror} (XDG_STATE_HOME)") from None
    return path
