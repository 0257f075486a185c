"""The options that give settings, made from the table of settings: a command says that it takes them, and no more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from teegpu import config
from teegpu.cli.common import OF_SETTING
from teegpu.fields import Flag, Setting, Value
from teegpu.settings import SETTINGS

Flags = dict[str, Any]
"""What the command line said, by dotted key, for ``config.load``; None where it said nothing."""

_PARAMETER = "flags"


def flags_of(*commands: str) -> Iterator[tuple[str, Flag]]:
    """The flags that any of ``commands`` takes, each with the key of its setting, in the order of the table."""
    for key, setting in SETTINGS.items():
        for flag in setting.flags:
            if not set(commands).isdisjoint(flag.commands.split()):
                yield key, flag


def takes_settings(
    *commands: str, panels: bool = True, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function: in place of its parameter ``flags`` stand the options of ``commands``, and it gets
    what was given as ``Flags``. ``panels`` False: help has all of them under one heading. ``without``: keys, or
    how they begin, whose options it does not take."""
    wanted = (pair for pair in flags_of(*commands) if not pair[0].startswith(without))
    taken = {f"{OF_SETTING}{number}": pair for number, pair in enumerate(wanted)}

    def made(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == _PARAMETER:
                parameters += [_option(name, *pair, panels=panels) for name, pair in taken.items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def run(**given: Any) -> None:
            flags: Flags = {}
            for name, (key, flag) in taken.items():
                value = _value(flag, given.pop(name))
                if value is not None:
                    long = next(spelled for spelled in _names(key, flag) if spelled.startswith("--"))
                    value = config.checked(key, value, long)
                for each in filter(None, (key, flag.also)):
                    # A setting's own option comes after one that gives it as well.
                    flags[each] = flags.get(each) if value is None else value
            function(**given, **{_PARAMETER: flags})

        vars(run).update(__signature__=signature.replace(parameters=parameters))
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return made


def _option(name: str, key: str, flag: Flag, *, panels: bool) -> inspect.Parameter:
    setting = SETTINGS[key]
    option = typer.Option(
        *_names(key, flag),
        help=flag.help,
        metavar=flag.metavar,
        rich_help_panel=flag.panel if panels and flag.panel else None,
    )
    annotation = Annotated[_type(setting, flag) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _names(key: str, flag: Flag) -> list[str]:
    return flag.names.split() or ["--" + key.split(".")[1].replace("_", "-")]


def _type(setting: Setting, flag: Flag) -> Any:
    if flag.values:
        return bool
    return list[str] if isinstance(setting.default, tuple) else type(setting.default)


def _value(flag: Flag, given: Any) -> Value | None:
    if flag.values and given is not None:
        return flag.values.get(given)
    if isinstance(given, list):
        return tuple(given) or None
    return given
