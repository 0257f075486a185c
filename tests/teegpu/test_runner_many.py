"""Many sequences over real sockets: every transport and mode gives what each sequence gets alone, and a server that is
lost in the middle costs time only."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from teegpu import config, facts
from teegpu.endpoints import FORMAT
from teegpu.model.folder import ModelFolder
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.tee.engine import Capacity
from teegpu.tee.flights import Flights
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Sequence
from tests.conftest import TinyModel
from tests.teegpu.conftest import random_ids
from tests.teegpu.tee.test_many import check, requests
from transports.netem.link import EmulatedLink, LinkSpec

MANY = Capacity(sequences=5, waiting=50, step_tokens=16, alone_tokens=48)
PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 40, 9, 1, 23, 70, 12, 33)]
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("qwen3", num_hidden_layers=3)


@pytest.fixture(scope="module")
def servers(folder: ModelFolder) -> Iterator[list[str]]:
    settings = config.load({"server.dtype": "fp32"})
    with EmbeddedServer(folder, settings, threads=1) as one, EmbeddedServer(folder, settings, threads=1) as other:
        yield [one.wait()["address"], other.wait()["address"]]


def open_runner(
    folder: ModelFolder, endpoints: list[str], plan: str = "attention", draft: ModelFolder | None = None, **more: object
) -> Runner:
    given: dict[str, object] = {
        "run.endpoints": tuple(endpoints),
        "run.prefill_plan": plan,
        "run.decode_plan": plan,
        "run.wire_dtype": "fp32",
        "run.threads": 1,
        "run.chunk_tokens": 8,
        "run.max_tokens": TOKENS,
    }
    given |= {key.replace("__", "."): value for key, value in more.items()}
    return Runner(config.load(given), folder, capacity=MANY, draft=draft)


def answers(runner: Runner, during: Callable[[int], Any] = lambda _: None) -> list[list[int]]:
    """All prompts, two more with each step."""
    sequences = [Sequence(list(prompt), TOKENS, Sampler(SamplingOptions())) for prompt in PROMPTS]
    left, step = list(sequences), 0
    while left or runner.engine.running or runner.engine.waiting:
        for sequence in left[:2]:
            runner.engine.add(sequence)
        del left[:2]
        runner.engine.step()
        step += 1
        during(step)
    return [sequence.done.token_ids for sequence in sequences]


def one_by_one(runner: Runner) -> list[list[int]]:
    greedy = SamplingOptions()
    return [runner.engine.generate(prompt, max_tokens=TOKENS, sampler=Sampler(greedy)).token_ids for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("plan", "transport"),
    [
        ("fused", "zmq"),
        ("attention", "pipelined"),
        *(
            pytest.param(*each, marks=pytest.mark.extra)
            for each in (("fused", "pipelined"), ("attention", "zmq"), ("fused", "pipelined+zstd"))
        ),
    ],
)
def test_in_the_clear(plan: str, transport: str, folder: ModelFolder, servers: list[str]) -> None:
    with open_runner(folder, servers[:1], plan, run__transport=transport) as runner:
        assert answers(runner) == one_by_one(runner)


@pytest.fixture(scope="module")
def whole_numbers(folder: ModelFolder) -> list[list[int]]:
    with open_runner(folder, [], run__privacy="reference") as runner:
        return one_by_one(runner)


@pytest.mark.parametrize(
    "mode",
    [
        {"run__privacy": "reference"},
        {"run__privacy": "two-server"},
        {"run__privacy": "two-server", "run__transport": "zmq", "run__speculate": 2},
        {"run__privacy": "pads"},
        {"run__verify": "on"},
    ],
    ids=lambda mode: "-".join(map(str, mode.values())),
)
def test_in_whole_numbers(
    mode: dict[str, object], folder: ModelFolder, servers: list[str], whole_numbers: list[list[int]]
) -> None:
    count = {"two-server": 2, "reference": 0}.get(str(mode.get("run__privacy")), 1)
    with open_runner(folder, servers[:count], **mode) as runner:
        assert answers(runner) == whole_numbers


def test_parts_of_a_step_that_are_under_way_together(
    folder: ModelFolder, servers: list[str], whole_numbers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flights, "choose", lambda _, most: min(3, most))
    with open_runner(folder, servers[:1]) as runner:
        assert answers(runner) == one_by_one(runner)
    with open_runner(folder, servers, run__privacy="two-server", run__speculate=2) as runner:
        assert answers(runner) == whole_numbers


def test_private_logits_are_the_same_bits_whatever_the_batch(folder: ModelFolder, servers: list[str]) -> None:
    class Listening(Sampler):
        def __init__(self) -> None:
            super().__init__(SamplingOptions())
            self.seen: list[torch.Tensor] = []

        def __call__(self, logits: torch.Tensor, context: Any) -> int:
            self.seen.append(logits.clone())
            return super().__call__(logits, context)

    def listened(runner: Runner, prompts: list[list[int]]) -> list[list[torch.Tensor]]:
        samplers = [Listening() for _ in prompts]
        for prompt, sampler in zip(prompts, samplers, strict=True):
            runner.engine.add(Sequence(list(prompt), TOKENS, sampler))
        while runner.engine.step():
            pass
        return [sampler.seen for sampler in samplers]

    with open_runner(folder, servers, run__privacy="two-server") as runner:
        together = listened(runner, PROMPTS)
        apart = [listened(runner, [prompt])[0] for prompt in PROMPTS]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize(
    ("mode", "transport"),
    [
        ("none", "pipelined"),
        ("two-server", "zmq"),
        pytest.param("none", "zmq", marks=pytest.mark.extra),
        pytest.param("two-server", "pipelined", marks=pytest.mark.extra),
    ],
)
def test_servers_that_are_lost_and_come_back_cost_time_only(
    mode: str, transport: str, folder: ModelFolder, servers: list[str]
) -> None:
    endpoints = servers[: 1 + (mode == "two-server")]
    options = {"run__privacy": mode, "run__transport": transport, "link__retry_backoff_seconds": 0.01}
    with (
        EmulatedLink(LinkSpec.parse("rtt=0ms"), endpoints[0]) as link,
        open_runner(folder, [link.endpoint, *endpoints[1:]], **options) as runner,
    ):

        def during(step: int) -> None:
            if step == 3:
                link.drop()
            elif step == 6:
                link.cut()
                threading.Timer(0.2, link.restore).start()

        assert answers(runner, during) == one_by_one(runner)
        assert sum(phase.rpc_retries for phase in runner.summary.phases.values()) >= 2


@pytest.mark.extra
@pytest.mark.timeout(400)
@pytest.mark.parametrize("transport", ["zmq", "pipelined", "pipelined+zstd"])
@pytest.mark.parametrize("mode", ["per-op", "batched", "attention", "fused", "two-server", "pads"])
def test_mixed_requests_that_come_and_go(mode: str, transport: str, folder: ModelFolder, servers: list[str]) -> None:
    """24 of them, arriving and cancelled at random, some sampled with a seed."""
    private = mode in facts.PRIVACY
    options: dict[str, object] = {"run__privacy": mode} if private else {}
    endpoints = servers[: 1 + (mode == "two-server")]
    asked = [*requests(18, seed=5), *requests(6, seed=6, seeds=True)]
    with open_runner(
        folder, endpoints, "attention" if private else mode, run__transport=transport, **options
    ) as runner:
        check(runner.engine, runner.engine, asked)


def test_servers_join_and_leave_in_the_middle(folder: ModelFolder, servers: list[str], tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"

    def write(*entries: str) -> None:
        (tmp_path / "new").write_text(json.dumps({"format": FORMAT, "endpoints": entries}))
        (tmp_path / "new").replace(file)

    write(servers[0])
    with open_runner(folder, [f"@{file}"]) as runner:
        heard = threading.Event()
        assert runner._servers is not None
        (pool,) = runner._servers.pools
        expect = pool.expect

        def hear(found: Any) -> None:
            expect(found)
            heard.set()

        pool.expect = hear  # type: ignore[method-assign]

        def during(step: int) -> None:
            changes = {2: servers, 5: servers[1:]}
            if step in changes:
                heard.clear()
                began = time.monotonic()
                write(*changes[step])
                assert heard.wait(20)
                assert time.monotonic() - began < 10

        together = answers(runner, during)
        assert [replica.address for replica in pool.replicas] == servers[1:]
        assert runner._servers.addresses == servers
        assert runner.summary.endpoints[1].rpc_calls > 0
        assert sum(phase.rpc_retries for phase in runner.summary.phases.values()) == 0
        assert together == one_by_one(runner)
