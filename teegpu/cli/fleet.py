"""``teegpu fleet``: GPU servers on the machines of a Ray cluster, as many as are needed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.common import (
    Commands,
    ConfigFile,
    InsecureServers,
    message_console,
    result_console,
    sigterm_as_interrupt,
)
from teegpu.cli.flags import Flags, takes_settings
from teegpu.errors import ConfigError, ConnectionFailedError, UsageError
from teegpu.units import plural

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.fleet.cluster import RayCluster
    from teegpu.fleet.controller import Controller

app = Commands(
    help="GPU servers on the machines of a Ray cluster, as many as are needed. These commands are for who operates the "
    "servers: a TEE runner never joins the cluster, it follows the file that 'up' writes (run --endpoint @FILE).",
    no_args_is_help=True,
    add_completion=False,
)

Name = Annotated[str, typer.Option("--name", metavar="NAME", help="The fleet, where there are several.")]
Ray = Annotated[
    str,
    typer.Option(
        "--ray",
        envvar="RAY_ADDRESS",
        metavar="HOST:PORT",
        help="The cluster's head; this machine is one of it. Without it the fleet is on this machine alone.",
        show_default=False,
    ),
]

_LOOK_SECONDS = 0.2

_MORE_SECONDS = 15.0
"""How much longer than ``server.drain_seconds`` the end of a fleet may take."""


@app.command()
@takes_settings("serve", "fleet-up", panels=False, without=("server.bind",))
def up(
    flags: Flags,
    replicas: Annotated[
        str, typer.Option(metavar="A..B", help="How many groups: as many as the load asks for, or always N.")
    ] = "1",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where it is written which groups serve.")] = Path(
        "endpoints.json"
    ),
    name: Name = "fleet",
    ray: Ray = "",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the groups serving when this command ends.")] = False,
    insecure: InsecureServers = False,
    config_file: ConfigFile = None,
) -> None:
    """Keep groups serving, each a 'teegpu serve', until Ctrl-C or SIGTERM.

    One that ends, hangs or loses its machine is started anew; more are started where requests wait, and ended where
    they are not needed. FILE lists those that serve, and runners follow it. When this command is killed, or Ray's head
    is lost, groups serve on: the next 'up' takes them over, and 'down' ends them.
    """
    from teegpu import config
    from teegpu.fleet import cluster
    from teegpu.fleet.controller import Controller
    from teegpu.fleet.group import Order
    from teegpu.fleet.scaling import Scaling

    least, most = _range(replicas)
    settings = _checked(config.load(flags, config_file))
    order = Order(_named(name), settings, insecure)
    out = out.absolute()
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    console = message_console()
    threads = max(1, settings.server.threads)
    with (
        sigterm_as_interrupt(),
        cluster.controlled(name),
        cluster.joined(name, ray) if ray else cluster.started(name, max(os.cpu_count() or 1, most * threads)) as on,
    ):
        for risk in sorted(_risks(settings, on.hosts(), insecure)):
            console.print(f"warning: --insecure: {risk}")
        controller = Controller(on, order, Scaling(least, most, settings.fleet), out, console.print)
        on.open_board(controller.status())
        wanted = plural(least, "group") if least == most else f"{least} to {most} groups"
        console.print(f"fleet '{name}': {wanted} of {_takes(on.bundle(order))}, listed in {out}")
        try:
            _watch(controller, on)
        except KeyboardInterrupt:
            if keep:
                console.print("the groups serve on: 'teegpu fleet down' ends them")
                return
        ended = controller.close(settings.server.drain_seconds + _MORE_SECONDS)
        console.print(f"ended {plural(ended, 'group')}")


def _watch(controller: Controller, on: RayCluster) -> None:
    """Until somebody asks for its end."""
    from teegpu.fleet.controller import TICK_SECONDS

    while not on.post(controller.status()):
        controller.tick()
        time.sleep(TICK_SECONDS)


@app.command()
def status(
    name: Name = "fleet",
    ray: Ray = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """Show a fleet's groups: where they are, how busy, how long requests wait, and why one does not serve.

    Exits with 4 when no group serves.
    """
    found = _found(_named(name), ray)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif found["groups"]:
        _print(found)
    if not any(group["state"] in ("serving", "unwatched") for group in found["groups"]):
        raise ConnectionFailedError(f"no group of fleet '{name}' serves")


@app.command()
def down(name: Name = "fleet", ray: Ray = "") -> None:
    """End a fleet: its groups answer what they have. Those that a killed 'up' has left are ended too."""
    from teegpu import config
    from teegpu.fleet import cluster

    wait_seconds = config.load().server.drain_seconds + _MORE_SECONDS
    with _cluster(_named(name), ray) as on:
        if on is not None and (said := on.status()) is not None:
            ended = len(said["groups"])
            on.ask_to_end()
            seconds = said["drain_seconds"] + 2 * _MORE_SECONDS
            deadline = time.monotonic() + seconds
            # A Ray of the fleet's own ends with the controller. Asked while it does, Ray waits for it for a minute, and
            # ends this process.
            while on.status() is not None if ray else cluster.is_controlled(name):
                if time.monotonic() > deadline:
                    raise ConnectionFailedError(
                        f"'teegpu fleet up' was asked to end fleet '{name}' and has not within {seconds:g} s: kill it, "
                        "and 'teegpu fleet down' again ends what it has left"
                    )
                time.sleep(_LOOK_SECONDS)
        else:
            names = [found.name for found in (cluster.serving(name) if on is None else on.serving())]
            ended = cluster.end(name, names, wait_seconds) if on is None else on.end(names, wait_seconds)
    message_console().print(f"ended {plural(ended, 'group')}")


@contextlib.contextmanager
def _cluster(name: str, ray: str) -> Iterator[RayCluster | None]:
    """That of ``--ray``, or of the fleet's own Ray on this machine; None where that is gone."""
    from teegpu.fleet import cluster

    address = ray or cluster.recorded(name)
    if not address:
        if cluster.is_controlled(name):
            raise UsageError(
                f"'teegpu fleet up' of '{name}' runs here, and no Ray of its own (yet): give the --ray it has"
            )
        yield None
        return
    with cluster.joined(name, address) as on:
        yield on


