"""Advice that is followed: a real run over an emulated link, the setting changed as it says, and what that brought.

The machine may be busy, so a saving has to be within a factor of two of what was predicted, in one of three attempts;
the links are slow enough that the time on them is most of each run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from teegpu import config
from teegpu.model.folder import ModelFolder
from teegpu.remote.embedded import EmbeddedServer
from teegpu.report.advice import advise
from teegpu.runner import Runner
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Generation
from tests.conftest import TinyModel

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ATTEMPTS = 3
PROMPT = 320
SHORT = 96
"""Tokens of a prompt that fits into one chunk, so that nothing is to be had from overlap."""

SHARED: dict[str, Any] = {
    "run.prefill_plan": "fused",
    "run.decode_plan": "fused",
    "run.prefix_cache_mib": 0,
    "run.threads": 1,
    "run.wire_dtype": "fp16",
    "run.max_tokens": 2,
    "server.dtype": "fp32",
}


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model(
        "llama", hidden_size=256, intermediate_size=768, head_dim=64, num_hidden_layers=4, max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def server(folder: ModelFolder) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(folder, config.load(SHARED, environ={}), threads=1) as server:
        server.wait()
        yield server


def seconds(document: dict[str, Any]) -> float:
    return sum(float(phase["seconds"]) for phase in document["phases"].values())


def run(server: EmbeddedServer, folder: ModelFolder, settings: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The quicker of two runs of one prompt."""
    made = config.load(SHARED | {"run.endpoints": (server.endpoint,)} | settings, environ={})
    ids = [number * 7 % 250 for number in range(tokens)]
    documents = []
    with Runner(made, folder) as runner:
        for _ in range(2):
            runner.restart_summary()
            runner.generate(
                ids, sampler=Sampler(SamplingOptions()), on_token=lambda _: False, result=Generation(), ignore_end=True
            )
            documents.append(runner.report("complete"))
    return min(documents, key=seconds)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("overlap", {"run.transport": "zmq", "run.wire_dtype": "fp32", "run.link": "rtt=10ms,bandwidth=100mbit"}),
        pytest.param(
            "plan-scores",
            {"run.transport": "zmq", "run.prefill_plan": "batched", "run.link": "rtt=5ms,bandwidth=100mbit"},
            marks=pytest.mark.extra,
        ),
        ("wire-dtype", {"run.wire_dtype": "fp32", "run.chunk_tokens": 64, "run.link": "rtt=5ms,bandwidth=100mbit"}),
        pytest.param(
            "wire-int8",
            {"run.chunk_tokens": 64, "run.link": "rtt=5ms,bandwidth=50mbit"},
            marks=pytest.mark.extra,
        ),
        ("chunk-too-small", {"run.transport": "zmq", "run.chunk_tokens": 16, "run.link": "rtt=10ms"}),
        pytest.param(
            "chunk-too-large",
            {"run.chunk_tokens": 1024, "run.wire_dtype": "fp32", "run.link": "rtt=5ms,bandwidth=80mbit"},
            marks=pytest.mark.extra,
        ),
        pytest.param(
            "plan-rounds",
            {"run.decode_plan": "attention", "run.max_tokens": 6, "run.link": "rtt=15ms"},
            marks=pytest.mark.extra,
        ),
        ("decode-local", {"run.max_tokens": 8, "run.link": "rtt=15ms"}),
    ],
)
def test_a_run_that_follows_advice_is_quicker_by_about_what_was_predicted(
    rule: str, settings: dict[str, Any], server: EmbeddedServer, folder: ModelFolder
) -> None:
    for _ in range(ATTEMPTS):
        saved, predicted = follow(rule, settings, server, folder)
        if saved > 0 and 0.5 < saved / predicted < 2.0:
            return
    pytest.fail(
        f"{ATTEMPTS} attempts, and in the last the advice saved {saved:.3f} s where it predicted {predicted:.3f} s"
    )


def follow(rule: str, settings: dict[str, Any], server: EmbeddedServer, folder: ModelFolder) -> tuple[float, float]:
    """The seconds that following ``rule`` saved, and those that it predicted."""
    tokens = SHORT if rule in ("chunk-too-small", "plan-rounds", "decode-local") else PROMPT
    before = run(server, folder, settings, tokens)
    references = []
    if rule == "decode-local":
        alone = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.link": ""}
        reference = run(server, folder, settings | alone, tokens)
        # A prompt that the TEE would take long for, else all of the run is what the advice is about.
        reference["phases"]["prefill"]["seconds"] += 100.0
        references.append(reference)
    found = {entry["id"]: entry for entry in advise(before, references)}
    entry = found[rule]
    changed = {name: int(value) if value.isdigit() else value for name, value in entry["settings"].items()}
    after = run(server, folder, settings | changed, tokens)
    return seconds(before) - seconds(after), entry["predicted_saving_seconds"]
