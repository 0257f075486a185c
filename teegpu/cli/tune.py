"""``teegpu tune``: measure what predictions need, rank the settings, and write the best ones down."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.common import ConfigFile, message_console, sigterm_as_interrupt
from teegpu.cli.destination import Destination
from teegpu.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from teegpu.bench.predictions import Wanted
    from teegpu.config import Config
    from teegpu.metrics.profile import Profile

WHERE = "Model and server"
WHAT = "What to predict"
OTHER = "Without measuring"

MOST_TOKENS = 10_000_000


def tune(
    model: Annotated[
        str | None, typer.Option(help="Catalogue name, Hugging Face id, folder or .gguf file.", rich_help_panel=WHERE)
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU server; may be given several times. Without one an embedded server is measured.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    server_key: Annotated[
        str | None, typer.Option(help="The public key that the server must prove to have.", rich_help_panel=WHERE)
    ] = None,
    client_key: Annotated[str | None, typer.Option(help="The key pair of this side.", rich_help_panel=WHERE)] = None,
    link: Annotated[
        str | None, typer.Option(help="Emulate a link: rtt=5ms,bandwidth=1gbit.", rich_help_panel=WHERE)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device of the embedded server.", rich_help_panel=WHERE)] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the embedded server.", rich_help_panel=WHERE)] = None,
    offline: Annotated[
        bool | None, typer.Option("--offline", help="Never use the network to find the model.", rich_help_panel=WHERE)
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", rich_help_panel=WHAT)] = 1024,
    decode_tokens: Annotated[int, typer.Option(help="Tokens after the first.", rich_help_panel=WHAT)] = 128,
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy", help="Also propose bf16 and int8 on the link, which cost accuracy.", rich_help_panel=WHAT
        ),
    ] = False,
    apply: Annotated[
        bool,
        typer.Option("--apply", help="Write the choice to your settings file, or to --config.", rich_help_panel=WHAT),
    ] = False,
    saved: Annotated[
        bool, typer.Option("--saved", help="Predict from the profile that is stored.", rich_help_panel=OTHER)
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Predict for another world: rtt=20ms,bandwidth=10gbit,model=llama-3-8b,gpu=h200,tee=32-core-amx,"
            "servers=2; given several times, worlds side by side.",
            rich_help_panel=OTHER,
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Compare stored profiles' predictions with what 'teegpu bench ladder' or 'bench plans' measured; may "
            "be given several times.",
            rich_help_panel=OTHER,
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="table, json, csv or md; else as the file's name says.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the result there, not to standard output.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure server, link and this machine, predict every way to divide the work, and say which is best.

    It takes under a minute. What was measured is kept as a profile, which the plan auto then goes by.
    """
    from teegpu import config, machine
    from teegpu.bench import tunetables

    flags: dict[str, object] = {
        "model.name": model,
        "model.offline": offline,
        "run.endpoints": tuple(endpoint) if endpoint else None,
        "link.server_key": server_key,
        "link.client_key": client_key,
        "run.link": link,
        "server.device": device,
        "server.dtype": dtype,
    }
    _check(
        prompt_tokens,
        decode_tokens,
        {"--what-if": bool(what_if), "--against": bool(against), "--saved": saved},
        {"--endpoint": bool(endpoint), "--link": link is not None, "--device": device is not None, "--apply": apply},
    )
    machine.share_cores()
    settings = config.load(flags, config_file)
    form = tunetables.choose(form, out.name if out is not None else "")
    destination = Destination(out, force=True, quiet=quiet)
    with sigterm_as_interrupt():
        if what_if:
            document = _what_if(what_if, settings, prompt_tokens, decode_tokens, allow_lossy)
        elif against:
            document = _against(against)
        else:
            document = _tuned(settings, prompt_tokens, decode_tokens, allow_lossy, saved, quiet)
        destination.write(tunetables.render(document, form))
        if apply:
            _apply(document["choice"]["settings"], config_file)


def _check(prompt_tokens: int, decode_tokens: int, modes: dict[str, bool], flags: dict[str, bool]) -> None:
    """Raises ``UsageError`` for numbers that can't be, and for flags that would do nothing beside each other."""
    for name, value, least in (("--prompt-tokens", prompt_tokens, 1), ("--decode-tokens", decode_tokens, 0)):
        if not least <= value <= MOST_TOKENS:
            raise UsageError(f"{name} {value} is not between {least} and {MOST_TOKENS}")
    given = [name for name, on in modes.items() if on]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are different questions: give one of them")
    if given in (["--what-if"], ["--against"]):
        idle = next((name for name, on in flags.items() if on), None)
        if idle is not None:
            raise UsageError(f"{idle} does nothing beside {given[0]}, which measures nothing: leave it out")


