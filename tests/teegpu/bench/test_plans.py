"""The comparison of plans, without its processes: its reference, its document, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from teegpu.bench.cases import Case, from_values, parse_all
from teegpu.bench.plans import REFERENCE, PlanBenchmark
from teegpu.bench.pool import Workload
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from transports.errors import LinkSpecError


def sample(*token_ids: int) -> Sample:
    return Sample(PhaseSample(16, 1, 0.5), PhaseSample(2, 2, 0.25), 0.5, 0.125, list(token_ids), 10)


@dataclass
class Ready:
    facts: dict[str, Any]
    warm_up: Sample


@dataclass
class FakePool:
    """``tokens`` by label; an error in place of tokens is raised."""

    cases: Sequence[Case]
    tokens: dict[str, list[int] | Exception]
    log: list[str]

    def __enter__(self) -> FakePool:
        self.log.append(f"open {len(self.cases)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("close")

    def release(self, index: int) -> None:
        pass

    def load(self, index: int) -> Ready:
        label = self.cases[index].label
        return Ready({"notes": [f"{label} is slow"], "server": {"dtype": "fp32"}}, self.sample(index))

    def sample(self, index: int) -> Sample:
        tokens = self.tokens[self.cases[index].label]
        if isinstance(tokens, Exception):
            raise tokens
        return sample(*tokens)


@dataclass
class Bench:
    folder: ModelFolder
    log: list[str] = field(default_factory=list)

    def __call__(
        self, tokens: dict[str, list[int] | Exception], *texts: str, flags: dict[str, Any] | None = None, **options: Any
    ) -> PlanBenchmark:
        base = from_values(flags or {})

        def open_pool(cases: Sequence[Case], _: Workload) -> FakePool:
            return FakePool(cases, tokens, self.log)

        numbers = {"prompt_tokens": 16, "decode_tokens": 2, "repeats": 2} | options
        return PlanBenchmark(self.folder, base, parse_all(texts, base), open_pool=open_pool, **numbers)


@pytest.fixture
def bench(tiny_model: TinyModel) -> Bench:
    return Bench(tiny_model("llama"))


def test_outputs_are_compared_with_a_reference_that_is_gone_before_the_cases(bench: Bench) -> None:
    made = bench({"local": [1, 2, 3], "odd": [1, 9, 3], REFERENCE.label: [1, 2, 3]}, "local", "fused,label=odd")
    steps: list[str] = []
    made.run(lambda step: steps.append(step.label))
    assert bench.log == ["open 1", "close", "open 2", "close"]
    assert steps[0] == REFERENCE.label
    document = made.document("complete")
    assert [entry["output"]["identical"] for entry in document["results"]] == [True, False]
    assert document["reference"] == {"by": "transformers fp32", "token_ids": [1, 2, 3]}
    assert made.failures == []


def test_transformers_among_the_cases_is_the_reference(bench: Bench) -> None:
    made = bench({"local": [1, 2, 3], "transformers fp32": [1, 2, 4]}, "local", "transformers")
    made.run()
    assert bench.log == ["open 2", "close"]
    assert [entry["output"]["agreeing_tokens"] for entry in made.document("complete")["results"]] == [2, 3]


def test_without_check_there_is_no_reference(bench: Bench) -> None:
    made = bench({"local": [1, 2, 3], "transformers fp32": [1, 2, 4]}, "local", "transformers", check=False)
    made.run()
    assert [entry["output"]["identical"] for entry in made.document("complete")["results"]] == [None, None]


def test_a_reference_that_fails_costs_the_check_and_no_more(bench: Bench) -> None:
    made = bench({"local": [1, 2, 3], REFERENCE.label: ModelError("too large")}, "local")
    made.run()
    document = made.document("complete")
    assert document["results"][0]["output"]["identical"] is None
    assert document["notes"][0] == "outputs were not checked, because the reference failed: too large"


def test_the_document_says_what_was_measured_where_and_how(bench: Bench) -> None:
    made = bench(
        {"a": [1]}, "per-op,transport=zmq,wire=fp32,dtype=bf16,label=a", flags={"run.link": "rtt=5ms"}, check=False
    )
    made.run()
    document = made.document("complete")
    assert document["schema"] == "teegpu.bench/1"
    assert document["benchmark"] == "plans"
    assert document["machine"]["cores"] >= 1
    assert {"teegpu", "torch", "transformers", "pyzmq"} <= document["versions"].keys()
    assert document["model"]["layers"] == 2
    assert len(document["model"]["digest"]) == 64
    assert document["settings"]["link"] == "rtt=5ms,bandwidth=unlimited"
    assert document["notes"] == ["a: a is slow"]
    (entry,) = document["results"]
    assert entry["case"]["transport"] == "zmq"
    assert entry["case"]["dtype"] == "bf16"
    assert entry["server"] == {"dtype": "fp32"}
    assert len(entry["samples"]) == 2
    assert entry["warm_up"]["token_ids"] == [1]


def test_before_a_run_there_is_a_document_too(bench: Bench) -> None:
    (entry,) = bench({}, "local").document("interrupted")["results"]
    assert (entry["label"], entry["samples"], entry["warm_up"]) == ("local", [], None)


def test_failures_are_listed(bench: Bench) -> None:
    made = bench({"a": ModelError("no"), "b": [1]}, "local,label=a", "local,label=b", check=False)
    made.run()
    assert made.failures == ["a: no"]
    assert [len(entry["samples"]) for entry in made.document("failed")["results"]] == [0, 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0 is below the least, 1"),
        ({"decode_tokens": -1}, "--decode-tokens -1 is below the least, 0"),
        ({"repeats": 0}, "--repeats 0 is below the least, 1"),
    ],
)
def test_numbers_that_can_not_be(bench: Bench, options: dict[str, int], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        bench({}, "local", **options)


def test_more_tokens_than_the_context_has(bench: Bench) -> None:
    assert bench({}, "local", prompt_tokens=254).document("interrupted")["settings"]["prompt_tokens"] == 254
    with pytest.raises(PromptError, match="which ends at 256"):
        bench({}, "local", prompt_tokens=255)


def test_a_link_that_can_not_be(bench: Bench) -> None:
    with pytest.raises(LinkSpecError, match="rtt=5 is not a time"):
        bench({}, "fused", flags={"run.link": "rtt=5"})
