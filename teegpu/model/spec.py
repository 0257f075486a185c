"""The dimensions of a decoder-only model, and the table of its weights' names and shapes.

Both sides build their tables from here: the server to check a program before it runs, the runner to check a reply.
Nothing in this module needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class ModelSpec:
    """What a decoder needs to know of a model. All sizes are counts of values, not bytes.

    ``layer_windows[i]`` is the sliding window of layer i in positions (a token sees itself and the window-1 tokens
    before it), or None for full attention. ``rope`` is transformers' ``rope_parameters`` as a plain dict.
    ``eos_token_ids`` end a generation.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope: dict[str, Any]
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def linear_shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of one of ``PROJECTIONS`` or of ``lm_head``."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden_size, self.intermediate_size
        shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        shapes |= {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i), "lm_head": (self.vocab_size, h)}
        return shapes[projection]

    def has_bias(self, projection: str) -> bool:
        if projection in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        if projection == "o_proj":
            return self.o_bias
        return self.mlp_bias and projection in ("gate_proj", "up_proj", "down_proj")

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its teegpu name, with its shape.

        ``embed_tokens``, ``lm_head`` (also where it is tied to the embedding), ``norm``, and for layer i
        ``layers.i.q_proj`` …, ``layers.i.q_proj.bias``, ``layers.i.input_layernorm``,
        ``layers.i.post_attention_layernorm``, ``layers.i.q_norm``, ``layers.i.k_norm``.
        """
        return dict(self._weights())

    def _weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "embed_tokens", (self.vocab_size, self.hidden_size)
        for layer in range(self.layers):
            prefix = f"layers.{layer}."
            for projection in PROJECTIONS:
                out, in_ = self.linear_shape(projection)
                yield prefix + projection, (out, in_)
                if self.has_bias(projection):
                    yield f"{prefix}{projection}.bias", (out,)
            for norm in LAYER_NORMS:
                yield prefix + norm, (self.hidden_size,)
            if self.qk_norm:
                yield prefix + "q_norm", (self.head_dim,)
                yield prefix + "k_norm", (self.head_dim,)
        yield "norm", (self.hidden_size,)
        yield "lm_head", (self.vocab_size, self.hidden_size)

    def layer_of(self, weight: str) -> int:
        """The layer with which ``weight`` is placed: the embedding goes with the first, the final norm and lm_head with
        the last."""
        if weight.startswith("layers."):
            return int(weight.split(".", 2)[1])
        return 0 if weight == "embed_tokens" else self.layers - 1

    @property
    def parameters(self) -> int:
        """Number of distinct parameters: a tied lm_head is counted once, as in the embedding."""
        total = 0
        for name, shape in self.weights.items():
            if name == "lm_head" and self.tied_embeddings:
                continue
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return total
