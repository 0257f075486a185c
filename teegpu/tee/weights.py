"""The weights that the TEE itself needs, loaded lazily: norms and biases always, the embedding where the plan looks
tokens up in the TEE, everything for the plan ``local``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from teegpu.facts import Plan
from teegpu.kernels import Matrix
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore, load_matrix
from teegpu.tee.plans import LM_HEAD, programs

_LOADING_THREADS: Final = 8
"""Each holds one matrix more than there will be."""


class TeeWeights:
    """Reads from ``store`` what is asked for and keeps it. ``product_dtype`` is that of the ``local`` plan's matrices,
    ``int8`` whether they are of int8 weights; all else is fp32."""

    def __init__(
        self, store: WeightStore, spec: ModelSpec, product_dtype: torch.dtype = torch.float32, *, int8: bool = False
    ) -> None:
        self.spec = spec
        self.product_dtype = product_dtype
        self.int8 = int8
        self._store = store
        self._vectors: dict[str, torch.Tensor | None] = {}
        self._biases: dict[tuple[str, ...], torch.Tensor | None] = {}
        self._head_norms: dict[int, torch.Tensor] = {}
        self._matrices: dict[tuple[str, ...], Matrix] = {}
        self._embedding: torch.Tensor | None = None

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight, (n,) in fp32."""
        found = self.maybe(name)
        if found is None:
            raise KeyError(name)
        return found

    def maybe(self, name: str) -> torch.Tensor | None:
        """A norm's weight or a bias in fp32, or None where the model has none of that name."""
        if name not in self._vectors:
            known = name in self.spec.weights
            self._vectors[name] = self._store.load(name, torch.float32) if known else None
        return self._vectors[name]

    def bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """The biases of the projections ``names`` one after the other, (sum of outs,) in fp32; None where they have
        none."""
        if names not in self._biases:
            parts = [self.maybe(f"{name}.bias") for name in names]
            found = [part for part in parts if part is not None]
            if found and len(found) != len(parts):
                raise ValueError(f"only some of {', '.join(names)} have a bias")
            self._biases[names] = torch.cat(found) if found else None
        return self._biases[names]

    def head_norms(self, layer: int) -> torch.Tensor:
        """The norms of queries and keys: (heads + kv_heads, head_dim) in fp32, a row for each head."""
        if layer not in self._head_norms:
            counts = {"q_norm": self.spec.heads, "k_norm": self.spec.kv_heads}
            vectors = ((self.vector(f"layers.{layer}.{name}"), count) for name, count in counts.items())
            rows = [vector.view(-1, self.spec.head_dim).expand(count, -1) for vector, count in vectors]
            self._head_norms[layer] = torch.cat(rows)
        return self._head_norms[layer]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, (tokens,) → (tokens, hidden) in fp32. The table stays in the dtype of the file."""
        return torch.nn.functional.embedding(ids, self._table()).to(torch.float32)

    def preload(self, plan: Plan) -> None:
        """Reads now what ``plan`` will ask for, so that the first prompt does not wait for the disk."""
        for name in self.spec.weights:
            if name.endswith(("norm", ".bias")):
                self.maybe(name)
        if not plan.remote_embedding:
            self._table()
        if not plan.remote:
            wanted = (LM_HEAD, *(program for layer in programs(self.spec, plan) for program in layer.plain))
            # Reading one while another is brought into its layout: neither keeps the cores busy alone.
            pool = ThreadPoolExecutor(min(torch.get_num_threads(), _LOADING_THREADS))
            try:
                for _ in pool.map(lambda program: self.matrix(program.weights), wanted):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # who interrupts this waits for no more than what is under way

    def _table(self) -> torch.Tensor:
        if self._embedding is None:
            self._embedding = self._store.load("embed_tokens")
        return self._embedding

    def matrix(self, names: tuple[str, ...]) -> Matrix:
        """The projections ``names``, which share an input, as one (sum of outs, in) matrix in ``product_dtype``."""
        matrix = self._matrices.get(names)
        if matrix is None:
            matrix = load_matrix(self._store, self.spec, names, self.product_dtype, int8=self.int8)
            self._matrices[names] = matrix
        return matrix
