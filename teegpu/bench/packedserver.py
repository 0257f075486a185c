"""``python -m teegpu.bench.packedserver``: the GPU server of ``bench.packed``, run by ``teegpu.bench.pool`` only.

It takes the flags of an embedded server, says where it listens in a line of JSON, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from teegpu import config, machine
from teegpu.bench.packed import PackedServer
from teegpu.config import Config
from teegpu.errors import TeegpuError
from teegpu.model.folder import ModelFolder

ENTRY = ("teegpu.bench.packedserver",)
"""For ``EmbeddedServer``."""


def main(arguments: Sequence[str]) -> int:
    """Serves until standard input ends, which ends the process; else the exit code of what went wrong."""
    parser = argparse.ArgumentParser()
    for name in ("model", "bind", "device", "dtype", "threads", "config"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("embedded", "offline"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(arguments)
    end_with_input(given.bind)
    try:
        settings = config.load(
            {
                "server.bind": given.bind,
                "server.device": given.device,
                "server.dtype": given.dtype,
                "server.threads": int(given.threads),
                "server.key": "",
                "server.auth_dir": "",
            },
            Path(given.config),
        )
        serve(settings, Path(given.model))
    except TeegpuError as error:
        sys.stderr.write(f"teegpu: {error}\n")
        return error.exit_code
    return 0


def end_with_input(bind: str) -> None:
    """A thread that waits for the end of standard input: then the socket, its folder and the process go at once."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        socket = Path(bind.removeprefix("ipc://"))
        with contextlib.suppress(OSError):
            socket.unlink(missing_ok=True)
            socket.parent.rmdir()
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="standard input").start()


def serve(settings: Config, path: Path) -> None:
    """Holds the model in ``path`` and answers packed requests, without end."""
    import torch

    import transports
    from teegpu.gpu import server as gpu
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore
    from teegpu.options import server_options, wire_limits

    machine.keep_freed_memory()
    torch.set_num_threads(settings.server.threads)
    folder = ModelFolder(path.name, path)
    spec = read_spec(folder)
    limits = wire_limits(settings)
    with transports.listen(settings.server.bind, server_options(settings)) as inner:
        with WeightStore(folder, spec) as store:
            executor, identity = gpu.load(
                store, spec, device=settings.server.device, dtype=settings.server.dtype, limits=limits
            )
        sys.stdout.write(json.dumps({"address": inner.address}) + "\n")
        sys.stdout.flush()
        gpu.GpuServer(PackedServer(inner), executor, identity, limits).serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
