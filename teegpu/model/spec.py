"""The dimensions of a decoder-only model, and the table of its weights' names and shapes.

Both sides build their tables from here: the server to check a program before it runs, the runner to check a reply.
Nothing in this module needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The projections of a layer in the order of a pass; those that share an input are one matrix, the rows of one after
the other."""
PROJECTIONS = tuple(projection for group in GROUPS for projection in group)

BEFORE, AROUND, AFTER = "before", "around", "after"
"""What is normalised in a layer: what goes into attention and MLP, what goes in and what comes out, what comes out."""
LAYER_NORMS = {
    BEFORE: ("input_layernorm", "post_attention_layernorm"),
    AROUND: ("input_layernorm", "attention_output_norm", "post_attention_layernorm", "mlp_output_norm"),
    AFTER: ("attention_output_norm", "mlp_output_norm"),
}
"""The norms of a layer. The one before the MLP has the name that Llama gave it."""
HEADS, WHOLE = "heads", "whole"
"""What of queries and keys is normalised together: each head, or all heads of a token."""
SILU, GELU_TANH = "silu", "gelu_tanh"
"""What is between gate and up."""


@dataclass(frozen=True)
class ModelSpec:
    """What a decoder needs to know of a model. All sizes are counts of values, not bytes.

    ``layer_windows[i]`` is the sliding window of layer i in positions (a token sees itself and the window-1 tokens
    before it), or None for full attention. ``rope`` is transformers' ``rope_parameters`` as a plain dict, and
    ``window_rope`` that of layers with a window, where it is another one. ``unrotated`` are the layers without rotary
    angles. ``norms`` is a key of ``LAYER_NORMS``, ``qk_norm`` HEADS, WHOLE or empty, ``activation`` SILU or GELU_TANH.
    Scales but the embedding's are folded into the weights (``arch.adjustment_of``); ``attention_scale`` None:
    1/√head_dim. Where there is a cap, scores and logits are ``cap · tanh(x / cap)``. ``eos_token_ids`` end a
    generation.
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
    qk_norm: str = ""
    norms: str = BEFORE
    activation: str = SILU
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logits_divisor: float = 1.0
    scores_cap: float | None = None
    logits_cap: float | None = None
    window_rope: dict[str, Any] | None = None
    unrotated: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def dimensions(self) -> dict[str, int]:
        """What runner and server compare, and reports keep."""
        return {
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
        }

    def canonical(self, *left_out: str) -> str:
        """Everything of it but its name, and ``left_out``, as canonical JSON."""
        values = {key: value for key, value in asdict(self).items() if key not in ("name", *left_out)}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of each layer."""
        return LAYER_NORMS[self.norms]

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
        ``layers.i.q_proj`` …, ``layers.i.q_proj.bias``, its ``layer_norms``, ``layers.i.q_norm``, ``layers.i.k_norm``.
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
            for norm in self.layer_norms:
                yield prefix + norm, (self.hidden_size,)
            if self.qk_norm:
                heads, kv_heads = (self.heads, self.kv_heads) if self.qk_norm == WHOLE else (1, 1)
                yield prefix + "q_norm", (heads * self.head_dim,)
                yield prefix + "k_norm", (kv_heads * self.head_dim,)
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
