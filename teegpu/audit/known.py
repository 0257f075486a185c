"""What every server knows without being told anything: the model's weights. And what the auditor alone knows: the
truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teegpu.model.spec import AFTER, ModelSpec
from teegpu.model.weights import WeightStore

PROMPT, AGAIN, CHANGED, TRAINING = "prompt", "again", "changed", "training"
"""Scenes: the prompt with its answer; the prompt again; the prompt with one token changed; another text, which the
attacker knows."""

_BLOCK_ROWS = 16384
"""Rows of the embedding that are compared at once."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Token ids of ``prompt``, of its ``answer``, and of the text of the scene ``training``. ``changed`` is the place
    of the token in which the scene of that name differs from the prompt."""

    prompt: list[int]
    answer: list[int]
    training: list[int]
    changed: int

    @property
    def computed(self) -> list[int]:
        """The tokens whose activations were computed: all but the last of the answer."""
        return self.prompt + self.answer[:-1]


class Known:
    """The weights that attacks use, read from ``store`` when they are needed."""

    def __init__(self, store: WeightStore, spec: ModelSpec) -> None:
        self.spec = spec
        self._store = store
        self.embedding = store.load("embed_tokens")

    def norm(self, layer: int) -> torch.Tensor:
        """The weight of the norm before ``layer``, fp32 (hidden,); ones where there is none."""
        name = f"layers.{layer}.input_layernorm"
        if name not in self.spec.weights:
            return torch.ones(self.spec.hidden_size)
        return self._store.load(name, torch.float32)

    def embedded(self, ids: list[int]) -> torch.Tensor:
        """fp32 (tokens, hidden)."""
        return self.embedding[torch.tensor(ids, dtype=torch.int64)].to(torch.float32)

    def entering_first(self, ids: list[int]) -> torch.Tensor:
        """What enters layer 0 for these tokens, its norm done: fp32 (tokens, hidden). Needs no context."""
        rows = self.embedded(ids) * self.spec.embedding_scale
        if self.spec.norms == AFTER:
            return rows
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.spec.rms_eps) * self.norm(0)

    def logit_scales(self) -> torch.Tensor:
        """What a product of int8 weights with lm_head is multiplied by, to be compared with others: fp32 (vocab,)."""
        shape = self.spec.weights["lm_head"]
        scale = torch.empty(shape[0])
        self._store.load_whole("lm_head", torch.empty(shape, dtype=torch.int8), scale)
        return scale

    def nearest(self, rows: torch.Tensor, factor: torch.Tensor | None = None) -> list[int]:
        """For each of ``rows`` (n, hidden) the token whose embedding, times ``factor`` (hidden,), points most nearly in
        its direction."""
        directions = torch.nn.functional.normalize(rows.to(torch.float32), dim=-1)
        best = torch.full((rows.shape[0],), -2.0)
        tokens = torch.zeros(rows.shape[0], dtype=torch.int64)
        for start in range(0, self.embedding.shape[0], _BLOCK_ROWS):
            block = self.embedding[start : start + _BLOCK_ROWS].to(torch.float32)
            block = torch.nn.functional.normalize(block if factor is None else block * factor, dim=-1)
            values, places = (directions @ block.t()).max(-1)
            better = values > best
            best = torch.where(better, values, best)
            tokens = torch.where(better, places + start, tokens)
        found: list[int] = tokens.tolist()
        return found
