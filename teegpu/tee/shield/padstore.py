"""A pool of pads on disk, for one model: what is in it, and claims on it.

    <shield.dir>/pads/<model>/pool.json                 the pool's id, the model
                              body-0000000000-16.pads   leaves 0 to 15, see padsegment
                              head-0000000000-16.pads
    $XDG_STATE_HOME/teegpu/shield/ledgers/<id>.ledger   how far it is spent, see padledger

Segments are whole from the moment at which they have their name, and go when all their leaves are claimed. Several
processes may claim at once, and while another one makes more.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teegpu.errors import ShieldError
from teegpu.model.spec import ModelSpec
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import Product, products
from teegpu.tee.shield.padledger import KINDS, Ledger, Place, Places
from teegpu.tee.shield.padsegment import LEAF_TOKENS, Leaf, Matrix, Segment, parse_name

HEAD: Final[Product] = ("lm_head",)
_POOL: Final = "pool.json"
_SCHEMA: Final = "teegpu.pads/1"


def kind_of(product: Product) -> str:
    return "head" if product == HEAD else "body"


def matrices_of(spec: ModelSpec, kind: str) -> tuple[Matrix, ...]:
    """The products that a pad of ``kind`` is for, in their order."""
    chosen = (product for product in products(spec) if kind_of(product) == kind)
    return tuple(
        Matrix(product, sum(spec.weights[name][0] for name in product), spec.weights[product[0]][1])
        for product in chosen
    )


def token_bytes(spec: ModelSpec, kind: str) -> float:
    """What a pad of ``kind`` takes on the disk."""
    return sum(matrix.block_bytes for matrix in matrices_of(spec, kind)) / LEAF_TOKENS


def pool_folder(data: Path, digest: str) -> Path:
    """Where the pads for the model with ``digest`` are, or will be, below ``sealed.data_folder``."""
    return data / "pads" / digest[:32]


@dataclass(frozen=True, slots=True)
class Part:
    """A segment's file as its name tells it."""

    path: Path
    kind: str
    start: int
    leaves: int

    @property
    def stop(self) -> int:
        return self.start + self.leaves


