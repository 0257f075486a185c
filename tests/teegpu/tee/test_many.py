"""Many sequences at once: each gets what it would get alone, whatever else comes, runs and goes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from teegpu import facts
from teegpu.errors import BadReplyError, BusyError, DeadlineError, PromptError, ShieldError, UnmetError
from teegpu.record.events import Admitted, Arrived, Event, GaveWay, Left, Stepped
from teegpu.tee.engine import Capacity, Engine
from teegpu.tee.flights import Flights
from teegpu.tee.kv_cache import bytes_of
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Sequence
from tests.conftest import TinyModel
from tests.teegpu import families
from tests.teegpu.conftest import Harness, MakeHarness, random_ids

MANY = Capacity(sequences=6, waiting=100, step_tokens=24, alone_tokens=40)


@dataclass
class Request:
    prompt: list[int]
    tokens: int
    arrives: int
    seed: int | None = None
    leaves: int | None = None
    namespace: str = ""
    made: list[int] = field(default_factory=list)
    ends: list[BaseException | None] = field(default_factory=list)

    def sequence(self) -> Sequence:
        greedy = self.seed is None
        options = SamplingOptions() if greedy else SamplingOptions(temperature=0.8, top_k=20, seed=self.seed)
        return Sequence(
            list(self.prompt),
            self.tokens,
            Sampler(options),
            on_token=lambda token: self.made.append(token) or False,  # type: ignore[func-returns-value]
            on_end=self.ends.append,
            namespace=self.namespace,
        )


def requests(count: int, *, seed: int = 0, seeds: bool = False) -> list[Request]:
    """Short and long ones, a few of which go away in the middle."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        prompt = random_ids(chance.choice([1, 2, 5, 17, 30, 61]), seed=100 + number).tolist()
        tokens = chance.choice([1, 3, 8, 20])
        leaves = chance.randrange(1, 12) if chance.random() < 0.25 else None
        found.append(Request(prompt, tokens, chance.randrange(20), number if seeds else None, leaves))
    return found


def serve(engine: Engine, asked: list[Request]) -> None:
    """Runs ``asked`` as they arrive; the clock is the steps."""
    sequences: dict[int, Sequence] = {}
    clock = 0
    while len(sequences) < len(asked) or engine.running or engine.waiting:
        for number, request in enumerate(asked):
            if request.arrives == clock:
                sequences[number] = request.sequence()
                engine.add(sequences[number])
            if request.leaves is not None and number in sequences and clock == request.arrives + request.leaves:
                engine.cancel(sequences[number])
        engine.step()
        clock += 1
        assert clock < 2000
    assert all(request.ends == [None] for request in asked)
    assert all(sequence.cache is None for sequence in sequences.values())


def alone(engine: Engine, request: Request) -> list[int]:
    copy = Request(request.prompt, request.tokens, 0, request.seed)
    serve(engine, [copy])
    return copy.made


def check(many: Engine, single: Engine, asked: list[Request]) -> None:
    serve(many, asked)
    for request in asked:
        whole = alone(single, request)
        assert request.made == whole[: len(request.made)]
        assert len(request.made) == len(whole) or request.leaves is not None


@pytest.mark.parametrize("plan", facts.PLANS)
def test_tokens_are_those_of_each_alone(plan: str, runner: Harness) -> None:
    many = runner.engine(plan, chunk_tokens=16, capacity=MANY)
    check(many, runner.engine(plan, chunk_tokens=16), requests(12 if plan == "per-op" else 24, seed=3))


@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("plans", [("attention", "fused"), ("fused", "fused"), ("fused", "local")])
def test_parts_that_are_under_way_together_change_no_token(
    plans: tuple[str, str], ways: int, runner: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(Flights, "choose", lambda _, most: min(ways, most))
    monkeypatch.setattr(Flights, "took", lambda _, ways, rows, seconds: taken.append(ways))
    prefill, decode = plans
    many = runner.engine(prefill, chunk_tokens=16, capacity=MANY, overlap=True, decode_plan=decode)
    check(many, runner.engine(prefill, chunk_tokens=16, decode_plan=decode), requests(10, seed=4))
    assert max(taken) == ways


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen3", {}),
        ("gemma2", families.CASES["gemma2"][0]),
        ("olmo3", families.CASES["olmo3"][0]),
        ("ministral3", families.CASES["ministral3"][0]),
        ("phi3", families.CASES["phi3"][0]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                   "max_position_embeddings": 32}),
    ],
)  # fmt: skip
def test_every_kind_of_model(
    architecture: str, options: dict[str, Any], tiny_model: TinyModel, harness: MakeHarness
) -> None:
    runner = harness(tiny_model(architecture, **options))
    long = {"max_positions": 100}
    check(
        runner.engine("fused", capacity=MANY, chunk_tokens=16, **long),
        runner.engine("fused", chunk_tokens=16, **long),
        requests(12),
    )


