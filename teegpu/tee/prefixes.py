"""Keys and values of sequences that have ended, for those that begin alike.

They are found within one namespace only: how long a prompt takes tells whether its beginning was known, and nobody is
to learn so what another one asked (CVE-2025-46570)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teegpu.tee.kv_cache import KVCache

_STRIDE = 64


@dataclass(frozen=True, slots=True)
class _Kept:
    namespace: str
    tokens: list[int]
    cache: KVCache


class Prefixes:
    """Keeps at most ``most_bytes``; those that were not used for longest go first. ``asked`` and ``found`` count
    tokens."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: list[_Kept] = []
        self.nbytes = 0
        self.asked = self.found = 0

    def keep(self, namespace: str, tokens: list[int], cache: KVCache) -> None:
        """Keeps ``cache``, which holds ``tokens``. The caller lets go of both."""
        if not tokens or cache.nbytes > self._most_bytes:
            return
        for kept in [kept for kept in self._kept if kept.namespace == namespace]:
            if _same(kept.tokens, tokens) == len(kept.tokens):
                self._remove(kept)  # it is the beginning of what comes now
        while self.nbytes + cache.nbytes > self._most_bytes:
            self.drop_one()
        self._kept.append(_Kept(namespace, tokens, cache))
        self.nbytes += cache.nbytes

    def drop_one(self) -> bool:
        """Forgets what was not used for longest; False where there is nothing."""
        if self._kept:
            self._remove(self._kept[0])
            return True
        return False

    def find(self, namespace: str, tokens: list[int], cache: KVCache) -> int:
        """Copies into ``cache`` what is known of ``tokens``; the length of it. The last one is always left out: its
        logits are needed."""
        best, length = None, 0
        for kept in self._kept:
            if kept.namespace == namespace and (same := _same(kept.tokens, tokens)) > length:
                best, length = kept, same
        self.asked += len(tokens)
        length = min(length, len(tokens) - 1)
        if best is None or not length:
            return 0
        self._kept.remove(best)
        self._kept.append(best)
        cache.take(best.cache, length)
        self.found += length
        return length

    def _remove(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self.nbytes -= kept.cache.nbytes


def _same(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(first), len(second))
    at = 0
    while at < most and first[at : at + _STRIDE] == second[at : at + _STRIDE]:
        at = min(at + _STRIDE, most)
    while at < most and first[at] == second[at]:
        at += 1
    return at
