"""How much memory more processes may take, and how much one of a benchmark's will need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from teegpu.machine import ROOT
from teegpu.model.spec import ModelSpec

MIB = 2**20

PROCESS_BYTES = 700 * MIB
"""A process with torch loaded, and the activations of a prompt."""

_LARGEST_VALUE_BYTES = {"bf16": 2, "fp16": 2}


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes that can be had without swapping: the kernel's estimate, within our control group's limits (version 2);
    None where the kernel does not say."""
    known = [*_meminfo(root), *_group_rooms(root)]
    return min(known) if known else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _meminfo(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_rooms(root: Path) -> Iterator[int]:
    """What each limited control group around us has left; file pages that it can drop count as free."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if not line.startswith("0::"):
            continue
        parts = [part for part in PurePosixPath(line[3:]).parts if part not in ("/", "..")]
        for length in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:length])
            limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used) + _droppable(folder))


def _droppable(folder: Path) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def server_bytes(spec: ModelSpec, dtype: str) -> int:
    """What a GPU server on the CPU needs for ``spec`` in ``dtype``; ``auto`` may turn out to be the largest."""
    return PROCESS_BYTES + spec.parameters * _LARGEST_VALUE_BYTES.get(dtype, 4)


def case_bytes(spec: ModelSpec, *, all_weights: bool, dtype: str = "fp32") -> int:
    """What a case's process needs: all weights in ``dtype``, or the embedding alone."""
    if all_weights:
        return PROCESS_BYTES + spec.parameters * _LARGEST_VALUE_BYTES.get(dtype, 4)
    return PROCESS_BYTES + spec.vocab_size * spec.hidden_size * 4
