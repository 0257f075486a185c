"""``teegpu serve``: be the GPU server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from teegpu import errors
from teegpu.cli import interrupts, logs
from teegpu.cli.common import ConfigFile, InsecureServers, message_console
from teegpu.cli.flags import Flags, takes_settings

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.config import Config
    from teegpu.gpu.ringweights import RingWeights
    from teegpu.gpu.server import GpuServer, Identity

log = logging.getLogger(__name__)

_PARENT_CHECK_SECONDS = 1.0

_AT_ONCE_SECONDS = 1.0
"""How long a second signal waits for Python to take notice of it: it does not in the middle of a long product."""


@takes_settings("serve", panels=False)
def serve(
    flags: Flags,
    insecure: InsecureServers = False,
    config_file: ConfigFile = None,
    embedded: Annotated[bool, typer.Option("--embedded", hidden=True)] = False,
) -> None:
    """Hold a model's weights and compute matrix products for runners, until Ctrl-C or SIGTERM.

    When it is told to end, it refuses what comes from then on, answers what it has within server.drain_seconds, and
    exits with 0; a second signal ends it at once. What a runner sends is seen in the clear by this process.
    """
    from teegpu import config, machine

    machine.share_cores()
    if embedded:
        # the embedded server's folder is its protection, whatever the user's other servers have
        flags |= {"server.key": "", "server.auth_dir": ""}
    settings = config.load(flags, config_file)
    risk = check_access(settings, insecure)
    console = message_console()
    # Lines in a log stay whole: there is no terminal whose width they should fit.
    console.soft_wrap = not console.is_terminal
    with contextlib.ExitStack() as stack:
        if not embedded:
            stack.enter_context(logs.shown(settings.server.log_format, settings.server.log_level, console))
        if risk:
            _tell(settings, console, f"warning: --insecure: {risk}", logging.WARNING, "insecure")
        _serve_until_told(settings, console, embedded=embedded)
    if embedded:
        # Nothing is left to be done, and taking torch down would keep the end of the run waiting.
        os._exit(0)


def _tell(
    settings: Config, console: Console, text: str, level: int = logging.INFO, event: str = "", **fields: object
) -> None:
    """Says to people what is no line of a log, and logs it where the log is for machines."""
    if settings.server.log_format == "json":
        log.log(level, "%s", text, extra={"event": event, **fields})
    else:
        console.print(text)


def _serve_until_told(settings: Config, console: Console, *, embedded: bool) -> None:
    with Stop() as stop, _life_line(settings.server.bind, stop) if embedded else contextlib.nullcontext():
        try:
            _serve(settings, stop, console, embedded=embedded)
        except KeyboardInterrupt:
            interrupts.handled()
            if stop.serving:
                raise
            _tell(settings, console, "stopped while loading", event="end", requests_served=0)


def _serve(settings: Config, stop: Stop, console: Console, *, embedded: bool) -> None:
    import transports
    from teegpu import machine, torchload
    from teegpu.cli.models import find_model, shown
    from teegpu.model.reader import read_spec
    from teegpu.options import held_layers, server_options, wire_limits

    machine.keep_freed_memory()
    quiet = embedded or settings.server.log_format == "json"
    folder = find_model(settings, quiet=quiet)
    if settings.server.log_format == "json":
        log.info(
            "loading %s", folder.name, extra={"event": "start", "model": folder.name, "bind": settings.server.bind}
        )
    limits = wire_limits(settings)
    # Bind first: a port that is taken should cost neither the time of loading nor that of torch.
    with contextlib.ExitStack() as stack:
        transport = stack.enter_context(transports.listen(settings.server.bind, server_options(settings)))
        with torchload.importing():
            import torch

            from teegpu.gpu import server as gpu
            from teegpu.gpu.group import Group
            from teegpu.model.weights import WeightStore

        spec = read_spec(folder)
        layers = held_layers(settings, spec.layers)
        threads, ranks = settings.server.threads or machine.available_cores(), settings.server.ranks
        torch.set_num_threads(max(1, threads // ranks))
        group = None
        if ranks > 1:
            lost = partial(_begin_anew, settings, console, stop, transport.address)
            group = stack.enter_context(Group(ranks, lost))
        with WeightStore(folder, spec) as store, shown(quiet=quiet) as progress:
            executor, identity = gpu.load(
                store,
                spec,
                device=settings.server.device,
                dtype=settings.server.dtype,
                limits=limits,
                layers=layers,
                shield=settings.server.shield,
                weights=settings.server.weights,
                group=group,
                progress=lambda share: progress(f"loading {spec.name}", share),
            )
        # The runner of an embedded server has no use for answers any more.
        drain_seconds = 0.0 if embedded else settings.server.drain_seconds
        server = gpu.GpuServer(transport, executor, identity, limits, drain_seconds=drain_seconds)
        with stop.ends(server):
            if embedded:
                sys.stdout.write(json.dumps({"address": transport.address}) + "\n")
                sys.stdout.flush()
            else:
                _banner(settings, console, transport.address, identity, executor.ring)
            server.serve()
    if not embedded:
        count = server.requests_served
        text = f"stopped after {count:,} request{'s' * (count != 1)}"
        refused = server.requests_refused
        _tell(settings, console, text, event="end", requests_served=count, requests_refused=refused)


def _begin_anew(settings: Config, console: Console, stop: Stop, address: str, reason: str) -> NoReturn:
    """Where ranks are lost: this process begins again as the same command, at the same ``address``. Clients see a lost
    connection, and ask again."""
    again = stop.serving and not stop.asked
    text = f"{reason}: {'all ranks begin again' if again else 'the server ends'}"
    _tell(settings, console, text, logging.ERROR, "rank-lost", reason=reason)
    if not again:
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.set_inheritable(descriptor, False)
    command = [sys.executable, *sys.orig_argv[1:]]
    # Port 0 has become another one; it may have been asked for in a file.
    same = [part.replace(settings.server.bind, address) for part in command]
    os.execv(sys.executable, same if same != command or address == settings.server.bind else [*same, "--bind", address])


class Stop:
    """SIGINT and SIGTERM while it is entered: the first one ends the server after what it has to answer, or loading at
    once (as ``KeyboardInterrupt``); a second one does not wait. ``serving``: whether loading is over; ``asked``:
    whether one came.
    """

    def __init__(self) -> None:
        self.serving = False
        self._server: GpuServer | None = None
        self.asked = False
        self._previous: dict[int, object] = {}
        self._seen = 0
        self._over = threading.Event()
        self._heard = interrupts.heard(self._count)

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        self._heard.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and can't be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._over.set()
        self._heard.__exit__(None, None, None)

    def _count(self, number: int) -> None:
        """Signals as the system tells them: Python's own handlers wait for the main thread to come back."""
        self._seen += number in self._previous
        if self._seen > 1 and not self._over.wait(_AT_ONCE_SECONDS):
            os._exit(errors.EXIT_INTERRUPTED)

    def _on_signal(self, *_: object) -> None:
        again, self.asked = self.asked, True
        if self._server is not None and not again:
            self._server.stop()
        elif not self.serving or again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def ends(self, server: GpuServer) -> Iterator[None]:
        """Within it, signals end ``server``; one that came before raises ``KeyboardInterrupt``."""
        self._server = server
        # Python drops an exception that a signal raises inside a destructor or a callback of C code: look again.
        if self.asked:
            raise KeyboardInterrupt
        self.serving = True
        try:
            yield
        finally:
            self._server = None


