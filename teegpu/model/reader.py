"""config.json → ``ModelSpec``.

A model's config is foreign: keys that we don't know are ignored, and the defaults of its architecture are taken from
transformers' own config classes. What would change the result of the computation and is not supported here is refused
by name, rather than computed wrongly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import caches
from teegpu.model.arch import (
    ALWAYS,
    ARCHITECTURES,
    EXPERTS,
    FULL,
    NEVER,
    REFUSED,
    ROOT,
    SLIDING,
    STATEFUL,
    TEXT_OF,
    Architecture,
    why_not,
)
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import BEFORE, GELU_TANH, SILU, ModelSpec
from teegpu.settings import SETTINGS
from teegpu.units import printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from teegpu.model.quantised import Quantisation

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}


_ORIGINAL = "original_max_position_embeddings"
BETA = "llama_4_scaling_beta"
"""Of a rotary embedding: how queries grow with their position."""
_CHANGES_GREEDY: dict[str, object] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Settings of generation, and the value with which each changes nothing."""
_DRAWN: dict[str, float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""What tokens are drawn by where a model says that they are, and what transformers takes where it leaves one out."""


def read_config(folder: ModelFolder) -> PreTrainedConfig:
    """The model's configuration as transformers' own config object, read from the folder only (no network).

    Raises ``UnsupportedModelError`` for an architecture that is not in ``ARCHITECTURES`` and ``ModelError`` for a
    config.json that is missing or can't be read.
    """
    raw = _read_json(folder, "config.json")
    architecture = raw.get("model_type")
    if not isinstance(architecture, str):
        raise ModelError(f"{folder.path / 'config.json'} has no 'model_type': {folder.repair}")
    text = raw.get("text_config") if architecture in TEXT_OF else None
    if isinstance(text, dict):
        architecture = str(text.get("model_type", TEXT_OF[architecture]))
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model '{folder.name}' is of architecture '{printable(architecture, 60)}', which is not supported"
            f"{why_not(architecture)}; supported are: {', '.join(ARCHITECTURES)}"
        )
    from transformers import AutoConfig

    try:
        with folder.copied() as path:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except ModelError:
        raise
    except Exception as error:  # each family's own code reads a stranger's file: it may raise anything
        reason = _one_line(error)
        raise ModelError(f"{folder.path / 'config.json'} can't be used ({reason}): {folder.repair}") from error
    if isinstance(text, dict):
        whole, config = config, config.get_text_config()
        config.tie_word_embeddings = whole.tie_word_embeddings
        config.eos_token_id = raw.get("eos_token_id", config.eos_token_id)
    return config


def read_spec(folder: ModelFolder) -> ModelSpec:
    """The dimensions of the model in ``folder``, checked for what this project can compute.

    Raises ``UnsupportedModelError`` for an architecture, activation, rotary kind or quantisation that is not
    supported and ``ModelError`` for dimensions that can't be.
    """
    read_quantisation(folder)
    config = known_config(folder)
    architecture = config.model_type
    row = ARCHITECTURES[architecture]
    activation = getattr(config, row.activation)
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"model '{folder.name}' uses the activation '{printable(str(activation), 40)}', which is not supported; "
            f"supported are: {', '.join(_ACTIVATIONS)}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"model '{folder.name}' lets tokens see those after them (use_bidirectional_attention), which is not "
            "supported: it makes no text"
        )
    _refuse_beside(folder, config, row)
    rope, window_rope = _ropes(folder, config, row)
    spec = ModelSpec(
        name=folder.name,
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, row.intermediate),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_positions=_context(rope, config.max_position_embeddings),
        rms_eps=float(config.rms_norm_eps),
        rope=rope,
        layer_windows=_layer_windows(folder, config),
        qkv_bias=_biased(config, row.qkv_bias),
        o_bias=_biased(config, row.o_bias),
        mlp_bias=_biased(config, row.mlp_bias),
        qk_norm=row.qk_norm,
        norms=row.norms,
        activation=_ACTIVATIONS[activation],
        tied_embeddings=bool(config.tie_word_embeddings),
        embedding_scale=_embedding_scale(folder, config, row),
        residual_scale=_scalar(folder, config, row.residual_scale) or 1.0,
        attention_scale=_attention_scale(folder, config, row),
        logits_divisor=_scalar(folder, config, row.logits_divisor) or 1.0,
        scores_cap=_cap(folder, config, row.scores_cap),
        logits_cap=_cap(folder, config, row.logits_cap),
        window_rope=window_rope,
        unrotated=_unrotated(config, row),
        eos_token_ids=eos_token_ids(folder, config),
    )
    _check(folder, spec)
    if spec.norms != BEFORE and (spec.o_bias or spec.mlp_bias):
        raise UnsupportedModelError(
            f"model '{folder.name}' normalises what comes out of attention and MLP with a bias in it, which is not "
            "supported: biases stay in the TEE, and the plan fused could not get past this one"
        )
    return spec


_READ = (
    "attention_out_bias", "attention_multiplier", "embedding_multiplier", "logits_scaling", "no_rope_layers",
    "residual_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation",
    "query_pre_attn_scalar", "use_bidirectional_attention", "shared_intermediate_size", "position_embedding_type",
    "num_local_experts",
    "attention_bias", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "sliding_window",
    "tie_word_embeddings", "vocab_size",
)  # fmt: skip
"""What is read of transformers' config object."""


def known_config(folder: ModelFolder) -> Any:
    """What ``read_config`` gives, as far as this project reads it: its attributes, without transformers' object.

    Its import takes seconds, most of a small model's start, so the values are kept in the user's cache: under the
    digest of the file that they come from and of the transformers version that read it.
    """
    content = folder.read("config.json")
    path = caches.kept("configs", content + metadata.version("transformers").encode())
    known = caches.read(path)
    if known.get("read") == list(_READ) and isinstance(known.get("values"), dict):
        return SimpleNamespace(**known["values"])
    config = read_config(folder)
    values = {name: getattr(config, name) for name in _READ if hasattr(config, name)}
    caches.write(path, {"read": list(_READ), "values": values})
    return config


def read_quantisation(folder: ModelFolder) -> Quantisation | None:
    """How the weights in ``folder`` are quantised; None: they are not. Raises ``UnsupportedModelError`` for a way that
    is not read."""
    from teegpu.model import quantised

    try:
        return quantised.declared(_read_json(folder, "config.json"))
    except quantised.NotReadError as error:
        raise UnsupportedModelError(
            f"model '{folder.name}' is quantised ({printable(str(error))}), which is not supported; use its original "
            f"weights (fp32, fp16 or bf16 safetensors), a .gguf file, or one that is quantised as {quantised.READ}"
        ) from None


def rotary_config(spec: ModelSpec, rope: Mapping[str, Any] | None = None) -> Any:
    """What the rotary angles of ``rope`` (None: ``spec.rope``) are computed from: where they are scaled that is done by
    transformers' own functions, which take its own config object."""
    rope = spec.rope if rope is None else rope
    values: dict[str, Any] = {
        "rope_parameters": {key: value for key, value in rope.items() if key != BETA},
        "head_dim": spec.head_dim,
        "hidden_size": spec.heads * spec.head_dim,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_positions,
    }
    if rope["rope_type"] == "dynamic":
        values["max_position_embeddings"] = rope[_ORIGINAL]
    if rope["rope_type"] == "default":
        return SimpleNamespace(**values)
    from transformers import LlamaConfig

    return LlamaConfig(**values)


def suggested_sampling(folder: ModelFolder) -> dict[str, float]:
    """What the model's generation_config.json would have tokens drawn by, as transformers does, by the names of the
    settings; without what changes nothing, and values that can't be. Empty: the most likely token."""
    if folder.maybe("generation_config.json") is None:
        return {}
    given = _read_json(folder, "generation_config.json")
    drawn = _DRAWN if given.get("do_sample") is True else {}
    suggested: dict[str, float] = {}
    for key, default in (*drawn.items(), ("repetition_penalty", 1.0)):
        setting = SETTINGS[f"sampling.{key}"]
        try:
            value = setting.check(default if given.get(key) is None else given[key])
        except ValueError:
            continue
        if value != setting.default and isinstance(value, int | float):
            suggested[key] = value
    return suggested


def unapplied(folder: ModelFolder) -> list[str]:
    """What the model's generation_config.json asks for that changes even the most likely tokens, and is not done here,
    as ``key=value``."""
    if folder.maybe("generation_config.json") is None:
        return []
    found = _read_json(folder, "generation_config.json")
    return [f"{key}={found[key]}" for key, usual in _CHANGES_GREEDY.items() if found.get(key) not in (None, usual, [])]


def eos_token_ids(folder: ModelFolder, config: Any) -> tuple[int, ...]:
    """Token ids that end a generation: those of generation_config.json, then those of the config, each once."""
    ids: list[int] = []
    sources = [config.eos_token_id]
    if folder.maybe("generation_config.json") is not None:
        sources.insert(0, _read_json(folder, "generation_config.json").get("eos_token_id"))
    for source in sources:
        for token in source if isinstance(source, list | tuple) else [source]:
            if isinstance(token, int) and not isinstance(token, bool) and token not in ids:
                ids.append(token)
    return tuple(ids)


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else int(config.hidden_size) // int(config.num_attention_heads)


def _ropes(folder: ModelFolder, config: Any, row: Architecture) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary embedding of all layers, or of those without a window and of those with one."""
    given: dict[str, Any] = config.rope_parameters or {}
    unread = {"max_position_embeddings"} | (set() if row.long_queries else {BETA})
    if not row.two_ropes:
        rope = _rope(folder, config, {key: value for key, value in given.items() if key not in unread})
        if row.long_queries:
            _positive(folder, rope, (BETA, _ORIGINAL), "its rotary embedding")
        return rope, None
    kinds = [each for kind in ("full_attention", "sliding_attention") if isinstance(each := given.get(kind), dict)]
    if len(kinds) != 2:
        raise ModelError(
            f"{folder.path / 'config.json'} can't be right: rope_parameters has not one set for layers with a window "
            f"and one for the others; {folder.repair}"
        )
    unread.add("truncate")  # transformers looks for it beside the two sets, and finds none
    rope, window_rope = (
        _rope(folder, config, {key: value for key, value in each.items() if key not in unread}) for each in kinds
    )
    for each in (rope, window_rope):
        if each["rope_type"] in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"model '{folder.name}' has the rotary embedding '{each['rope_type']}' in some of its layers alone, "
                "which is not supported"
            )
    return rope, window_rope


def _rope(folder: ModelFolder, config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(given)
    rope.pop("type", None)  # the old name of rope_type, which transformers keeps where a config has it
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"model '{folder.name}' uses the rotary embedding '{printable(str(kind), 40)}', which is not supported; "
            f"supported are: {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not ARCHITECTURES[config.model_type].partial:
        raise UnsupportedModelError(
            f"model '{folder.name}' rotates a part of each head only (partial_rotary_factor "
            f"{rope['partial_rotary_factor']!r:.40}), which is not supported for the architecture '{config.model_type}'"
        )
    if kind == "dynamic":
        rope[_ORIGINAL] = config.max_position_embeddings
    wanted = {"rope_theta"} | ({"factor"} if kind not in ("default", "longrope") else set())
    given_too = {key for key in rope.keys() & _POSITIVE if rope[key] is not None}
    _positive(folder, rope, sorted(wanted | given_too), "its rotary embedding")
    return rope


def _positive(folder: ModelFolder, values: Mapping[str, Any], keys: Iterable[str], of: str) -> None:
    """Raises ``ModelError`` where one of ``keys`` is no positive number."""
    for key in keys:
        value: Any = values.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ModelError(
                f"{folder.path / 'config.json'} can't be right: {key} of {of} is {value!r}, not a positive number; "
                f"{folder.repair}"
            )


_POSITIVE = {
    _ORIGINAL,
    "partial_rotary_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
}


def _context(rope: Mapping[str, Any], positions: int) -> int:
    """How many positions the model is for: yarn and dynamic scaling extend those of its training."""
    extended = rope["factor"] * rope[_ORIGINAL] if rope["rope_type"] in ("yarn", "dynamic") else 0
    return max(positions, int(extended))


def _biased(config: Any, key: str) -> bool:
    return key == ALWAYS or (key != NEVER and bool(getattr(config, key)))


def _scalar(folder: ModelFolder, config: Any, key: str) -> float | None:
    if not key:
        return None
    value = getattr(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"{folder.path / 'config.json'} can't be right: {key} is {value!r}; {folder.repair}")
    return float(value)


def _embedding_scale(folder: ModelFolder, config: Any, row: Architecture) -> float:
    if row.embedding_scale == ROOT:
        return math.sqrt(config.hidden_size)
    return _scalar(folder, config, row.embedding_scale) or 1.0


def _attention_scale(folder: ModelFolder, config: Any, row: Architecture) -> float | None:
    scalar = _scalar(folder, config, row.query_scalar)
    return _scalar(folder, config, row.attention_scale) if scalar is None else 1.0 / math.sqrt(scalar)


def _cap(folder: ModelFolder, config: Any, key: str) -> float | None:
    return _scalar(folder, config, key) if key and getattr(config, key) is not None else None


def _refuse_beside(folder: ModelFolder, config: Any, row: Architecture) -> None:
    """Raises ``UnsupportedModelError`` for what some models of a row have beside what it computes."""
    if not row.experts:
        return
    stateful = set(config.layer_types) - {"full_attention"}
    kind = EXPERTS if getattr(config, row.experts) else STATEFUL if stateful else None
    if kind:
        raise UnsupportedModelError(
            f"model '{folder.name}' is of architecture '{config.model_type}', of which dense models are supported "
            f"alone: {REFUSED[kind][0]}"
        )


def _unrotated(config: Any, row: Architecture) -> tuple[int, ...]:
    if row.rotation and getattr(config, row.rotation) != "rope":
        return tuple(range(config.num_hidden_layers))
    rotated = getattr(config, row.unrotated) if row.unrotated else []
    return tuple(layer for layer, flag in enumerate(rotated) if not flag)


def _layer_windows(folder: ModelFolder, config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    row = ARCHITECTURES[config.model_type]
    if row.windows == FULL:
        return (None,) * layers
    window = config.sliding_window or None
    if row.windows == SLIDING:  # transformers gives every layer the window, whatever layer_types says
        return (window,) * layers
    if row.two_ropes and window is None:  # by which layers are told apart
        raise ModelError(f"{folder.path / 'config.json'} can't be right: sliding_window is missing; {folder.repair}")
    kinds = config.layer_types
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"model '{folder.name}' has layers of type '{printable(str(unknown[0]), 40)}', which is not supported; "
            "supported are: full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check(folder: ModelFolder, spec: ModelSpec) -> None:
    sizes = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        ARCHITECTURES[spec.architecture].intermediate: spec.intermediate_size,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
    }
    problem = next((f"{key} is {value}" for key, value in sizes.items() if value < 1), None)
    if problem is None and spec.heads % spec.kv_heads:
        problem = f"{spec.heads} attention heads can't share {spec.kv_heads} key-value heads evenly"
    if problem is None and _rotated(spec) % 2:
        problem = f"{_rotated(spec)} values of each head are rotated, which is odd"
    if problem is None and not spec.rms_eps > 0:
        problem = f"rms_norm_eps is {spec.rms_eps}"
    if problem is None and len(spec.layer_windows) != spec.layers:
        problem = f"layer_types has {len(spec.layer_windows)} entries for {spec.layers} layers"
    if problem is not None:
        raise ModelError(f"{folder.path / 'config.json'} can't be right: {problem}; {folder.repair}")


def _rotated(spec: ModelSpec) -> int:
    """How many values of each head are rotated, the first ones."""
    return int(spec.head_dim * spec.rope.get("partial_rotary_factor", 1.0))


def _read_json(folder: ModelFolder, file: str) -> dict[str, Any]:
    path = folder.path / file
    try:
        data = json.loads(folder.read(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ModelError(f"{path} is not valid JSON ({_one_line(error)}): {folder.repair}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object: {folder.repair}")
    return data


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 200) or type(error).__name__