def test_the_phases_may_have_plans_of_their_own(runner: Harness) -> None:
    check(
        runner.engine("fused", decode_plan="local", chunk_tokens=16, capacity=MANY),
        runner.engine("fused", decode_plan="local", chunk_tokens=16),
        requests(12),
    )


def test_a_seed_gives_the_same_whatever_else_runs(runner: Harness) -> None:
    asked = requests(16, seeds=True)
    check(runner.engine("fused", capacity=MANY), runner.engine("fused"), asked)
    assert len({tuple(request.made) for request in asked}) > 8


def test_guesses_change_nothing(runner: Harness) -> None:
    asked = requests(10)
    for request in asked:
        request.prompt = (request.prompt[:5] * 5)[:20]
    check(runner.engine("fused", speculate=3, capacity=MANY), runner.engine("fused"), asked)
    assert runner.summary.phases["decode"].accepted_tokens > 0


def test_a_step_is_two_requests_a_layer_whatever_the_number_of_sequences(runner: Harness) -> None:
    engine = runner.engine("fused", capacity=Capacity(sequences=16, waiting=16, step_tokens=1000))
    asked = [Request(random_ids(10, seed=n).tolist(), 5, 0) for n in range(16)]
    serve(engine, asked)
    # One step that reads all of them, four that generate.
    assert len(runner.client.sent) == 5 * (2 * runner.spec.layers + 1)


def test_who_generates_does_not_wait_for_a_long_prompt(runner: Harness) -> None:
    engine = runner.engine("fused", chunk_tokens=8, capacity=Capacity(sequences=3, waiting=3, step_tokens=12))
    short = Request(random_ids(4).tolist(), 40, 0)
    long = Request(random_ids(100).tolist(), 1, 2)
    engine.add(short.sequence())
    engine.step()
    engine.add(long.sequence())
    for step in range(13):
        assert not long.made
        engine.step()
        assert len(short.made) == 2 + step
    assert long.made


def test_two_prompts_share_a_step_with_who_generates(runner: Harness) -> None:
    """Those that generate take nothing of what a step may read."""
    capacity = Capacity(sequences=4, waiting=4, step_tokens=16)
    engine = runner.engine("fused", chunk_tokens=capacity.chunk_tokens, capacity=capacity)
    first, *others = [Request(random_ids(count, seed=count).tolist(), 20, 0) for count in (4, 16, 15, 14)]
    engine.add(first.sequence())
    engine.step()
    for request in others:
        engine.add(request.sequence())
    for steps, began in enumerate(([0, 0, 0], [1, 1, 0], [2, 2, 0], [3, 3, 1]), start=1):
        engine.step()
        assert [len(request.made) for request in others] == began
        assert len(first.made) == 1 + steps


def test_first_come_first_served(runner: Harness) -> None:
    engine = runner.engine("local", capacity=Capacity(sequences=2, waiting=8))
    asked = [Request(random_ids(5, seed=n).tolist(), 3, 0) for n in range(6)]
    ended: list[int] = []
    for number, request in enumerate(asked):
        sequence = request.sequence()
        sequence.on_end = lambda _, number=number: ended.append(number)  # type: ignore[misc]
        engine.add(sequence)
    while engine.step():
        assert engine.running <= 2
    assert ended == [0, 1, 2, 3, 4, 5]


def test_a_line_that_is_full(runner: Harness) -> None:
    engine = runner.engine("local", capacity=Capacity(sequences=1, waiting=2))
    for _ in range(3):
        engine.add(Request([1, 2], 3, 0).sequence())
    with pytest.raises(BusyError, match="try again later"):
        engine.add(Request([1, 2], 3, 0).sequence())
    while engine.step():
        pass
    engine.add(Request([1, 2], 3, 0).sequence())


def test_keys_and_values_stay_within_their_budget(runner: Harness) -> None:
    """Where there is no room the last one gives way, waits, and goes on with what it had."""
    room = bytes_of(runner.spec, 300)
    engine = runner.engine("local", chunk_tokens=64, capacity=Capacity(sequences=8, waiting=8, kv_bytes=room))
    asked = [Request(random_ids(30, seed=n).tolist(), 60, 0) for n in range(6)]
    most = 0
    sequences = [request.sequence() for request in asked]
    for sequence in sequences:
        engine.add(sequence)
    gave_way = False
    while engine.step():
        most = max(most, engine.kv_bytes)
        gave_way |= any(s.cache is None and s.made and not s.ended for s in sequences)
    assert most <= room
    single = runner.engine("local", chunk_tokens=64)
    assert [request.made for request in asked] == [alone(single, request) for request in asked]


