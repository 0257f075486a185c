"""Where a model lies on disk, and what is read of it.

The files beside the weights decide an answer as much as they do. ``ModelFolder.pinned`` reads each of them once: what
is hashed, parsed and given to other libraries from then on are these bytes, whatever becomes of the disk.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from teegpu import machine
from teegpu.errors import ModelError

TEXT_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
"""Names, with wildcards, of the files beside the weights that decide what a text becomes and where an answer ends."""

MOST_FILE_BYTES: Final = 128 << 20
"""Of one of ``TEXT_FILES``: the largest tokenizers have some 35 MB."""

_MOST_FILES: Final = 64
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_MEMORY: Final = Path("/dev/shm")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``config.json``, a tokenizer and safetensors weights.

    ``name`` is for messages and records. ``pull_as`` is what to give to ``teegpu model pull`` to make the folder anew,
    where teegpu made it; empty where the folder is the user's own. ``files`` are the contents of its ``TEXT_FILES`` by
    name, once they are read for good; None: they are read whenever they are asked for.
    """

    name: str
    path: Path
    pull_as: str = ""
    files: Mapping[str, bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def repair(self) -> str:
        """What to do when a file of this model is damaged or missing, as the end of an error message."""
        if self.pull_as:
            return f"fetch the model again with 'teegpu model pull {self.pull_as} --force'"
        return f"restore the file in {self.path}, or choose another model with --model"

    def pinned(self) -> ModelFolder:
        """The same with ``files`` read, which decide everything from here on. Raises ``ModelError``."""
        return self if self.files is not None else replace(self, files=self._all())

    def maybe(self, name: str) -> bytes | None:
        """The content of the file ``name`` of ``TEXT_FILES``; None where there is none. Raises ``ModelError``."""
        if self.files is not None:
            return self.files.get(name)
        try:
            return self._read(name)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """As ``maybe``, and raises ``ModelError`` where there is none."""
        content = self.maybe(name)
        if content is None:
            raise ModelError(f"{self.path / name} is missing: {self.repair}")
        return content

    @contextlib.contextmanager
    def copied(self) -> Iterator[Path]:
        """A private folder, in memory where there is room, with ``files`` alone: for libraries that read a folder.
        Raises ``ModelError``."""
        files = self.pinned().files or {}
        with contextlib.ExitStack() as stack:
            try:
                place = _MEMORY if _has_room(_MEMORY, sum(map(len, files.values()))) else None
                if place is None and machine.tee_kind() != "none":
                    raise OSError(f"in a TEE it has to be in {_MEMORY}, as others can change what is on a disk")
                made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-", dir=place)))
                for name, content in files.items():
                    (made / name).parent.mkdir(exist_ok=True)
                    (made / name).write_bytes(content)
            except OSError as error:
                raise ModelError(f"no room for a copy of the tokenizer of '{self.name}' ({error})") from error
            yield made

    def open(self, name: str) -> int:
        """A descriptor to read the file ``name`` with, which is a regular one of this folder, or of the blobs beside
        it, where the Hugging Face cache links to. Raises ``ModelError``, and ``OSError`` where it can't be opened."""
        path = self.path / name
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(self.path))
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
            raise ModelError(
                f"{path} is a link to {real}, outside of the model's folder: put the file itself there, or give the "
                "folder that it is in with --model"
            )
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for its writer
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ModelError(f"{path} is not a regular file: {self.repair}")
        return descriptor

    def _all(self) -> dict[str, bytes]:
        try:
            names = os.listdir(self.path)
            templates = self.path / "additional_chat_templates"
            if templates.is_dir():
                names += [f"{templates.name}/{name}" for name in os.listdir(templates)]
        except OSError as error:
            raise ModelError(f"{self.path} can't be read ({error.strerror}): {self.repair}") from error
        wanted = [name for name in sorted(names) if any(fnmatch.fnmatchcase(name, form) for form in TEXT_FILES)]
        if len(wanted) > _MOST_FILES:
            raise ModelError(f"{self.path} has {len(wanted)} tokenizer files, more than {_MOST_FILES}: {self.repair}")
        return {name: self.read(name) for name in wanted if not self._is_gone(name)}

    def _is_gone(self, name: str) -> bool:
        """Whether ``name`` is no file that could be read: a folder, or a link to nothing."""
        path = self.path / name
        return path.is_dir() or not path.exists()

    def _read(self, name: str) -> bytes:
        try:
            with os.fdopen(self.open(name), "rb") as file:
                content = file.read(MOST_FILE_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ModelError(f"{self.path / name} can't be read ({error.strerror}): {self.repair}") from error
        if len(content) > MOST_FILE_BYTES:
            raise ModelError(f"{self.path / name} has more than {MOST_FILE_BYTES >> 20} MiB: {self.repair}")
        if content.startswith(_LFS_POINTER):
            raise lfs_pointer(self.path / name)
        return content


def _has_room(folder: Path, size_bytes: int) -> bool:
    try:
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * size_bytes + (1 << 20)
    except OSError:
        return False


def lfs_pointer(path: Path) -> ModelError:
    """The error of a file in whose place Git LFS has left a pointer."""
    return ModelError(
        f"{path} is a Git LFS pointer, not the file itself: fetch it with 'git lfs pull' in the repository's folder"
    )


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins with these bytes is a Git LFS pointer."""
    return beginning.startswith(_LFS_POINTER)
