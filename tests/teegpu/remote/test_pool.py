"""What is sent again, to whom, when and for how long: every rule of it, on a clock that stands still."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
import torch

from teegpu.endpoints import parse
from teegpu.errors import (
    BadReplyError,
    ConfigError,
    ConnectionFailedError,
    MismatchError,
    ServerRefusedError,
    TeegpuError,
)
from teegpu.facts import plan as plan_of
from teegpu.record.events import SERIALIZATION, WAIT, Lap
from teegpu.remote.calls import Call, drive
from teegpu.remote.connections import Replica
from teegpu.remote.pool import Pool
from teegpu.stats.summary import Summary
from teegpu.tee.plans import CONTEXT, EMBED, LM_HEAD, programs
from tests.teegpu.remote.network import TRIP_SECONDS, World
from transports.errors import (
    BadAddressError,
    ConnectError,
    ConnectionLostError,
    FrameError,
    LimitError,
    ReplyTimeoutError,
    TransportError,
)

A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"


def call(world: World, layer: int = 0) -> Call:
    code = programs(world.harness.spec, plan_of("fused"))[layer].qkv[0]
    return Call(code, {"n": torch.ones(3, world.harness.spec.hidden_size)}, layer)


def absent(pool: Pool) -> list[Replica]:
    return [replica for replica in pool.replicas if replica.client is None]


def lost(text: str = "the connection was lost") -> ConnectionLostError:
    return ConnectionLostError(text)


# What is sent again


@pytest.mark.parametrize("error", [lost(), ReplyTimeoutError("late"), ConnectError("nobody")])
def test_a_lost_request_is_sent_again_byte_for_byte(error: TransportError, world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    drive(gpu.run(call(world)))
    host.faults.append(error)
    out = drive(gpu.run(call(world)))
    want = torch.ones(3, 32) @ world.harness.store.load("layers.0.q_proj").T
    torch.testing.assert_close(out["qkv"][:, : want.shape[1]], want)
    first, second = host.served
    assert len(first) == len(second)
    assert host.greeted == 2  # the connection is a new one, and says hello first
    (retry,) = world.retries
    assert (retry.request_id, retry.layer, retry.endpoint, retry.reason) == (2, 0, 0, type(error).__name__)
    assert [(rpc.request_id, rpc.attempts, rpc.endpoint) for rpc in world.rpcs] == [(1, 1, 0), (2, 2, 0)]
    # the time on the link is that of the attempt that came through
    assert world.rpcs[1].received_ns - world.rpcs[1].sent_ns == TRIP_SECONDS * 1e9


@pytest.mark.parametrize(
    "error", [FrameError("garbage"), LimitError("too long"), BadAddressError("no"), ValueError("our bug")]
)
def test_what_would_only_happen_again_is_not_sent_again(error: Exception, world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.faults.append(error)
    before = world.seconds
    with pytest.raises(type(error)) as raised:
        drive(gpu.run(call(world)))
    assert raised.value is error
    assert (world.retries, host.greeted) == ([], 1)
    assert world.seconds - before == pytest.approx(TRIP_SECONDS)


def test_a_refusal_is_not_sent_again(world: World) -> None:
    host = world.host(A)
    world.host(B)
    gpu, _ = world.gpu(A, B)
    with pytest.raises(ServerRefusedError, match="vocabulary"):
        drive(gpu.run(Call(EMBED, {"ids": torch.tensor([100_000])})))
    assert len(host.served) == 1
    assert world.hosts[B].served == []


def test_a_bad_reply_is_not_sent_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.host(A)
    gpu, _ = world.gpu(A)
    monkeypatch.setattr(gpu, "_checked", lambda *_: (_ for _ in ()).throw(BadReplyError("nonsense")))
    with pytest.raises(BadReplyError):
        drive(gpu.run(call(world)))
    assert world.retries == []


def test_a_request_that_the_server_will_never_take_is_not_sent_again(world: World) -> None:
    host = world.host(A, limits={"message_bytes": 300})
    gpu, _ = world.gpu(A)
    host.faults.append(lost())
    with pytest.raises(ServerRefusedError, match=r"a request has \d+ bytes, and the server at tcp://a:1 takes 300"):
        drive(gpu.run(call(world)))
    assert world.retries == []


def test_of_requests_that_go_together_the_lost_one_is_sent_again(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.faults.extend([None, lost()])
    results = drive(gpu.run_all([call(world), call(world, 1), call(world)]))
    assert len(results) == 3
    assert [rpc.attempts for rpc in world.rpcs] == [1, 2, 1]
    assert [retry.request_id for retry in world.retries] == [2]


# Pauses and the budget


def test_pauses_double_up_to_two_seconds(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A, budget_seconds=60.0)
    host.refusals.extend([lost() for _ in range(12)])
    host.faults.append(lost())
    drive(gpu.run(call(world)))
    pauses = [after - before for before, after in pairwise([host.asked[0] + TRIP_SECONDS, *host.asked[1:]])]
    expected = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, *[2.0] * 7]
    assert pauses == pytest.approx(expected, abs=0.005)
    assert [rpc.attempts for rpc in world.rpcs] == [2]


def test_the_pauses_go_on_growing_where_hello_is_answered_and_requests_are_not(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.faults.extend([lost() for _ in range(4)])
    drive(gpu.run(call(world)))
    pauses = [after - before for before, after in pairwise(host.asked)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4], abs=0.006)
    host.faults.append(lost())
    drive(gpu.run(call(world)))
    assert host.asked[-1] - world.seconds == pytest.approx(0.0, abs=0.01)  # a reply has come: the first pause again


def test_the_budget_counts_from_the_first_failure(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A, budget_seconds=30.0)
    drive(gpu.run(call(world)))
    host.up = False
    began = world.seconds
    with pytest.raises(ConnectionFailedError) as raised:
        drive(gpu.run(call(world)))
    assert world.seconds - began == pytest.approx(30.0, abs=0.01)
    assert str(raised.value).startswith(
        "no reply from tcp://a:1 for 30.0 s, in spite of 3 attempts to connect (link.retry_budget_seconds is 30): "
    )
    assert "no server answers at tcp://a:1" in str(raised.value)
    assert raised.value.exit_code == 4


def test_a_reply_begins_the_budget_anew(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A, budget_seconds=5.0)
    for _ in range(3):
        host.up = False
        world.at(world.seconds + 4.0, lambda: setattr(host, "up", True))
        drive(gpu.run(call(world)))
    assert world.seconds > 12.0
    assert [rpc.attempts for rpc in world.rpcs] == [2, 2, 2]


def test_hello_does_not_begin_the_budget_anew(world: World) -> None:
    """A request that makes the server drop the connection each time does not go on for ever."""
    host = world.host(A)
    gpu, _ = world.gpu(A, budget_seconds=5.0)
    host.faults.extend([lost("it was too long") for _ in range(1000)])
    with pytest.raises(ConnectionFailedError, match="it was too long"):
        drive(gpu.run(call(world)))
    assert world.seconds < 8.0


def test_a_reply_that_is_late_begins_the_budget_and_does_not_spend_it(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A, budget_seconds=30.0)
    host.faults.append(ReplyTimeoutError("no reply within 120 s"))
    drive(gpu.run(call(world)))
    assert world.rpcs[0].attempts == 2
    host.faults.extend([ReplyTimeoutError("no reply within 120 s") for _ in range(2)])
    with pytest.raises(ConnectionFailedError, match=r"for 120\.\d s, .*: no reply within 120 s$"):
        drive(gpu.run(call(world)))


def test_without_a_budget_the_first_failure_is_the_end(world: World) -> None:
    host = world.host(A)
    world.host(B)
    gpu, _ = world.gpu(A, B, budget_seconds=0.0)
    error = lost()
    host.faults.append(error)
    with pytest.raises(ConnectionLostError) as raised:
        drive(gpu.run(call(world)))
    assert raised.value is error
    assert world.retries == []


def test_nobody_is_waited_for_who_will_not_come_back(world: World) -> None:
    host = world.host(A)
    ended: list[TeegpuError] = []
    gpu, _ = world.gpu(A, gone=lambda: ended[0] if ended else None)
    drive(gpu.run(call(world)))
    host.up = False
    ended.append(ConnectionFailedError("the embedded GPU server ended"))
    with pytest.raises(ConnectionFailedError, match="the embedded GPU server ended"):
        drive(gpu.run(call(world)))
    assert world.seconds < 1.0


# Hello on each new connection


def test_another_process_behind_the_address_is_as_good(world: World) -> None:
    host = world.host(A)
    gpu, pool = world.gpu(A)
    drive(gpu.run(call(world)))
    host.restart()
    drive(gpu.run(call(world)))
    assert pool.welcome is not None
    assert pool.welcome.instance == "second"
    assert world.notes[0] == "a request to the server at tcp://a:1 was lost (ConnectionLostError): sending it again"
    assert world.notes[1].startswith("the server at tcp://a:1 was restarted and answers again after 0.1 s")


def test_another_model_behind_the_address_is_not(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.restart()
    host.digest = "another"
    with pytest.raises(MismatchError, match=r"tcp://a:1 serves 'tiny' \(digest another\).*give both the same --model"):
        drive(gpu.run(call(world)))
    assert world.seconds < 1.0
    assert len(host.served) == 0


def test_another_model_at_one_of_two_is_left_out(world: World) -> None:
    host = world.host(A)
    world.host(B)
    gpu, _ = world.gpu(A, B, spread="round-robin")
    host.restart()
    host.digest = "another"
    for _ in range(200):
        drive(gpu.run(call(world)))
    assert len(world.hosts[B].served) == 200
    assert host.greeted == 2
    assert [note for note in world.notes if "is left out from now on" in note]


def test_garbage_for_a_hello_ends_the_run(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.restart()
    host.refusals.append(FrameError("not a reply"))
    with pytest.raises(FrameError):
        drive(gpu.run(call(world)))


# Several servers


def test_the_next_one_takes_over_at_once_and_stays(world: World) -> None:
    first, second = world.host(A), world.host(B)
    gpu, pool = world.gpu(A, B)
    drive(gpu.run(call(world)))
    assert (len(first.served), len(second.served)) == (1, 0)
    first.up = False
    before = world.seconds
    drive(gpu.run(call(world)))
    assert world.seconds - before == pytest.approx(2 * TRIP_SECONDS)
    assert pool.at_hand is pool.replicas[1]
    first.up = True
    drive(gpu.run(call(world)))
    assert (len(first.served), len(second.served)) == (1, 2)
    assert [rpc.endpoint for rpc in world.rpcs] == [0, 1, 1]
    assert "going on with the server at tcp://b:1" in world.notes
    second.up = False
    drive(gpu.run(call(world)))
    assert len(first.served) == 2


def test_whoever_comes_back_first_goes_on(world: World) -> None:
    hosts = [world.host(address) for address in (A, B, C)]
    gpu, _ = world.gpu(A, B, C)
    for host in hosts:
        host.up = False
    world.at(world.seconds + 3.0, lambda: setattr(hosts[2], "up", True))
    drive(gpu.run(call(world)))
    assert len(hosts[2].served) == 1
    assert 3.0 <= world.seconds < 3.1


def test_when_all_are_gone_all_are_named(world: World) -> None:
    hosts = [world.host(address) for address in (A, B)]
    gpu, _ = world.gpu(A, B, budget_seconds=1.0)
    for host in hosts:
        host.up = False
    with pytest.raises(ConnectionFailedError, match=r"no reply from tcp://a:1 or tcp://b:1 for 1\.0 s"):
        drive(gpu.run(call(world)))


def test_round_robin_goes_to_all_in_turn(world: World) -> None:
    hosts = [world.host(address) for address in (A, B, C)]
    gpu, _ = world.gpu(A, B, C, spread="round-robin")
    for _ in range(9):
        drive(gpu.run(call(world)))
    assert [len(host.served) for host in hosts] == [3, 3, 3]
    assert [rpc.endpoint for rpc in world.rpcs] == [0, 1, 2] * 3


def test_round_robin_prefers_who_has_less_to_do(world: World) -> None:
    hosts = [world.host(address) for address in (A, B)]
    gpu, _ = world.gpu(A, B, spread="round-robin")
    world.clients[0].load = 1000
    for _ in range(3):
        drive(gpu.run(call(world)))
    assert [len(host.served) for host in hosts] == [0, 3]


def test_round_robin_leaves_a_dead_one_out_and_takes_it_back(world: World) -> None:
    first, second = world.host(A), world.host(B)
    gpu, _ = world.gpu(A, B, spread="round-robin")
    first.up = False
    for _ in range(100):
        drive(gpu.run(call(world)))
    assert (len(first.served), len(second.served)) == (0, 100)
    assert world.seconds < 0.15  # nobody waited for the dead one
    assert len(world.retries) == 1
    first.up = True
    for _ in range(100):
        drive(gpu.run(call(world)))
    assert len(first.served) > 40
    assert any("answers again after" in note for note in world.notes)


# Layers on several servers


def test_a_call_goes_where_its_weights_are(world: World) -> None:
    low, high = world.host(A, layers=(0, 0)), world.host(B, layers=(1, 1))
    gpu, pool = world.gpu(f"{A}#layers=0-0", f"{B}#layers=1-1")
    assert pool.borders == (1,)
    spec = world.harness.spec
    drive(gpu.run(call(world, 0)))
    drive(gpu.run(call(world, 1)))
    drive(gpu.run(Call(EMBED, {"ids": torch.tensor([1])})))
    drive(gpu.run(Call(LM_HEAD, {"n": torch.ones(1, spec.hidden_size)})))
    weights = {"p": torch.ones(4, 1, 3), "v": torch.ones(2, 3, 8)}
    drive(gpu.run(Call(CONTEXT, weights, 0)))
    drive(gpu.run(Call(CONTEXT, weights, 1)))
    assert (len(low.served), len(high.served)) == (3, 3)
    assert [rpc.endpoint for rpc in world.rpcs] == [0, 1, 0, 1, 0, 1]
    assert len(drive(gpu.run_all([call(world, 0), call(world, 1)]))) == 2
    spanning = Call(programs(spec, plan_of("fused"))[0].after_mlp, {"h": torch.ones(1, 64), "z": torch.ones(1, 32)}, 0)
    with pytest.raises(RuntimeError, match="weights of more than one shard"):
        drive(gpu.run(spanning))


def test_each_group_has_its_replicas_and_its_budget(world: World) -> None:
    endpoints = [f"{A}#layers=0-0", f"{B}#layers=1-1", f"{C}#layers=0-0"]
    low, _, other = world.host(A, layers=(0, 0)), world.host(B, layers=(1, 1)), world.host(C)
    gpu, _ = world.gpu(*endpoints, budget_seconds=1.0)
    low.up = False
    drive(gpu.run(call(world, 0)))
    assert len(other.served) == 1
    other.up = False
    drive(gpu.run(call(world, 1)))
    with pytest.raises(ConnectionFailedError, match="no reply from tcp://a:1 or tcp://c:1 for"):
        drive(gpu.run(call(world, 0)))


def test_a_server_without_the_layers_it_is_to_compute_is_refused(world: World) -> None:
    world.host(A, layers=(0, 0))
    world.host(B, layers=(0, 0))
    with pytest.raises(MismatchError, match=r"tcp://b:1 holds layers 0-0, and is to compute 1-1"):
        world.gpu(f"{A}#layers=0-0", f"{B}#layers=1-1")
    with pytest.raises(MismatchError, match=r"tcp://a:1 holds layers 0-0, and is to compute 0-1"):
        world.gpu(A)


# The start


def test_all_are_greeted_at_the_start(world: World) -> None:
    hosts = [world.host(A), world.host(B)]
    _, pool = world.gpu(A, B)
    assert [host.greeted for host in hosts] == [1, 1]
    assert absent(pool) == []
    assert pool.at_hand is pool.replicas[0]
    assert world.seconds == 0.0


def test_one_that_answers_is_enough_to_begin(world: World) -> None:
    world.host(A, up=False)
    world.host(B)
    gpu, pool = world.gpu(A, B)
    assert [replica.address for replica in absent(pool)] == [A]
    assert 1.0 <= world.seconds < 1.1  # the grace that the other one had
    drive(gpu.run(call(world)))
    assert world.rpcs[0].endpoint == 1


def test_nobody_answers(world: World) -> None:
    world.host(A, up=False)
    with pytest.raises(ConnectError, match="no server answers at tcp://a:1 within 10 s"):
        world.gpu(A)
    assert world.seconds == pytest.approx(10.0, abs=0.01)


def test_every_group_is_needed_at_the_start(world: World) -> None:
    world.host(A, layers=(0, 0))
    world.host(B, layers=(1, 1), up=False)
    with pytest.raises(ConnectError, match="tcp://b:1"):
        world.gpu(f"{A}#layers=0-0", f"{B}#layers=1-1")


def test_a_hello_that_is_lost_at_the_start_is_said_again(world: World) -> None:
    world.host(A).refusals.extend([lost(), lost()])
    _, pool = world.gpu(A)
    assert absent(pool) == []
    assert 0.14 < world.seconds < 0.2


def test_one_that_only_loses_hellos_is_given_up_in_time(world: World) -> None:
    world.host(A).refusals.extend([lost() for _ in range(100)])
    with pytest.raises(ConnectionLostError):
        world.gpu(A, connect_timeout_seconds=5.0)
    assert 5.0 <= world.seconds < 7.1


def test_another_model_at_the_start_ends_it_at_once(world: World) -> None:
    world.host(A)
    world.host(B, digest="another")
    with pytest.raises(MismatchError, match="tcp://b:1"):
        world.gpu(A, B)
    assert world.seconds == 0.0


# Many in flight


def test_all_that_were_in_flight_are_sent_again_in_order(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    order: list[int] = []

    async def one(number: int) -> None:
        asked = call(world, number % 2)
        await gpu.run(Call(asked.program, asked.inputs, asked.layer, number, overlapped=True))
        order.append(number)

    async def many() -> None:
        await asyncio.gather(*(one(number) for number in range(30)))

    host.restart()
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        world.pass_time(seconds)
        await real_sleep(0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asyncio, "sleep", sleep)
        asyncio.run(many())
    assert order == list(range(30))
    assert host.greeted == 2
    assert len(host.served) == len(world.retries) == 30
    assert {rpc.attempts for rpc in world.rpcs} == {2}
    assert len([note for note in world.notes if "was lost" in note]) == 1


def test_a_connection_that_is_given_up_finishes_what_it_has(world: World) -> None:
    host = world.host(A)
    gpu, pool = world.gpu(A)
    old = world.clients[0]
    old.load = 100  # others of its requests have no reply yet
    host.faults.append(lost("tcp://a:1 is shutting down: closing"))
    drive(gpu.run(call(world)))
    assert not old.closed
    world.clients[1].load = 0
    old.load = 0
    host.faults.append(lost())
    drive(gpu.run(call(world)))
    assert old.closed
    assert world.clients[1].closed
    pool.close()
    assert all(client.closed for client in world.clients)
    pool.close()


# The clock


def test_the_time_that_was_lost_is_waiting(world: World) -> None:
    host = world.host(A)
    gpu, _ = world.gpu(A)
    host.up = False
    world.at(world.seconds + 3.0, lambda: setattr(host, "up", True))
    drive(gpu.run(call(world)))
    world.recorder.end(0, 1)
    laps = world.recorded(Lap)
    assert sum(lap.end_ns - lap.start_ns for lap in laps if lap.part == SERIALIZATION) == 0
    waited = sum(lap.end_ns - lap.start_ns for lap in laps if lap.part == WAIT) / 1e9
    assert waited == pytest.approx(3.0, abs=0.1)
    summary = Summary()
    summary.add(world.events)
    phase = summary.phases["decode"]
    assert phase.seconds == pytest.approx(waited)
    assert phase.network_seconds == pytest.approx(waited, abs=2e-3)


# Servers that join and leave


def expect(pool: Pool, *texts: str) -> None:
    found = [parse(text) for text in texts]
    pool.check_cut(found)
    pool.expect(found)


def test_a_server_joins_and_another_leaves_without_a_lost_request(world: World) -> None:
    first, second = world.host(A), world.host(B)
    gpu, pool = world.gpu(A)
    drive(gpu.run(call(world)))
    expect(pool, A, B)
    for _ in range(3):
        drive(gpu.run(call(world)))
    assert (len(first.served), len(second.served), second.greeted) == (4, 0, 0)
    old = world.clients[0]
    old.load = 100  # it has still to answer
    expect(pool, B)
    drive(gpu.run(call(world)))
    assert (len(first.served), len(second.served)) == (4, 1)
    assert not old.closed
    assert (world.retries, [rpc.endpoint for rpc in world.rpcs]) == ([], [0, 0, 0, 0, 1])
    assert world.notes == [
        "the server at tcp://b:1 joins",
        "the server at tcp://a:1 leaves: it is asked nothing more",
    ]
    assert pool.at_hand is pool.replicas[0]


def test_one_that_leaves_and_comes_back_is_greeted_anew(world: World) -> None:
    first, _ = world.host(A), world.host(B)
    gpu, pool = world.gpu(A, B, spread="round-robin")
    expect(pool, B)
    drive(gpu.run(call(world)))
    first.digest = "another"
    expect(pool, A, B)
    for _ in range(20):
        drive(gpu.run(call(world)))
    assert first.served == []
    assert [note for note in world.notes if "tcp://a:1 is left out from now on" in note]


def test_others_may_not_cut_the_layers_in_another_way(world: World) -> None:
    world.host(A)
    _, pool = world.gpu(A)
    with pytest.raises(ConfigError, match="the same ranges of layers"):
        expect(pool, f"{A}#layers=0-0", f"{B}#layers=1-1")
    with pytest.raises(ConfigError, match="no server for"):
        expect(pool, f"{A}#layers=0-0")


def test_what_is_told_from_outside_is_noted(world: World) -> None:
    world.host(A)
    gpu, pool = world.gpu(A)
    pool.tell("the servers stay as they are: the file is empty")
    drive(gpu.run(call(world)))
    assert world.notes == ["the servers stay as they are: the file is empty"]
    assert pool.at_hand is not None


def test_a_loss_is_told(world: World) -> None:
    losses: list[float] = []
    host = world.host(A)
    gpu, _ = world.gpu(A, on_loss=lambda: losses.append(world.seconds))
    drive(gpu.run(call(world)))
    assert losses == []
    host.faults.append(lost())
    drive(gpu.run(call(world)))
    assert len(losses) == 1


def test_the_least_loaded_of_two_is_asked(world: World) -> None:
    hosts = [world.host(address) for address in (A, B)]
    gpu, pool = world.gpu(A, B, spread="least-loaded")
    busy, idle = pool.replicas
    for _ in range(20):
        busy.waited(0.5, world.now)
        idle.waited(0.001, world.now)
        drive(gpu.run(call(world)))
    assert [len(host.served) for host in hosts] == [0, 20]


def test_one_that_was_busy_is_tried_again(world: World) -> None:
    hosts = [world.host(address) for address in (A, B)]
    gpu, pool = world.gpu(A, B, spread="least-loaded")
    pool.replicas[0].waited(0.5, world.now)
    served = []
    for _ in range(20):
        pool.replicas[1].waited(0.001, world.now)
        drive(gpu.run(call(world)))
        served.append(len(hosts[0].served))
        world.pass_time(1.0)
    assert served[5] == 0  # half of 0.5 s for each second that has passed is more than 1 ms
    assert served[-1] > 0


def test_work_goes_to_all_who_wait_as_long(world: World) -> None:
    hosts = [world.host(address) for address in (A, B, C)]
    gpu, _ = world.gpu(A, B, C, spread="least-loaded")
    for _ in range(60):
        drive(gpu.run(call(world)))
    assert min(len(host.served) for host in hosts) >= 10
