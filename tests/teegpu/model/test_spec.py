from __future__ import annotations

import pytest

from teegpu.model.reader import read_spec


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_parameters_are_counted_as_transformers_counts_them(tiny_model, architecture, overrides) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, **overrides)
    model = AutoModelForCausalLM.from_pretrained(str(folder.path))

    assert read_spec(folder).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_every_projection_has_its_shape(tiny_model) -> None:
    spec = read_spec(tiny_model("qwen3", head_dim=16))

    assert spec.linear_shape("q_proj") == (64, 32)
    assert spec.linear_shape("v_proj") == (32, 32)
    assert spec.linear_shape("o_proj") == (32, 64)
    assert spec.linear_shape("down_proj") == (32, 64)
    assert spec.linear_shape("lm_head") == (272, 32)
    assert spec.weights["layers.1.k_norm"] == (16,)


def test_every_weight_is_placed_with_a_layer(tiny_model) -> None:
    spec = read_spec(tiny_model("qwen3", num_hidden_layers=12))

    places = {name: spec.layer_of(name) for name in spec.weights}
    assert (places["embed_tokens"], places["norm"], places["lm_head"]) == (0, 11, 11)
    assert (places["layers.1.q_proj"], places["layers.11.k_norm"]) == (1, 11)
    assert set(places.values()) == set(range(12))
