"""The GPU server under load: health, fairness between clients, draining, and clients that invent programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import transports
from teegpu import machine
from teegpu.gpu.executor import Execution, Executor
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.spec import ModelSpec
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Health, HealthReport, Hello, Message, Refusal, Result, Welcome
from teegpu.wire.program import Program, Step, linear, single
from transports.base import Incoming, ServerOptions
from transports.errors import ConnectionLostError, TransportError

DEADLINE_SECONDS = 30.0
LINEAR = single(["n"], linear("q", "n", "layers.0.q_proj"))


class Gate(Executor):
    """Waits before each program until it is let through; ``rows`` are those of the inputs of what it ran, in order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows: list[int] = []
        self.reached = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def let(self, count: int) -> None:
        self._go.release(count)

    def run(self, program: Program, inputs: Any, encodings: Any) -> Execution:
        self.rows.append(next(iter(inputs.values())).shape[0])
        self.reached.release()
        assert self._go.acquire(timeout=DEADLINE_SECONDS)
        return super().run(program, inputs, encodings)


@pytest.fixture
def gate(store: Any, spec: ModelSpec) -> Gate:
    return Gate(DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32), Limits())


@contextmanager
def serving(
    executor: Executor, identity: Identity, options: ServerOptions | None = None, drain_seconds: float = 0.0
) -> Iterator[GpuServer]:
    with transports.listen("tcp://127.0.0.1:0", options) as transport:
        server = GpuServer(transport, executor, identity, Limits(), drain_seconds=drain_seconds)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            if isinstance(executor, Gate):
                executor.let(1000)
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive()


def address(server: GpuServer) -> str:
    return server._transport.address


def ask(rows: int, program: Program = LINEAR) -> transports.Message:
    tensors = {"n": torch.ones(rows, 32)}
    replies = dict.fromkeys(program.outputs, "fp32")
    return transports.Message(codec.encode_execute(Execute(1, program, tensors, {"n": "fp32"}, replies)).frames)


def health(request_id: int = 0) -> transports.Message:
    return transports.Message(codec.encode_health(Health(request_id, "0.1.0")).frames)


def read(reply: transports.Reply) -> Message:
    return codec.Decoder(Limits()).decode(reply.frames)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Health


def test_health_tells_what_is_going_on(gate: Gate, identity: Identity) -> None:
    with serving(gate, identity) as server, transports.connect("pipelined", address(server)) as busy:
        polls = [busy.begin(ask(rows)).poll for rows in (1, 2)]
        assert gate.reached.acquire(timeout=DEADLINE_SECONDS)
        until(lambda: server._transport.load.waiting_requests == 1)
        with transports.connect("pipelined", address(server)) as operator:
            poll = operator.begin(health(9)).poll
            until(lambda: server._transport.load.waiting_requests == 2)
            gate.let(2)
            until(lambda: poll() is not None)
            reply = poll()
            assert reply is not None
            report = read(reply)
        until(lambda: all(each() is not None for each in polls))
    assert isinstance(report, HealthReport)
    assert report.request_id == 9
    assert (report.model, report.digest, report.layers) == ("tiny", identity.digest, (0, 1))
    assert (report.clients, report.connections) == (2, 2)
    assert report.in_flight >= 1, "this one at least"
    assert 0.0 < report.busy_share <= 1.0
    assert 0.0 < report.uptime_seconds < DEADLINE_SECONDS
    assert report.rss_bytes > 10 * 2**20
    assert (report.weight_bytes, report.refused, report.draining) == (1234, 0, False)


