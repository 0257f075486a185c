"""Servers that answer all that they are asked, each time within its time-out, and never come to an end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from teegpu.errors import ConnectionFailedError
from teegpu.facts import plan as plan_of
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.deadline import Deadline
from teegpu.tee.plans import programs
from tests.teegpu.remote.network import World
from transports.errors import ConnectionLostError

A = "tcp://a:1"


@pytest.fixture
def gpu(world: World) -> Callable[..., GpuClient]:
    """``gpu(trip_seconds, **limits)`` → a client of a server that takes so long for each answer."""

    def make(trip_seconds: float, **limits: float) -> GpuClient:
        world.host(A, trip_seconds=trip_seconds)
        deadline = Deadline(clock_ns=lambda: world.now, **limits)
        client, _ = world.gpu(A, deadline=deadline)
        return client

    return make


def call(world: World, layer: int = 0, chunk: int = 0) -> Call:
    code = programs(world.harness.spec, plan_of("fused"))[layer].qkv[0]
    return Call(code, {"n": torch.ones(3, world.harness.spec.hidden_size)}, layer, chunk)


def passes(gpu: GpuClient, world: World, most: int) -> int:
    """Passes through two layers, of 2 requests each, until one fails or there were so many."""
    for number in range(most):
        try:
            for layer in (0, 0, 1, 1):
                drive(gpu.run(call(world, layer)))
        except ConnectionFailedError:
            return number
    return most


def test_a_server_that_takes_long_for_each_request_of_a_pass(gpu: Callable[..., GpuClient], world: World) -> None:
    client, before = gpu(100.0, pass_seconds=250.0, reply_seconds=120.0), world.seconds
    drive(client.run(call(world)))
    drive(client.run(call(world)))
    # What is left for the third is less than a request may take, and the server is given no more than that.
    with pytest.raises(ConnectionFailedError, match=r"link\.pass_timeout_seconds, 250, allows a pass"):
        drive(client.run(call(world, 1)))
    assert world.seconds - before == pytest.approx(250.0, abs=1.0)
    assert world.hosts[A].allowed == [None, None, pytest.approx(50.0)]


def test_each_pass_has_its_own_time(gpu: Callable[..., GpuClient], world: World) -> None:
    assert passes(gpu(10.0, pass_seconds=45.0), world, 20) == 20


def test_an_answer_without_end(gpu: Callable[..., GpuClient], world: World) -> None:
    """Each pass is quick enough, and there is always another one."""
    client, before = gpu(10.0, pass_seconds=45.0, answer_seconds=1000.0), world.seconds
    with client._pool.deadline.answering():
        assert passes(client, world, 1000) == 25
        assert world.seconds - before == pytest.approx(1000.0, abs=1.0)
        with pytest.raises(ConnectionFailedError, match=r"run\.deadline_seconds, 1000, allows an answer"):
            drive(client.run(call(world)))
    assert passes(client, world, 20) == 20
    with client._pool.deadline.answering():  # the next one
        assert passes(client, world, 20) == 20


def test_chunks_have_passes_of_their_own(gpu: Callable[..., GpuClient], world: World) -> None:
    client = gpu(10.0, pass_seconds=45.0)
    for layer in (0, 0, 1, 1):
        for chunk in range(5):
            drive(client.run(call(world, layer, chunk)))


def test_lost_attempts_and_waiting_for_a_connection_count(gpu: Callable[..., GpuClient], world: World) -> None:
    """A server that answers now and then, and ends the connection in between, keeps within every other budget."""
    client, host = gpu(5.0, pass_seconds=100.0), world.hosts[A]
    before = world.seconds
    host.faults.extend([ConnectionLostError("cut"), None] * 30)
    answered, ended = 0, ""
    try:
        while answered < 30:
            drive(client.run(call(world)))
            answered += 1
    except ConnectionFailedError as error:
        ended = str(error)
    assert "link.pass_timeout_seconds, 100, allows a pass" in ended
    assert answered >= 5
    assert world.seconds - before == pytest.approx(100.0, abs=12.0)


def test_a_request_is_given_a_limit_of_its_own_where_little_is_left(world: World) -> None:
    deadline, asked = Deadline(pass_seconds=600.0, reply_seconds=120.0), call(world)
    assert deadline.allow(asked) is None
    deadline.spend(asked, 500.0)
    assert deadline.allow(asked) == pytest.approx(100.0)
    assert Deadline().allow(asked) is None
