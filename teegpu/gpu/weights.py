"""The model's weights on the device, laid out so that projections that share an input are one matrix.

Q, K and V are one matrix, gate and up another. A program that asks for one of them alone (the plan ``per-op``) gets its
rows as a matrix of its own, made when it is first asked for: a view, or a copy where matrices are packed. So is a tied
``lm_head``, of the embedding, where both are held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from teegpu.kernels import Matrix
from teegpu.model.spec import GROUPS, ModelSpec
from teegpu.model.weights import WHOLE, Cut, WeightStore, load_matrix


class DeviceWeights:
    """Weights of ``spec`` on ``device`` in ``dtype``, read straight from safetensors, one slice at a time; matrices as
    ``int8`` where that is asked for, on a CPU.

    ``layers``, the first and the last one to hold, loads the weights that are placed with these alone (see
    ``ModelSpec.layer_of``); None loads all. ``cut``: the part of each matrix, and of the embedding, that is held; norms
    are held whole. ``progress`` is called with the fraction that is done, 0 to 1. Raises
    ``ModelError`` for a file that can't be read.
    """

    def __init__(
        self,
        store: WeightStore,
        spec: ModelSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        layers: tuple[int, int] | None = None,
        int8: bool = False,
        cut: Cut = WHOLE,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.spec = spec
        self.cut = cut
        self.layers = layers or (0, spec.layers - 1)
        self.device = device
        self.dtype = dtype
        self.int8 = int8
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._matrices: dict[tuple[str, ...], Matrix] = {}
        self._places: dict[str, tuple[Matrix, int]] = {}
        self._bytes = 0
        self._load(store, spec, progress or (lambda _: None))

    def _load(self, store: WeightStore, spec: ModelSpec, progress: Callable[[float], None]) -> None:
        first, last = self.layers
        if first == 0:
            self._load_tensor(store, spec, "embed_tokens")
        if last == spec.layers - 1:
            self._load_tensor(store, spec, "norm")
            if store.tied and first == 0 and not self.int8:
                head = Matrix(self._tensors["embed_tokens"])
                self._add_matrix(("lm_head",), (spec.weights["lm_head"],), head, owned=False)
            else:
                self._load_matrix(store, spec, ("lm_head",))
        for layer in range(first, last + 1):
            for group in GROUPS:
                self._load_matrix(store, spec, tuple(f"layers.{layer}.{projection}" for projection in group))
            for norm in spec.layer_norms:
                self._load_tensor(store, spec, f"layers.{layer}.{norm}")
            progress((layer + 1 - first) / (last + 1 - first))

    def _load_tensor(self, store: WeightStore, spec: ModelSpec, name: str) -> None:
        self._shapes[name] = shape = spec.weights[name]
        part = self.cut.of(shape[0]) if len(shape) > 1 else slice(0, shape[0])
        shape = (part.stop - part.start, *shape[1:])
        self._tensors[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        store.load_into(name, self._tensors[name], part.start)
        self._bytes += self._tensors[name].nbytes

    def _load_matrix(self, store: WeightStore, spec: ModelSpec, names: tuple[str, ...]) -> None:
        shapes = tuple(spec.weights[name] for name in names)
        matrix = load_matrix(store, spec, names, self.dtype, int8=self.int8, device=self.device, cut=self.cut)
        self._add_matrix(names, shapes, matrix, owned=True)

    def _add_matrix(
        self, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], matrix: Matrix, *, owned: bool
    ) -> Matrix:
        """Keeps ``matrix``, the rows of ``names`` one after the other. ``owned``: nothing else keeps its memory."""
        self._matrices[names] = matrix
        if owned or matrix.packed:
            self._bytes += matrix.nbytes
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            self._shapes[name] = shape
            self._places.setdefault(name, (matrix, start))
            start += self.cut.rows(shape[0])
        return matrix

    def tensor(self, name: str) -> torch.Tensor:
        """A norm's weight (hidden,), or the part of the embedding (vocab, hidden) that is held."""
        return self._tensors[name]

    def matrix(self, *names: str) -> Matrix | None:
        """The parts that are held of one projection, or of neighbours that share an input as one matrix, (sum of outs,
        in). None where ``names`` are not such neighbours, in their order, or no projection."""
        found = self._matrices.get(names)
        if found is None and len(names) == 1 and names[0] in self._places:
            merged, start = self._places[names[0]]
            shape = self._shapes[names[0]]
            found = self._add_matrix(names, (shape,), merged.part(start, start + self.cut.rows(shape[0])), owned=False)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of ``name``, uncut, or None for a name that programs may not use, or that is not held here."""
        return self._shapes.get(name)

    def elsewhere(self, name: str) -> bool:
        """Whether ``name`` is a weight of the model that is placed with layers other than those held here."""
        first, last = self.layers
        return name in self.spec.weights and not first <= self.spec.layer_of(name) <= last

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on the device: copies included, views counted once."""
        return self._bytes