def test_health_is_answered_while_the_queue_is_full_of_others_work(gate: Gate, identity: Identity) -> None:
    """A client has as much in the queue as it may: the question still waits for one program at most."""
    options = ServerOptions(max_client_requests=20)
    with serving(gate, identity, options) as server, transports.connect("pipelined", address(server)) as greedy:
        polls = [greedy.begin(ask(1)).poll for _ in range(20)]
        assert gate.reached.acquire(timeout=DEADLINE_SECONDS)
        until(lambda: server._transport.load.waiting_requests == 19)
        with transports.connect("pipelined", address(server)) as operator:
            poll = operator.begin(health()).poll
            until(lambda: server._transport.load.waiting_requests == 20)
            gate.let(1)
            until(lambda: poll() is not None)
            assert len(gate.rows) <= 2, "the one in hand, and the next that has begun"
        gate.let(100)
        until(lambda: all(each() is not None for each in polls))


def test_refusals_are_counted(gate: Gate, identity: Identity) -> None:
    with serving(gate, identity) as server, transports.connect("zmq", address(server)) as client:
        for frames in ([b"rubbish"], codec.encode_refusal(Refusal(1, "internal", "x")).frames):
            assert isinstance(read(client.request(transports.Message(frames))), Refusal)
        report = read(client.request(health()))
    assert isinstance(report, HealthReport)
    assert (report.refused, report.requests_served) == (2, 2)


# Fairness


def test_small_programs_wait_for_one_large_one_at_most(gate: Gate, identity: Identity) -> None:
    """Programs of 7 rows fill one client's queue; the small ones of another get in front of all but the one in hand."""
    with serving(gate, identity) as server, transports.connect("pipelined", address(server)) as large:
        polls = [large.begin(ask(7)).poll for _ in range(10)]
        with transports.connect("zmq", address(server)) as small:
            for served in range(4):
                # The next large one is in hand: it is what a small one has to wait for.
                until(lambda served=served: gate.rows.count(7) == served + 1)
                waiting = 9 - served
                until(lambda waiting=waiting: server._transport.load.waiting_requests == waiting)
                reply: list[transports.Reply] = []
                thread = threading.Thread(target=lambda reply=reply: reply.append(small.request(ask(1))))
                thread.start()
                until(lambda waiting=waiting: server._transport.load.waiting_requests == waiting + 1)
                before = gate.rows.count(7)
                gate.let(2)
                thread.join(DEADLINE_SECONDS)
                assert isinstance(read(reply[0]), Result)
                assert gate.rows.count(7) - before <= 1
                assert gate.rows.count(1) == served + 1
        gate.let(100)
        until(lambda: all(each() is not None for each in polls))


# Draining


def test_what_it_has_is_answered_and_what_comes_then_is_refused(gate: Gate, identity: Identity) -> None:
    with (
        serving(gate, identity, drain_seconds=DEADLINE_SECONDS) as server,
        transports.connect("pipelined", address(server)) as client,
        transports.connect("pipelined", address(server)) as late,
    ):
        polls = [client.begin(ask(rows)).poll for rows in (1, 2, 3)]
        assert gate.reached.acquire(timeout=DEADLINE_SECONDS)
        until(lambda: server._transport.load.waiting_requests == 2)
        server.stop()
        refused = late.begin(ask(9)).poll
        with pytest.raises(TransportError, match="is being stopped") as raised:
            until(lambda: refused() is not None)
        assert raised.value.retryable, "another server may do it, or this one when it is back"
        gate.let(3)
        until(lambda: all(each() is not None for each in polls))
    assert gate.rows == [1, 2, 3]


def test_what_can_not_be_drained_in_time_is_refused(gate: Gate, identity: Identity) -> None:
    with (
        serving(gate, identity, drain_seconds=0.0) as server,
        transports.connect("pipelined", address(server)) as client,
    ):
        polls = [client.begin(ask(rows)).poll for rows in (1, 2)]
        assert gate.reached.acquire(timeout=DEADLINE_SECONDS)
        until(lambda: server._transport.load.waiting_requests == 1)
        server.stop()
        gate.let(1)
        until(lambda: polls[0]() is not None)
    assert gate.rows == [1]


