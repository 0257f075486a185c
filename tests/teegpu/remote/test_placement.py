"""A model that is cut over several servers: the same results, and no program that needs the weights of two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu import facts
from teegpu.errors import ServerRefusedError
from teegpu.record.events import PREFILL
from teegpu.remote.calls import drive
from teegpu.tee.decoder import Span, Step
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.sampling import Sampler, SamplingOptions
from tests.conftest import TinyModel
from tests.teegpu.conftest import MakeHarness, random_ids
from tests.teegpu.tee.test_decoder import enlarged, relative_error

Reference = Callable[..., Any]
Groups = tuple[tuple[int, int], ...]

REMOTE = [plan for plan in facts.PLANS if plan != "local"]
LAYERS = 5
CUTS: dict[str, Groups] = {
    "two": ((0, 2), (3, 4)),
    "three": ((0, 0), (1, 3), (4, 4)),
    "each layer": tuple((layer, layer) for layer in range(LAYERS)),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biased and tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}


CASES = [
    *((name, plan, cut) for plan in facts.PLANS for name, cut in (("llama", "two"), ("biased and tied", "three"))),
    ("qwen3", "fused", "each layer"),
]


@pytest.mark.parametrize(("name", "plan", "cut"), CASES)
def test_every_plan_equals_transformers_over_several_servers(
    name: str, plan: str, cut: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    architecture, overrides = MODELS[name]
    folder = tiny_model(architecture, num_hidden_layers=LAYERS, **overrides)
    runner = harness(folder, shards=CUTS[cut])
    ids = random_ids(20)
    with torch.inference_mode():
        want = reference(folder)(ids[None]).logits[0]
    assert relative_error(runner.logits(plan, ids, 9, 18), want) < 1e-4
    assert set(runner.client.asked) == (set(range(len(CUTS[cut]))) if plan != "local" else set())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("plan", REMOTE)
def test_a_border_costs_the_fused_plan_one_rpc_and_the_others_none(
    plan: str, cut: str, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    shards = CUTS[cut]
    runner = harness(tiny_model("llama", num_hidden_layers=LAYERS), shards=shards)
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 32)
    runner.rotary.prepare(12)
    with torch.inference_mode():
        drive(decoder.forward(Step([Span(random_ids(12), 0, cache, "last")])))
    chosen = facts.plan(plan)
    assert len(runner.client.sent) == chosen.rpc_calls(LAYERS, len(shards))
    assert chosen.rpc_calls(LAYERS, len(shards)) - chosen.rpc_calls(LAYERS) == (len(shards) - 1) * chosen.fused
    if plan == "fused":
        assert len(runner.client.sent) == 2 * LAYERS + 1 + len(shards) - 1


def test_servers_are_asked_in_the_order_of_their_layers(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama", num_hidden_layers=LAYERS), shards=CUTS["three"])
    runner.logits("fused", random_ids(3))
    # Q, K and V of its first layer, two programs a layer; the last one of a layer stays with the layer
    assert runner.client.asked == [0] * 3 + [1] * 7 + [2] * 3


@pytest.mark.parametrize("plan", REMOTE)
def test_overlapped_chunks_over_two_servers_generate_what_one_does(
    plan: str, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    folder = tiny_model("llama", num_hidden_layers=LAYERS)
    prompt = random_ids(40).tolist()

    def generated(shards: Groups, **options: Any) -> list[int]:
        engine = harness(folder, shards=shards).engine(plan, **options)
        return engine.generate(prompt, max_tokens=8, sampler=Sampler(SamplingOptions())).token_ids

    assert generated(CUTS["two"], chunk_tokens=8, overlap=True) == generated(())
    assert generated(CUTS["three"], chunk_tokens=16) == generated(())


@pytest.mark.parametrize("wire_dtype", ["fp16", "bf16", "int8"])
def test_narrow_wires_lose_no_more_over_borders(
    wire_dtype: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    folder = tiny_model("qwen3", num_hidden_layers=LAYERS)
    ids = random_ids(24)
    with torch.inference_mode():
        want = reference(folder)(ids[None]).logits[0]
    whole, cut = (harness(folder, wire_dtype=wire_dtype, shards=shards) for shards in ((), CUTS["each layer"]))
    assert relative_error(cut.logits("fused", ids), want) < 1.5 * relative_error(whole.logits("fused", ids), want)


@pytest.mark.parametrize("wire_dtype", ["fp16", "int8"])
def test_a_residual_beyond_fp16_crosses_a_border(
    wire_dtype: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference, tmp_path: Any
) -> None:
    factors = {
        "model.embed_tokens.weight": 30_000.0,
        "model.layers.0.self_attn.o_proj.weight": 30_000.0,
        "model.layers.1.mlp.down_proj.weight": 30_000.0,
    }
    folder = enlarged(tiny_model("llama", num_hidden_layers=LAYERS), factors, tmp_path / "large")
    ids = random_ids(24)
    with torch.inference_mode():
        out = reference(folder)(ids[None], output_hidden_states=True)
    assert max(float(state.abs().max()) for state in out.hidden_states) > 65_504
    runner = harness(folder, wire_dtype=wire_dtype, shards=((0, 1), (2, 4)))
    assert relative_error(runner.logits("fused", ids, 20), out.logits[0]) < (1e-2 if wire_dtype == "fp16" else 1e-1)


def test_without_borders_a_server_refuses_what_it_does_not_hold(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama", num_hidden_layers=LAYERS), shards=CUTS["two"])
    runner.borders = frozenset()
    with pytest.raises(ServerRefusedError, match=r"unknown-weight.*holds layers 0-2 of 5.*'layers\.3\."):
        runner.logits("fused", random_ids(3))


def test_no_token_id_leaves_the_tee_over_a_border(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama", num_hidden_layers=LAYERS), shards=CUTS["two"])
    runner.logits("fused", random_ids(12), 10)
    for frames in runner.client.sent:
        assert b"embed_tokens" not in frames[0]
        assert b"int32" not in frames[0]


def test_times_add_up_over_a_border(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama", num_hidden_layers=LAYERS), shards=CUTS["two"])
    decoder, cache = runner.decoder("fused"), KVCache(runner.spec, 64)
    runner.rotary.prepare(40)
    record = runner.recorder
    with torch.inference_mode():
        record.begin(PREFILL)
        drive(decoder.forward(Step([Span(random_ids(40), 0, cache, "last")])))
        record.end(40, 1)
    phase = runner.summary.phases[PREFILL]
    parts = phase.tee_seconds + phase.serialization_seconds + phase.wait_seconds + phase.other_seconds
    assert parts == pytest.approx(phase.seconds, rel=1e-6)
    assert phase.ops["LINEAR"].count == 4 * LAYERS
