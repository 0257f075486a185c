"""Secret vectors on disk: read where they are, made and sealed where they are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teegpu.tee.shield import sealed

Parts = Mapping[str, np.ndarray[Any, Any]]
"""What a file holds, by name."""


def kept(
    path: Path,
    kind: str,
    binding: sealed.Binding,
    names: Sequence[str],
    make: Callable[[], Parts],
    *,
    remake: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> Parts:
    """The parts called ``names`` of the file at ``path``, as uint8. Where there is no such file, or ``remake`` is set,
    they are what ``make`` gives, and are kept there.

    A damaged file is made anew, and ``notify`` told. Raises ``ShieldError`` for a file that others may have read, and
    where it can't be written.
    """
    seal = sealed.SealKey.load()
    if not remake and (found := _read(path, seal, kind, binding, names, notify)) is not None:
        return found
    with sealed.making(path):
        # Another process may have made it while this one waited.
        if not remake and (found := _read(path, seal, kind, binding, names, lambda _: None)) is not None:
            return found
        made = make()
        with sealed.SealedWriter(path, seal, kind, binding, [(name, made[name].nbytes) for name in names]) as writer:
            for name in names:
                writer.append(made[name])
    return {name: np.ascontiguousarray(made[name]).reshape(-1).view(np.uint8) for name in names}


def _read(
    path: Path,
    seal: sealed.SealKey,
    kind: str,
    binding: sealed.Binding,
    names: Sequence[str],
    notify: Callable[[str], None],
) -> Parts | None:
    try:
        with sealed.SealedFile(path, seal, kind, binding) as file:
            return {name: file.read(name) for name in names}
    except FileNotFoundError:
        return None
    except sealed.DamagedError as error:
        notify(f"making the keys of verification anew: {error}")
        return None
