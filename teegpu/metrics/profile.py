"""The profile of a model on a machine over a link: what ``teegpu tune`` measured, kept for later runs.

    <state>/profiles/<key>.json        the key: endpoints, emulated link, model digest

Only its user may read it. A file that is there but was made on another machine, by another version or of another model
is refused with the command that renews it; so is one whose server computes differently now.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from teegpu import __version__, machine
from teegpu.errors import ConfigError
from teegpu.metrics.rates import Rates
from teegpu.metrics.runfolder import read_json, write_json
from teegpu.metrics.store import state_folder
from teegpu.metrics.traffic import Shape

SCHEMA: Final = "teegpu.profile/1"


@dataclass(frozen=True, slots=True)
class Server:
    """What the server said of itself: a profile is of this one."""

    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Profile:
    """``rates`` are those of ``model`` (its name) with ``digest``, run by ``runner_threads`` here and ``server`` behind
    ``endpoints`` and ``link`` (an emulated one, or empty). No endpoint: the server was embedded."""

    endpoints: tuple[str, ...]
    link: str
    model: str
    digest: str
    shape: Shape
    machine: Mapping[str, Any]
    version: str
    runner_threads: int
    server: Server
    created_at: str
    rates: Rates

    @property
    def command(self) -> str:
        """What makes it anew."""
        return renewal(self.endpoints, self.link, self.model)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "endpoints": list(self.endpoints),
            "link": self.link,
            "model": {"name": self.model, "digest": self.digest, "shape": asdict(self.shape)},
            "machine": dict(self.machine),
            "version": self.version,
            "threads": self.runner_threads,
            "server": asdict(self.server),
            "created_at": self.created_at,
            "rates": self.rates.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """What ``to_json`` gave. Raises ``ValueError`` for anything else."""
        if value.get("schema") != SCHEMA:
            raise ValueError(f"it is of schema {value.get('schema')!r}, and this version reads {SCHEMA}")
        try:
            server, model = value["server"], value["model"]
            return cls(
                tuple(map(str, value["endpoints"])),
                str(value["link"]),
                str(model["name"]),
                str(model["digest"]),
                _shape(model["shape"]),
                dict(value["machine"]),
                str(value["version"]),
                int(value["threads"]),
                Server(str(server["device"]), str(server["dtype"]), int(server["threads"])),
                str(value["created_at"]),
                Rates.from_json(value["rates"]),
            )
        except (KeyError, TypeError) as error:
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


def _shape(value: Mapping[str, Any]) -> Shape:
    sizes = {name: int(value[name]) for name in _SIZES}
    windows = tuple(None if window is None else int(window) for window in value["windows"])
    return Shape(**sizes, windows=windows, cuts=tuple(map(int, value["cuts"])))


_SIZES = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")


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
    return state_folder() / "profiles" / f"{key}.json"


def read(path: Path) -> Profile:
    """The profile in ``path``. Raises ``ConfigError`` for one that can't be read."""
    try:
        return Profile.from_json(read_json(path))
    except OSError as error:
        raise ConfigError(f"the profile {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the profile {path} can't be used: {error}; 'teegpu tune' makes a new one") from None


def write(profile: Profile) -> Path:
    """Keeps ``profile`` in its place, whole or not at all; returns where. Raises ``ConfigError``."""
    path = path_of(profile.endpoints, profile.link, profile.digest)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, profile.to_json())
    except OSError as error:
        raise ConfigError(f"the profile can't be kept in {path}: {error.strerror} (XDG_STATE_HOME)") from None
    return path
