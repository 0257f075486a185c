"""Several processes that compute a server's programs together, over torch.distributed.

Each rank holds its part of every matrix, neighbouring rows, and all registers that steps read. Rank 0 announces what
comes next; then all go through the same steps, and what each has computed of a register is gathered: by all, where a
later step reads it, else by rank 0 alone. A part of a product takes no more than the matrix's rows, so values modulo
2**32 are the same bits for any number of ranks.

What travels are tensors: bytes that are read as numbers, names and shapes, and never as objects.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import torch
import torch.distributed

from teegpu.model.weights import Cut, bytes_of

Product = Callable[[torch.Tensor], torch.Tensor]

_distributed: Any = torch.distributed
"""Most of what is needed of it is without types."""

_NEVER: Final = timedelta(days=10_000)
"""Ranks wait for the next program for as long as there is none. Whoever hangs is found by rank 0's watch."""

_FRAME_BYTES: Final = 2**15
"""Of what is announced at once: a program of a few steps, and inputs of one token. What is longer takes a second
message."""

_ALIGNED: Final = 64
"""Programs and inputs begin at multiples of so many bytes."""

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
"""Of a program's inputs."""

RUN, MAKE_RING = range(2)
"""What rank 0 announces: a program, or that the int8 matrices are made."""


class Order(NamedTuple):
    """What comes next. ``packed``: the program; ``inputs``: its inputs, or room for them on a CUDA device."""

    kind: int
    packed: bytes
    inputs: list[torch.Tensor]


