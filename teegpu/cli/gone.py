"""Commands and flags of earlier versions that are gone, each with what to do now.

They are looked up only where the command line has refused what it was given: a name that is taken again is not in the
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_SCRIPTS: Final = "it is a script of the source now, see benchmarks/README.md there"

COMMANDS: Final[dict[str, str]] = {
    "bench plans": "it is 'teegpu bench ladder --case CASE'",
    "bench show": "it is 'teegpu bench ladder --from FILE'",
    "bench plot": "it is 'teegpu bench ladder --from FILE --plot FILE.svg'",
    "pads": "a run with --privacy pads makes the pads that it needs first, in its own memory",
    "hint": "so is the mode lwe, which cost the runner more than computing in the runner does",
    "checks": "a run draws what it checks products with by itself, in its own memory",
    "bench recording": _SCRIPTS,
    "bench watch": _SCRIPTS,
    "bench replay": _SCRIPTS,
    "bench overhead": _SCRIPTS,
    "bench soak": _SCRIPTS,
    "bench curve": _SCRIPTS,
    "bench transports": _SCRIPTS,
    "bench accounting": "the parts of a run always add up, and the tests hold it to that; see them in 'teegpu report'",
    "bench codec": "compare wire dtypes and transports by 'teegpu bench ladder', and their error by 'bench accuracy'",
}
"""``hint`` or ``bench plot`` → what to do now, as the end of a sentence that begins with "it is gone: "."""

FLAGS: Final[dict[str, str]] = {
    "tune --against": "'tune --check' follows its own predictions and shows both",
}
"""``tune --against`` → the same."""


def told(args: Sequence[str]) -> str | None:
    """What to say to ``args``, which the command line has refused; None where nothing of it is known here."""
    words = [arg for arg in args if not arg.startswith("-")]
    paths = [" ".join(words[:length]) for length in (1, 2)]
    for path in paths:
        if path in COMMANDS:
            return f"'teegpu {path}' is gone: {COMMANDS[path]}"
    for path in paths:
        for arg in args:
            flag = f"{path} {arg.partition('=')[0]}"
            if flag in FLAGS:
                return f"'teegpu {flag}' is gone: {FLAGS[flag]}"
    return None