class Pool:
    """The pool in ``folder``, which must be there. ``notify`` is told what a user should know.

    Raises ``FileNotFoundError`` where there is none; ``ShieldError`` where it is another model's or damaged, where it
    has no ledger, and for files that others can read.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        spec: ModelSpec,
        key: sealed.SealKey,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.digest = digest
        content = read_pool(folder)
        self.id: str = content["pool"]
        if content["model"] != digest:
            raise ShieldError(f"{folder} holds the pads of another model: remove it with 'teegpu pads rm'")
        self.matrices = {kind: matrices_of(spec, kind) for kind in KINDS}
        self._notify = notify
        self._segments: dict[Path, Segment] = {}
        self._ledger = Ledger(self.id, key)

    @classmethod
    def create(cls, folder: Path, digest: str, name: str, key: sealed.SealKey) -> None:
        """An empty pool. Within ``sealed.making(folder)``; raises ``ShieldError``."""
        pool = secrets.token_hex(16)
        Ledger.create(pool, key)
        content = {"schema": _SCHEMA, "pool": pool, "model": digest, "name": name}
        write_pool(sealed.private_folder(folder), content)

    # Claims

    def claim(self, kind: str, leaves: int) -> list[Leaf]:
        """The next ``leaves`` leaves of ``kind``, for the caller alone and for ever; empty where there are fewer.

        On return it is on the disk that they are spent. Raises ``ShieldError`` where the ledger is older than the pool,
        and for a segment that is damaged.
        """
        with self._ledger.locked() as places:
            place = places[kind]
            parts = self._unspent(kind, place)
            if sum(part.stop - max(part.start, place.next) for part in parts) < leaves:
                return []
            claimed: list[Leaf] = []
            touched: list[tuple[Segment, int]] = []
            for part in parts:
                segment = self._open(part)
                if segment.mark > place.next:
                    raise ShieldError(
                        f"the ledger {self._ledger.path} is older than the pads in {self.folder}: it was copied back "
                        "from a backup, and which pads are spent is not known any more. Remove them with 'teegpu pads "
                        "rm' and make new ones"
                    )
                place = place.at(max(place.next, part.start))
                while place.next < part.stop and len(claimed) < leaves:
                    claimed.append(Leaf(segment, place.next - part.start, place.leaf_key(segment.salt)))
                    place = place.at(place.next + 1)
                touched.append((segment, place.next))
                if len(claimed) == leaves:
                    break
            self._ledger.write({**places, kind: place})
            for segment, mark in touched:
                if mark >= segment.stop:
                    segment.path.unlink(missing_ok=True)
                else:
                    segment.raise_mark(mark)
        return claimed

    def _unspent(self, kind: str, place: Place) -> list[Part]:
        """The segments with leaves that are not spent, in their order. Spent ones that are there all the same go."""
        parts = [part for part in self.parts() if part.kind == kind]
        spent = [part for part in parts if part.stop <= place.next]
        for part in spent:
            part.path.unlink(missing_ok=True)
        if spent:
            tokens = sum(part.leaves for part in spent) * LEAF_TOKENS
            self._notify(
                f"{tokens:,} pads in {self.folder} were spent before, and are there again after a crash or from a "
                "backup: they were removed, not used"
            )
        return [part for part in parts if part.stop > place.next]

    def _open(self, part: Part) -> Segment:
        segment = self._segments.get(part.path)
        if segment is None:
            segment = self._segments[part.path] = Segment(part.path, self.id, self.digest, self.matrices[part.kind])
        return segment

    def let_go(self, keep: set[Segment]) -> None:
        """Forgets the segments that are not in ``keep``; masks that are on their way may still read them."""
        for path, segment in list(self._segments.items()):
            if segment not in keep:
                del self._segments[path]

    @property
    def open_segments(self) -> int:
        return len(self._segments)

    # What there is

    def parts(self) -> list[Part]:
        """The segments that are whole, by kind and place."""
        return parts_in(self.folder)

    def left(self) -> dict[str, int]:
        """Tokens for which there are pads, by kind."""
        with self._ledger.locked() as places:
            return _left(self.parts(), places)

    def end(self, kind: str) -> Place:
        """Where the next segment of ``kind`` begins. Raises ``ShieldError`` for a damaged ledger."""
        with self._ledger.locked() as places:
            place = places[kind]
            stop = max([place.next, *(part.stop for part in self.parts() if part.kind == kind)])
        return place.at(stop)

    def close(self) -> None:
        """May be called twice."""
        self.let_go(set())
        self._ledger.close()


def _left(parts: Iterable[Part], places: Places) -> dict[str, int]:
    left = dict.fromkeys(KINDS, 0)
    for part in parts:
        left[part.kind] += LEAF_TOKENS * max(0, part.stop - max(part.start, places[part.kind].next))
    return left


def tokens_left(folder: Path, key: sealed.SealKey) -> dict[str, int]:
    """As ``Pool.left``, of a pool whose model need not be there. Raises ``FileNotFoundError`` and ``ShieldError``."""
    ledger = Ledger(read_pool(folder)["pool"], key)
    try:
        with ledger.locked() as places:
            return _left(parts_in(folder), places)
    finally:
        ledger.close()


def parts_in(folder: Path) -> list[Part]:
    """The whole segments in ``folder``. Raises ``ShieldError`` where it can't be read."""
    found = []
    with sealed.explaining(folder):
        for name in os.listdir(folder):
            parsed = parse_name(name)
            if parsed is not None and parsed[0] in KINDS:
                found.append(Part(folder / name, *parsed))
    return sorted(found, key=lambda part: (part.kind, part.start))


def read_pool(folder: Path) -> dict[str, Any]:
    """``pool.json``. Raises ``FileNotFoundError``, and ``ShieldError`` where it is damaged."""
    path = folder / _POOL
    if not path.exists():
        raise FileNotFoundError(path)
    with sealed.explaining(path):
        sealed.private_folder(folder)
        text = path.read_bytes()
    try:
        content = json.loads(text)
        known = content["schema"] == _SCHEMA and all(isinstance(content[key], str) for key in ("pool", "model", "name"))
        known = known and content["pool"].isalnum()
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ShieldError(f"{path} is damaged: remove the pool with 'teegpu pads rm'")
    return dict(content)


def write_pool(folder: Path, content: dict[str, Any]) -> None:
    """Replaces ``pool.json`` in one step. Raises ``ShieldError``."""
    path = folder / _POOL
    partial = folder / f".{_POOL}~"
    with sealed.explaining(path):
        with open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sealed.flush_folder(folder)


def destroy(folder: Path, key: sealed.SealKey) -> int:
    """Removes a pool, its ledger first: from then on nothing of it can be read. Gives the bytes that were freed.

    Raises ``FileNotFoundError`` where there is none, ``ShieldError`` where it can't be removed.
    """
    with sealed.making(folder):
        try:
            pool = read_pool(folder)["pool"]
        except ShieldError:
            pool = None  # damaged: it goes all the same
        if pool is not None:
            with contextlib.suppress(ShieldError):  # a ledger that is lost, or not ours alone
                Ledger(pool, key).destroy()
        freed = 0
        with sealed.explaining(folder):
            for path in _files(folder):
                freed += path.stat().st_size
                path.unlink()
            folder.rmdir()
    return freed


def _files(folder: Path) -> Iterator[Path]:
    for name in os.listdir(folder):
        parsed = parse_name(name.strip(".").removesuffix("~"))
        if parsed is not None or name in (_POOL, f".{_POOL}~"):
            yield folder / name