def _found(name: str, ray: str) -> dict[str, Any]:
    """What the fleet's controller said last; without one, what is there."""
    from teegpu.fleet import cluster

    with _cluster(name, ray) as on:
        known = None if on is None else on.status()
        if known is not None:
            return known
        left = cluster.serving(name) if on is None else on.serving()
    said = "nobody watches it: 'teegpu fleet up' takes it over, 'teegpu fleet down' ends it"
    groups = [{"name": each.name, "state": "unwatched", "endpoint": each.address, "pid": each.pid, "said": said}
              for each in left]  # fmt: skip
    return {"fleet": name, "groups": groups}


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from teegpu.units import human_seconds, percent

    table = Table("group", "state", "endpoint", "pid", "busy", "queue", "starts", "", box=None, pad_edge=False)
    for group in found["groups"]:
        watched = "starts" in group
        table.add_row(
            group["name"],
            group["state"],
            group["endpoint"].partition("#")[0],
            str(group["pid"] or ""),
            percent(group["busy_share"]) if watched else "",
            human_seconds(group["queue_seconds"]) if watched else "",
            str(group["starts"]) if watched else "",
            group["said"],
        )
    console = result_console()
    if "wanted" in found:
        least, most = found["replicas"]
        console.print(f"{plural(found['wanted'], 'group')} wanted, of {least} to {most}; listed in {found['file']}")
    console.print(table)


def _named(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_-]{1,40}", name):
        raise UsageError(f"--name {name}: up to 40 letters, digits, '_' and '-'")
    return name


def _range(text: str) -> tuple[int, int]:
    """``2..5``, or ``3`` for ``3..3``."""
    found = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found is not None else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(f"--replicas {text}: write the least and the most, such as 1..4, or one number from 1 on")
    return least, most


def _checked(settings: Config) -> Config:
    """What is a path is one wherever a group starts."""
    server, model, link = settings.server, settings.model, settings.link
    if server.key and not link.client_key:
        raise ConfigError(
            "--key is given and --client-key is not: groups are asked how they are, by a client whose public key is in "
            "--auth, on each machine ('teegpu keys new NAME' makes a pair)"
        )
    folder = _whole(model.name, "model.name")
    return replace(
        settings,
        server=replace(server, key=_key(server.key, "server.key"), auth_dir=_whole(server.auth_dir, "server.auth_dir")),
        model=replace(
            model,
            name=folder if Path(folder).exists() else model.name,
            cache_dir=_whole(model.cache_dir, "model.cache_dir"),
        ),
        link=replace(link, client_key=_key(link.client_key, "link.client_key") if server.key else ""),
    )


def _key(value: str, setting: str) -> str:
    """A path where it has a slash, else a name."""
    return _whole(value, setting) if "/" in value else value


def _whole(path: str, setting: str) -> str:
    from teegpu import files

    return str(files.expanded(path, setting).absolute()) if path else ""


def _risks(settings: Config, hosts: list[str], insecure: bool) -> set[str]:
    """Who can use groups that is not meant to: they are reached as ``serve`` at those addresses would be."""
    from teegpu.cli.serve import check_access
    from transports import addresses

    binds = [f"tcp://{addresses.at(host, 0)}" for host in hosts]
    servers = [replace(settings, server=replace(settings.server, bind=bind)) for bind in binds]
    return {risk for server in servers if (risk := check_access(server, insecure))}


def _takes(bundle: dict[str, float]) -> str:
    return " and ".join(f"{number:g} {kind}" for kind, number in bundle.items())
