"""Tiny models of every row of ``model.arch``: what they have of their own that a plain one lacks. The first of a row is
in each test of families; the others are in the longer ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest

Overrides = Mapping[str, Any]

LONGROPE: Final = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [2.0, 5.0, 9.0],
    "partial_rotary_factor": 0.75,
}
LONG_QUERIES: Final = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 256,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.7,
}
TWO_ROPES: Final = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOWS: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
PARTIAL: Final = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SCALARS: Final = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.5,
    "logits_scaling": 8.0,
}
GRANITE_4: Final = {
    **SCALARS,
    "layer_types": ["full_attention", "full_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "mamba_n_heads": 8,
}

CASES: Final[Mapping[str, list[Overrides]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {}],
    "mistral": [{"sliding_window": 7}, {}],
    "ministral": [WINDOWS],
    "ministral3": [{"rope_parameters": LONG_QUERIES}, {"sliding_window": 7}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {}],
    "qwen3": [{"attention_bias": True}],
    "seed_oss": [{"attention_bias": True, "attention_out_bias": False}],
    "smollm3": [{"no_rope_layers": [0, 1], "tie_word_embeddings": True}, {"num_hidden_layers": 4}],
    "granite": [{**SCALARS, "tie_word_embeddings": True}, {**SCALARS, "attention_bias": True}],
    "granitemoehybrid": [
        {**GRANITE_4, "position_embedding_type": "rope", "tie_word_embeddings": True},
        {**GRANITE_4, "position_embedding_type": None, "attention_bias": True},
    ],
    "phi3": [
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        {"sliding_window": 7, "rope_parameters": PARTIAL},
    ],
    "olmo2": [{"tie_word_embeddings": True}, {"num_hidden_layers": 3}],
    "olmo3": [{**WINDOWS, "rope_parameters": TWO_ROPES}, WINDOWS],
    "gemma": [{"tie_word_embeddings": True}, {"hidden_act": "gelu", "num_key_value_heads": 1}],
    "gemma2": [
        {**WINDOWS, "tie_word_embeddings": True, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
        {**WINDOWS, "query_pre_attn_scalar": 3, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ],
    "gemma3_text": [
        {**WINDOWS, "tie_word_embeddings": True, "query_pre_attn_scalar": 3},
        {**WINDOWS, "final_logit_softcapping": 4.0, "rope_parameters": TWO_ROPES, "num_hidden_layers": 2},
    ],
}

NEW_KINDS: Final = ("llama", "gemma3_text", "olmo3")
"""Rows that together have all that a shield, a border, or a guess could stumble over."""


def each(*, whole: bool = False) -> list[Any]:
    """Parameters ``(architecture, overrides)``: of each row the first, ``extra`` but for ``NEW_KINDS``; or with
    ``whole`` all, ``extra`` but for the first."""
    found = []
    for name, cases in CASES.items():
        for index, overrides in enumerate(cases if whole else cases[:1]):
            extra = index > 0 if whole else name not in NEW_KINDS
            marks = [pytest.mark.extra] if extra else []
            found.append(pytest.param(name, overrides, id=f"{name}-{index}" if whole else name, marks=marks))
    return found
