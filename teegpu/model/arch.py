"""What architectures are: one row each. Adding a family that fits is one row, and a test is made of it.

Scalars that a family multiplies activations with are linear, and so they are folded into the weights as these are read
(``adjustment_of``): the server, the TEE and the whole numbers of shielded products all get the same weights, and no
program knows of them. That of the embedding is not: rows of a table in bf16 would be rounded once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from teegpu.model.spec import AFTER, AROUND, BEFORE, HEADS, WHOLE, ModelSpec

NEVER, ALWAYS = "", "always"
FULL, SLIDING, BY_LAYER = "full", "sliding", "by layer"


@dataclass(frozen=True, slots=True)
class Architecture:
    """``models``: those that people know it by.

    ``qkv_bias``, ``o_bias``, ``mlp_bias``: the key of config.json that says whether there is one; or NEVER, ALWAYS.
    ``windows``: FULL attention in each layer; SLIDING: each has the config's window; BY_LAYER: as ``layer_types`` says.
    ``partial``: a part of each head may be rotated. ``qk_norm``: queries and keys are normalised: NEVER, HEADS (each
    head by itself), WHOLE (all heads of a token together). ``norms``: what is normalised in a layer: BEFORE: what goes
    into attention and MLP; AFTER: what comes out of them; AROUND: both. ``norm_offset``: what is added to the stored
    weight of each norm. ``activation``: the key of the function between gate and up.
    ``intermediate``: the key of the size of the MLP. ``joined``: tensors of a layer that are several of ours in the
    files, one after the other, or one of ours under another name. ``unrotated``: the key that tells which layers rotate
    nothing; ``rotation``: the key that says "rope", or no layer rotates anything. ``two_ropes``: layers with a window
    have rotary angles of their own. ``long_queries``: queries grow with their position (``llama_4_scaling_beta``).
    ``experts``: the key of the number of experts that there may be beside the MLP; where there are any, or layers that
    keep a state, a model is refused all the same. The keys of scalars: of the embedding (ROOT: √hidden), of what is
    added to the residual, of the scores in place of 1/√d (``query_scalar``: 1 over its root), what logits are divided
    by, and what scores and logits are kept below with a tanh.
    """

    models: str
    qkv_bias: str = NEVER
    o_bias: str = NEVER
    mlp_bias: str = NEVER
    windows: str = FULL
    qk_norm: str = NEVER
    norms: str = BEFORE
    norm_offset: float = 0.0
    activation: str = "hidden_act"
    intermediate: str = "intermediate_size"
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    partial: bool = False
    unrotated: str = ""
    rotation: str = ""
    experts: str = ""
    two_ropes: bool = False
    long_queries: bool = False
    embedding_scale: str = ""
    residual_scale: str = ""
    attention_scale: str = ""
    query_scalar: str = ""
    logits_divisor: str = ""
    scores_cap: str = ""
    logits_cap: str = ""


ROOT: Final = "root"
_BIASED: Final = ("attention_bias", "attention_bias")
_GATE_UP: Final = ("gate_proj", "up_proj")

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("Llama 2 and 3, TinyLlama, SmolLM2, Yi", *_BIASED, "mlp_bias"),
    "mistral": Architecture("Mistral 7B, Nemo, Small", windows=SLIDING),
    "ministral": Architecture("Ministral 8B", windows=BY_LAYER),
    "ministral3": Architecture("Ministral 3 (text)", windows=SLIDING, long_queries=True),
    "qwen2": Architecture("Qwen2, Qwen2.5, QwQ", ALWAYS, windows=BY_LAYER),
    "qwen3": Architecture("Qwen3", *_BIASED, windows=BY_LAYER, qk_norm=HEADS),
    "seed_oss": Architecture("Seed-OSS", "attention_bias", "attention_out_bias", "mlp_bias"),
    "smollm3": Architecture("SmolLM3", *_BIASED, "mlp_bias", windows=BY_LAYER, unrotated="no_rope_layers"),
    "granite": Architecture(
        *("Granite 3", *_BIASED, "mlp_bias"),
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        attention_scale="attention_multiplier",
        logits_divisor="logits_scaling",
    ),
    "granitemoehybrid": Architecture(
        *("Granite 4 dense (350M, 1B, Micro)", *_BIASED),
        intermediate="shared_intermediate_size",
        joined=(("shared_mlp.input_linear", _GATE_UP), ("shared_mlp.output_linear", ("down_proj",))),
        rotation="position_embedding_type",
        experts="num_local_experts",
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
        attention_scale="attention_multiplier",
        logits_divisor="logits_scaling",
    ),
    "phi3": Architecture(
        "Phi-3, Phi-3.5, Phi-4",
        windows=SLIDING,
        joined=(("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")), ("mlp.gate_up_proj", _GATE_UP)),
        partial=True,
    ),
    "olmo2": Architecture("OLMo 2", *_BIASED, qk_norm=WHOLE, norms=AFTER),
    "olmo3": Architecture("OLMo 3", *_BIASED, windows=BY_LAYER, qk_norm=WHOLE, norms=AFTER, two_ropes=True),
    "gemma": Architecture("Gemma 1", *_BIASED, norm_offset=1.0, embedding_scale=ROOT),
    "gemma2": Architecture(
        *("Gemma 2", *_BIASED),
        windows=BY_LAYER,
        norms=AROUND,
        norm_offset=1.0,
        activation="hidden_activation",
        embedding_scale=ROOT,
        query_scalar="query_pre_attn_scalar",
        scores_cap="attn_logit_softcapping",
        logits_cap="final_logit_softcapping",
    ),
    "gemma3_text": Architecture(
        *("Gemma 3 (text)", *_BIASED),
        windows=BY_LAYER,
        qk_norm=HEADS,
        norms=AROUND,
        norm_offset=1.0,
        activation="hidden_activation",
        two_ropes=True,
        embedding_scale=ROOT,
        query_scalar="query_pre_attn_scalar",
        logits_cap="final_logit_softcapping",
    ),
}

TEXT_OF: Final[Mapping[str, str]] = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models of images and text, of which the text is computed: it is one of the architectures, by its own ``text_config``,
which says which; or else this one."""

