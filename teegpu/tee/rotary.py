"""Rotary angles, cached per run: one table of cosines and sines, grown as positions are asked for."""

from __future__ import annotations

from typing import Any

import torch

from teegpu.errors import UnsupportedModelError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


class RotaryTable:
    """Cosines and sines for a model's positions; frequencies and scaling come from transformers' own functions.

    ``config`` is the model's transformers config; for the kind ``default`` its values are enough. Raises
    ``UnsupportedModelError`` for a rope kind that isn't known.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self.kind: str = config.rope_parameters.get("rope_type", "default")
        if self.kind not in KINDS:
            raise UnsupportedModelError(
                f"rope scaling {self.kind!r} is not supported; supported are {', '.join(KINDS)}"
            )
        self._original_positions: int = config.max_position_embeddings
        self._scaled_for = self._original_positions
        self._frequencies, self._scaling = self._compute(None)
        self._cos = self._sin = torch.empty(0, 1, self._frequencies.shape[0])

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a position change with the length of the sequence around it."""
        return self.kind == "dynamic"

    def _compute(self, length: int | None) -> tuple[torch.Tensor, float]:
        if self.kind == "default":
            theta = self._config.rope_parameters["rope_theta"]
            dim = (
                getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
            )
            return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes seconds, and most models need none

        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.kind](self._config, seq_len=length)
        return frequencies, scaling

    def prepare(self, length: int) -> None:
        """Call before each pass with the length of the sequence after it, in tokens.

        ``dynamic`` scaling takes its frequencies from the longest sequence so far once that exceeds the model's
        original context (as transformers does), so all chunks of a prompt must be prepared for the whole prompt.
        """
        if self.depends_on_length:
            if length > self._scaled_for:
                self._frequencies, self._scaling = self._compute(length)
                self._scaled_for = length
                self._cos = self._cos[:0]
            elif length < self._original_positions < self._scaled_for:
                self._frequencies, self._scaling = self._compute(None)
                self._scaled_for = self._original_positions
                self._cos = self._cos[:0]
        if length > self._cos.shape[0]:
            size = max(256, 1 << (length - 1).bit_length())
            angles = torch.arange(size, dtype=torch.float32)[:, None] * self._frequencies
            self._cos = (angles.cos() * self._scaling)[:, None, :]
            self._sin = (angles.sin() * self._scaling)[:, None, :]

    def at(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions start..stop, each (tokens, 1, head_dim / 2)."""
        return self._cos[start:stop], self._sin[start:stop]