def check_access(settings: Config, insecure: bool) -> str:
    """Who can use the server that is not meant to; empty where nobody can.

    Raises ``ConfigError`` for an address that can't be served, for one that others can reach without a key, and for a
    key without an allow-list; ``insecure`` takes away the last two.
    """
    from teegpu.errors import ConfigError

    server = settings.server
    check_address(server.bind, insecure or bool(server.key))
    if server.key and server.auth_dir:
        return ""
    if not server.key:
        return "anybody who reaches this address can use the server, read its traffic and change it" if insecure else ""
    if not insecure:
        raise ConfigError(
            "server.key is set and server.auth_dir is not: give the folder with the public keys of those who may "
            "connect (serve --auth DIR), or let in all who have this server's public key, with --insecure"
        )
    return "the link is encrypted, and anybody who has this server's public key can use it"


def check_address(bind: str, insecure: bool) -> None:
    """Raises ``ConfigError`` for an address that can't be served, or one that others can reach unless ``insecure``."""
    from teegpu.errors import ConfigError
    from transports import addresses
    from transports.errors import BadAddressError

    try:
        address = addresses.parse(bind, listening=True)
    except BadAddressError as error:
        raise ConfigError(f"server.bind: {error}") from None
    if address.scheme == "inprocess":
        raise ConfigError(
            f"server.bind: {bind} reaches nobody outside of this process: use tcp://127.0.0.1:PORT or ipc://"
        )
    if not insecure and not address.local:
        raise ConfigError(
            f"server.bind: {bind} can be reached from other machines: give the server a key and its clients' keys "
            "(serve --key NAME --auth DIR; 'teegpu keys new NAME' makes one), or accept the risk with --insecure"
        )


