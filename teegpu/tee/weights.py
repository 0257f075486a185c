"""The weights that the TEE itself needs, loaded lazily: norms and biases always, the embedding where the plan looks
tokens up in the TEE, everything for the plan ``local``."""

from __future__ import annotations

import torch

from teegpu.kernels import Matrix
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.plans import LM_HEAD, Plan, programs


class TeeWeights:
    """Reads from ``store`` what is asked for and keeps it. ``product_dtype`` is that of the ``local`` plan's matrices;
    all else is fp32."""

    def __init__(self, store: WeightStore, spec: ModelSpec, product_dtype: torch.dtype = torch.float32) -> None:
        self.spec = spec
        self.product_dtype = product_dtype
        self._store = store
        self._vectors: dict[str, torch.Tensor | None] = {}
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
            for program in (LM_HEAD, *(program for layer in programs(self.spec, plan) for program in layer.plain)):
                self.matrix(tuple(step.weight for step in program.steps))

    def _table(self) -> torch.Tensor:
        if self._embedding is None:
            self._embedding = self._store.load("embed_tokens")
        return self._embedding

    def matrix(self, names: tuple[str, ...]) -> Matrix:
        """The projections ``names``, which share an input, as one (sum of outs, in) matrix in ``product_dtype``."""
        matrix = self._matrices.get(names)
        if matrix is None:
            shapes = [self.spec.weights[name] for name in names]
            whole = torch.empty((sum(shape[0] for shape in shapes), shapes[0][1]), dtype=self.product_dtype)
            start = 0
            for name, shape in zip(names, shapes, strict=True):
                self._store.load_into(name, whole[start : start + shape[0]])
                start += shape[0]
            matrix = self._matrices[names] = Matrix(whole)
        return matrix
