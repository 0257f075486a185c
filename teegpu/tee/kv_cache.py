"""Keys and values of all layers, in the TEE, preallocated and grown by doubling."""

from __future__ import annotations

import torch

from teegpu.model.spec import ModelSpec


class KVCache:
    """``layers`` × (keys, values), each (kv_heads, capacity, head_dim) in fp32.

    ``length`` is how many positions every layer holds. During a pass layers are ahead of it by the pass's tokens;
    ``advance`` moves it when all of them are there.
    """

    def __init__(self, spec: ModelSpec, capacity: int = 256) -> None:
        self._shape = (spec.kv_heads, max(1, capacity), spec.head_dim)
        self._keys = [torch.empty(self._shape) for _ in range(spec.layers)]
        self._values = [torch.empty(self._shape) for _ in range(spec.layers)]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._shape[1]

    @property
    def nbytes(self) -> int:
        return 2 * len(self._keys) * self._shape[0] * self._shape[1] * self._shape[2] * 4

    def reserve(self, positions: int) -> None:
        """Makes room for ``positions`` in all, at least doubling when it grows. Not while a pass is under way."""
        if positions <= self.capacity:
            return
        heads, capacity, dim = self._shape
        self._shape = (heads, max(positions, 2 * capacity), dim)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = torch.empty(self._shape)
                tensors[layer][:, : self.length] = old[:, : self.length]

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
