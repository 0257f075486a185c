"""``teegpu keys``: make, list and show the keys that runners and servers know each other by."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from teegpu.cli.common import Commands, message_console, result_console
from teegpu.errors import ConfigError

app = Commands(
    help="Make and look at the keys that runners and servers know each other by. They are kept in "
    "$XDG_CONFIG_HOME/teegpu/keys.",
    no_args_is_help=True,
    add_completion=False,
)

Name = Annotated[str, typer.Argument(help="The key's name, such as that of its machine.", show_default=False)]


@app.command()
def new(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a key of that name: what knows the old one is locked out.")
    ] = False,
) -> None:
    """Make a pair: NAME.key, which stays secret and here, and NAME.pub, for the other side."""
    from teegpu import keys

    pair = keys.new(name, replace=force)
    console = message_console()
    console.print(f"made {keys.secret_path(name)} (secret: it stays on this machine)", soft_wrap=True)
    console.print(f"made {keys.public_path(name)} (public, fingerprint {pair.public})", soft_wrap=True)
    console.print(f"where the public one goes: teegpu keys show {name}", soft_wrap=True)


@app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """List the keys of this user, and mark those whose files are unsafe or damaged.

    Exits with 2 when there are such ones.
    """
    from rich.table import Table
    from rich.text import Text

    from teegpu import keys

    found, trouble = keys.all_keys(), keys.folder_trouble()
    if as_json:
        rows = [
            {"name": key.name, "secret": key.has_secret, "fingerprint": key.fingerprint, "trouble": key.trouble}
            for key in found
        ]
        document = {"folder": str(keys.folder()), "trouble": trouble, "keys": rows}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif found:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("name", "kind", "fingerprint", ""):
            table.add_column(heading, overflow="fold")
        for key in found:
            kind = "own pair" if key.has_secret else "public only"
            state = Text(f"UNSAFE OR DAMAGED: {key.trouble}", "bold red") if key.trouble else Text("")
            table.add_row(key.name, kind, key.fingerprint or "–", state)
        result_console().print(table)
    else:
        message_console().print(f"no keys in {keys.folder()}: 'teegpu keys new NAME' makes a pair", soft_wrap=True)
    bad = [key.name for key in found if key.trouble]
    if trouble:
        raise ConfigError(f"{keys.folder()}: {trouble}")
    if bad:
        raise ConfigError(f"{', '.join(bad)}: not to be used as {'it is' if len(bad) == 1 else 'they are'}")


@app.command()
def show(name: Name) -> None:
    """Print a public key on stdout, and on stderr where it goes. The secret key is never printed."""
    from teegpu import keys

    key = keys.public(name)
    typer.echo(key.text)
    own = any(found.has_secret for found in keys.all_keys() if found.name == name)
    for line in _places(name) if own else (f"somebody else's key: run --server-key {name} expects it of a server",):
        message_console().print(line, soft_wrap=True)
    message_console().print(f"fingerprint {key}", soft_wrap=True)


def _places(name: str) -> tuple[str, ...]:
    return (
        f"as the key of a runner (run --client-key {name}): the line above goes into the file {name}.pub in the folder "
        "that the server has been given with --auth",
        f"as the key of a server (serve --key {name}): the line above goes into the file {name}.pub in "
        f"$XDG_CONFIG_HOME/teegpu/keys of each runner, which then uses run --server-key {name}",
    )