def test_who_grows_beyond_the_budget_makes_the_last_one_wait(runner: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.tee.engine.AHEAD", 4)
    room = bytes_of(runner.spec, 160)
    engine = runner.engine("local", chunk_tokens=64, capacity=Capacity(sequences=8, waiting=8, kv_bytes=room))
    asked = [Request(random_ids(20, seed=n).tolist(), 60, 0) for n in range(4)]
    sequences = [request.sequence() for request in asked]
    for sequence in sequences:
        engine.add(sequence)
    gave_way = 0
    while engine.step():
        assert engine.kv_bytes <= room
        gave_way += any(s.cache is None and s.made and not s.ended for s in sequences)
    assert gave_way
    single = runner.engine("local", chunk_tokens=64)
    assert [request.made for request in asked] == [alone(single, request) for request in asked]


def test_what_can_never_fit_is_refused_at_once(runner: Harness) -> None:
    engine = runner.engine("local", capacity=Capacity(sequences=2, waiting=2, kv_bytes=bytes_of(runner.spec, 50)))
    assert engine.most_positions == 50
    with pytest.raises(PromptError, match="30 tokens and 30 more are more than the 50"):
        engine.add(Request(random_ids(30).tolist(), 30, 0).sequence())


def test_who_goes_is_gone_before_the_next_step(runner: Harness) -> None:
    """In decode, in the middle of a prompt, and in line."""
    engine = runner.engine("fused", chunk_tokens=8, capacity=Capacity(sequences=2, waiting=2, step_tokens=8))
    made = [Request(random_ids(4).tolist(), 50, 0), Request(random_ids(60).tolist(), 5, 0), Request([1, 2], 5, 0)]
    sequences = [request.sequence() for request in made]
    for sequence in sequences:
        engine.add(sequence)
    for _ in range(4):
        engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    assert sequences[1].reading
    for sequence in sequences:
        engine.cancel(sequence)
    assert not engine.step()
    assert (engine.running, engine.waiting, engine.kv_bytes) == (0, 0, 0)
    assert all(sequence.ended and sequence.done.finish_reason == "interrupted" for sequence in sequences)


def test_after_an_error_those_that_ran_may_go_on(runner: Harness) -> None:
    asked = [Request(random_ids(6, seed=n).tolist(), 10, 0) for n in range(3)]
    engine = runner.engine("fused", capacity=MANY)
    for request in asked:
        engine.add(request.sequence())
    for _ in range(3):
        engine.step()
    runner.client.tamper = lambda frames: frames[:1]
    with pytest.raises(BadReplyError):
        engine.step()
    runner.client.tamper = lambda frames: frames
    while engine.step():
        pass
    assert [request.made for request in asked] == [alone(runner.engine("fused"), request) for request in asked]


def test_those_that_ran_can_be_ended_with_the_error(runner: Harness) -> None:
    engine = runner.engine("local", capacity=Capacity(sequences=2, waiting=2))
    asked = [Request(random_ids(6).tolist(), 10, 0) for _ in range(3)]
    for request in asked:
        engine.add(request.sequence())
    engine.step()
    error = BadReplyError("no")
    engine.fail(error)
    assert [request.ends for request in asked] == [[error], [error], []]
    while engine.step():
        pass
    assert asked[2].ends == [None]


def test_what_a_false_reply_left_is_not_gone_on_from(runner: Harness) -> None:
    engine = runner.engine("local", capacity=Capacity(sequences=2, prefix_bytes=1 << 30))
    first, again = (Request(random_ids(20).tolist(), 5, 0) for _ in range(2))
    sequence = first.sequence()
    engine.add(sequence)
    engine.step()
    sequence.held.slab.values[0].fill_(float("inf"))  # as values too large make it, which are found out by the logits
    with pytest.raises(BadReplyError) as caught:
        engine.step()
    engine.fail(caught.value)
    engine.add(again.sequence())
    while engine.step():
        pass
    assert again.made == alone(runner.engine("local"), again)


def test_what_can_not_be_prepared_for_ends_alone(runner: Harness) -> None:
    def prepare(tokens: int, prompts: int, rows: int) -> None:
        if tokens + rows > 100:
            raise ShieldError(f"{tokens} tokens of {prompts} prompts and {rows} rows are too many")

    engine = runner.engine("local", capacity=MANY, prepare=prepare)
    small, large = Request(random_ids(5).tolist(), 10, 0), Request(random_ids(5).tolist(), 200, 0)
    engine.add(small.sequence())
    engine.step()
    engine.add(large.sequence())
    while engine.step():
        pass
    assert (len(small.made), small.ends) == (10, [None])
    assert (large.made, str(large.ends[0])) == ([], "5 tokens of 1 prompts and 208 rows are too many")
    with pytest.raises(ShieldError, match="too many"):
        engine.generate([1, 2, 3], max_tokens=200, sampler=Sampler(SamplingOptions()))


def test_who_takes_too_long_is_told_so(runner: Harness) -> None:
    """In line as well as in the middle of an answer; the rest go on."""
    engine = runner.engine("local", capacity=Capacity(sequences=1, waiting=3, answer_seconds=60))
    asked = [Request(random_ids(6, seed=n).tolist(), 10, 0) for n in range(3)]
    sequences = [request.sequence() for request in asked]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    engine.step()
    for late in sequences[:2]:
        late.times.added_ns -= 61 * 10**9
    while engine.step():
        pass
    assert [type(request.ends[0]) for request in asked] == [DeadlineError, DeadlineError, type(None)]
    assert "run.deadline_seconds" in str(asked[0].ends[0])
    assert [len(request.made) for request in asked] == [2, 0, 10]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_can_not_be_ends_alone(temperature: float, runner: Harness) -> None:
    class Nothing:
        """Allows nothing after two tokens."""

        taken = 0

        def mask(self, logits: torch.Tensor) -> torch.Tensor:
            return logits if self.taken < 2 else torch.full_like(logits, float("-inf"))

        def take(self, token: int) -> None:
            self.taken += 1

    asked = [Request(random_ids(6, seed=n).tolist(), 10, 0) for n in range(3)]
    sequences = [request.sequence() for request in asked]
    sequences[1].sampler = Sampler(SamplingOptions(temperature=temperature, seed=1), Nothing())
    engine = runner.engine("fused", capacity=MANY)
    for sequence in sequences:
        engine.add(sequence)
    while engine.step():
        pass
    assert [type(request.ends[0]) for request in asked] == [type(None), UnmetError, type(None)]
    assert len(asked[1].made) == 2
    for request in (asked[0], asked[2]):
        assert request.made == alone(runner.engine("fused"), request)


def test_prefixes_are_found_within_a_namespace_only(runner: Harness) -> None:
    engine = runner.engine("local", prefix_bytes=1 << 30)
    common = random_ids(40).tolist()
    reused = []
    for namespace in ("a", "a", "b", "b"):
        sequence = Request([*common, 5, len(reused)], 3, 0, namespace=namespace).sequence()
        engine.add(sequence)
        while engine.step():
            pass
        reused.append(sequence.done.reused_tokens)
    assert reused == [0, 41, 0, 41]


def test_what_is_told_of_each(runner: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arrival, begin, step and end, in this order, and no more; of one prompt alone nothing."""
    told: list[Event] = []
    runner.recorder._sinks = (*runner.recorder._sinks, told.extend)
    monkeypatch.setattr("teegpu.tee.engine.AHEAD", 4)
    room = bytes_of(runner.spec, 110)
    engine = runner.engine("fused", chunk_tokens=16, capacity=Capacity(3, 50, kv_bytes=room, step_tokens=24))
    asked = [request for request in requests(24, seed=3) if len(request.prompt) + request.tokens < 80]
    serve(engine, asked)
    runner.recorder.flush()
    found = runner.summary.requests
    assert found.arrived == sum(found.ended.values()) == len(asked)
    assert found.made == sum(len(request.made) for request in asked)
    assert 0 < found.ended["abort"] <= sum(request.leaves is not None for request in asked)
    assert not found.open
    assert found.gave_way
    assert (found.most_running, found.most_kv_bytes <= room) == (3, True)
    for number in range(1, len(asked) + 1):
        kinds = [type(event) for event in told if getattr(event, "request", 0) == number]
        assert kinds[0] is Arrived
        assert kinds[-1] is Left
        assert set(kinds[1:-1]) <= {Admitted, GaveWay}
    steps = [event for event in told if isinstance(event, Stepped)]
    assert all(before.at_ns <= after.began_ns for before, after in pairwise(steps))
    told.clear()
    alone(runner.engine("fused"), asked[0])
    runner.recorder.flush()
    assert not any(isinstance(event, Arrived | Stepped | Left) for event in told)


def test_the_clock_adds_up_with_many(runner: Harness) -> None:
    began = runner.recorder.clock_ns()
    serve(runner.engine("fused", chunk_tokens=16, capacity=MANY), requests(12))
    wall = (runner.recorder.clock_ns() - began) / 1e9
    phases = runner.summary.phases.values()
    for phase in phases:
        parts = phase.tee_seconds + phase.serialization_seconds + phase.wait_seconds + phase.other_seconds
        assert parts == pytest.approx(phase.seconds, rel=1e-6)
    assert sum(phase.seconds for phase in phases) <= wall


def test_a_step_draws_what_transformers_does(runner: Harness, reference: Any) -> None:
    model = reference(runner.folder)
    asked = requests(8, seed=5)
    serve(runner.engine("fused", chunk_tokens=16, capacity=MANY), asked)
    for request in asked:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([request.prompt]),
                max_new_tokens=request.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert request.made == out[0, len(request.prompt) :].tolist()[: len(request.made)]
