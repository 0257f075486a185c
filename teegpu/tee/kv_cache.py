"""Keys and values of sequences in all layers, in the TEE. Those of several lie side by side, so that one call attends
for all of them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from teegpu.model.spec import ModelSpec

SLOTS = 16
"""Sequences whose keys and values lie side by side at most. Memory is taken when a place is first used."""


def bytes_of(spec: ModelSpec, positions: int) -> int:
    """What keys and values of ``positions`` take in all layers."""
    return 2 * spec.layers * spec.kv_heads * positions * spec.head_dim * 4


def rounded(positions: int) -> int:
    """``positions`` or up to a quarter more: few capacities, so that sequences share a slab and freed places fit."""
    step = max(32, (1 << max(0, positions - 1).bit_length()) // 8)
    return -(-positions // step) * step


class Slab:
    """Places for ``slots`` sequences of ``capacity`` positions: for each layer keys and values, (slots, kv_heads,
    capacity, head_dim) in fp32. What is not written is finite."""

    def __init__(self, spec: ModelSpec, slots: int, capacity: int) -> None:
        shape = (slots, spec.kv_heads, capacity, spec.head_dim)
        self.capacity = capacity
        self.keys = [torch.empty(shape) for _ in range(spec.layers)]
        self.values = [torch.empty(shape) for _ in range(spec.layers)]
        self._free = list(reversed(range(slots)))
        self._slots = slots
        self._untouched = slots

    def take(self) -> int:
        """The first place that is free, cleared: nothing of who had it before is left, and products with what is masked
        are zero."""
        self._free.sort(reverse=True)
        slot = self._free.pop()
        self._untouched = min(self._untouched, self._slots - slot - 1)
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    @property
    def full(self) -> bool:
        return not self._free

    @property
    def empty(self) -> bool:
        return len(self._free) == self._slots

    @property
    def touched(self) -> int:
        """Places that were used, and so take memory."""
        return self._slots - self._untouched

    @property
    def spare(self) -> bool:
        """Whether a place is free that takes memory already."""
        return len(self._free) > self._untouched


class Slabs:
    """The keys and values of all sequences of an engine. ``shared``: several lie side by side, with capacities that are
    rounded up, though never beyond ``most`` positions."""

    def __init__(self, spec: ModelSpec, *, shared: bool, most: int) -> None:
        self._spec = spec
        self._shared = shared
        self._most = most
        self._slabs: list[Slab] = []

    def capacity(self, positions: int) -> int:
        """What a sequence that is to have ``positions`` gets."""
        return max(positions, min(rounded(positions), self._most)) if self._shared else positions

    def more_bytes(self, capacity: int) -> int:
        """What another place of ``capacity`` would take beyond what is taken."""
        if any(slab.capacity == capacity and slab.spare for slab in self._slabs):
            return 0
        return bytes_of(self._spec, capacity)

    @property
    def nbytes(self) -> int:
        return sum(bytes_of(self._spec, slab.capacity) * slab.touched for slab in self._slabs)

    def place(self, capacity: int) -> tuple[Slab, int]:
        slabs = [slab for slab in self._slabs if slab.capacity == capacity and not slab.full]
        slab = next((slab for slab in slabs if slab.spare), slabs[0] if slabs else None)
        if slab is None:
            slab = Slab(self._spec, SLOTS if self._shared else 1, capacity)
            self._slabs.append(slab)
        return slab, slab.take()

    def give_back(self, slab: Slab, slot: int) -> None:
        slab.give_back(slot)
        if slab.empty:
            self._slabs.remove(slab)


class KVCache:
    """Keys and values of one sequence: ``layers`` × (keys, values), each (kv_heads, capacity, head_dim) in fp32.

    ``length`` is how many positions every layer holds. During a step layers are ahead of it by the step's tokens;
    ``advance`` moves it when all of them are there. ``most`` positions will ever be asked for, where that is known.
    ``slab`` and ``slot`` are where it lies in ``slabs``, of which it is the only one without; it goes when nobody has
    it any more.
    """

    def __init__(
        self, spec: ModelSpec, capacity: int = 256, most: int | None = None, slabs: Slabs | None = None
    ) -> None:
        self._spec = spec
        self._most = most
        self._slabs = slabs or Slabs(spec, shared=False, most=1 << 62)
        self.length = 0
        self._settle(self._slabs.capacity(max(1, capacity)))

    def _settle(self, capacity: int) -> None:
        self.slab, self.slot = self._slabs.place(capacity)
        self._leave = weakref.finalize(self, self._slabs.give_back, self.slab, self.slot)
        self._leave.atexit = False
        self._keys = [tensor[self.slot] for tensor in self.slab.keys]
        self._values = [tensor[self.slot] for tensor in self.slab.values]

    @property
    def capacity(self) -> int:
        return self.slab.capacity

    @property
    def nbytes(self) -> int:
        return bytes_of(self._spec, self.capacity)

    def grown(self, positions: int) -> int:
        """The capacity that ``reserve(positions)`` comes to."""
        if positions <= self.capacity:
            return self.capacity
        doubled = 2 * self.capacity if self._most is None else min(2 * self.capacity, self._most)
        return self._slabs.capacity(max(positions, doubled))

    def reserve(self, positions: int) -> None:
        """Makes room for ``positions`` in all, at least doubling when it grows. Not while a step is under way."""
        if positions <= self.capacity:
            return
        leave, held = self._leave, (self._keys, self._values)
        self._settle(self.grown(positions))
        for tensors, before in zip((self._keys, self._values), held, strict=True):
            for tensor, old in zip(tensors, before, strict=True):
                tensor[:, : self.length] = old[:, : self.length]
        leave()

    def take(self, other: KVCache, length: int) -> None:
        """Copies the first ``length`` positions of ``other``; there is room for them."""
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for tensor, source in zip(mine, theirs, strict=True):
                tensor[:, :length] = source[:, :length]
        self.length = length

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores (tokens, kv_heads, head_dim) keys and values of ``layer`` from position ``start`` on."""
        stop = start + keys.shape[0]
        self._keys[layer][:, start:stop] = keys.transpose(0, 1)
        self._values[layer][:, start:stop] = values.transpose(0, 1)

    def read(self, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (kv_heads, stop - start, head_dim) of the keys and values of ``layer``."""
        return self._keys[layer][:, start:stop], self._values[layer][:, start:stop]

    def advance(self, length: int) -> None:
        self.length = length

    def truncate(self, length: int) -> None:
        """Forgets all positions from ``length`` on."""
        self.length = min(self.length, length)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Sequences in the places ``first`` to ``last`` of ``slab``, each with one new row. ``vectors`` (rows · kv_heads,)
    int64 are the places of its keys, and of its values, among all vectors of a layer."""

    slab: Slab
    first: int
    last: int
    vectors: torch.Tensor
    mask: torch.Tensor
    """(rows, 1, 1, longest) of 0 where a sequence has a position, else -inf."""

    @classmethod
    def of(cls, slab: Slab, first: int, starts: list[int]) -> Neighbours:
        positions = torch.tensor(starts, dtype=torch.int64)
        hidden = torch.arange(max(starts) + 1) > positions[:, None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
        last = first + len(starts)
        kv_heads = slab.keys[0].shape[1]
        heads = torch.arange(first * kv_heads, last * kv_heads).view(-1, kv_heads)
        return cls(slab, first, last, (heads * slab.capacity + positions[:, None]).flatten(), mask)

    @property
    def longest(self) -> int:
        return self.mask.shape[-1]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores (rows, kv_heads, head_dim) keys and values of ``layer``."""
        for stored, new in ((self.slab.keys[layer], keys), (self.slab.values[layer], values)):
            stored.view(-1, stored.shape[-1]).index_copy_(0, self.vectors, new.reshape(-1, stored.shape[-1]))

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (rows, kv_heads, longest, head_dim) of the keys and values of ``layer``."""
        both = self.slab.keys[layer], self.slab.values[layer]
        keys, values = (tensor[self.first : self.last, :, : self.longest] for tensor in both)
        return keys, values
