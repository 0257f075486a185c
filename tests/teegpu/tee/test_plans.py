from __future__ import annotations

import pytest

from teegpu import facts
from teegpu.config import PLANS as PLAN_NAMES
from teegpu.errors import ConfigError
from teegpu.model.reader import read_spec
from teegpu.tee import plans
from tests.conftest import TinyModel


def test_the_settings_offer_exactly_these_plans() -> None:
    assert tuple(facts.PLANS) == PLAN_NAMES


def test_an_unknown_plan_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown plan 'batch', did you mean 'batched'"):
        facts.plan("batch")


@pytest.mark.parametrize("name", facts.PLANS)
def test_rpc_counts_for_22_layers(name: str) -> None:
    want = {"local": 0, "per-op": 200, "batched": 134, "attention": 89, "fused": 45}
    assert facts.plan(name).rpc_calls(22) == want[name]


@pytest.mark.parametrize("name", facts.PLANS)
def test_every_weight_of_a_program_is_in_the_model(name: str, tiny_model: TinyModel) -> None:
    spec = read_spec(tiny_model("llama"))
    for layer in plans.programs(spec, facts.plan(name)):
        for program in (*layer.plain, layer.after_attention, layer.after_mlp, layer.end):
            assert set(program.weights) <= set(spec.weights)


@pytest.mark.parametrize("name", facts.PLANS)
def test_programs_take_the_weights_of_one_layer_but_for_the_one_that_leads_to_the_next(
    name: str, tiny_model: TinyModel
) -> None:
    spec = read_spec(tiny_model("llama", num_hidden_layers=3))
    for layer, code in enumerate(plans.programs(spec, facts.plan(name))):
        for program in (*code.plain, code.after_attention, code.end):
            assert {spec.layer_of(name) for name in program.weights} == {layer}
        places = {spec.layer_of(name) for name in code.after_mlp.weights}
        assert places == {layer, min(layer + 1, spec.layers - 1)}


def test_rpc_counts_over_several_servers() -> None:
    assert [facts.plan("fused").rpc_calls(22, groups) for groups in (1, 2, 3)] == [45, 46, 47]
    assert [facts.plan("attention").rpc_calls(22, groups) for groups in (1, 2, 3)] == [89, 89, 89]
    assert facts.plan("local").rpc_calls(22, 3) == 0
