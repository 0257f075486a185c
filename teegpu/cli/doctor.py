"""``teegpu doctor``: is everything there that a run needs?"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import teegpu
from teegpu import machine
from teegpu.cli.common import ConfigFile, from_transport, result_console
from teegpu.cli.flags import Flags, takes_settings
from teegpu.config import SETTINGS, Config, RunSettings, load
from teegpu.errors import ConfigError, EvidenceError, ModelError, TeegpuError

if TYPE_CHECKING:
    from teegpu.endpoints import Endpoint
    from teegpu.remote.health import Probe
    from teegpu.wire.messages import HealthReport

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "pyzmq",
    "msgpack",
    "zstandard",
    "numpy",
    "rich",
    "typer",
)

BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``status`` is ``ok``, ``warn`` or ``fail``; ``exit_code`` counts where it is ``fail``. ``facts`` are
    for ``--json`` alone."""

    name: str
    status: str
    detail: str
    exit_code: int = 0
    facts: dict[str, Any] | None = None


@takes_settings("doctor")
def doctor(
    flags: Flags,
    config_file: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """Check this machine, the model and the server, and show how much a server has to do.

    Exits with 0 when nothing failed, 2 when the settings can't be read, 3 when the model can't be used, 4 when the
    server does not answer.
    """
    machine.share_cores()
    checks = []
    for check in examine(flags, config_file):
        checks.append(check)
        if not as_json:
            _print(check)
    if as_json:
        rows = [
            {"name": check.name, "status": check.status, "detail": check.detail} | (check.facts or {})
            for check in checks
        ]
        failed = any(check.status == "fail" for check in checks)
        typer.echo(json.dumps({"ok": not failed, "checks": rows}, indent=2, ensure_ascii=False))
    raise typer.Exit(next((check.exit_code for check in checks if check.status == "fail"), 0))


def examine(flags: Flags | None = None, config_file: Path | None = None) -> Iterator[Check]:
    """Every finding, as it is made. With settings that can't be read the rest is examined for the defaults."""
    try:
        config = load(flags, config_file)
        changed = [key for key, value in config.values().items() if value != SETTINGS[key].default]
        settings = Check("settings", "ok", f"changed from the default: {', '.join(changed) or 'none'}")
    except ConfigError as error:
        config = Config(run=RunSettings(endpoints=(flags or {}).get("run.endpoints") or ()))
        settings = Check("settings", "fail", str(error), error.exit_code)
    yield from versions()
    yield settings
    yield from hardware(config)
    yield trusted_execution()
    yield attestation()
    yield model(config)
    yield from servers(config)


def versions() -> Iterator[Check]:
    yield Check("teegpu", "ok", f"{teegpu.__version__}, Python {platform.python_version()}, {platform.platform()}")
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    yield Check("packages", "ok", ", ".join(found))
    if missing:
        yield Check("packages", "fail", f"not installed: {', '.join(missing)}; 'pip install teegpu' brings them", 1)


def hardware(config: Config) -> Iterator[Check]:
    cores = machine.available_cores()
    memory = machine.memory_bytes() / 2**30
    yield Check("machine", "ok", f"{machine.cpu_name()}, {cores} core(s) for this process, {memory:.1f} GiB of memory")
    features = machine.cpu_features()
    bf16 = "with" if BF16_INSTRUCTIONS & set(features) else "without"
    yield Check("processor", "ok", f"{bf16} bf16 instructions; of those that matter: {', '.join(features) or 'none'}")
    yield threads(config, cores)
    yield devices(config)


def threads(config: Config, cores: int) -> Check:
    embedded = not config.run.endpoint
    split = machine.thread_split(embedded, cores)
    runner, server = config.run.threads or split[0], config.server.threads or split[1]
    if not embedded:
        where = ", ".join(config.run.endpoints)
        several = len(config.run.endpoints) > 1
        has = "servers at {} have their" if several else "server at {} has its"
        return Check("threads", "ok", f"runner {runner}; the {has.format(where)} own")
    detail = f"runner {runner}, embedded server {server}, on {cores} core(s)"
    shared = machine.shares_cores()
    if shared:
        detail += ", in turn"
    if machine.oversubscribed(runner, server, cores, shared=shared):
        return Check("threads", "warn", f"{detail}: more threads than cores; set run.threads and server.threads to 0")
    return Check("threads", "ok", detail)


def devices(config: Config) -> Check:
    import torch

    wanted = config.server.device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        if index >= count:
            detail = f"server.device is {wanted}, but PyTorch finds {count} CUDA device(s): set it to auto or cpu"
            return Check("devices", "fail", detail, 1)
    if not count:
        return Check("devices", "ok", "no CUDA device: a server on this machine computes on the CPU")
    names = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return Check("devices", "ok", "; ".join(names))


def trusted_execution() -> Check:
    tee = machine.tee()
    if tee.kind == "none":
        return Check("TEE", "warn", f"none: {tee.note}")
    return Check("TEE", "ok", f"{tee.kind} ({', '.join(tee.evidence)}): {tee.note}")


def attestation() -> Check:
    """Whether evidence can be had here, by asking for some."""
    import secrets

    from teegpu.attest import sources

    source = sources.find()
    if source is None:
        return Check("evidence", "warn", "none: nothing here can be attested to anybody")
    try:
        quoted = source.quote(secrets.token_bytes(64))
    except EvidenceError as error:
        return Check("evidence", "warn", str(error))
    detail = f"{quoted.kind} by {source.describe}, {len(quoted.quote):,} bytes; 'teegpu api' gives it to who asks"
    return Check("evidence", "ok", detail)


def model(config: Config) -> Check:
    from teegpu.model import catalog, reader

    name, cache = config.model.name, config.model.cache_path
    try:
        folder = catalog.find_local(name, cache_dir=cache)
        if folder is None:
            return absent_model(config)
        spec = reader.read_spec(folder)
    except ModelError as error:
        return Check("model", "fail", str(error), error.exit_code)
    return Check("model", "ok", f"{name}: {spec.architecture}, {spec.layers} layers, in {folder.path}")


def absent_model(config: Config) -> Check:
    """For a model that can't be used as it is. Raises ``ModelError`` where a run could not get it either."""
    from teegpu.model import catalog

    name = config.model.name
    if Path(name).expanduser().is_file() and name.lower().endswith(".gguf"):
        return Check("model", "warn", f"{name} has still to be converted; 'teegpu run' does it when it is first used")
    remote = name in catalog.ENTRIES or (name.count("/") == 1 and name[0] not in "/.~")
    if config.model.offline or not remote:
        catalog.resolve(name, cache_dir=config.model.cache_path, offline=True)
    return Check("model", "warn", f"{name} has still to be fetched; 'teegpu run' does it when it is first used")


def servers(config: Config) -> Iterator[Check]:
    """Two findings for each endpoint: who answers there, and how it is."""
    if not config.run.endpoints:
        yield Check("server", "ok", "none configured (run.endpoints): each run starts its own")
    from teegpu import endpoints

    for text in config.run.endpoints:
        try:
            listed = endpoints.parse_all([text])
        except TeegpuError as error:
            yield Check("server", "fail", str(error), error.exit_code, {"endpoint": text})
            continue
        for endpoint in listed:
            yield from server(endpoint, config)


def server(endpoint: Endpoint, config: Config) -> Iterator[Check]:
    from teegpu.remote import health

    text = str(endpoint)
    try:
        found = health.probe(endpoint, config)
    except Exception as error:
        told = error if isinstance(error, TeegpuError) else from_transport(error)
        if told is None:
            raise
        yield Check("server", "fail", str(told), told.exit_code, {"endpoint": text})
        return
    welcome, facts = found.welcome, _facts(text, found)
    first, last = welcome.layers
    part = f", layers {first}-{last}" if last - first + 1 != welcome.dims.get("layers") else ""
    ranks = f", {welcome.ranks} ranks" if welcome.ranks > 1 else ""
    detail = (
        f"{endpoint.address} answers in {found.rtt_seconds * 1e3:.2f} ms: {welcome.model} ({welcome.digest[:12]}) on "
        f"{welcome.device} in {welcome.dtype}{part}{ranks}, version {welcome.software}"
    )
    yield Check("server", "ok", detail, facts=facts)
    yield Check("load", "warn" if found.health.draining else "ok", load_line(found.health), facts={"endpoint": text})


def load_line(health: HealthReport) -> str:
    """``up 3 h, 2 clients, 12.5% busy, 1 request in hand or waiting (3.0 MiB), …``."""
    from teegpu.units import human_age, human_bytes, percent

    def counted(number: int, thing: str) -> str:
        return f"{number:,} {thing}{'s' * (number != 1)}"

    flight = counted(health.in_flight, "request")
    parts = [
        f"up {human_age(health.uptime_seconds)}",
        counted(health.clients, "client"),
        f"{percent(health.busy_share)} busy in the last 10 s",
        f"{flight} in hand, {health.waiting_requests:,} of them waiting ({human_bytes(health.waiting_bytes)})",
        f"{health.requests_served:,} served, {health.refused:,} refused",
        f"{human_bytes(health.rss_bytes)} of memory, weights {human_bytes(health.weight_bytes)}",
        *([f"int8 weights {human_bytes(health.ring_bytes)}"] if health.ring_bytes else []),
    ]
    if health.draining:
        parts.insert(0, "it is being stopped")
    return ", ".join(parts)


def _facts(text: str, found: Probe) -> dict[str, Any]:
    health = asdict(found.health)
    del health["request_id"]
    return {"endpoint": text, "rtt_seconds": found.rtt_seconds, "threads": found.welcome.threads, "health": health}


def _print(check: Check) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    row = Table.grid(padding=(0, 2))
    row.add_column(width=4)
    row.add_column(width=9)
    row.add_column(overflow="fold")
    # the word alone says it all: colour is only for those who see it
    row.add_row(Text(check.status, styles[check.status]), check.name, check.detail)
    result_console().print(row)
