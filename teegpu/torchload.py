"""Loading torch with less ado: it is the larger part of a start."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def _load_library() -> None:
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        library = Path(folder, "lib/libtorch_cpu.so")
        if library.exists():
            # As a function like any other: ctypes.CDLL(library) would hold Python's lock meanwhile. Where it fails,
            # torch finds what it needs by itself, or says what is wrong.
            dlopen = ctypes.CDLL(None).dlopen
            dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
            dlopen(os.fsencode(library), os.RTLD_LAZY)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch: they make a million objects that stay, so nobody looks through these for garbage, now
    or later. Its library, which takes seconds where the disk or the machine is busy, is loaded by a thread first: a
    signal is heard meanwhile."""
    if "torch" not in sys.modules:
        library = threading.Thread(target=_load_library, daemon=True, name="torch's library")
        library.start()
        library.join()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
