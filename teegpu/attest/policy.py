"""A policy: what an endpoint must prove before a prompt goes there. A TOML file that a person can read and sign off.

Every rule has to be there: what is accepted in any form is written as ``"any"``, so that nothing is let through by
being forgotten. Unknown names and values are refused. No policy can allow debug."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teegpu.attest import amd, intel
from teegpu.attest.binding import MAX_VALUE, SETTINGS
from teegpu.attest.claims import Claims
from teegpu.attest.evidence import KINDS, SGX, SIMULATED, SNP, TDX
from teegpu.errors import ConfigError, nearest
from teegpu.units import printable

VERSION: Final = 1
ANY: Final = "any"

Accepted = tuple[str, ...] | None
"""The values that a rule accepts; None: any."""

_DAY_SECONDS: Final = 86400

_Check = Callable[[object], Any]


def _one_of(pattern: str, form: str) -> _Check:
    """A list of texts of that form, not empty, or ``"any"``."""
    known = re.compile(pattern)

    def check(raw: object) -> Accepted:
        if raw == ANY:
            return None
        if not isinstance(raw, list) or not raw or not all(isinstance(each, str) for each in raw):
            raise ValueError(f'is a list of {form}, or "any"')
        if wrong := next((each for each in raw if not known.fullmatch(each)), None):
            raise ValueError(f"has {wrong!r}, which is not {form}")
        return tuple(raw)

    return check


def _names(known: Sequence[str]) -> _Check:
    """A list of some of ``known``; there is no other."""

    def check(raw: object) -> tuple[str, ...]:
        if not isinstance(raw, list) or not raw:
            raise ValueError(f"is a list of some of {', '.join(known)}")
        for each in raw:
            if each not in known:
                raise ValueError(f"has {each!r}, which is none of {', '.join(known)}{nearest(str(each), list(known))}")
        return tuple(raw)

    return check


def _number(least: int, most: int) -> _Check:
    def check(raw: object) -> int:
        if not isinstance(raw, int) or isinstance(raw, bool) or not least <= raw <= most:
            raise ValueError(f"is a whole number from {least} to {most}")
        return raw

    return check


def _days(raw: object) -> int | None:
    if raw == ANY:
        return None
    found: int = _number(1, 36500)(raw)
    return found


def _hex(digits: int) -> _Check:
    return _one_of(f"[0-9a-f]{{{digits}}}", f"values of {digits} hexadecimal digits, of lower case")


_SHA384, _SHA256 = _hex(96), _hex(64)
_INTEL: Final[dict[str, _Check]] = {
    "tcb": _names(intel.STATUSES),
    "tcb_days": _days,
    "platforms": _hex(32),
    "collateral_days": _days,
}

RULES: Final[dict[str, dict[str, _Check]]] = {
    TDX: {"mrtd": _SHA384, **{f"rtmr{number}": _SHA384 for number in range(4)}, **_INTEL},
    SNP: {
        "measurement": _SHA384,
        **{f"min_{part}": _number(0, 255) for part in amd.TCB},
        "max_vmpl": _number(0, 3),
        "platforms": _hex(128),
        "collateral_days": _days,
    },
    SGX: {
        "mrenclave": _SHA256,
        "mrsigner": _SHA256,
        "isv_prod_id": _number(0, 65535),
        "min_isv_svn": _number(0, 65535),
        **_INTEL,
    },
    SIMULATED: {"measurement": _SHA384},
    "settings": {
        "privacy": _one_of("local|none|two-server|pads", "local, none, two-server or pads"),
        "verify": _one_of("on|off", "on or off"),
        "model": _SHA256,
        "version": _one_of(rf"[0-9A-Za-z.+_-]{{1,{MAX_VALUE}}}", "versions of teegpu"),
    },
}
"""Section → rule → how its value is read. The sections of kinds are there for the kinds that are accepted."""

_TOP: Final[dict[str, _Check]] = {
    "version": _number(VERSION, VERSION),
    "kinds": _names(KINDS),
    "evidence_seconds": _number(1, 7 * _DAY_SECONDS),
}


@dataclass(frozen=True)
class Policy:
    """``evidence_seconds``: how old evidence may get before it is asked for anew. ``rules``: section → rule → value."""

    kinds: tuple[str, ...]
    evidence_seconds: int
    rules: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Raises ``ConfigError``."""
        try:
            return cls.parse(path.read_text("utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"--policy {path}: can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--policy {path}: is no text") from None

    @classmethod
    def parse(cls, text: str, place: str) -> Policy:
        """``place`` is where ``text`` is from, for errors. Raises ``ConfigError``."""
        try:
            raw = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{place}: not a valid TOML file: {printable(str(error))}") from None
        top = _section(place, "", {key: value for key, value in raw.items() if not isinstance(value, dict)}, _TOP)
        wanted = {*top["kinds"], "settings"}
        tables = {key: value for key, value in raw.items() if isinstance(value, dict)}
        for name in tables:
            if name not in RULES:
                raise ConfigError(f"{place}: unknown section [{printable(name, 60)}]{nearest(name, list(RULES))}")
            if name not in wanted:
                raise ConfigError(f"{place}: [{name}] is there, and kinds does not accept it: take one of them out")
        if missing := sorted(wanted - set(tables)):
            raise ConfigError(f"{place}: there is no section [{missing[0]}]")
        rules = {name: _section(place, name, table, RULES[name]) for name, table in tables.items()}
        for kind, names in ((TDX, ("mrtd",)), (SGX, ("mrenclave", "mrsigner")), (SNP, ("measurement",))):
            if kind in rules and all(rules[kind][name] is None for name in names):
                raise ConfigError(
                    f"{place}: [{kind}] accepts any {' and any '.join(names)}: that is any program at all, which "
                    "proves nothing; say which"
                )
        return cls(top["kinds"], top["evidence_seconds"], rules)


def _section(place: str, name: str, table: Mapping[str, object], known: Mapping[str, _Check]) -> dict[str, Any]:
    where = f"{name}." if name else ""
    found = {}
    for key, raw in table.items():
        if key not in known:
            raise ConfigError(f"{place}: unknown rule '{where}{printable(key, 60)}'{nearest(key, list(known))}")
        try:
            found[key] = known[key](raw)
        except ValueError as error:
            raise ConfigError(f"{place}: {where}{key} {error}") from None
    if missing := next((key for key in known if key not in found), None):
        raise ConfigError(
            f"{place}: there is no rule '{where}{missing}': every rule has to be there, and what may be anything is "
            'written as "any"'
        )
    return found


# Writing one


def render(claims: Claims, settings: Mapping[str, str], *, origin: str) -> str:
    """A policy that accepts what was seen, and nothing else, for a person to read. ``origin``: where it was seen."""
    sections = {claims.kind: _seen(claims), "settings": {name: [settings[name]] for name in SETTINGS}}
    lines = [
        f"# What an endpoint must prove before a prompt goes there; seen at {origin}.",
        "# That it was seen proves nothing: compare the measurements with those of the image that you built or audited",
        '# before you rely on them. Every rule has to be there; "any" accepts anything. Debug mode is always refused.',
        "",
        f"version = {VERSION}",
        f'kinds = ["{claims.kind}"]',
        "# Evidence is asked for anew when it is older than this, and whenever a connection is made.",
        "evidence_seconds = 300",
    ]
    if claims.kind == SIMULATED:
        lines.insert(3, "# SIMULATED EVIDENCE PROVES NOTHING: whoever likes to makes it. For demonstrations and tests.")
    for section, values in sections.items():
        lines += ["", f"[{section}]"]
        for name in RULES[section]:
            lines += [f"# {line}" for line in _COMMENTS.get(name, ())]
            lines.append(f"{name} = {_toml(values[name])}")
    return "\n".join(lines) + "\n"


def _seen(claims: Claims) -> dict[str, Any]:
    values: dict[str, Any] = {name: [value] for name, value in claims.measurements.items()}
    values |= {"tcb": [claims.tcb_status], "tcb_days": ANY, "collateral_days": 30}
    values["platforms"] = [claims.platform] if claims.platform else ANY
    if claims.kind == SNP:
        values |= {f"min_{part}": claims.numbers[part] for part in amd.TCB}
        values |= {"max_vmpl": claims.numbers["vmpl"], "collateral_days": 366}
    if claims.kind == SGX:
        values |= {"isv_prod_id": claims.numbers["isv_prod_id"], "min_isv_svn": claims.numbers["isv_svn"]}
    return values


def blank(kind: str) -> str:
    """A policy for ``kind`` to fill in: as it is, it is refused, since nobody can guess a measurement."""
    claims = Claims(
        kind,
        b"",
        measurements={name: "FILL-IN" for name, check in RULES[kind].items() if check in (_SHA384, _SHA256)},
        numbers=dict.fromkeys((*amd.TCB, "vmpl", "isv_prod_id", "isv_svn"), 0),
        tcb_status="UpToDate",
    )
    settings = {"privacy": "two-server", "verify": "on", "model": "FILL-IN", "version": "FILL-IN"}
    return render(claims, settings, origin="nowhere: every FILL-IN has to be replaced")


_COMMENTS: Final[dict[str, tuple[str, ...]]] = {
    "mrtd": ("The virtual machine as it was launched (MRTD), and what it measured since: firmware, kernel, image.",),
    "measurement": ("The launch digest.",),
    "mrenclave": ("The program itself, and who signed it.",),
    "tcb": (f"Intel's judgements of the processor's firmware that are good enough, of {', '.join(intel.STATUSES[:3])},",
            f"{', '.join(intel.STATUSES[3:])}.",),
    "tcb_days": ("How many days ago that level of firmware may have been set.",),
    "platforms": ("The processors by PPID or CHIP_ID: only those in machine rooms that you trust.",),
    "collateral_days": ("How old the vendor's statements on revoked keys and firmware may be.",),
    "min_bootloader": ("The level of firmware at least.",),
    "privacy": ("What GPU servers see: local (there is none), two-server, pads, or none: they see all activations.",),
    "model": ("'teegpu model info' shows the digest.",),
}  # fmt: skip


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f'"{each}"' for each in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
