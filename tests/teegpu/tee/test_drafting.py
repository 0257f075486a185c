"""Guesses of a small model: they change no answer, whoever makes them, and are right where that model is."""

from __future__ import annotations

import pytest

from teegpu.errors import UnsupportedModelError
from teegpu.tee.drafting import Drafter
from teegpu.tee.engine import Capacity
from teegpu.tee.sampling import Sampler, SamplingOptions
from tests.conftest import TinyModel
from tests.teegpu.conftest import Harness, MakeHarness, random_ids
from tests.teegpu.tee.test_many import MANY, Request, alone, check, requests, serve
from tests.teegpu.test_runner_many import open_runner


def drafter(runner: Harness, other: Harness) -> Drafter:
    vocab_size = runner.spec.vocab_size
    return Drafter(other.decoder("local"), other.spec, other.rotary, runner.recorder, vocab_size=vocab_size)


@pytest.mark.parametrize("seed", [0, 1])
def test_guesses_of_many_change_nothing(
    seed: int, runner: Harness, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    """Those of the same model, and of one that knows nothing of it; sampled too."""
    other = harness(tiny_model("llama", seed=seed) if seed else tiny_model("llama"))
    asked = [*requests(10, seed=4), *requests(6, seed=7, seeds=True)]
    many = runner.engine("fused", speculate=3, chunk_tokens=16, capacity=MANY, drafter=drafter(runner, other))
    check(many, runner.engine("fused", chunk_tokens=16), asked)
    decode = runner.summary.phases["decode"]
    assert decode.drafted_tokens
    if seed:
        assert decode.accepted_tokens < 0.3 * decode.drafted_tokens
    assert decode.ops["DRAFT"].where == "tee"
    parts = decode.tee_seconds + decode.serialization_seconds + decode.wait_seconds + decode.other_seconds
    assert parts == pytest.approx(decode.seconds, rel=1e-6)


def test_a_model_that_is_right_saves_passes(runner: Harness, tiny_model: TinyModel, harness: MakeHarness) -> None:
    same = harness(tiny_model("llama"))
    engine = runner.engine("fused", speculate=4, drafter=drafter(runner, same), capacity=Capacity())
    asked = Request(random_ids(60).tolist(), 41, 0)
    serve(engine, [asked])
    decode = runner.summary.phases["decode"]
    assert decode.accepted_tokens > 20
    assert decode.passes < 20
    assert asked.made == alone(runner.engine("fused"), Request(asked.prompt, 41, 0))


def test_a_context_that_is_shorter_ends_the_guesses(
    runner: Harness, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    short = harness(tiny_model("llama", max_position_embeddings=24))
    engine = runner.engine("fused", speculate=4, drafter=drafter(runner, short))
    asked = Request(random_ids(10).tolist(), 40, 0)
    serve(engine, [asked])
    assert len(asked.made) == 40
    assert runner.summary.phases["decode"].drafted_tokens


@pytest.mark.parametrize("more", [-10, 100])
def test_a_model_with_rows_for_other_tokens(
    more: int, runner: Harness, tiny_model: TinyModel, harness: MakeHarness
) -> None:
    """It guesses none that the model lacks, and nothing where it lacks one itself."""
    last = runner.spec.vocab_size - 1
    other = harness(tiny_model("llama", vocab_size=last + 1 + more))
    engine = runner.engine("fused", speculate=4, drafter=drafter(runner, other))
    asked = Request([*random_ids(9).tolist(), last], 30, 0)
    serve(engine, [asked])
    assert asked.made == alone(runner.engine("fused"), Request(asked.prompt, 30, 0))


def test_a_runner_with_one(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen3", num_hidden_layers=3)
    greedy = SamplingOptions()
    prompt = random_ids(30).tolist()
    with open_runner(folder, [], plan="local", run__speculate=3, run__draft_model="x", draft=folder) as runner:
        made = runner.engine.generate(prompt, max_tokens=20, sampler=Sampler(greedy)).token_ids
        settings = runner.report("complete")["settings"]
        assert settings["draft_model"] == folder.name
        assert runner.summary.phases["decode"].accepted_tokens
    with open_runner(folder, [], plan="local") as runner:
        assert runner.engine.generate(prompt, max_tokens=20, sampler=Sampler(greedy)).token_ids == made


def test_other_tokens_are_refused(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tiny_model("qwen3", num_hidden_layers=3), tiny_model("llama")
    tokens = iter(["a", "b"])
    monkeypatch.setattr("teegpu.model.tokenizer.Tokenizer._text", lambda *_: next(tokens))
    with pytest.raises(UnsupportedModelError, match=r"^run\.draft_model: tiny-llama has other tokens than tiny-qwen3"):
        open_runner(folder, [], plan="local", run__speculate=3, run__draft_model="x", draft=other)
