"""The settings in force: where they may come from, and the strict reading of each.

What settings there are stands in ``teegpu.settings``; the project's ``config.toml`` is generated from that table by
``render``.

A value is taken from the first of these that has it: command-line flag, environment variable
``TEEGPU_<SECTION>_<KEY>``, the file given with ``--config`` (or else ``config.toml`` in the current folder), the user's
``$XDG_CONFIG_HOME/teegpu/config.toml``, the default. ``Config.source`` says which one it was.

Settings that are ``guarded`` are taken from flags and the file of ``--config`` alone: whoever controls the machine
chooses its environment, the current folder, and where the user's own files are looked for. Elsewhere such a setting is
refused, unless it says the default, which changes nothing.

Nothing here needs torch, or any package: the command line is built on it and must start quickly.
"""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from teegpu import operators
from teegpu.errors import ConfigError, nearest
from teegpu.fields import Setting, Value
from teegpu.files import expanded, replace, there, user_folder
from teegpu.settings import (
    GONE,
    PLANS,
    SECTIONS,
    SERVER_DTYPES,
    SETTINGS,
    TRANSPORTS,
    WIRE_DTYPES,
    ApiSettings,
    CompressionSettings,
    FleetSettings,
    LimitSettings,
    LinkSettings,
    ModelSettings,
    MonitorSettings,
    RecordSettings,
    RunSettings,
    SamplingSettings,
    ServerSettings,
    ShieldSettings,
)
from teegpu.units import printable

__all__ = [
    "PLANS",
    "SERVER_DTYPES",
    "SETTINGS",
    "TRANSPORTS",
    "WIRE_DTYPES",
    "ApiSettings",
    "CompressionSettings",
    "Config",
    "FleetSettings",
    "LimitSettings",
    "LinkSettings",
    "ModelSettings",
    "MonitorSettings",
    "RecordSettings",
    "RunSettings",
    "SamplingSettings",
    "ServerSettings",
    "ShieldSettings",
    "files",
    "load",
    "render",
    "to_toml",
    "updated",
    "user_file",
    "variable_name",
    "write",
]

ENVIRONMENT_PREFIX = "TEEGPU_"
FILE_NAME = "config.toml"