def test_an_inprocess_server_drains_too(gate: Gate, identity: Identity) -> None:
    gate.let(10)
    with transports.listen("inprocess://drained") as transport:
        server = GpuServer(transport, gate, identity, Limits(), drain_seconds=1.0)
        with transports.connect("inprocess", transport.address) as client:
            server.stop()
            server.serve()
            with pytest.raises(ConnectionLostError, match="is being stopped"):
                client.request(ask(1))


# Limits and memory


@pytest.mark.parametrize(
    ("limits", "rows", "setting"),
    [
        (Limits(working_bytes=4096), 64, "limits.program_mib on the server"),
        (Limits(message_bytes=16_000), 64, "limits.message_mib on the server"),
    ],
)
def test_what_is_too_large_is_refused_with_the_settings_name(
    store: Any, spec: ModelSpec, identity: Identity, limits: Limits, rows: int, setting: str
) -> None:
    executor = Executor(DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32), limits)
    with serving(executor, identity) as server, transports.connect("zmq", address(server)) as client:
        answer = read(client.request(ask(rows)))
    assert isinstance(answer, Refusal)
    assert answer.code == "too-large"
    assert setting in answer.text


def test_the_transport_learns_what_programs_need_before_they_take_it(
    store: Any, spec: ModelSpec, identity: Identity
) -> None:
    executor = Executor(DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32), Limits())
    with serving(executor, identity) as server, transports.connect("zmq", address(server)) as client:
        assert server._transport.user_bytes() == 0
        client.request(ask(8))
        small = server._transport.user_bytes()
        # n and q of 8 rows by 32, q once more for the reply, and q_proj, which is taken out of a larger matrix
        assert small >= 3 * 8 * 32 * 4 + 32 * 32 * 4
        client.request(ask(800))
        assert server._transport.user_bytes() > small + 2 * 800 * 32 * 4
        client.request(ask(8))
        assert server._transport.user_bytes() > small + 2 * 800 * 32 * 4, "what was freed stays with the process"


def test_programs_and_shapes_that_a_client_invents_fill_nothing(
    store: Any, spec: ModelSpec, identity: Identity
) -> None:
    """Each with the most that is remembered, and a shape of its own; what one request takes is noise beside it."""
    executor = Executor(DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32), Limits())
    with transports.listen("inprocess://inventions") as transport, torch.inference_mode():
        server = GpuServer(transport, executor, identity, Limits())
        for length in (8, 60):
            before = machine.resident_bytes()
            for number in range(2500):
                frames = codec.encode_execute(invention(number, length)).frames
                incoming = Incoming([memoryview(bytearray(frame)) for frame in frames], b"c", None, 0)
                reply = server.answer(incoming)
                assert len(reply.frames) == 1 + 4
            assert machine.resident_bytes() - before < 64 * 2**20


def invention(number: int, length: int) -> Execute:
    def name(place: int) -> str:
        return f"{number}-{place}".ljust(length, "x")

    inputs = tuple(name(100 + place) for place in range(4))
    steps = [Step("add", name(0), (inputs[0], inputs[1])), Step("add", name(1), (inputs[2], inputs[3]))]
    steps += [Step("add", name(place), (name(place - 1), name(place - 2))) for place in range(2, 12)]
    program = Program(inputs, tuple(steps), tuple(name(place) for place in range(8, 12)))
    tensors = {register: torch.ones(1, 1 + number % 7) for register in inputs}
    return Execute(1, program, tensors, dict.fromkeys(inputs, "fp16"), dict.fromkeys(program.outputs, "fp16"))


def test_a_client_that_was_forgotten_is_served_when_it_comes_back(gate: Gate, identity: Identity) -> None:
    gate.let(10)
    options = ServerOptions(idle_timeout_seconds=0.05)
    with serving(gate, identity, options) as server, transports.connect("zmq", address(server)) as client:
        hello = transports.Message(codec.encode_hello(Hello(0, "")).frames)
        assert isinstance(read(client.request(hello)), Welcome)
        until(lambda: server._transport.load.clients == 0)
        assert isinstance(read(client.request(ask(1))), Result)