def _tuned(
    settings: Config, prompt_tokens: int, decode_tokens: int, allow_lossy: bool, saved: bool, quiet: bool
) -> dict[str, Any]:
    """Measured now, or ``saved``."""
    from teegpu.bench import tuned
    from teegpu.cli.benchprogress import shown
    from teegpu.cli.models import find_model
    from teegpu.metrics import profile as profiles

    folder = find_model(settings, quiet=quiet)
    facts: dict[str, Any] = {}
    if saved:
        profile = _stored(settings, folder)
    else:
        from teegpu.bench.tuning import Tuning

        tuning = Tuning(folder, settings)
        with shown(quiet=quiet) as notify:
            profile = tuning.run(notify)
        place = profiles.write(profile)
        facts = tuning.facts
        if not quiet:
            message_console().print(f"profile kept in {place}", soft_wrap=True)
    return tuned.of_profile(
        profile, _wanted(profile, settings, folder, prompt_tokens, decode_tokens, allow_lossy), facts
    )


def _wanted(
    profile: Profile, settings: Config, folder: Any, prompt_tokens: int, decode_tokens: int, allow_lossy: bool
) -> Wanted:
    from teegpu.bench.predictions import Wanted
    from teegpu.metrics.chooser import AUTO_PLANS, OFFLOADING_PLANS
    from teegpu.metrics.cost_model import Settings
    from teegpu.model.reader import read_spec
    from teegpu.options import wire_dtype
    from teegpu.tee.auto import local_fits

    run = settings.run
    wire = wire_dtype(settings, [profile.server.dtype])
    servers = 1 + len(profile.shape.cuts)
    if run.spread == "round-robin" and len(run.endpoints) > servers:
        servers = len(run.endpoints)
    base = Settings(
        "fused", wire, run.transport, run.chunk_tokens, servers=servers, rows=1 + run.speculate,
        compressed_bytes=settings.compression.min_bytes,
    )  # fmt: skip
    return Wanted(
        prompt_tokens,
        decode_tokens,
        base,
        wire,
        allow_lossy=allow_lossy,
        chunk_tokens=run.chunk_tokens,
        plans=AUTO_PLANS if run.endpoints else OFFLOADING_PLANS,
        local_fits=local_fits(read_spec(folder)),
    )


def _stored(settings: Config, folder: Any) -> Profile:
    """The stored profile of these settings. Raises ``ConfigError`` where there is none, or one that does not fit."""
    from teegpu.metrics import profile as profiles
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore
    from transports.linkspec import LinkSpec

    run = settings.run
    link = str(LinkSpec.parse(run.link)) if run.link else ""
    with WeightStore(folder, read_spec(folder)) as store:
        digest = store.digest()
    place = profiles.path_of(run.endpoints, link, digest)
    renewal = profiles.renewal(run.endpoints, link, settings.model.name)
    if not place.exists():
        raise ConfigError(f"--saved: there is no profile of these yet: '{renewal}' measures one")
    found = profiles.read(place)
    if reason := found.misfit(digest=digest):
        raise ConfigError(f"--saved: the stored profile can't be used, as {reason}: '{renewal}' renews it")
    return found


def _what_if(
    specs: list[str], settings: Config, prompt_tokens: int, decode_tokens: int, allow_lossy: bool
) -> dict[str, Any]:
    from teegpu.bench import assumptions, tuned
    from teegpu.bench.predictions import Wanted
    from teegpu.metrics.cost_model import Settings

    name = settings.model.name
    defaults = {"model": name if name in assumptions.MODELS else "llama-3-8b", "gpu": "h100", "tee": "32-core-avx512"}
    # A GPU computes in bf16, so that bf16 on the link loses nothing more: what the wire dtype auto comes to there.
    wire = "bf16" if settings.run.wire_dtype == "auto" else settings.run.wire_dtype
    worlds = []
    for spec in specs:
        world = assumptions.parse(spec, defaults)
        base = Settings("fused", wire, "pipelined", 0, servers=world.servers, rows=1 + settings.run.speculate)
        worlds.append((world, Wanted(prompt_tokens, decode_tokens, base, wire, allow_lossy=allow_lossy)))
    return tuned.of_world(*worlds[0]) if len(worlds) == 1 else tuned.of_worlds(worlds)


def _against(paths: list[Path]) -> dict[str, Any]:
    from teegpu.bench.against import against, packed_costs

    return against(paths, packed_costs())


def _apply(changes: dict[str, Any], config_file: Path | None) -> None:
    """Writes ``changes`` to the file of ``--config``, or else the user's own, and says so."""
    from teegpu import config
    from teegpu.configfile import updated

    target = config_file if config_file is not None else config.user_file()
    try:
        text = target.read_text(encoding="utf-8") if target.exists() else ""
        _replace(target, updated(text, changes, str(target)))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{target}: can't be changed: {reason}") from None
    console = message_console()
    written = ", ".join(f"{key} = {config.to_toml(value)}" for key, value in changes.items())
    console.print(f"written to {target}: {written}", soft_wrap=True)
    now = config.load(config_file=config_file)
    for key, value in changes.items():
        if now.values()[key] != value:
            console.print(f"but {key} is set by {now.source(key)}, which goes before that file", soft_wrap=True)


def _replace(target: Path, text: str) -> None:
    """Whole or not at all, with the permissions that it had."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
