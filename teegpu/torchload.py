"""Loading torch with less ado: it is the larger part of a start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch: they make a million objects that stay, so nobody looks through these for garbage, now
    or later."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