class Ranks:
    """The rank ``cut.rank`` among ``cut.ranks`` processes of this machine, which meet in ``folder``, where nobody else
    may write. Blocks until all are there.

    ``lost``, of rank 0, is called where ranks are out of step for good, with what happened; it does not return.
    """

    def __init__(
        self, cut: Cut, device: torch.device, folder: Path, lost: Callable[[str], NoReturn] | None = None
    ) -> None:
        self.cut = cut
        self.waits_since: float | None = None
        """Of rank 0: since when it waits for others, or they may for it; ``time.monotonic``."""
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._lost = lost
        store = _distributed.FileStore(str(folder / "ranks"))  # without a count it leaves the file to us
        with self._together():
            options = _distributed.ProcessGroupGloo._Options()
            options._timeout = _NEVER
            options._devices = [_distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._control = _distributed.ProcessGroupGloo(store, cut.rank, cut.ranks, options)
            self._data = self._control if self._on_cpu else _nccl(store, cut)
            # Afterwards nobody reads the store any more: some connect when they first have something to say.
            self._data.allreduce(torch.zeros(1, device=device)).wait()
            self._control.barrier().wait()

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.cut.rank == 0

    def close(self) -> None:
        """Ends the connections: others that wait see that as an error."""
        del self._control, self._data

    # Of rank 0

    @contextmanager
    def running(self, packed: bytes, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within it, all ranks run the program ``packed`` on ``inputs``, which ``share`` may hand to them."""
        with self._together():
            self._announce(RUN, packed, inputs)
            yield

    def make_ring(self) -> None:
        """Has the others make their int8 matrices."""
        with self._together():
            self._announce(MAKE_RING)

    @contextmanager
    def _together(self) -> Iterator[None]:
        self.waits_since = time.monotonic()
        try:
            yield
        except Exception as error:
            if self._lost is None:
                raise
            # One that did not finish a step is out of step with the others, whatever it was.
            self._lost(f"{type(error).__name__}: {error}")
        finally:
            self.waits_since = None

    def _announce(self, kind: int, packed: bytes = b"", inputs: Sequence[torch.Tensor] = ()) -> None:
        numbers = [0, kind, len(packed), len(inputs)]
        for each in inputs:
            numbers += [_DTYPES.index(each.dtype), each.dim(), *each.shape]
        parts: list[bytes | memoryview] = [struct.pack(f"<{len(numbers)}q", *numbers), packed]
        if self._on_cpu:
            parts += [bytes_of(each.contiguous()) for each in inputs]
        content = bytearray().join(piece for part in parts for piece in (part, bytes(-len(part) % _ALIGNED)))
        struct.pack_into("<q", content, 0, len(content))
        message = torch.frombuffer(content.ljust(_FRAME_BYTES, b"\0"), dtype=torch.uint8)
        self._control.broadcast(message[:_FRAME_BYTES], 0).wait()
        if len(message) > _FRAME_BYTES:
            self._control.broadcast(message[_FRAME_BYTES:], 0).wait()

    # Of the others

    def receive(self) -> Order:
        """Waits for what comes next."""
        message = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        self._control.broadcast(message, 0).wait()
        (length,) = struct.unpack_from("<q", bytes_of(message))
        if length > _FRAME_BYTES:
            message = torch.cat([message, torch.empty(length - _FRAME_BYTES, dtype=torch.uint8)])
            self._control.broadcast(message[_FRAME_BYTES:], 0).wait()
        content, place = bytes_of(message), 8

        def numbers(count: int) -> tuple[int, ...]:
            nonlocal place
            found = struct.unpack_from(f"<{count}q", content, place)
            place += 8 * count
            return found

        def part(size: int) -> torch.Tensor:
            nonlocal place
            start = place + -place % _ALIGNED
            place = start + size
            return message[start:place]

        kind, program_bytes, count = numbers(3)
        kinds = [(_DTYPES[dtype], numbers(dimensions)) for dtype, dimensions in (numbers(2) for _ in range(count))]
        packed = bytes(bytes_of(part(program_bytes)))
        inputs = [
            part(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
            if self._on_cpu
            else torch.empty(shape, dtype=dtype, device=self._device)
            for dtype, shape in kinds
        ]
        return Order(kind, packed, inputs)

    # Of all

    def share(self, inputs: Iterable[torch.Tensor]) -> None:
        """Fills ``inputs``, on a CUDA device, with those of rank 0. On a CPU they came with what was announced."""
        if not self._on_cpu:
            for work in [self._data.broadcast(each.contiguous().view(torch.uint8), 0) for each in inputs]:
                work.wait()
        self._at_it()

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of what all ranks have."""
        self._at_it()
        self._data.allreduce(part).wait()
        self._at_it()
        return part

    def whole(self, product: Product, outputs: Sequence[int], *, everywhere: bool) -> Product:
        """``product``, with this rank's parts of matrices of ``outputs`` rows, as one with all of their rows: (rows,
        in) → (rows, sum of outputs). Not ``everywhere``: rank 0 alone has what comes of it."""
        widths = [[cut.rows(size) for size in outputs] for cut in self.cut.others()]
        ranks, own = range(self.cut.ranks), self.cut.rank
        receivers = ranks if everywhere else (0,)

        def gathered(x: torch.Tensor) -> torch.Tensor:
            # Room for the others' parts is there before ours is computed, so that nobody waits to send.
            theirs = [rank for rank in ranks if rank != own and own in receivers]
            parts = {rank: x.new_empty((len(x), sum(widths[rank]))) for rank in theirs}
            receiving = self._receive(parts) if self._on_cpu else []
            parts[own] = product(x).contiguous()
            self._at_it()
            self._send(parts, receiving, [rank for rank in receivers if rank != own])
            self._at_it()
            if own not in receivers:
                return parts[own]
            columns = [parts[rank].split(widths[rank], 1) for rank in ranks]
            return torch.cat([each for matrix in zip(*columns, strict=True) for each in matrix], 1)

        return gathered

    def _receive(self, parts: Mapping[int, torch.Tensor]) -> list[Any]:
        return [self._data.recv([part], rank, 0) for rank, part in parts.items() if rank != self.cut.rank]

    def _send(self, parts: Mapping[int, torch.Tensor], receiving: list[Any], receivers: Sequence[int]) -> None:
        """Sends this rank's part to ``receivers``, and waits until those of others are there."""
        if not self._on_cpu:  # All at once: one after the other, ranks that all send first would wait for each other.
            self._data._start_coalescing()
            self._receive(parts)
        works = receiving + [self._data.send([parts[self.cut.rank]], rank, 0) for rank in receivers]
        for work in works if self._on_cpu else [self._data._end_coalescing()]:
            work.wait()

    def _at_it(self) -> None:
        """Notes that this rank came forward."""
        if self.waits_since is not None:
            self.waits_since = time.monotonic()


def _nccl(store: object, cut: Cut) -> Any:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = _distributed.ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    return _distributed.ProcessGroupNCCL(_distributed.PrefixStore("nccl", store), cut.rank, cut.ranks, options)
