"""What narrow dtypes cost: the figures, and the real thing on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from teegpu.bench import accuracy
from teegpu.bench.accuracy import REFERENCE, AccuracyBenchmark, Score, chosen_texts, compare, variants
from teegpu.bench.cases import from_values
from teegpu.errors import PromptError, UsageError
from teegpu.model import texts
from tests.conftest import TinyModel


def logits_of(table: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: table[start:stop]


def test_the_figures_are_those_of_their_definitions() -> None:
    random = torch.Generator().manual_seed(1)
    reference, other = torch.randn(7, 5, generator=random), torch.randn(7, 5, generator=random)
    ids = torch.tensor([0, 3, 1, 4, 2, 2, 0])
    scores = compare(ids, {"other": logits_of(other), REFERENCE.label: logits_of(reference)}, chunk_tokens=3)
    p, q = (table.double().softmax(-1) for table in (reference, other))
    divergence = (p * (p / q).log()).sum(-1)
    surprise = [-math.log(q[place, ids[place + 1]]) for place in range(6)]
    figures = scores["other"].to_json()
    assert figures["kl_nats"] == pytest.approx(float(divergence.mean()))
    assert figures["kl_nats_largest"] == pytest.approx(float(divergence.max()))
    assert figures["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert figures["perplexity"] == pytest.approx(math.exp(sum(surprise) / 6))
    assert figures["positions"] == 7
    own = scores[REFERENCE.label].to_json()
    assert (own["kl_nats"], own["top1_agreement"]) == (0.0, 1.0)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 100])
def test_chunks_do_not_matter(chunk_tokens: int) -> None:
    random = torch.Generator().manual_seed(2)
    tables = {label: logits_of(torch.randn(8, 6, generator=random)) for label in ("other", REFERENCE.label)}
    ids = torch.arange(8) % 6
    whole, pieces = (compare(ids, tables, size)["other"].to_json() for size in (8, chunk_tokens))
    assert pieces == pytest.approx(whole)


def test_scores_of_texts_add_up_by_position() -> None:
    total = Score()
    total += Score(kl_nats=3.0, largest_kl_nats=2.0, agreeing=1, positions=3, surprise_nats=4.0, predictions=2)
    total += Score(kl_nats=1.0, largest_kl_nats=1.0, agreeing=1, positions=1, surprise_nats=0.0, predictions=0)
    assert total.to_json() == {
        "kl_nats": 1.0,
        "kl_nats_largest": 2.0,
        "top1_agreement": 0.5,
        "perplexity": math.exp(2.0),
        "positions": 4,
    }
    assert Score().to_json()["kl_nats"] is Score().to_json()["perplexity"] is None


def test_variants() -> None:
    least = variants(bf16=False, shielded=False, int8=False)
    assert [variant.wire_dtype for variant in least] == ["fp32", "bf16", "fp16", "int8"]
    assert [variant.label for variant in variants(bf16=True, shielded=True, int8=True)[4:]] == [
        "fp16 wire, bf16 server",
        "bf16 wire, bf16 server",
        "transformers bf16",
        "whole numbers (private, verified)",
        "int8 weights, decoded in the TEE",
    ]


def test_texts_are_chosen_by_name() -> None:
    assert chosen_texts("all").keys() == texts.evaluation_texts().keys()
    assert list(chosen_texts("code, alice")) == ["code", "alice"]
    with pytest.raises(UsageError, match="there is no text 'alcie', did you mean 'alice'"):
        chosen_texts("alcie")
    with pytest.raises(UsageError, match="--texts names no text"):
        chosen_texts(" , ")


def test_numbers_that_can_not_be(tiny_model: TinyModel) -> None:
    folder, chosen = tiny_model("llama"), chosen_texts("alice")
    with pytest.raises(UsageError, match="--tokens 1 is below the least, 2"):
        AccuracyBenchmark(folder, from_values({}), tokens=1, chosen=chosen)
    with pytest.raises(PromptError, match="which ends at 256"):
        AccuracyBenchmark(folder, from_values({}), tokens=257, chosen=chosen)


def test_a_tiny_model(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real servers over ipc. With chunks of 16, a text of 40 tokens has three."""
    monkeypatch.setattr(accuracy, "CHUNK_TOKENS", 16)
    threads = torch.get_num_threads()
    chosen = {"first": texts.evaluation_texts()["alice"], "short": "Hi there."}
    bench = AccuracyBenchmark(tiny_model("qwen3"), from_values({}), tokens=40, chosen=chosen)
    assert bench.document("interrupted")["results"] == []
    outcomes: list[str] = []
    bench.run(lambda step: outcomes.append(step.outcome))
    assert torch.get_num_threads() == threads
    assert outcomes[-1].startswith("fp32 KL ")
    document = bench.document("complete")
    found = {entry["label"]: entry for entry in document["results"]}
    every = variants(bf16=True, shielded=True, int8=True)
    assert found.keys() == {variant.label for variant in every} | {REFERENCE.label}
    fp32, fp16 = found["fp32 wire, fp32 server"], found["fp16 wire, fp32 server"]
    int8 = found["int8 wire, fp32 server"]
    assert fp32["positions"] == 40 + len("Hi there.")
    assert fp32["kl_nats"] < 1e-8
    assert fp32["top1_agreement"] == 1.0
    assert fp32["perplexity"] == pytest.approx(found[REFERENCE.label]["perplexity"], rel=1e-4)
    assert 0 < fp16["kl_nats"] < int8["kl_nats"] < 0.1
    assert found["fp16 wire, bf16 server"]["kl_nats"] > fp16["kl_nats"]
    assert found["transformers bf16"]["kl_nats"] > fp16["kl_nats"]
    exact = found["whole numbers (private, verified)"]
    assert fp16["kl_nats"] < exact["kl_nats"] < 0.1
    assert (exact["whole_numbers"], fp16["whole_numbers"]) == (True, False)
    assert fp16["kl_nats"] < found["int8 weights, decoded in the TEE"]["kl_nats"] < 0.1
    assert fp16["texts"].keys() == {"first", "short"}
    assert fp16["kl_nats_worst_text"] == max(text["kl_nats"] for text in fp16["texts"].values())
    assert document["settings"]["chunk_tokens"] == 16
