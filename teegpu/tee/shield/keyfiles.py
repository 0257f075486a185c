"""Secret vectors with which products are checked: what all kinds of them have in common, and how they are kept.

They are read from a sealed file where there is one, and drawn, and kept there, where there is none.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np

from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product, products

_VERSION: Final = 1
SEED: Final = "seed"
"""What a seed is called in a file."""

Parts = Mapping[str, np.ndarray[Any, Any]]
"""What a file holds, by name."""

Progress = Callable[[float], None]
"""Told the share that is done, 0 to 1."""


class SecretVectors(ABC):
    """The secret vectors of a model, and what they give with each of its products.

    ``checks`` is k: what is wrong passes with a probability of 2**-k at most. ``path`` is where they came from.
    ``kind`` is what their file is, and ``suffix`` how its name ends.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str]
    checks: int
    path: Path | None

    @staticmethod
    @abstractmethod
    def drawn(store: WeightStore, spec: ModelSpec, checks: int, progress: Progress) -> Parts:
        """New ones, from the operating system's randomness, as a file has them: a seed, and a part for each product.
        Streams all weights once."""

    @classmethod
    @abstractmethod
    def of(cls, parts: Parts, spec: ModelSpec, checks: int, path: Path | None = None) -> Self:
        """Those that a file with ``parts`` holds."""

    @classmethod
    def key_path(cls, folder: Path, digest: str, checks: int) -> Path:
        """Where those of the model with ``digest`` are, or will be."""
        return folder / f"{digest[:32]}-{checks}{cls.suffix}.keys"

    @classmethod
    def make(cls, store: WeightStore, spec: ModelSpec, checks: int, progress: Progress = lambda _: None) -> Self:
        """New ones, which are not kept."""
        return cls.of(cls.drawn(store, spec, checks, progress), spec, checks)

    @classmethod
    def load(
        cls,
        store: WeightStore,
        spec: ModelSpec,
        digest: str,
        *,
        checks: int,
        folder: Path,
        progress: Progress = lambda _: None,
        remake: bool = False,
        notify: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Those of the model with ``digest`` from ``folder``, made and sealed there where there are none, or ``remake``
        is set.

        A damaged file is made anew, and ``notify`` told. Raises ``ShieldError`` for files that others may have read,
        and where they can't be written.
        """
        path = cls.key_path(folder, digest, checks)
        binding: sealed.Binding = {"model": digest, "checks": checks, "version": _VERSION}
        names = [SEED, *map(name_of, products(spec))]
        parts = kept(
            path, cls.kind, binding, names, lambda: cls.drawn(store, spec, checks, progress),
            remake=remake, notify=notify,
        )  # fmt: skip
        return cls.of(parts, spec, checks, path)

    def discard(self) -> None:
        """Removes the file that they came from: the next run draws others. It is no error where it is gone already."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def sizes_of(spec: ModelSpec) -> dict[Product, int]:
    """The rows of each product's matrix."""
    return {product: sum(spec.weights[name][0] for name in product) for product in products(spec)}


def name_of(product: Product) -> str:
    """What ``product`` is called in a file."""
    return "+".join(product)


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
