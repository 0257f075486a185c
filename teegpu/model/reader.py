"""config.json → ``ModelSpec``.

A model's config is foreign: keys that we don't know are ignored, and the defaults of its architecture are taken from
transformers' own config classes. What would change the result of the computation and is not supported here is refused
by name, rather than computed wrongly.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import cachefile
from teegpu.model.folder import ModelFolder, default_cache_dir
from teegpu.model.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_config(folder: ModelFolder) -> PreTrainedConfig:
    """The model's configuration as transformers' own config object, read from the folder only (no network).

    Raises ``UnsupportedModelError`` for an architecture that is not in ``ARCHITECTURES`` and ``ModelError`` for a
    config.json that is missing or can't be read.
    """
    raw = _read_json(folder, "config.json")
    architecture = raw.get("model_type")
    if not isinstance(architecture, str):
        raise ModelError(f"{folder.path / 'config.json'} has no 'model_type': {folder.repair}")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model '{folder.name}' is of architecture '{architecture}', which is not supported; "
            f"supported are: {', '.join(ARCHITECTURES)}"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder.path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = _one_line(error)
        raise ModelError(f"{folder.path / 'config.json'} can't be used ({reason}): {folder.repair}") from error
    return config


def read_spec(folder: ModelFolder) -> ModelSpec:
    """The dimensions of the model in ``folder``, checked for what this project can compute.

    Raises ``UnsupportedModelError`` for an architecture, activation, rotary kind or quantisation that is not
    supported and ``ModelError`` for dimensions that can't be.
    """
    config = known_config(folder)
    architecture = config.model_type
    activation = config.hidden_act
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"model '{folder.name}' uses the activation '{activation}', which is not supported; supported is: silu"
        )
    if (method := _quantisation(config)) is not None:
        raise UnsupportedModelError(
            f"model '{folder.name}' is quantised ({method}), which is not supported; "
            "use its original weights (fp32, fp16 or bf16 safetensors) or a .gguf file"
        )
    spec = ModelSpec(
        name=folder.name,
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rms_eps=float(config.rms_norm_eps),
        rope=_rope(folder, config),
        layer_windows=_layer_windows(folder, config),
        qkv_bias=architecture == "qwen2" or bool(getattr(config, "attention_bias", False)),
        o_bias=architecture in ("llama", "qwen3") and bool(config.attention_bias),
        mlp_bias=architecture == "llama" and bool(config.mlp_bias),
        qk_norm=architecture == "qwen3",
        tied_embeddings=bool(config.tie_word_embeddings),
        eos_token_ids=eos_token_ids(folder, config),
    )
    _check(folder, spec)
    return spec


_READ = (
    "attention_bias", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "quantization_config", "rms_norm_eps", "rope_parameters", "sliding_window",
    "tie_word_embeddings", "vocab_size",
)  # fmt: skip
"""What is read of transformers' config object."""


def known_config(folder: ModelFolder) -> Any:
    """What ``read_config`` gives, as far as this project reads it: its attributes, without transformers' object.

    Its import takes seconds, most of a small model's start, so the values are kept in the user's cache: under the
    digest of the file that they come from and of the transformers version that read it.
    """
    try:
        content = (folder.path / "config.json").read_bytes()
    except OSError:
        return read_config(folder)  # which says what is wrong
    key = hashlib.sha256(content + metadata.version("transformers").encode()).hexdigest()[:32]
    path = default_cache_dir() / "configs" / f"{key}.json"
    known = cachefile.read(path)
    if known.get("read") == list(_READ) and isinstance(known.get("values"), dict):
        return SimpleNamespace(**known["values"])
    config = read_config(folder)
    values = {name: getattr(config, name) for name in _READ if hasattr(config, name)}
    cachefile.write(path, {"read": list(_READ), "values": values})
    return config


def rotary_config(folder: ModelFolder) -> Any:
    """What rotary angles are computed from: where they are scaled that is done by transformers' own functions, which
    take its own config object. Raises as ``read_config``."""
    known = known_config(folder)
    return known if known.rope_parameters.get("rope_type", "default") == "default" else read_config(folder)


def eos_token_ids(folder: ModelFolder, config: Any) -> tuple[int, ...]:
    """Token ids that end a generation: those of generation_config.json, then those of the config, each once."""
    ids: list[int] = []
    sources = [config.eos_token_id]
    if (folder.path / "generation_config.json").is_file():
        sources.insert(0, _read_json(folder, "generation_config.json").get("eos_token_id"))
    for source in sources:
        for token in source if isinstance(source, list | tuple) else [source]:
            if isinstance(token, int) and not isinstance(token, bool) and token not in ids:
                ids.append(token)
    return tuple(ids)


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else int(config.hidden_size) // int(config.num_attention_heads)


def _rope(folder: ModelFolder, config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    rope.pop("type", None)  # the old name of rope_type, which transformers keeps where a config has it
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"model '{folder.name}' uses the rotary embedding '{kind}', which is not supported; "
            f"supported are: {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"model '{folder.name}' rotates a part of each head only (partial_rotary_factor "
            f"{rope['partial_rotary_factor']}), which is not supported"
        )
    return rope


def _layer_windows(folder: ModelFolder, config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    if config.model_type == "llama":
        return (None,) * layers
    window = config.sliding_window or None
    if config.model_type == "mistral":  # transformers gives every layer the window, whatever layer_types says
        return (window,) * layers
    kinds = config.layer_types
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"model '{folder.name}' has layers of type '{unknown[0]}', which is not supported; "
            "supported are: full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _quantisation(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method or "unknown method")


def _check(folder: ModelFolder, spec: ModelSpec) -> None:
    sizes = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
    }
    problem = next((f"{key} is {value}" for key, value in sizes.items() if value < 1), None)
    if problem is None and spec.heads % spec.kv_heads:
        problem = f"{spec.heads} attention heads can't share {spec.kv_heads} key-value heads evenly"
    if problem is None and spec.head_dim % 2:
        problem = f"head_dim {spec.head_dim} is odd, so it can't be rotated"
    if problem is None and not spec.rms_eps > 0:
        problem = f"rms_norm_eps is {spec.rms_eps}"
    if problem is None and len(spec.layer_windows) != spec.layers:
        problem = f"layer_types has {len(spec.layer_windows)} entries for {spec.layers} layers"
    if problem is not None:
        raise ModelError(f"{folder.path / 'config.json'} can't be right: {problem}; {folder.repair}")


def _read_json(folder: ModelFolder, file: str) -> dict[str, Any]:
    path: Path = folder.path / file
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {folder.repair}") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error.strerror}): {folder.repair}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ModelError(f"{path} is not valid JSON ({_one_line(error)}): {folder.repair}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object: {folder.repair}")
    return data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
