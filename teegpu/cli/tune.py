"""``teegpu tune``: measure what predictions need, rank the settings, and write the best ones down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli.common import ConfigFile, message_console, sigterm_as_interrupt
from teegpu.cli.destination import Destination
from teegpu.cli.flags import Flags, takes_settings
from teegpu.errors import ConfigError, UsageError
from teegpu.files import there

if TYPE_CHECKING:
    from teegpu.bench.tuning import Wanted
    from teegpu.config import Config
    from teegpu.stats.profile import Profile
    from teegpu.stats.traffic import Shape

WHAT = "What to predict"
OTHER = "Without measuring"

MOST_TOKENS = 10_000_000


@takes_settings("tune")
def tune(
    flags: Flags,
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
        typer.Option(
            "--apply",
            help="Have your settings file, or --config, go by it: plans auto, and the transport.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    saved: Annotated[
        bool, typer.Option("--saved", help="Predict from the profile that is stored.", rich_help_panel=OTHER)
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Predict for another world: rtt=20ms,bandwidth=10gbit,model=llama-3-8b,gpu=h200,tee=32-core-amx,"
            "servers=2,privacy=pads; a model may be a folder or a Hugging Face id, too. Given several times, worlds "
            "side by side.",
            rich_help_panel=OTHER,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Then follow the prediction of each plan, and show what it took.", rich_help_panel=WHAT
        ),
    ] = False,
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

    _check(
        prompt_tokens,
        decode_tokens,
        {"--what-if": bool(what_if), "--saved": saved},
        {
            "--endpoint": flags["run.endpoints"] is not None,
            "--link": flags["run.link"] is not None,
            "--device": flags["server.device"] is not None,
            "--apply": apply,
            "--check": check,
            "--allow-lossy": allow_lossy,
        },
    )
    machine.share_cores()
    # From here on torch is loaded, which reads how its threads wait.
    from teegpu.bench import tuned
    from teegpu.bench.tuning import Wanted

    settings = config.load(flags, config_file)
    form = tuned.choose_format(form, out.name if out is not None else "")
    destination = Destination(out, force=True, quiet=quiet)
    with sigterm_as_interrupt():
        if what_if:
            document = _what_if(what_if, settings, prompt_tokens, decode_tokens)
        else:
            wanted = Wanted(prompt_tokens, decode_tokens, allow_lossy)
            document = _tuned(settings, wanted, saved=saved, check=check, quiet=quiet)
        destination.write(tuned.render(document, form))
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
    if given == ["--what-if"]:
        idle = next((name for name, on in flags.items() if on), None)
        if idle is not None:
            raise UsageError(f"{idle} does nothing beside {given[0]}, which measures nothing: leave it out")


def _tuned(settings: Config, wanted: Wanted, *, saved: bool, check: bool, quiet: bool) -> dict[str, Any]:
    """Measured now, or ``saved``."""
    from teegpu.bench import tuned
    from teegpu.bench.tuning import Tuning
    from teegpu.cli.benchcommon import progress
    from teegpu.cli.models import find_model
    from teegpu.model.reader import read_spec
    from teegpu.options import wire_dtype
    from teegpu.stats import profile as profiles
    from teegpu.tee.choose import local_fits

    folder = find_model(settings, quiet=quiet)
    tuning = Tuning(folder, settings, wanted)
    if saved:
        profile = _stored(settings, folder)
    else:
        with progress(quiet=quiet) as notify:
            profile = tuning.run(notify)
        try:
            kept = f"profile kept in {profiles.write(profile)}"
        except ConfigError as error:
            kept = f"{error}: what was measured is shown, and the plan auto will not know of it"
        if not quiet:
            message_console().print(kept, soft_wrap=True)
    wire = wire_dtype(settings, [profile.server.dtype])
    fits = local_fits(read_spec(folder))
    document = tuned.of_profile(profile, wanted, wire, local_fits=fits, facts_of_it=tuning.facts)
    if check:
        with progress(quiet=quiet) as notify:
            document["checked"] = tuning.followed(document, notify)
    return document


def _stored(settings: Config, folder: Any) -> Profile:
    """The stored profile of these settings. Raises ``ConfigError`` where there is none, or one that does not fit."""
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore
    from teegpu.stats import profile as profiles
    from transports.netem.spec import LinkSpec

    run = settings.run
    link = str(LinkSpec.parse(run.link)) if run.link else ""
    with WeightStore(folder, read_spec(folder)) as store:
        digest = store.digest()
    place = profiles.path_of(run.endpoints, link, digest)
    renewal = profiles.renewal(run.endpoints, link, settings.model.name)
    if not there(place):
        raise ConfigError(f"--saved: there is no profile of these yet: '{renewal}' measures one")
    found = profiles.read(place)
    if reason := found.misfit(digest=digest):
        raise ConfigError(f"--saved: the stored profile can't be used, as {reason}: '{renewal}' renews it")
    return found


def _what_if(specs: list[str], settings: Config, prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    from teegpu.bench import whatif
    from teegpu.facts import AUTO, BF16

    def shape_of(model: str) -> Shape:
        known = model in whatif.MODELS or not (set(model) & set("/.~") or there(Path(model)))
        return whatif.known(model) if known else _shape_of(model, settings)

    name = settings.model.name
    defaults = {"model": name if name in whatif.MODELS else "llama-3-8b", "gpu": "h100", "tee": "32-core-avx512"}
    # A GPU computes in bf16, so that bf16 on the link loses nothing more: what the wire dtype auto comes to there.
    wire = BF16.name if settings.run.wire_dtype == AUTO else settings.run.wire_dtype
    worlds = [whatif.parse(spec, defaults, wire, shape_of) for spec in specs]
    return whatif.document(worlds, prompt_tokens, decode_tokens)


def _shape_of(model: str, settings: Config) -> Shape:
    """The dimensions of a folder, a .gguf file or a Hugging Face id. Of one that is not here its configuration is
    fetched, and no weights. Raises ``ModelError``."""
    from teegpu.model import catalog
    from teegpu.model.reader import read_spec
    from teegpu.stats.traffic import Shape

    where = settings.model
    spec = read_spec(catalog.described(model, cache_dir=where.cache_path, offline=where.offline))
    windows = spec.layer_windows if any(spec.layer_windows) else ()
    return Shape(
        spec.layers, spec.hidden_size, spec.intermediate_size, spec.heads, spec.kv_heads, spec.head_dim,
        spec.vocab_size, windows,
    )  # fmt: skip


def _apply(changes: dict[str, Any], config_file: Path | None) -> None:
    """Writes ``changes`` to the file of ``--config``, or else the user's own, and says so."""
    from teegpu import config

    target = config_file if config_file is not None else config.user_file()
    try:
        text = target.read_text(encoding="utf-8") if target.exists() else ""
        config.write(target, config.updated(text, changes, str(target)))
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