@dataclass(frozen=True)
class Config:
    """All settings, checked. ``sources`` is where each that is not a default came from; use ``source``."""

    model: ModelSettings = field(default_factory=ModelSettings)
    run: RunSettings = field(default_factory=RunSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    record: RecordSettings = field(default_factory=RecordSettings)
    shield: ShieldSettings = field(default_factory=ShieldSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def source(self, key: str) -> str:
        """Where the value of ``key`` (``"run.transport"``) came from: ``default``, ``flag``, a variable, or a file.

        Raises ``KeyError`` for a key that is no setting.
        """
        if key not in SETTINGS:
            raise KeyError(key)
        return self.sources.get(key, "default")

    def chosen(self, key: str) -> bool:
        """Whether somebody chose the value of ``key``: it is not the default, or a flag or a variable gives it. (A file
        may just list all settings.)"""
        section, _, name = key.partition(".")
        source = self.source(key)
        given = source == "flag" or source.startswith(ENVIRONMENT_PREFIX)
        return given or vars(vars(self)[section])[name] != SETTINGS[key].default

    def values(self) -> dict[str, Value]:
        """Every value by its dotted key, in the order of ``config.toml``."""
        return {
            f"{section}.{item.name}": vars(vars(self)[section])[item.name]
            for section, kind in SECTIONS.items()
            for item in fields(kind)
        }


def user_file(environ: Mapping[str, str] | None = None) -> Path:
    """The user's own configuration file, whether it exists or not."""
    return user_folder("config", environ) / FILE_NAME


def files(
    config_file: Path | None = None, *, environ: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[Path]:
    """The files that ``load`` reads, strongest last. Raises ``ConfigError`` where ``config_file`` does not exist."""
    if config_file is not None and not there(config_file):
        raise ConfigError(f"--config {config_file}: there is no such file")
    if config_file is None:
        return [path for path in (user_file(environ), (folder or Path()) / FILE_NAME) if there(path)]
    own = user_file(environ)
    same = False
    with contextlib.suppress(OSError):  # one of them is not there, or can't be read, which is told when it is
        same = own.samefile(config_file)
    return [own, config_file] if there(own) and not same else [config_file]


def load(
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Config:
    """The settings in force.

    ``flags`` are those of the command line by dotted key; None means that the flag was not given. ``config_file`` is
    what ``--config`` says. ``environ`` and ``folder`` stand in for the process's own.

    Raises ``ConfigError`` for a file that can't be read, an unknown section, key or variable, and a value of the wrong
    type or outside its limits, or where it must not come from; the message names the place and the nearest known name.
    Raises ``KeyError`` for a flag that is no setting, which is a mistake in the calling code.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Value] = {}
    sources: dict[str, str] = {}

    def take(key: str, value: Value, source: str, *, given: bool = False) -> None:
        known = SETTINGS[key]
        if known.guarded and not given:
            if value != known.default:
                raise ConfigError(
                    f"{source}: {key} decides what is secret or believed, so only flags and the file of --config may "
                    "set it: give it so, and take it out of there"
                )
        elif not known.tightens or _at_least(known, value, values.get(key, known.default)):
            values[key], sources[key] = value, source

    for path in files(config_file, environ=environ, folder=folder):
        for key, value in _read(path).items():
            take(key, value, str(path), given=path == config_file)

    for variable, key in _variables(environ):
        given = environ[variable]
        try:
            value = SETTINGS[key].parse(given)
        except ValueError as error:
            raise ConfigError(f"{variable}={given!r} {_gone(f'{key}={given}') or error}") from None
        take(key, value, variable)

    for key, raw in (flags or {}).items():
        if key not in SETTINGS:
            raise KeyError(key)
        if raw is not None:
            take(key, checked(key, raw, f"the command line: {key}"), "flag", given=True)

    chosen: dict[str, dict[str, Value]] = {section: {} for section in SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        chosen[section][name] = value
    if listed := str(chosen["run"].get("operators", "")):
        if chosen["run"].get("endpoints"):
            raise ConfigError("run.operators and run.endpoints both say which servers there are: give one of them")
        chosen["run"]["endpoints"] = operators.read(expanded(listed, "run.operators"))
        sources["run.endpoints"] = listed
    sections: dict[str, Any] = {section: kind(**chosen[section]) for section, kind in SECTIONS.items()}
    return Config(**sections, sources=sources)


def _at_least(known: Setting, value: Value, other: Value) -> bool:
    return known.choices.index(str(value)) >= known.choices.index(str(other))


def checked(key: str, raw: object, name: str) -> Value:
    """``raw`` as a value of the setting ``key``. Raises ``ConfigError``, which calls it ``name``."""
    try:
        return SETTINGS[key].check(raw)
    except ValueError as error:
        raise ConfigError(f"{name} = {_shown(raw)} {_gone(f'{key}={raw}') or error}") from None


def _gone(key: str) -> str:
    """``is gone: …`` for a setting, or a value of one, that was there in an earlier version; else empty."""
    return f"is gone: {GONE[key]}" if key in GONE else ""


def _shown(raw: object) -> str:
    return to_toml(raw) if isinstance(raw, (str, bool, int, float)) else repr(raw)


def _read(path: Path) -> dict[str, Value]:
    """The value of each key. Raises ``ConfigError`` for an unreadable file, or with all that is wrong in it."""
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a valid TOML file: {printable(str(error))}") from None
    values: dict[str, Value] = {}
    wrong: list[str] = []
    for section, table in document.items():
        if not isinstance(table, dict):
            home = [key for key in SETTINGS if key.endswith(f".{section}")]
            hint = f"; did you mean it in section [{home[0].split('.')[0]}]?" if home else ""
            wrong.append(f"'{printable(section, 60)}' stands outside of any section{hint}")
            continue
        known = section in SECTIONS
        if not known and not any(_gone(f"{section}.{name}") for name in table):
            wrong.append(f"unknown section [{printable(section, 60)}]{nearest(section, list(SECTIONS))}")
        for key, raw in ((f"{section}.{name}", raw) for name, raw in table.items()):
            if told := _gone(key):
                wrong.append(f"{key} {told}")
            elif key in SETTINGS:
                try:
                    values[key] = checked(key, raw, key)
                except ConfigError as error:
                    wrong.append(str(error))
            elif known:
                wrong.append(f"unknown key '{printable(key, 60)}'{nearest(key, list(SETTINGS))}")
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    return values


def variable_name(key: str) -> str:
    """``TEEGPU_RUN_WIRE_DTYPE`` for ``run.wire_dtype``."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    known = {variable_name(key): key for key in SETTINGS}
    gone = {variable_name(key): key for key in GONE if "=" not in key}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable in gone:
            raise ConfigError(f"environment variable {variable}: {gone[variable]} {_gone(gone[variable])}")
        if variable not in known:
            hint = nearest(variable, list(known))
            raise ConfigError(
                f"environment variable {printable(variable, 60)} is no setting{hint}; 'teegpu config show' lists them"
            )
        yield variable, known[variable]


def to_toml(value: object) -> str:
    """``value`` (of a setting's type) as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are a subset of TOML's; what is left bare is fit for a terminal
        return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    return repr(value)


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def updated(text: str, changes: Mapping[str, Value], place: str) -> str:
    """``text`` of the settings file at ``place`` with ``changes`` by dotted key (``"run.transport"``).

    A key that is there gets its new value where it stands; others are added to the end of their section. Comments and
    layout stay. Raises ``ConfigError`` for a file that is no TOML.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document: Any = tomlkit.parse(text)
    except TOMLKitError as error:
        raise ConfigError(f"{place}: not a valid TOML file: {error}") from None
    for key, value in changes.items():
        section, name = key.split(".")
        if section not in document:
            document[section] = tomlkit.table()
        table = document[section]
        if not isinstance(table, MutableMapping):
            raise ConfigError(f"{place}: '{section}' stands outside of any section")
        # tomlkit counts the comment above the next heading to this section: a new key goes before it.
        rest = _above_the_next(document[section]) if name not in table else []
        table[name] = list(value) if isinstance(value, tuple) else value
        for item in rest:
            document[section].add(item)
    return tomlkit.dumps(document)


def _above_the_next(table: Any) -> list[Any]:
    """Takes the blank lines and comments at the end of ``table`` out of it; commented-out settings stay."""
    from tomlkit.items import Comment, Table, Whitespace

    body: list[Any] = table.value.body if isinstance(table, Table) else []
    taken = []
    while body and (
        isinstance(body[-1][1], Whitespace)
        or (isinstance(body[-1][1], Comment) and body[-1][1].as_string().lstrip().startswith("# "))
    ):
        taken.append(body.pop()[1])
    return taken[::-1]


def write(path: Path, text: str) -> None:
    """Replaces the settings file ``path`` as a whole; it keeps its permissions. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text, mode=path.stat().st_mode & 0o777 if path.exists() else 0o644)


PROJECT_HEADER = """\
Settings of teegpu, with their defaults. This file is read when teegpu is started in the folder where it lies.

A value is taken from the first of these that has it: command-line flag, environment variable
TEEGPU_<SECTION>_<KEY> (TEEGPU_RUN_TRANSPORT), the file given with --config or else this file, the user's own
$XDG_CONFIG_HOME/teegpu/config.toml, the default. 'teegpu config show' prints each value and where it came from.
What is marked as guarded decides what is secret or believed: values other than the default are taken from flags and
the file given with --config alone.
"""

USER_HEADER = """\
Settings of teegpu. The values here are the defaults, commented out: remove the '#' before one to change it. What stays
commented out follows the defaults of the installed version. 'teegpu config show' prints what is in force, and why.
What is marked as guarded is refused here, unless the file is given with --config.
"""


def render(*, active: bool) -> str:
    """The text of a configuration file with every setting, its comment and its default.

    ``active`` writes the values as settings (the project's ``config.toml``); otherwise they are commented out.
    """
    lines = [f"# {line}".rstrip() for line in (PROJECT_HEADER if active else USER_HEADER).splitlines()]
    for section, kind in SECTIONS.items():
        lines += ["", f"# {(kind.__doc__ or '').strip()}", f"[{section}]"]
        for item in fields(kind):
            known: Setting = item.metadata["setting"]
            comment = known.comment + (f" One of: {', '.join(known.choices)}." if known.choices else "")
            comment += " Guarded." if known.guarded else ""
            lines += [f"# {line}" for line in textwrap.wrap(comment, 116, break_on_hyphens=False)]
            lines.append(f"{'' if active else '#'}{item.name} = {to_toml(known.default)}")
    return "\n".join(lines) + "\n"
