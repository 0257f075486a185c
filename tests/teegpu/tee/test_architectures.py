"""Each row of the table of architectures computes what transformers computes from the same files: a prompt and 16
steps, in each plan that it takes, whole, in chunks, guessed, after a common beginning, and over two servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu import facts
from teegpu.model.arch import ARCHITECTURES
from teegpu.model.folder import ModelFolder
from teegpu.tee.sampling import Sampler, SamplingOptions
from tests.conftest import TinyModel
from tests.teegpu import families
from tests.teegpu.conftest import MakeHarness, random_ids

Reference = Callable[..., Any]

PROMPT, STEPS = 30, 16


def test_every_row_has_its_cases() -> None:
    assert list(families.CASES) == list(ARCHITECTURES)
    assert all(families.CASES.values())


def continued(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``prompt`` with the ``STEPS`` tokens that follow it, and the logits of all: each computed with all before it."""
    ids = prompt
    with torch.inference_mode():
        for _ in range(STEPS):
            logits = model(ids[None]).logits[0]
            ids = torch.cat([ids, logits[-1].argmax()[None]])
        return ids, model(ids[None]).logits[0]


@pytest.mark.parametrize(("architecture", "overrides"), families.each(whole=True))
def test_a_prompt_and_its_steps_equal_transformers_in_each_plan(
    architecture: str, overrides: families.Overrides, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    folder = tiny_model(architecture, **overrides)
    ids, expected = continued(reference(folder), random_ids(PROMPT, seed=5))
    runner = harness(folder)
    assert len(ids.unique()) > 8
    for plan in facts.PLANS:
        got = runner.logits(plan, ids, *range(PROMPT, len(ids)))
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4, plan
        assert torch.equal(got[PROMPT - 1 : -1].argmax(-1), ids[PROMPT:]), plan


@pytest.mark.parametrize(("architecture", "overrides"), families.each())
def test_chunks_guesses_and_common_beginnings_change_no_token(
    architecture: str, overrides: families.Overrides, tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    folder = tiny_model(architecture, **overrides)
    half = random_ids(PROMPT // 2, seed=5)
    prompt = torch.cat([half, half])  # there is something to guess from
    ids, _ = continued(reference(folder), prompt)
    runner = harness(folder)
    for plan in facts.PLANS:
        engine = runner.engine(plan, chunk_tokens=11, overlap=True, speculate=4, prefix_bytes=1 << 30)
        for again in range(2):
            done = engine.generate(prompt.tolist(), max_tokens=STEPS, sampler=Sampler(SamplingOptions()))
            assert done.token_ids == ids[PROMPT:].tolist(), plan
            assert (done.reused_tokens > 0) == (again > 0 and not runner.rotary.depends_on_length)


@pytest.mark.parametrize(("architecture", "overrides"), families.each())
def test_layers_over_two_servers_are_those_of_one(
    architecture: str, overrides: families.Overrides, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    folder = tiny_model(architecture, **overrides)
    ids = random_ids(PROMPT, seed=5)
    whole, cut = harness(folder), harness(folder, shards=[(0, 0), (1, 1)])
    for plan in facts.PLANS:
        one, two = (runner.logits(plan, ids, 26, 28, 29) for runner in (whole, cut))
        assert float((one - two).abs().max() / one.abs().max()) < 1e-5, plan


@pytest.mark.parametrize("architecture", ["granite", "gemma"])
def test_the_scale_of_an_embedding_in_bf16_rounds_nothing(
    architecture: str, tiny_model: TinyModel, harness: MakeHarness, tmp_path: Any
) -> None:
    """The table is kept as it is stored; what transformers computes in fp32 from such a file has no more than that."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, **families.CASES[architecture][0])
    model = AutoModelForCausalLM.from_pretrained(str(folder.path), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    half = ModelFolder("half", tmp_path)
    ids = random_ids(PROMPT)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)(ids[None]).logits[0]
    for plan in ("local", "fused", "per-op"):
        got = harness(half).logits(plan, ids)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4, plan


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "head_dim": 8,
}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize(
    ("architecture", "text", "overrides"),
    [
        ("gemma3", "gemma3_text", {**families.CASES["gemma3_text"][0], "eos_token_id": 257}),
        ("mistral3", "ministral3", families.CASES["ministral3"][0]),
    ],
)
def test_of_a_model_of_images_the_text_is_computed(
    architecture: str,
    text: str,
    overrides: families.Overrides,
    prefix: str,
    tiny_model: TinyModel,
    harness: MakeHarness,
    tmp_path: Any,
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    plain = tiny_model(text, **overrides)
    settings = json.loads((plain.path / "config.json").read_text())
    tied = settings["tie_word_embeddings"]
    config = AutoConfig.for_model(architecture, text_config=settings, vision_config=VISION, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    weights = {
        (name if name.startswith("lm_head") else prefix + name.removeprefix("model.")): tensor
        for name, tensor in load_file(plain.path / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file in plain.path.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ids = random_ids(PROMPT)
    with torch.inference_mode():
        whole = AutoModelForImageTextToText.from_pretrained(str(tmp_path), dtype=torch.float32)
        expected = whole(input_ids=ids[None]).logits[0]
    runner = harness(ModelFolder("images", tmp_path))
    assert runner.spec.architecture == text
    assert runner.spec.eos_token_ids == (257,)
    got = runner.logits("fused", ids, 20)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_sequence_that_outgrows_longrope_is_computed_anew(
    tiny_model: TinyModel, harness: MakeHarness, reference: Reference
) -> None:
    """Its first tokens have other angles then, and transformers forgets what it had of them."""
    folder = tiny_model("phi3", **families.CASES["phi3"][0])
    for tokens in (20, 23, 24, 25):
        prompt = random_ids(tokens, seed=tokens)
        with torch.inference_mode():
            out = reference(folder).generate(
                prompt[None],
                attention_mask=torch.ones(1, tokens),
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
            )
        for plan in ("local", "fused"):
            engine = harness(folder).engine(plan, chunk_tokens=11)
            done = engine.generate(prompt.tolist(), max_tokens=STEPS, sampler=Sampler(SamplingOptions()))
            assert done.token_ids == out[0, tokens:].tolist(), (tokens, plan)
