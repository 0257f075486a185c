"""The engine with one prompt: chunks, overlap, prefixes, speculation, and every way in which a generation ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from teegpu.errors import BadReplyError, PromptError
from teegpu.tee.engine import Engine
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Generation
from tests.conftest import TinyModel
from tests.teegpu.conftest import Harness, MakeHarness, random_ids

Reference = Callable[..., Any]
GREEDY = SamplingOptions()


def generate(engine: Engine, prompt: list[int], count: int = 12, **options: Any) -> Generation:
    sampler = options.pop("sampler", None) or Sampler(GREEDY)
    return engine.generate(prompt, max_tokens=count, sampler=sampler, **options)


def greedy_reference(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("plan", ["local", "per-op", "batched", "attention", "fused"])
@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_greedy_output_equals_transformers(plan: str, chunk_tokens: int, runner: Harness, reference: Reference) -> None:
    prompt = random_ids(30).tolist()
    done = generate(runner.engine(plan, chunk_tokens=chunk_tokens), prompt)
    assert done.token_ids == greedy_reference(reference(runner.folder), prompt, 12)
    assert (done.finish_reason, done.prompt_tokens, done.reused_tokens) == ("length", 30, 0)


@pytest.mark.parametrize("plan", ["per-op", "attention", "fused"])
def test_overlapped_chunks_give_the_same(plan: str, runner: Harness) -> None:
    prompt = random_ids(50).tolist()
    overlapped = runner.engine(plan, chunk_tokens=8, overlap=True)
    assert generate(overlapped, prompt).token_ids == generate(runner.engine(plan), prompt).token_ids


def test_prefill_and_decode_may_have_plans_of_their_own(runner: Harness) -> None:
    prompt = random_ids(20).tolist()
    mixed = generate(runner.engine("fused", decode_plan="local"), prompt)
    assert runner.summary.phases["prefill"].rpc_calls == 2 * runner.spec.layers + 1
    assert runner.summary.phases["decode"].rpc_calls == 0
    assert mixed.token_ids == generate(runner.engine("local"), prompt).token_ids


def test_end_token_stops_and_is_kept_in_the_ids(runner: Harness) -> None:
    prompt = random_ids(10).tolist()
    free = generate(runner.engine("local"), prompt).token_ids
    third = free[2]
    done = generate(runner.engine("local"), prompt, end_ids=[third])
    assert done.token_ids == free[: free.index(third) + 1]
    assert done.finish_reason == "stop"


def test_the_caller_can_stop(runner: Harness) -> None:
    seen: list[int] = []

    def on_token(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    done = generate(runner.engine("fused"), random_ids(10).tolist(), on_token=on_token)
    assert done.token_ids == seen
    assert (len(seen), done.finish_reason) == (4, "stop")


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count: int, runner: Harness) -> None:
    done = generate(runner.engine("local"), random_ids(5).tolist(), count)
    assert (len(done.token_ids), done.finish_reason) == (count, "length")
    assert "decode" not in runner.summary.phases


def test_generation_ends_with_the_context(runner: Harness) -> None:
    done = generate(runner.engine("local", max_positions=16), random_ids(12).tolist(), 50)
    assert (len(done.token_ids), done.finish_reason) == (5, "length")
    full = generate(runner.engine("local", max_positions=16), random_ids(16).tolist(), 50)
    assert (len(full.token_ids), full.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty"), ([1] * 17, "17 tokens.*ends at 16"), ([1, 9999], "9999")]
)
def test_prompts_that_can_not_be(prompt: list[int], message: str, runner: Harness) -> None:
    with pytest.raises(PromptError, match=message):
        generate(runner.engine("local", max_positions=16), prompt)


def test_an_interrupt_leaves_what_there_was_and_a_usable_session(runner: Harness) -> None:
    prompt = random_ids(10).tolist()
    engine = runner.engine("fused", prefix_bytes=1 << 30)
    whole = generate(engine, prompt).token_ids
    done = Generation()

    def on_token(_: int) -> bool:
        if len(done.token_ids) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        generate(engine, prompt, on_token=on_token, result=done)
    assert (done.token_ids, done.finish_reason) == (whole[:3], "interrupted")
    assert generate(engine, prompt).token_ids == whole


def test_a_failure_in_one_overlapped_chunk_is_raised_as_it_is(runner: Harness) -> None:
    calls = 0

    def tamper(frames: list[memoryview]) -> list[memoryview]:
        nonlocal calls
        calls += 1
        return frames[:1] if calls == 9 else frames

    runner.client.tamper = tamper
    engine = runner.engine("fused", chunk_tokens=8, overlap=True)
    with pytest.raises(BadReplyError):
        generate(engine, random_ids(50).tolist())


# Prefixes


def test_a_common_prefix_is_computed_once(runner: Harness) -> None:
    common = random_ids(40).tolist()
    engine = runner.engine("fused", prefix_bytes=1 << 30)
    prompts = [[*common, 1, 2, 3], [*common, 9, 8], common[:30] + [7] * 5, [100, 101, 102]]
    reused = []
    for prompt in prompts:
        done = generate(engine, prompt)
        reused.append(done.reused_tokens)
        assert done.token_ids == generate(runner.engine("fused"), prompt).token_ids
    assert reused == [0, 40, 30, 0]


def test_a_prompt_that_is_all_cached_computes_its_last_token(runner: Harness) -> None:
    prompt = random_ids(20).tolist()
    engine = runner.engine("local", prefix_bytes=1 << 30)
    first = generate(engine, prompt)
    again = generate(engine, prompt)
    assert again.reused_tokens == 19
    assert again.token_ids == first.token_ids
    longer = generate(engine, prompt + first.token_ids)
    assert longer.reused_tokens == 20 + len(first.token_ids) - 1


def test_prefixes_are_bounded_in_memory(runner: Harness) -> None:
    prompt = random_ids(20).tolist()
    engine = runner.engine("local", prefix_bytes=0)
    assert generate(engine, prompt).token_ids == generate(engine, prompt).token_ids
    assert generate(engine, prompt).reused_tokens == 0


def test_dynamic_rope_keeps_no_prefix(tiny_model: TinyModel, harness: MakeHarness) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    runner = harness(tiny_model("llama", rope_parameters=rope))
    engine = runner.engine("local", prefix_bytes=1 << 30)
    prompt = random_ids(20).tolist()
    generate(engine, prompt)
    assert generate(engine, prompt).reused_tokens == 0


# Speculation


@pytest.mark.parametrize("plan", ["local", "per-op", "fused"])
def test_speculation_leaves_greedy_output_as_it_is(plan: str, runner: Harness) -> None:
    prompt = [5, 6, 7, 8] * 6
    plain = generate(runner.engine(plan), prompt, 40)
    runner.summary.phases.clear()
    done = generate(runner.engine(plan, speculate=4), prompt, 40)
    assert done.token_ids == plain.token_ids
    decode = runner.summary.phases["decode"]
    assert decode.drafted_tokens > 0
    assert decode.passes + decode.accepted_tokens == decode.tokens == 39


class Repeating(Sampler):
    """Draws 1, 2, 3, 4, 1, 2, … whatever the logits are, as a model does that has fallen into a loop."""

    def __init__(self) -> None:
        super().__init__(GREEDY)
        self.drawn = 0

    def __call__(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        self.drawn += 1
        return 1 + (self.drawn - 1) % 4


def test_speculation_shares_passes_where_the_text_repeats(runner: Harness) -> None:
    done = generate(runner.engine("local", speculate=4), random_ids(8).tolist(), 101, sampler=Repeating())
    assert done.token_ids == [1 + index % 4 for index in range(101)]
    decode = runner.summary.phases["decode"]
    assert decode.passes <= 24  # 4 steps until the loop has been seen, then 5 tokens a pass
    assert decode.accepted_tokens == 100 - decode.passes


def test_speculation_draws_the_same_tokens_for_a_seed(runner: Harness) -> None:
    options = SamplingOptions(temperature=0.7, top_k=5, seed=11)
    prompt = [5, 6, 7, 8] * 6
    plain = generate(runner.engine("local"), prompt, 30, sampler=Sampler(options))
    guessed = generate(runner.engine("local", speculate=3), prompt, 30, sampler=Sampler(options))
    assert guessed.token_ids == plain.token_ids


def test_speculation_ends_where_generation_ends(runner: Harness) -> None:
    prompt = [5, 6, 7, 8] * 3
    free = generate(runner.engine("local"), prompt, 30).token_ids
    for count in range(1, 12):
        assert generate(runner.engine("local", speculate=5), prompt, count).token_ids == free[:count]
    done = generate(runner.engine("local", speculate=5, max_positions=20), prompt, 50)
    assert done.token_ids == free[:9]
    stop = free[5]
    done = generate(runner.engine("local", speculate=5), prompt, 30, end_ids=[stop])
    assert done.token_ids == free[: free.index(stop) + 1]


def test_a_session_goes_on_after_rejected_guesses(runner: Harness) -> None:
    engine = runner.engine("fused", speculate=4, prefix_bytes=1 << 30)
    prompt = [5, 6, 7, 8] * 4
    first = generate(engine, prompt, 20)
    follow = prompt + first.token_ids + [3, 1]
    done = generate(engine, follow, 10)
    assert done.reused_tokens == len(prompt) + len(first.token_ids) - 1
    assert done.token_ids == generate(runner.engine("fused"), follow, 10).token_ids