EXPERTS: Final = "mixtures of experts"
STATEFUL: Final = "layers with a state of their own"
IMAGES: Final = "images and sounds"

REFUSED: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    EXPERTS: (
        "it is a mixture of experts, and which expert a token takes tells what it is",
        (
            *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v32", "llama4"),
            *("olmoe", "flex_olmo", "phimoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "dbrx", "dots1"),
            *("hunyuan_v1_moe", "minimax", "longcat_flash"),
        ),
    ),
    STATEFUL: (
        "some of its layers keep a state in the place of keys and values",
        (
            *("qwen3_next", "qwen3_5", "mamba", "falcon_mamba", "bamba", "falcon_h1", "jamba", "lfm2", "zamba"),
            *("nemotron_h", "recurrent_gemma", "rwkv", "kimi_linear", "olmo_hybrid"),
        ),
    ),
    IMAGES: (
        "it is a model of images or sounds too, of which none is read here: take the text model of that family",
        (*("gemma3n", "gemma4", "llava", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_omni"),),
    ),
}
"""What has no row, and why: kind → (the reason, the beginnings of names). A row would say how they are split. Experts:
a router in the TEE, and a program for each set that was chosen, in the clear alone. State: projections at the server,
all else in the TEE, with copies of the state for guesses and prefixes."""


def why_not(name: str) -> str:
    """What an architecture that has no row does that is not done here, as the end of a message; empty: unknown."""
    if "moe" in name:
        return f": {REFUSED[EXPERTS][0]}"
    return next((f": {reason}" for reason, names in REFUSED.values() if name.startswith(names)), "")


def adjustment_of(spec: ModelSpec, weight: str) -> tuple[float, float]:
    """What is added to the stored ``weight`` as it is read, and what it is multiplied with then."""
    kind = weight.removesuffix(".bias").rpartition(".")[2]
    offset = ARCHITECTURES[spec.architecture].norm_offset if kind.endswith("norm") else 0.0
    if kind == "norm":
        return offset, 1.0 / spec.logits_divisor
    if kind in ("o_proj", "down_proj"):
        return offset, spec.residual_scale
    if kind == ("q_norm" if spec.qk_norm else "q_proj") and spec.attention_scale is not None:
        return offset, spec.attention_scale * math.sqrt(spec.head_dim)  # by whose inverse all scores are multiplied
    return offset, 1.0


def stored_name(spec: ModelSpec, weight: str) -> str:
    """The last part of the name of ``weight`` in the files, after those of its layer."""
    prefix, _, kind = weight.rpartition(".")
    names = _NORMS_AFTER if ARCHITECTURES[spec.architecture].norms != BEFORE else {}
    return f"{prefix}.{names.get(kind, kind)}" if prefix else weight


_NORMS_AFTER: Final = {
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def joined(spec: ModelSpec, weight: str) -> tuple[str, int] | None:
    """Where ``weight`` is a part of a tensor: the name of that in the place of its own, and its first row there."""
    prefix, _, kind = weight.rpartition(".")
    for whole, parts in ARCHITECTURES[spec.architecture].joined:
        if kind in parts:
            before = parts[: parts.index(kind)]
            return f"{prefix}.{whole}", sum(spec.linear_shape(part)[0] for part in before)
    return None
