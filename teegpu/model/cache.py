"""The folder of fetched and converted models: what is in it is whole, whatever interrupted the work.

``<root>/models/<slug>`` is a finished model. It is built in ``<root>/models/.<slug>~…``, flushed to disk and renamed
into place in one step; a lock in ``<root>/locks`` keeps two processes from building the same one. What a killed
process left behind is removed by the next one that builds.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from teegpu.errors import ModelError
from teegpu.files import Lock, locked, sync_folder

MARKER = "teegpu.json"  # written last: where the model came from, and which conversion made it
CONVERSION = 2
"""Goes up where a conversion makes something else of the same file: what an older one made is made anew."""

Notify = Callable[[str, float | None], None]
"""Told what is being done, and the share that is done, from 0 to 1, or None where that is unknown."""


def say_nothing(text: str, share: float | None) -> None:
    """Drop the news."""


class ModelCache:
    """The models below ``root``. Reading it never writes; ``install`` creates folders as needed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models = root / "models"
        self._locks = root / "locks"

    def find(self, slug: str) -> Path | None:
        """The folder of a finished model, or None."""
        path = self._models / slug
        try:
            marker = json.loads((path / MARKER).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return path if isinstance(marker, dict) and marker.get("conversion") == CONVERSION else None

    def install(
        self, slug: str, build: Callable[[Path], dict[str, object]], notify: Notify, *, replace: bool = False
    ) -> Path:
        """The folder of the model ``slug``, built when it is not there or ``replace`` is set.

        ``build(work)`` has an empty folder for itself, makes the model in ``work/model`` and returns what the marker
        shall say of its origin. Raises what ``build`` raises, and ``ModelError`` when the cache can't be written.
        """
        with self._explaining():
            self._models.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(parents=True, exist_ok=True)
        with self._locked(slug, notify):
            found = self.find(slug)
            if found is not None and not replace:
                return found
            self._remove_leftovers(slug)
            with self._explaining():
                work = Path(tempfile.mkdtemp(prefix=f".{slug}~", dir=self._models))
            try:
                with self._explaining():
                    origin = build(work)
                    model = work / "model"
                    marker = {**origin, "conversion": CONVERSION}
                    (model / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
                    _flush_tree(model)
                    return self._move_into_place(model, slug, work)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _move_into_place(self, model: Path, slug: str, work: Path) -> Path:
        target = self._models / slug
        if target.exists():
            target.rename(work / "replaced")
        model.rename(target)
        sync_folder(self._models)
        return target

    @contextmanager
    def _locked(self, slug: str, notify: Notify) -> Iterator[None]:
        """Hold the lock of ``slug``. The kernel lets go of it when the process ends, however it ends."""
        path = self._locks / f"{slug}.lock"
        with self._explaining():
            try:
                lock = Lock(path, wait=False)
            except BlockingIOError:
                notify("waiting for another process that is preparing this model", None)
                lock = Lock(path)
        with lock:
            yield

    def _remove_leftovers(self, locked_slug: str) -> None:
        for leftover in self._models.glob(".*~*"):
            slug = leftover.name[1:].rpartition("~")[0]
            if slug == locked_slug or not locked(self._locks / f"{slug}.lock"):  # nobody is building it any more
                shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cache_error(self.root, error) from error


def cache_error(root: Path, error: OSError) -> ModelError:
    """The error of a cache that can't be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(
            f"no space left for the model in {root}: free some, or set model.cache_dir "
            "(TEEGPU_MODEL_CACHE_DIR) to a folder on another disk"
        )
    return ModelError(
        f"the model cache {root} can't be written ({error.strerror or error}): set model.cache_dir "
        "(TEEGPU_MODEL_CACHE_DIR) to a folder that can be"
    )


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
