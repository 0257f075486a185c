"""What a setting is: its default, its limits, the flags that give it, and the strict reading of its values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from teegpu.errors import nearest

Value = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True)
class Flag:
    """An option of the command line that gives a setting; ``teegpu.cli.flags`` makes it.

    ``commands``: those that take it, with spaces between them. ``names``: ``--stop``, or several with spaces between
    them; empty: the setting's own. ``panel``: the heading under which help has it. ``values``: what an option without a
    value stands for, where that is not its being true. ``also``: another setting that it gives as well, unless that
    has an option of its own that is given.
    """

    commands: str
    help: str
    names: str = ""
    panel: str = ""
    metavar: str | None = None
    values: Mapping[bool, Value] = field(default_factory=dict)
    also: str = ""


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its value. ``minimum`` and ``maximum`` are allowed, ``above`` is not.

    ``pattern`` is a regular expression for the whole value, and ``form`` its description for people. ``guarded``: it
    decides what stays secret or what is believed, so it is taken from flags and ``--config`` alone. ``tightens``: its
    choices are in the order of strength, and of all places that have it the strongest holds.
    """

    default: Value
    comment: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    pattern: str = ""
    form: str = ""
    guarded: bool = False
    tightens: bool = False
    flags: tuple[Flag, ...] = ()

    @property
    def kind(self) -> str:
        """The type of its values, in words."""
        if isinstance(self.default, tuple):
            return "a list of strings"
        return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[type(self.default)]

    def check(self, value: object) -> Value:
        """``value`` as this setting's type. Raises ``ValueError`` that says what would be allowed."""
        checked = self._typed(value)
        if self.choices and checked not in self.choices:
            hint = nearest(str(checked), list(self.choices))
            raise ValueError(f"is not one of {', '.join(self.choices)}{hint}")
        if self.pattern and not re.fullmatch(self.pattern, str(checked)):
            raise ValueError(f"is not {self.form}")
        if isinstance(checked, (int, float)) and not isinstance(checked, bool):
            self._check_range(checked)
        return checked

    def _typed(self, value: object) -> Value:
        default = self.default
        if isinstance(default, tuple):
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif isinstance(default, bool):
            if isinstance(value, bool):
                return value
        elif isinstance(default, float):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        elif isinstance(default, int):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, str):
            return value
        raise ValueError(f"is not {self.kind}")

    def _check_range(self, number: float) -> None:
        if self.minimum is not None and number < self.minimum:
            raise ValueError(f"is below the least, {self.minimum:g}")
        if self.above is not None and number <= self.above:
            raise ValueError(f"must be above {self.above:g}")
        if self.maximum is not None and number > self.maximum:
            raise ValueError(f"is above the most, {self.maximum:.12g}")

    def parse(self, text: str) -> Value:
        """The value that ``text`` (of an environment variable) stands for. Raises ``ValueError`` like ``check``.

        A list is written as a TOML array, ``["a", "b"]``; any other text is a list of that one string.
        """
        default = self.default
        if isinstance(default, tuple):
            if not text.startswith("["):
                return self.check([text] if text else [])
            return self.check(_toml_value(text))
        if isinstance(default, bool):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return self.check(words.get(text.strip().lower(), text))
        if isinstance(default, (int, float)):
            try:
                return self.check(type(default)(text))
            except ValueError as error:
                # int("x") has a message of its own; ours says what is expected
                raise error if str(error).startswith(("is ", "must ")) else ValueError(f"is not {self.kind}") from None
        return self.check(text)


def _toml_value(text: str) -> object:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise ValueError("is not a TOML array of strings") from None


def setting(default: Value, comment: str, *flags: Flag, **limits: Any) -> Any:
    """A dataclass field that is a setting, with the ``flags`` that give it; ``limits`` are those of ``Setting``."""
    return field(default=default, metadata={"setting": Setting(default, comment, flags=flags, **limits)})
