"""The decoder against transformers: every plan, every architecture, every way of cutting a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teegpu import facts
from teegpu.errors import BadReplyError
from teegpu.model.folder import ModelFolder
from teegpu.remote.calls import Call, drive
from teegpu.tee.decoder import Span, Step
from teegpu.tee.kv_cache import KVCache
from tests.conftest import TinyModel
from tests.teegpu.conftest import MakeHarness, random_ids

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
}
"""Few, at many lengths; ``test_architectures`` has all families."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
DECODE_STEPS = 16

Reference = Callable[..., Any]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("plan", facts.PLANS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefill_and_decode_equal_transformers(
    name: str, plan: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    architecture, overrides = ARCHITECTURES[name]
    folder = tiny_model(architecture, **overrides)
    model = reference(folder)
    runner = harness(folder)
    for prompt in (1, 2, 17, 64):
        ids = random_ids(prompt + DECODE_STEPS, seed=prompt)
        with torch.inference_mode():
            want = model(ids[None]).logits[0]
        got = runner.logits(plan, ids, *range(prompt, prompt + DECODE_STEPS))
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("plan", ["local", "batched", "fused"])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_kinds(
    kind: str, plan: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    folder = tiny_model("llama", rope_parameters=ROPES[kind], max_position_embeddings=256)
    ids = random_ids(80)
    with torch.inference_mode():
        want = reference(folder)(ids[None]).logits[0]
    assert relative_error(harness(folder).logits(plan, ids, 64, 65), want) < 1e-4


def test_dynamic_rope_beyond_the_original_context_follows_transformers(
    tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    folder = tiny_model("llama", rope_parameters=ROPES["dynamic"], max_position_embeddings=32)
    runner = harness(folder)
    ids = random_ids(56)
    model = reference(folder)
    with torch.inference_mode():
        cached = model(ids[None, :48], use_cache=True)
        want = [cached.logits[0]]
        for position in range(48, 56):
            step = model(ids[None, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
            want.append(step.logits[0])
    assert relative_error(runner.logits("fused", ids, *range(48, 56)), torch.cat(want)) < 1e-4


@pytest.mark.parametrize("plan", facts.PLANS)
@pytest.mark.parametrize("edges", [(1,), (5, 6, 30), (16, 32, 48), (39,)])
def test_chunks_give_what_the_whole_gives(
    plan: str, edges: tuple[int, ...], tiny_model: TinyModel, harness: MakeHarness
) -> None:
    runner = harness(tiny_model("mistral", sliding_window=16))
    ids = random_ids(50)
    assert relative_error(runner.logits(plan, ids, *edges), runner.logits(plan, ids)) < 1e-5


@pytest.mark.parametrize("plan", facts.PLANS)
def test_only_the_last_logits_are_the_last_of_all_logits(
    plan: str, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    runner = harness(tiny_model("qwen2"))
    ids = random_ids(20)
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 32)
    runner.rotary.prepare(20)
    with torch.inference_mode():
        last = drive(decoder.forward(Step([Span(ids, 0, cache, "last")])))
    assert last is not None
    assert last.shape == (1, runner.spec.vocab_size)
    assert relative_error(last[0], runner.logits(plan, ids)[-1]) < 1e-5


@pytest.mark.parametrize("plan", facts.PLANS)
def test_a_pass_without_logits_stores_keys_all_the_same(plan: str, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"))
    ids = random_ids(24)
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 32)
    runner.rotary.prepare(24)
    with torch.inference_mode():
        assert drive(decoder.forward(Step([Span(ids[:20], 0, cache, "none")]))) is None
        got = drive(decoder.forward(Step([Span(ids[20:], 20, cache, "all")])))
    assert got is not None
    assert relative_error(got, runner.logits(plan, ids)[20:]) < 1e-5


@pytest.mark.parametrize(
    ("plan", "calls"), [("local", 0), ("per-op", 200), ("batched", 134), ("attention", 89), ("fused", 45)]
)
def test_rpc_calls_of_a_model_of_22_layers(plan: str, calls: int, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama", num_hidden_layers=22))
    assert facts.plan(plan).rpc_calls(22) == calls
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 32)
    runner.rotary.prepare(21)
    ids = random_ids(21)
    with torch.inference_mode():
        for start, stop in ((0, 20), (20, 21)):
            runner.client.sent.clear()
            drive(decoder.forward(Step([Span(ids[start:stop], start, cache, "last")])))
            assert len(runner.client.sent) == calls


@pytest.mark.parametrize("plan", ["attention", "fused", "local"])
def test_no_token_id_leaves_the_tee(plan: str, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"))
    runner.logits(plan, random_ids(12), 10)
    for frames in runner.client.sent:
        assert b"embed_tokens" not in frames[0]
        assert b"int32" not in frames[0]


LARGE = {
    "fused": {
        "model.embed_tokens.weight": 30_000.0,
        "model.layers.0.self_attn.o_proj.weight": 30_000.0,
        "model.layers.1.mlp.down_proj.weight": 30_000.0,
    },
    "attention": {
        "model.embed_tokens.weight": 30_000.0,
        "model.layers.1.mlp.gate_proj.weight": 300.0,
        "model.layers.1.mlp.up_proj.weight": 300.0,
    },
}
"""Weights of a tiny model made larger, so that its activations leave fp16's range: in the residual, and inside the MLP.
(In ``attention`` the TEE sees the input of a product only, so a matrix with rows of norm 10,000 would still
overflow.)"""


def enlarged(folder: ModelFolder, factors: dict[str, float], path: Path) -> ModelFolder:
    shutil.copytree(folder.path, path)
    tensors = load_file(path / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return ModelFolder("large", path)


@pytest.mark.parametrize("wire_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("plan", LARGE)
def test_activations_beyond_fp16_stay_in_range(
    plan: str, wire_dtype: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference, tmp_path: Path
) -> None:
    folder = enlarged(tiny_model("llama", num_hidden_layers=3), LARGE[plan], tmp_path / "large")
    model = reference(folder)
    ids = random_ids(24)
    with torch.inference_mode():
        out = model(ids[None], output_hidden_states=True)
    assert max(float(state.abs().max()) for state in out.hidden_states) > 65_504
    got = harness(folder, wire_dtype=wire_dtype).logits(plan, ids, 20)
    assert relative_error(got, out.logits[0]) < (1e-2 if wire_dtype == "fp16" else 1e-1)


@pytest.mark.parametrize("wire_dtype", ["fp16", "int8"])
def test_norms_after_products_may_be_as_large_as_they_like(
    wire_dtype: str, tiny_model: TinyModel, harness: MakeHarness, reference: Reference, tmp_path: Path
) -> None:
    """The residual leaves fp16's range, and so would what the server makes of products that it does not normalise."""
    factors = {
        "model.layers.0.post_attention_layernorm.weight": 30_000.0,
        "model.layers.1.post_feedforward_layernorm.weight": 300_000.0,
        "model.layers.1.self_attn.o_proj.weight": 300.0,
        "model.layers.0.mlp.down_proj.weight": 1e-4,
    }
    folder = enlarged(tiny_model("olmo2", num_hidden_layers=3), factors, tmp_path / "large")
    ids = random_ids(24)
    with torch.inference_mode():
        out = reference(folder)(ids[None], output_hidden_states=True)
    assert max(float(state.abs().max()) for state in out.hidden_states) > 65_504
    got = harness(folder, wire_dtype=wire_dtype).logits("fused", ids, 20)
    assert relative_error(got, out.logits[0]) < (1e-2 if wire_dtype == "fp16" else 1e-1)


@pytest.mark.parametrize("plan", LARGE)
def test_the_same_activations_overflow_without_the_scaling(
    plan: str, tiny_model: TinyModel, harness: MakeHarness, tmp_path: Path
) -> None:
    runner = harness(
        enlarged(tiny_model("llama", num_hidden_layers=3), LARGE[plan], tmp_path / "large"), wire_dtype="fp16"
    )
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 32)
    decoder.products.narrow_range = False
    runner.rotary.prepare(24)
    with torch.inference_mode(), pytest.raises(BadReplyError, match="not finite"):
        drive(decoder.forward(Step([Span(random_ids(24), 0, cache, "last")])))


@pytest.mark.parametrize(
    ("architecture", "plan"), [*(("qwen3", plan) for plan in facts.PLANS), ("olmo2", "fused"), ("gemma3_text", "fused")]
)
@pytest.mark.parametrize(("wire_dtype", "bound"), [("fp16", 1e-2), ("bf16", 6e-2), ("int8", 1e-1)])
def test_narrow_wires_stay_close(
    architecture: str,
    plan: str,
    wire_dtype: str,
    bound: float,
    tiny_model: TinyModel,
    harness: MakeHarness,
    reference: Reference,
) -> None:
    folder = tiny_model(architecture)
    ids = random_ids(24)
    with torch.inference_mode():
        want = reference(folder)(ids[None]).logits[0]
    assert relative_error(harness(folder, wire_dtype=wire_dtype).logits(plan, ids, 20), want) < bound


@pytest.mark.parametrize("plan", facts.PLANS)
def test_exclusive_times_add_up_to_the_wall(plan: str, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"))
    decoder, cache = runner.decoder(plan), KVCache(runner.spec, 64)
    runner.rotary.prepare(40)
    record = runner.recorder
    with torch.inference_mode():
        record.begin("prefill")
        began = record.clock_ns()
        drive(decoder.forward(Step([Span(random_ids(40), 0, cache, "last")])))
        ended = record.clock_ns()
        record.end(40, 1)
    phase = runner.summary.phases["prefill"]
    parts = phase.tee_seconds + phase.serialization_seconds + phase.wait_seconds + phase.other_seconds
    assert parts == pytest.approx(phase.seconds, rel=1e-6)
    assert phase.seconds == pytest.approx((ended - began) / 1e9, rel=0.01)
    assert phase.wait_seconds == pytest.approx(
        phase.network_seconds + phase.server_seconds + phase.gpu_seconds, rel=1e-6
    )
    assert all(layer.network_seconds >= 0 for layer in phase.layers.values())


@pytest.mark.parametrize(
    ("plan", "light_bytes", "threads"),
    [
        ("fused", 2**20, {8: 2, 1: 1}),
        ("attention", 2**20, {8: 2, 1: 1}),
        ("local", 2**20, {8: 2, 1: 2}),
        ("fused", 64, {8: 2, 1: 2}),
    ],
)
def test_a_light_step_leaves_the_other_cores_to_the_server(
    plan: str,
    light_bytes: int,
    threads: dict[int, int],
    tiny_model: TinyModel,
    harness: MakeHarness,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row after a short context, of which others compute the products; and the number is as before afterwards."""
    monkeypatch.setattr("teegpu.tee.decoder._WORTH_THREADS_BYTES", light_bytes)
    runner = harness(tiny_model("llama"))
    decoder, seen = runner.decoder(plan), {}
    inner = decoder.products.run

    async def run(call: Call) -> dict[str, torch.Tensor]:
        seen[next(iter(call.inputs.values())).shape[0]] = torch.get_num_threads()
        return await inner(call)

    decoder.products.run = run  # type: ignore[method-assign]
    cache = KVCache(runner.spec, capacity=4)
    torch.set_num_threads(2)
    with torch.inference_mode():
        for start, stop in pairwise([0, 8, 9]):
            cache.reserve(stop)
            runner.rotary.prepare(stop)
            drive(decoder.forward(Step([Span(random_ids(stop)[start:], start, cache, "last")])))
            cache.advance(stop)
            assert torch.get_num_threads() == 2
    assert seen == threads
