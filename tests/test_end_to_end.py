"""The whole of it on a real model: SmolLM2 answers through every plan and transport as transformers does.

In fp32 on the wire and on the server the answers are the same, token for token. So that this takes a minute, not ten,
most answers are made with guesses that are right: each pass then computes and draws many tokens, and a token that the
plan would not have drawn ends the agreement. The first tokens of each answer, and one whole answer, are made singly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from teegpu import config
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_config
from teegpu.model.texts import evaluation_texts
from teegpu.model.tokenizer import Tokenizer
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.tee import engine
from teegpu.tee.sequence import Generation

TOKENS = 48
SINGLY = 4
"""Decode steps of one token before the guesses begin."""

UNICODE, LONG, LIST = range(3)
PROMPTS = (
    "Qu'est-ce qu'une forêt ? Réponds en français. 森とは何ですか？ Что такое лес? 🌲",
    "Sum this up in one sentence: " + " ".join(evaluation_texts()["alice"].split()[:210]),
    "List the first ten prime numbers, separated by commas.",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(smollm2: ModelFolder) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(smollm2, config.load({"server.dtype": "fp32"}), threads=1) as server:
        yield server


@pytest.fixture(scope="module")
def prompts(smollm2: ModelFolder) -> list[list[int]]:
    tokenizer = Tokenizer(smollm2)
    ids = [tokenizer.encode_chat(prompt) for prompt in PROMPTS]
    assert len(ids[LONG]) > 280
    return ids


@pytest.fixture(scope="module")
def answers(server: EmbeddedServer, smollm2: ModelFolder, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers in fp32, an end token included. The server loads meanwhile."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2.path, config=read_config(smollm2), dtype=torch.float32)
    made = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
            made.append(out[0, len(prompt) :].tolist())
    server.wait()
    return made


Open = Callable[..., Runner]


@pytest.fixture
def runner(smollm2: ModelFolder, server: EmbeddedServer, answers: list[list[int]]) -> Iterator[Open]:
    """``runner(plan, transport, **more)`` → a runner on the fp32 server."""
    made: list[Runner] = []

    def make(plan: str, transport: str = "pipelined", **more: Any) -> Runner:
        settings: dict[str, object] = {
            "run.endpoints": (server.endpoint,),
            "run.prefill_plan": plan,
            "run.decode_plan": plan,
            "run.transport": transport,
            "run.wire_dtype": "fp32",
            "run.threads": 1,
            "run.max_tokens": TOKENS,
        }
        settings |= {key.replace("__", "."): value for key, value in more.items()}
        made.append(Runner(config.load(settings), smollm2))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(runner: Runner, prompt: list[int]) -> list[int]:
    done = Generation()
    runner.generate(prompt, sampler=runner.sampler(), on_token=lambda _: False, result=done)
    return done.token_ids


@pytest.fixture
def right_guesses(monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Guesses come from transformers' answers, after the first few steps."""
    known = [(prompt, prompt + made) for prompt, made in zip(prompts, answers, strict=True)]

    class Told:
        def __init__(self, context: list[int]) -> None:
            self._whole = next(whole for prompt, whole in known if context[: len(prompt)] == prompt)
            self._at = len(context)
            self._steps = 0

        def append(self, token: int) -> None:
            self._at += 1

        def guess(self, count: int) -> list[int]:
            self._steps += 1
            return [] if self._steps <= SINGLY else self._whole[self._at : self._at + count]

    monkeypatch.setattr(engine, "PromptLookup", Told)


def test_every_token_by_itself_as_most_users_have_it(
    runner: Open, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    assert answer(runner("fused"), prompts[UNICODE]) == answers[UNICODE]


@pytest.mark.usefixtures("right_guesses")
@pytest.mark.parametrize(
    "plan", ["local", "per-op", pytest.param("batched", marks=pytest.mark.extra), "attention", "fused"]
)
def test_every_plan_answers_every_prompt(
    plan: str, runner: Open, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    """Over ``pipelined``: the long prompt goes in chunks that overlap."""
    one = runner(plan, run__speculate=TOKENS, run__chunk_tokens=100)
    assert [answer(one, prompt) for prompt in prompts] == answers
    few_passes = len(PROMPTS) * (SINGLY + 3)
    assert one.summary.phases["decode"].passes <= few_passes


@pytest.mark.usefixtures("right_guesses")
@pytest.mark.parametrize(
    "plan", [*(pytest.param(plan, marks=pytest.mark.extra) for plan in ("per-op", "batched", "attention")), "fused"]
)
@pytest.mark.parametrize("transport", ["zmq", pytest.param("zmq+zstd", marks=pytest.mark.extra)])
def test_every_plan_over_every_other_transport(
    plan: str, transport: str, runner: Open, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    one = runner(plan, transport, run__speculate=TOKENS, run__chunk_tokens=150)
    number = LONG if transport == "zmq" else UNICODE
    assert answer(one, prompts[number]) == answers[number]


def test_real_guesses_change_nothing(runner: Open, prompts: list[list[int]], answers: list[list[int]]) -> None:
    one = runner("fused", run__speculate=4)
    assert answer(one, prompts[LIST]) == answers[LIST]


def test_sampling_with_a_seed_repeats_itself(runner: Open, prompts: list[list[int]], answers: list[list[int]]) -> None:
    one = runner("fused", sampling__temperature=1.0, sampling__top_p=0.9, sampling__seed=2, run__max_tokens=12)
    first = answer(one, prompts[LIST])
    assert answer(one, prompts[LIST]) == first
    assert first != answers[LIST][:12]


def test_a_question_is_answered_with_nothing_but_defaults(smollm2: ModelFolder) -> None:
    """Two processes, fp16 on the wire, the server in what this machine computes best."""
    command = [sys.executable, "-m", "teegpu", "run", "--model", str(smollm2.path), "--json", "--max-tokens", "10"]
    command.append("What is the capital of France?")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert "Paris" in document["outputs"][0]["text"]
    assert document["server"]["embedded"] is True
    assert done.stderr.startswith("no endpoint given: ")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["no endpoint given", "privacy none"]
