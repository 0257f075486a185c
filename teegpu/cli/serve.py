"""``teegpu serve``: be the GPU server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, message_console

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.config import Config
    from teegpu.gpu.server import GpuServer, Identity

_PARENT_CHECK_SECONDS = 1.0


def serve(
    model: Annotated[str | None, typer.Option(help="Catalogue name, Hugging Face id, folder or .gguf file.")] = None,
    bind: Annotated[str | None, typer.Option(help="tcp://host:port (port 0: any free one) or ipc:///path.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:n.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: all cores.")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network to find the model.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that other machines can reach, without keys.")
    ] = False,
    config_file: ConfigFile = None,
    embedded: Annotated[bool, typer.Option("--embedded", hidden=True)] = False,
) -> None:
    """Hold a model's weights and compute matrix products for runners, until Ctrl-C or SIGTERM.

    The request in hand is finished before the server ends (a second Ctrl-C does not wait for it). What a runner sends
    is seen in the clear by this process.
    """
    from teegpu import config

    settings = config.load(
        {
            "model.name": model,
            "server.bind": bind,
            "server.device": device,
            "server.dtype": dtype,
            "server.threads": threads,
            "model.offline": offline,
        },
        config_file,
    )
    check_address(settings.server.bind, insecure)
    console = message_console()
    # Lines in a log stay whole: there is no terminal whose width they should fit.
    console.soft_wrap = not console.is_terminal
    if insecure:
        console.print("warning: --insecure: anybody who reaches this address can use the server and read its traffic")
    with Stop() as stop, _life_line(settings.server.bind, stop) if embedded else contextlib.nullcontext():
        try:
            _serve(settings, stop, console, embedded=embedded)
        except KeyboardInterrupt:
            interrupts.handled()
            if stop.serving:
                raise
            console.print("stopped while loading")
    if embedded:
        # Nothing is left to be done, and taking torch down would keep the end of the run waiting.
        os._exit(0)


def _serve(settings: Config, stop: Stop, console: Console, *, embedded: bool) -> None:
    import torch

    import transports
    from teegpu import machine
    from teegpu.cli.models import find_model
    from teegpu.cli.progress import shown
    from teegpu.gpu import server as gpu
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore
    from teegpu.options import server_options, wire_limits

    machine.keep_freed_memory()
    torch.set_num_threads(settings.server.threads or machine.available_cores())
    folder = find_model(settings, quiet=embedded)
    spec = read_spec(folder)
    limits = wire_limits(settings)
    # Bind first: a port that is taken should not cost the time of loading.
    with transports.listen(settings.server.bind, server_options(settings)) as transport:
        with WeightStore(folder, spec) as store, shown(quiet=embedded) as progress:
            executor, identity = gpu.load(
                store,
                spec,
                device=settings.server.device,
                dtype=settings.server.dtype,
                limits=limits,
                progress=lambda share: progress(f"loading {spec.name}", share),
            )
        server = gpu.GpuServer(transport, executor, identity, limits)
        with stop.ends(server):
            if embedded:
                sys.stdout.write(json.dumps({"address": transport.address}) + "\n")
                sys.stdout.flush()
            else:
                _banner(console, transport.address, identity)
            server.serve()
    if not embedded:
        count = server.requests_served
        console.print(f"stopped after {count:,} request{'s' * (count != 1)}")


class Stop:
    """SIGINT and SIGTERM while it is entered: the first one ends the server after the request in hand, or loading at
    once (as ``KeyboardInterrupt``); a second one does not wait for the request. ``serving``: whether loading is over.
    """

    def __init__(self) -> None:
        self.serving = False
        self._server: GpuServer | None = None
        self._asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and can't be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _on_signal(self, *_: object) -> None:
        again, self._asked = self._asked, True
        if self._server is not None and not again:
            self._server.stop()
        elif not self.serving or again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def ends(self, server: GpuServer) -> Iterator[None]:
        """Within it, signals end ``server``; one that came before raises ``KeyboardInterrupt``."""
        self._server = server
        # Python drops an exception that a signal raises inside a destructor or a callback of C code: look again.
        if self._asked:
            raise KeyboardInterrupt
        self.serving = True
        try:
            yield
        finally:
            self._server = None


def check_address(bind: str, insecure: bool) -> None:
    """Raises ``ConfigError`` for an address that can't be served, or one that others can reach unless ``insecure``."""
    import ipaddress

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
    if address.scheme == "ipc" or address.host == "localhost" or insecure:
        return
    try:
        local = ipaddress.ip_address(address.host.strip("[]")).is_loopback
    except ValueError:
        local = False  # a wildcard or a network interface
    if not local:
        raise ConfigError(
            f"server.bind: {bind} can be reached from other machines, and this version has no keys: bind to "
            "tcp://127.0.0.1:PORT and tunnel it (ssh -L), or accept the risk with --insecure"
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


def _banner(console: Console, address: str, identity: Identity) -> None:
    from teegpu.units import human_bytes
    from teegpu.wire.messages import PROTOCOL_VERSION

    console.print(f"teegpu GPU server ready at {address}")
    facts = [
        f"model {identity.spec.name}",
        f"device {identity.device}",
        identity.dtype,
        f"{human_bytes(identity.memory_bytes)} of weights",
        f"{identity.threads} CPU thread{'s' * (identity.threads != 1)}",
        f"protocol {PROTOCOL_VERSION}",
        f"digest {identity.digest[:12]}",
    ]
    console.print(" · ".join(facts))
    console.print("activations that runners send are visible to this process in the clear; stop with Ctrl-C")
