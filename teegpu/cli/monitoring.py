"""What ``watch`` and ``run --watch`` share: the monitor, its report at the end, its advice meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teegpu.errors import ConfigError, nearest
from teegpu.metrics.document import rebuild
from teegpu.metrics.summary import Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

    from teegpu.config import Config
    from teegpu.monitor.players import Player


def show(settings: Config, player: Player, *, ours: bool) -> str | None:
    """The full-screen monitor, until the user leaves it. How it was left (see ``monitor.app``), or None where it
    failed."""
    from teegpu.monitor.app import Monitor

    app = Monitor(
        player,
        ours=ours,
        theme=settings.monitor.theme,
        hertz=settings.monitor.refresh_hertz,
        conclude=conclude,
        build=lambda meta, summary: with_advice(rebuild(meta, summary, "running")),
    )
    player.start()
    try:
        return app.run()
    finally:
        player.close()


def check_theme(settings: Config) -> None:
    """Raises ``ConfigError`` for a theme that there is not."""
    from textual.theme import BUILTIN_THEMES

    from teegpu.monitor.themes import COLOURS

    known = [*COLOURS, *BUILTIN_THEMES]
    theme = settings.monitor.theme
    if theme not in known:
        raise ConfigError(
            f"monitor.theme: there is no theme '{theme}'{nearest(theme, known)}; ours are {', '.join(COLOURS)}"
        )


def conclude(document: Mapping[str, Any]) -> list[RenderableType]:
    """The report of a run that has ended, as ``report last`` has it."""
    from teegpu.report.tables import tables

    return tables(with_advice(dict(document)))


def with_advice(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with advice, where it has none."""
    if document.get("advice"):
        return document
    from teegpu.report.advice import advise

    return document | {"advice": advise(document)}


def advice(meta: Mapping[str, Any], summary: Summary, status: str) -> list[str]:
    """What could be advised by now, in words."""
    return [str(entry["text"]) for entry in with_advice(rebuild(meta, summary, status))["advice"]]


def speed_of(given: float) -> float:
    """``--speed`` as a replay takes it: 0 is at once."""
    return given if given > 0 else math.inf
