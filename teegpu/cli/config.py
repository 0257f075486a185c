"""``teegpu config``: what the settings are, where each came from, and a file to change them in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from teegpu import config as settings
from teegpu.cli.common import Commands, ConfigFile, message_console, result_console
from teegpu.errors import ConfigError

app = Commands(help="Show the settings in force, or write a settings file.", no_args_is_help=True, add_completion=False)


@app.command()
def show(
    config_file: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """Print each setting with its value, and where that came from."""
    from rich import box
    from rich.table import Table

    config = settings.load(config_file=config_file)
    values = config.values()
    if as_json:
        document = {key: {"value": value, "source": config.source(key)} for key, value in values.items()}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for key, value in values.items():
        table.add_row(key, settings.to_toml(value), config.source(key))
    result_console().print(table)
    read = settings.files(config_file)
    message_console().print(f"files read: {', '.join(str(path) for path in reversed(read)) or 'none'}", soft_wrap=True)


@app.command()
def init(
    path: Annotated[
        Path | None, typer.Argument(help="The file to write; without it, the user's own.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    active: Annotated[
        bool, typer.Option("--active", help="Write the defaults as settings, not commented out.")
    ] = False,
) -> None:
    """Write a settings file in which every setting is explained; prints its path."""
    target = settings.user_file() if path is None else path
    if os.path.isdir(target):  # not Path's: that raises where it may not look
        raise ConfigError(f"{target} is a folder: name the file to write, as in '{target / settings.FILE_NAME}'")
    if os.path.exists(target) and not force:
        raise ConfigError(f"{target} exists: give --force to replace it")
    try:
        settings.write(target, settings.render(active=active))
    except OSError as error:
        raise ConfigError(f"{target}: can't be written: {error.strerror}") from None
    typer.echo(str(target))


@app.command()
def path() -> None:
    """Print where the user's own settings file is, whether it exists or not."""
    typer.echo(str(settings.user_file()))
