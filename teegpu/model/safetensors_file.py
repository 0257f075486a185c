"""One safetensors file, read by position.

The format is a little-endian u64 (the header's length in bytes), a JSON header, then the tensors' bytes. Reading by
position rather than by mapping has two reasons: the pages of a mapping count as this process's memory (a runner that
holds little should show little), and a file that is cut short while it is mapped kills the process with SIGBUS where
a short read is an error that can be told.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MAX_HEADER_BYTES = 16 << 20  # some 100,000 tensors; the format's own limit, 100 MB, is 1.6 GB as Python's objects
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 40

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class DamagedFileError(Exception):
    """The file is not what its header claims. The message says what is wrong, without the file's name."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` is the format's name of it; ``offset`` is from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SafetensorsFile:
    """An open safetensors file and its checked header. ``descriptor``: of ``path``, where that is open already; it is
    closed in the end. Raises ``DamagedFileError`` or ``OSError`` on opening."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO would wait for its writer
        self._descriptor = os.open(path, flags) if descriptor is None else descriptor
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (writable bytes) with the file's bytes from ``offset`` on."""
        done = 0
        while done < len(out):
            got = os.preadv(self._descriptor, [out[done:]], offset + done)
            if got == 0:
                raise DamagedFileError(f"it ends before byte {offset + done + 1}, inside the tensor")
            done += got

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _read_header(self) -> dict[str, TensorEntry]:
        file_bytes = os.fstat(self._descriptor).st_size
        if file_bytes < 8:
            raise DamagedFileError(f"it has {file_bytes} bytes, too few for a header")
        prefix = bytearray(8)
        self.read_into(0, memoryview(prefix))
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > file_bytes - 8:
            raise DamagedFileError(f"its header claims {header_bytes} bytes, and the file has {file_bytes}")
        if header_bytes > MAX_HEADER_BYTES:
            raise DamagedFileError(f"its header has {header_bytes} bytes, more than {MAX_HEADER_BYTES}")
        raw = bytearray(header_bytes)
        self.read_into(8, memoryview(raw))
        try:
            header = json.loads(raw.decode("utf-8"), parse_int=_small_int)
        except (ValueError, RecursionError):
            raise DamagedFileError("its header is not valid JSON") from None
        if not isinstance(header, dict):
            raise DamagedFileError("its header is not a JSON object")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise DamagedFileError(f"its header has {len(header)} tensors, more than {MAX_TENSORS}")
        first = 8 + header_bytes
        return {name: _entry(name, value, first, file_bytes) for name, value in header.items()}


def _entry(name: str, value: object, first: int, file_bytes: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise DamagedFileError(f"its entry of tensor {_shown(name)} is not an object")
    dtype, shape, offsets = value.get("dtype"), _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise DamagedFileError(f"tensor {_shown(name)} has no valid dtype, shape and data_offsets")
    begin, end = offsets
    if begin > end:
        raise DamagedFileError(f"tensor {_shown(name)} ends before it begins")
    if first + end > file_bytes:
        raise DamagedFileError(f"it is truncated: tensor {_shown(name)} ends at byte {first + end} of {file_bytes}")
    item_bytes = ITEM_BYTES.get(dtype)
    if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
        raise DamagedFileError(
            f"tensor {_shown(name)} of shape {shape} and dtype {dtype} can't have {end - begin} bytes"
        )
    return TensorEntry(dtype, shape, first + begin, end - begin)


def _shown(name: str) -> str:
    """A name from the file for a message of one line."""
    return repr(name[:100])


def _small_int(digits: str) -> int:
    """A number of the header. Reading one of thousands of digits takes time that grows with their square."""
    if len(digits) > 20:
        raise ValueError("a number of more than 20 digits")
    return int(digits)


def _sizes(value: object) -> tuple[int, ...] | None:
    """``value`` where it is a list of few sizes: those of a shape, or of a file."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < MAX_DIMENSION for item in value) else None