@contextlib.contextmanager
def _life_line(bind: str, stop: Stop) -> Iterator[None]:
    """An embedded server's tie to its parent, which holds the other end of standard input: when that ends, so do we.

    The private folder of the socket goes too: the parent may not be there any more to remove it.
    """
    main = threading.get_ident()
    parent = os.getppid()
    socket = Path(bind.removeprefix("ipc://"))

    def clear() -> None:
        with contextlib.suppress(OSError):
            socket.unlink(missing_ok=True)
            socket.parent.rmdir()

    def watch() -> None:
        # A process that the parent forked may hold our standard input open: look at the parent itself as well.
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], _PARENT_CHECK_SECONDS)
            if readable and not os.read(0, 4096):
                break
        if stop.serving:
            signal.pthread_kill(main, signal.SIGTERM)
        else:
            # Loading can take minutes, and libraries swallow what a signal raises within them.
            clear()
            os._exit(0)

    threading.Thread(target=watch, daemon=True, name="life line").start()
    try:
        yield
    finally:
        clear()


def _part(identity: Identity) -> list[str]:
    """The layers held, where they are not all."""
    every = identity.spec.layers
    if identity.layers is None or identity.layers == (0, every - 1):
        return []
    first, last = identity.layers
    return [f"layers {first}-{last} of {every}"]


def _banner(settings: Config, console: Console, address: str, identity: Identity, ring: RingWeights | None) -> None:
    from teegpu.units import human_bytes
    from teegpu.wire.messages import PROTOCOL_VERSION

    if settings.server.log_format == "json":
        about: dict[str, object] = {
            "event": "ready",
            "address": address,
            "model": identity.spec.name,
            "digest": identity.digest,
            "device": identity.device,
            "dtype": identity.dtype,
            "layers": list(identity.layers or (0, identity.spec.layers - 1)),
            "ranks": identity.ranks,
            "weight_bytes": identity.memory_bytes,
            "ring_bytes": 0 if ring is None else ring.nbytes,
            "shield": settings.server.shield,
            "threads": identity.threads,
            "protocol": PROTOCOL_VERSION,
        }
        log.info("ready at %s", address, extra=about)
        return
    console.print(f"teegpu GPU server ready at {address}")
    facts = [
        f"model {identity.spec.name}",
        f"device {identity.device}",
        identity.dtype,
        f"{human_bytes(identity.memory_bytes)} of weights",
        *([f"{human_bytes(ring.nbytes)} of int8 weights"] if ring is not None and ring.made else []),
        f"{identity.threads} CPU thread{'s' * (identity.threads != 1)}",
        *([f"{identity.ranks} ranks, with as many weights each"] if identity.ranks > 1 else []),
        *_part(identity),
        f"protocol {PROTOCOL_VERSION}",
        f"digest {identity.digest[:12]}",
    ]
    console.print(" · ".join(facts))
    console.print("activations that runners send are visible to this process in the clear; stop with Ctrl-C")
