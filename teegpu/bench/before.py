"""How it was done before, for the first rungs of the ladder alone; the product has no part in any of it.

``packed``: all frames of a message as bytes in one msgpack map, with a copy at each step, as a program would do it that
had not thought about it. It is a transport around another one: runner and server pack what they would have sent as
frames of their own, and take it apart again; neither sees anything of it but its time. The server is a program of its
own, ``python -m teegpu.bench.before``, with the flags of an embedded one.

``no-kv-cache`` and ``no-position-cache``: decoding without what is kept between steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence as Several
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgpack
import torch

import transports
from teegpu import config, machine
from teegpu.config import Config
from teegpu.errors import TeegpuError, WireError
from teegpu.gpu import server as gpu
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import server_options, wire_limits
from teegpu.tee.engine import Engine, Part
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.sequence import Sequence
from teegpu.wire.unpacking import unpack
from transports.base import (
    Buffer,
    Changed,
    Client,
    Compression,
    Incoming,
    Message,
    Reply,
    Sent,
    Server,
    ServerLoad,
)
from transports.errors import FrameError

FRAMES = "frames"

PACKING_BYTES = 4096
"""What packing adds to a message at most: the map, its key, and five bytes for each of some hundred frames."""


def pack(frames: Several[Buffer]) -> bytes:
    """One msgpack map with a copy of every frame, which msgpack copies once more."""
    packed: bytes = msgpack.packb({FRAMES: [bytes(frame) for frame in frames]})
    return packed


def taken_apart(frames: Several[memoryview]) -> list[memoryview]:
    """The frames that were packed, each in memory of its own. Raises ``WireError`` for anything else."""
    body = unpack(frames[0], "a packed message") if len(frames) == 1 else None
    parts = body.get(FRAMES) if isinstance(body, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, bytes) for part in parts):
        raise WireError(f"a packed message is one map with '{FRAMES}', a list of bytes")
    return [memoryview(bytearray(part)) for part in parts]


class PackedClient(Client):
    """Packs what goes through ``inner``, a lock-step client, and so is one itself. Raises what ``inner`` does, and
    ``FrameError`` for a reply that was not packed."""

    name: ClassVar[str] = "packed"

    def __init__(self, inner: Client) -> None:
        self.endpoint = inner.endpoint
        self._inner = inner

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        most = message.max_reply_bytes and message.max_reply_bytes + PACKING_BYTES
        packed = Message([pack(message.frames)], max_reply_bytes=most)
        return Changed(self._inner.begin(packed, timeout_seconds=timeout_seconds), self._opened)

    @property
    def pending_bytes(self) -> int:
        return self._inner.pending_bytes

    def close(self) -> None:
        self._inner.close()

    def _opened(self, reply: Reply) -> Reply:
        try:
            return replace(reply, frames=taken_apart(reply.frames))
        except WireError as error:
            raise FrameError(f"{self.endpoint} sent a reply that is not packed ({error})") from None


class PackedServer(Server):
    """Packs what goes through ``inner``. A request that was not packed is handed out without frames, and so refused as
    malformed by who reads it."""

    def __init__(self, inner: Server) -> None:
        self.address = inner.address
        self._inner = inner

    @property
    def load(self) -> ServerLoad:
        return self._inner.load

    def drain(self) -> None:
        self._inner.drain()

    def next(self, timeout_seconds: float | None = None) -> Incoming | None:
        incoming = self._inner.next(timeout_seconds)
        if incoming is None:
            return None
        try:
            frames = taken_apart(incoming.frames)
        except WireError:
            frames = []
        return replace(incoming, frames=frames)

    def reply(self, incoming: Incoming, message: Message) -> Compression:
        return self._inner.reply(incoming, Message([pack(message.frames)]))

    def wake(self) -> None:
        self._inner.wake()

    def close(self, drain_seconds: float = 5.0) -> None:
        self._inner.close(drain_seconds)


# Decoding without what is kept between steps


class WholeContextEngine(Engine):
    """Each step computes prompt and output so far again, in one pass, without keys and values of the step before."""

    def next_row(self, sequence: Sequence) -> Part | None:
        part = super().next_row(sequence)
        if part is not None:
            part.start, part.ids, part.want, part.drafts = 0, list(sequence.tokens), "last", []
        return part


class AnglesAnew(RotaryTable):
    """Cosines and sines are computed whenever they are asked for: in each layer of each pass."""

    def at(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * self._frequencies
        return (angles.cos() * self._scaling)[:, None, :], (angles.sin() * self._scaling)[:, None, :]


# The server that packs


def main(arguments: Several[str]) -> int:
    """Serves until standard input ends, which ends the process; else the exit code of what went wrong."""
    parser = argparse.ArgumentParser()
    for name in ("model", "bind", "device", "dtype", "weights", "threads", "config"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("embedded", "offline"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(arguments)
    _end_with_input(given.bind)
    settings = {f"server.{name}": getattr(given, name) for name in ("bind", "device", "dtype", "weights")}
    settings |= {"server.threads": int(given.threads), "server.key": "", "server.auth_dir": ""}
    try:
        _serve(config.load(settings, Path(given.config)), Path(given.model))
    except TeegpuError as error:
        sys.stderr.write(f"teegpu: {error}\n")
        return error.exit_code
    return 0


def _end_with_input(bind: str) -> None:
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


def _serve(settings: Config, path: Path) -> None:
    """Holds the model in ``path`` and answers packed requests, without end. Says where in a line of JSON."""
    machine.keep_freed_memory()
    torch.set_num_threads(settings.server.threads)
    folder = ModelFolder(path.name, path)
    spec = read_spec(folder)
    limits = wire_limits(settings)
    with transports.listen(settings.server.bind, server_options(settings)) as inner:
        with WeightStore(folder, spec) as store:
            server = settings.server
            executor, identity = gpu.load(
                store, spec, device=server.device, dtype=server.dtype, weights=server.weights, limits=limits
            )
        sys.stdout.write(json.dumps({"address": inner.address}) + "\n")
        sys.stdout.flush()
        gpu.GpuServer(PackedServer(inner), executor, identity, limits).serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
