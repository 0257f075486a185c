"""Rotary angles, cached per run: tables of cosines and sines, grown as positions are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from teegpu.errors import UnsupportedModelError
from teegpu.model.reader import BETA, rotary_config
from teegpu.model.spec import ModelSpec

DYNAMIC, LONGROPE = "dynamic", "longrope"
KINDS = ("default", "linear", DYNAMIC, "yarn", "llama3", LONGROPE)


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
        self._original_positions: int = (
            config.rope_parameters["original_max_position_embeddings"]
            if self.kind == LONGROPE
            else config.max_position_embeddings
        )
        self._scaled_for = self._original_positions
        self._frequencies, self._scaling = self._compute(None)
        self._cos = self._sin = torch.empty(0, 1, self._frequencies.shape[0])

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a position change with the length of the sequence around it."""
        return self.kind in (DYNAMIC, LONGROPE)

    @property
    def changes_at(self) -> int | None:
        """The length from which on all positions have other angles, where there is such: what was computed with fewer
        tokens has to be computed anew then, as transformers does."""
        return self._original_positions + 1 if self.kind == LONGROPE else None

    def _compute(self, length: int | None) -> tuple[torch.Tensor, float]:
        if self.kind == "default":
            theta = self._config.rope_parameters["rope_theta"]
            dim = (
                getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
            )
            dim = int(dim * self._config.rope_parameters.get("partial_rotary_factor", 1.0))
            return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes seconds, and most models need none

        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.kind](self._config, seq_len=length)
        return frequencies, scaling

    def prepare(self, length: int) -> None:
        """Call before each pass with the length of the sequence after it, in tokens.

        ``dynamic`` scaling takes its frequencies from that length once it exceeds the model's original context (as
        transformers does), and ``longrope`` then takes its other ones, so all chunks of a prompt must be prepared for
        the whole prompt.
        """
        most = self._original_positions + 1 if self.kind == LONGROPE else length
        scaled_for = max(min(length, most), self._original_positions)
        if self.depends_on_length and scaled_for != self._scaled_for:
            self._frequencies, self._scaling = self._compute(length if length > self._original_positions else None)
            self._scaled_for = scaled_for
            self._cos = self._cos[:0]
        if length > self._cos.shape[0]:
            size = max(256, 1 << (length - 1).bit_length())
            angles = torch.arange(size, dtype=torch.float32)[:, None] * self._frequencies
            self._cos = (angles.cos() * self._scaling)[:, None, :]
            self._sin = (angles.sin() * self._scaling)[:, None, :]

    def at(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions start..stop, each (tokens, 1, half of the rotated values of a head)."""
        return self._cos[start:stop], self._sin[start:stop]


class Rotary:
    """The angles of all layers of a model: one ``table``, or one more for layers with a window."""

    def __init__(self, spec: ModelSpec, table: Callable[[Any], RotaryTable] = RotaryTable) -> None:
        self._windows = spec.layer_windows
        self.tables = [table(rotary_config(spec))]
        if spec.window_rope is not None:
            self.tables.append(table(rotary_config(spec, spec.window_rope)))
        self._beta: float = spec.rope.get(BETA, 0.0)
        self._original: int = spec.rope.get("original_max_position_embeddings", 0)

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a position change with the length of the sequence around it."""
        return any(table.depends_on_length for table in self.tables)

    def changes_at(self, length: int) -> bool:
        """``RotaryTable.changes_at``, of any."""
        return any(table.changes_at == length for table in self.tables)

    def prepare(self, length: int) -> None:
        """``RotaryTable.prepare``, of each."""
        for table in self.tables:
            table.prepare(length)

    def of(self, layer: int) -> int:
        """Which of ``tables`` has the angles of ``layer``."""
        return int(len(self.tables) > 1 and self._windows[layer] is not None)

    def growth(self, start: int, stop: int) -> torch.Tensor | None:
        """What queries at positions start..stop are multiplied with, (tokens, 1, 1), where they grow with them."""
        if not self._beta or stop <= self._original:
            return None
        spans = torch.arange(start, stop, dtype=torch.float32).div_(self._original).floor_()
        return spans.log1p_().mul_(self._beta).add_(1.0)[:, None, None]
