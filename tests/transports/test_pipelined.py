"""Many requests in flight, with an event loop and without, one after the other on one client."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import transports
from tests.transports.conftest import ask_all, free_port
from transports import ClientOptions, Message, Reply, Server, envelope
from transports.errors import ConnectError, ConnectionLostError, FrameError, LimitError, ReplyTimeoutError
from transports.pipelined import PipelinedClient

Serve = Callable[..., Server]
Scripted = Callable[..., str]


def client_of(address: str, **options: float) -> PipelinedClient:
    client = transports.connect("pipelined", address, ClientOptions(**options))  # type: ignore[arg-type]
    assert isinstance(client, PipelinedClient)
    return client


def message(text: str, size: int = 0) -> Message:
    return Message([text.encode(), bytes(size)])


def text(reply: Reply) -> str:
    return bytes(reply.frames[0]).decode()


class Gate:
    """An ``answer`` that holds every request until the gate opens; ``arrived`` is released once per request."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.held: list[transports.Incoming] = []

    def __call__(self, server: Server, incoming: transports.Incoming) -> None:
        self.held.append(incoming)
        self.arrived.release()
        while not self.open.is_set():
            more = server.next(0.01)
            if more is not None:
                self.held.append(more)
                self.arrived.release()
        for each in self.held:
            server.reply(each, Message(each.frames))
        self.held.clear()

    async def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.arrived.acquire, timeout=10)


def test_replies_in_any_order_find_their_requests(scripted: Scripted):
    def script(peer) -> None:
        requests = [peer.receive() for _ in range(20)]
        for parts in reversed(requests):
            peer.send(*parts)

    async def main() -> list[Reply]:
        return await asyncio.gather(*(client.request_async(message(str(index))) for index in range(20)))

    with client_of(scripted(script)) as client:
        replies = asyncio.run(main())
    assert [text(reply) for reply in replies] == [str(index) for index in range(20)]
    assert client.dropped_replies == 0


def test_a_server_that_is_started_while_a_loop_waits(serve: Serve):
    """Attempts that failed are made again, and all that was asked meanwhile is sent then, in its order."""
    seen: list[bytes] = []

    def answer(server: Server, incoming: transports.Incoming) -> None:
        seen.append(bytes(incoming.frames[0]))
        server.reply(incoming, Message(incoming.frames))

    async def main(client: PipelinedClient) -> list[Reply]:
        tasks = [asyncio.create_task(client.request_async(message(str(index)))) for index in range(3)]
        await asyncio.sleep(0.12)  # some attempts are over, and the next is not due
        tasks += [asyncio.create_task(client.request_async(message(str(index)))) for index in range(3, 6)]
        return await asyncio.gather(*tasks)

    endpoint = f"tcp://127.0.0.1:{free_port()}"
    timer = threading.Timer(0.3, serve, [endpoint, answer])
    timer.start()
    with client_of(endpoint) as client:
        assert [text(reply) for reply in asyncio.run(main(client))] == [str(index) for index in range(6)]
    timer.join()
    assert seen == [b"%d" % index for index in range(6)]


def test_one_missing_reply_fails_only_its_own_request(scripted: Scripted):
    def script(peer) -> None:
        peer.send(*peer.receive())
        for _ in range(10):
            parts = peer.receive()
            if parts[2] != b"3":
                peer.send(*parts)

    async def main() -> list[object]:
        await client.request_async(message("hello"))
        tasks = [client.request_async(message(str(index))) for index in range(10)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with client_of(scripted(script), reply_timeout_seconds=0.2) as client:
        results = asyncio.run(main())
        assert isinstance(results.pop(3), ReplyTimeoutError)
        assert [text(result) for result in results if isinstance(result, Reply)] == list("012456789")


def test_one_missing_reply_without_a_loop(scripted: Scripted):
    def script(peer) -> None:
        for _ in range(4):
            parts = peer.receive()
            if parts[2] != b"1":
                peer.send(*parts)

    with client_of(scripted(script)) as client:
        with pytest.raises(ReplyTimeoutError):
            ask_all(client, [message(str(index)) for index in range(3)], timeout_seconds=0.2)
        assert text(client.request(message("after"))) == "after"


def test_the_window_in_requests_holds_the_others_back(serve: Serve):
    most = 0

    def answer(server: Server, incoming: transports.Incoming) -> None:
        nonlocal most
        held = [incoming]
        while len(held) < 4 and (more := server.next(5)) is not None:
            held.append(more)
        # Whatever were let through beyond the window would arrive now.
        while (more := server.next(0.02)) is not None:
            held.append(more)
        most = max(most, len(held))
        for each in held:
            server.reply(each, Message(each.frames))

    async def main() -> list[Reply]:
        return await asyncio.gather(*(client.request_async(message(str(index))) for index in range(20)))

    server = serve(answer=answer)
    with client_of(server.address, window_requests=4) as client:
        assert [text(reply) for reply in asyncio.run(main())] == [str(index) for index in range(20)]
        assert most == 4
        assert len(ask_all(client, [message(str(index)) for index in range(12)])) == 12
        assert most == 4


def test_the_window_in_bytes_holds_the_others_back(serve: Serve):
    gate = Gate()

    async def main() -> list[Reply]:
        tasks = [asyncio.ensure_future(client.request_async(message("x", 40_000))) for _ in range(6)]
        await gate.wait_for(2)
        assert not await asyncio.to_thread(gate.arrived.acquire, timeout=0.1)
        gate.open.set()
        return await asyncio.gather(*tasks)

    server = serve(answer=gate)
    with client_of(server.address, window_bytes=100_000) as client:
        assert len(asyncio.run(main())) == 6


def test_a_message_larger_than_the_window_goes_alone(serve: Serve):
    async def main() -> list[Reply]:
        sizes = (10, 500_000, 20, 500_000, 30)
        return await asyncio.gather(*(client.request_async(message("x", size)) for size in sizes))

    server = serve()
    with client_of(server.address, window_bytes=100_000) as client:
        assert [len(reply.frames[1]) for reply in asyncio.run(main())] == [10, 500_000, 20, 500_000, 30]
        assert len(ask_all(client, [message("x", 500_000)] * 3)) == 3


def test_cancelled_with_30_in_flight(serve: Serve):
    gate = Gate()

    async def main() -> None:
        tasks = [asyncio.ensure_future(client.request_async(message(str(index)))) for index in range(30)]
        await gate.wait_for(30)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        gate.open.set()
        assert text(await client.request_async(message("in the same loop"))) == "in the same loop"

    server = serve(answer=gate)
    with client_of(server.address) as client:
        asyncio.run(main())
        assert text(client.request(message("without a loop"))) == "without a loop"
        assert client.dropped_replies == 30
        assert text(asyncio.run(_one(client, "in a new loop"))) == "in a new loop"


async def _one(client: PipelinedClient, name: str) -> Reply:
    return await client.request_async(message(name))


def test_a_cancelled_request_keeps_its_place_until_its_reply_comes(serve: Serve):
    gate = Gate()

    async def main() -> None:
        tasks = [asyncio.ensure_future(client.request_async(message(str(index)))) for index in range(3)]
        await gate.wait_for(2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waiting = asyncio.ensure_future(client.request_async(message("next")))
        assert not await asyncio.to_thread(gate.arrived.acquire, timeout=0.05)
        gate.open.set()
        assert text(await waiting) == "next"

    server = serve(answer=gate)
    with client_of(server.address, window_requests=2) as client:
        asyncio.run(main())
        assert client.dropped_replies == 2


def test_a_cancelled_request_whose_reply_never_comes_gives_its_place_back(scripted: Scripted):
    def script(peer) -> None:
        peer.send(*peer.receive())
        peer.receive()
        for _ in range(3):
            peer.send(*peer.receive())

    async def cancel_one() -> None:
        await client.request_async(message("hello"))
        task = asyncio.ensure_future(client.request_async(message("lost")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert text(await client.request_async(message("same loop"))) == "same loop"

    with client_of(scripted(script), window_requests=1, reply_timeout_seconds=0.1) as client:
        asyncio.run(cancel_one())
        assert text(client.request(message("no loop"), timeout_seconds=10)) == "no loop"
        assert text(asyncio.run(_one(client, "new loop"))) == "new loop"


def test_who_stands_in_line_may_leave_it(serve: Serve):
    gate = Gate()

    async def main() -> None:
        tasks = [asyncio.ensure_future(client.request_async(message(str(index)))) for index in range(5)]
        await gate.wait_for(1)
        for index in (1, 3):
            tasks[index].cancel()
        gate.open.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, Reply) for result in results] == [True, False, True, False, True]

    server = serve(answer=gate)
    with client_of(server.address, window_requests=1) as client:
        asyncio.run(main())
        assert client.dropped_replies == 0


def test_a_refused_message_lets_the_next_in_line_go(serve: Serve):
    async def main() -> list[object]:
        tasks = [client.request_async(message("x", size)) for size in (10, 9_000, 20_000, 30)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    server = serve()
    with client_of(server.address, window_requests=1, max_message_bytes=10_000) as client:
        results = asyncio.run(main())
    assert [type(result) for result in results] == [Reply, Reply, LimitError, Reply]


def test_loops_and_blocking_calls_alternate(serve: Serve):
    async def burst(turn: int) -> list[Reply]:
        return await asyncio.gather(*(client.request_async(message(f"{turn}-{i}", i * 20_000)) for i in range(8)))

    async def blocking_inside(turn: int) -> None:
        await client.request_async(message("before"))
        assert text(client.request(message(str(turn)))) == str(turn)
        await client.request_async(message("after"))

    server = serve()
    with client_of(server.address) as client:
        for turn in range(25):
            assert [text(reply) for reply in asyncio.run(burst(turn))] == [f"{turn}-{i}" for i in range(8)]
            for _ in range(turn % 4):
                assert text(client.request(message("alone"))) == "alone"
            replies = ask_all(client, [message(str(i)) for i in range(turn % 5)])
            assert [text(reply) for reply in replies] == [str(i) for i in range(turn % 5)]
            asyncio.run(blocking_inside(turn))
        assert client.dropped_replies == 0


def test_late_replies_do_not_confuse_the_next_phase(serve: Serve):
    """What arrives between two phases wakes neither: it is there when the next one starts, to be stepped over."""
    may_answer = threading.Semaphore(0)

    def answer(server: Server, incoming: transports.Incoming) -> None:
        if bytes(incoming.frames[0]) == b"late":
            may_answer.acquire(timeout=10)
        server.reply(incoming, Message(incoming.frames))

    async def abandon() -> None:
        task = asyncio.ensure_future(client.request_async(message("late", 1000)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    server = serve(answer=answer)
    with client_of(server.address) as client:
        for turn in range(40):
            asyncio.run(abandon())
            may_answer.release()
            if turn % 2:
                assert text(client.request(message("blocking"))) == "blocking"
            if turn % 3:
                assert text(asyncio.run(_one(client, "awaited"))) == "awaited"
        client.request(message("last"))
        assert client.dropped_replies == 40


def test_a_reply_received_in_a_loops_last_moment_is_not_lost(serve: Serve):
    """The loop stops in the very turn in which it receives, before the callback that would take the message."""
    may_answer = threading.Semaphore(0)

    def answer(server: Server, incoming: transports.Incoming) -> None:
        if bytes(incoming.frames[0]) == b"late":
            may_answer.acquire(timeout=10)
        server.reply(incoming, Message(incoming.frames))

    async def leave_at_once() -> None:
        await client.request_async(message("hello"))
        task = asyncio.ensure_future(client.request_async(message("late")))
        await asyncio.sleep(0)
        task.cancel()
        assert client._connection is not None
        fd = client._connection.socket.FD
        may_answer.release()
        assert select.select([fd], [], [], 10)[0]

    server = serve(answer=answer)
    for in_time in range(3):
        with client_of(server.address) as client:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(leave_at_once())
            if in_time == 1:
                loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            if in_time == 2:
                assert text(asyncio.run(_one(client, "awaited"))) == "awaited"
            assert text(client.request(message("next"))) == "next"
            assert client.dropped_replies == 1
            assert not client._in_flight


def test_one_loop_used_twice_with_a_blocking_phase_between(serve: Serve):
    server = serve()
    loop = asyncio.new_event_loop()
    try:
        with client_of(server.address) as client:
            for _ in range(10):
                assert text(loop.run_until_complete(_one(client, "awaited"))) == "awaited"
                assert text(client.request(message("blocking"))) == "blocking"
    finally:
        loop.close()


def test_two_loops_that_both_stay_open(serve: Serve):
    server = serve()
    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        with client_of(server.address) as client:
            for turn in range(10):
                assert text(loops[turn % 2].run_until_complete(_one(client, str(turn)))) == str(turn)
    finally:
        for loop in loops:
            loop.close()


def test_no_server_with_a_loop():
    with client_of("tcp://127.0.0.1:9", connect_timeout_seconds=0.1) as client:

        async def main() -> list[object]:
            tasks = [client.request_async(message("x"), timeout_seconds=limit) for limit in (None, 60)]
            return await asyncio.gather(*tasks, return_exceptions=True)

        started = time.perf_counter()
        assert [type(result) for result in asyncio.run(main())] == [ConnectError, ConnectError]
        assert time.perf_counter() - started < 2.0


def test_a_server_that_accepts_and_never_answers(scripted: Scripted):
    with client_of(scripted(lambda peer: peer.receive()), connect_timeout_seconds=0.1) as client:

        async def main() -> list[object]:
            return await asyncio.gather(*(client.request_async(message("x")) for _ in range(3)), return_exceptions=True)

        assert [type(result) for result in asyncio.run(main())] == [ConnectError] * 3
        with pytest.raises(ConnectError):
            ask_all(client, [message("x")] * 3)


def test_a_line_that_a_closed_loop_left_behind(serve: Serve):
    gate = Gate()

    async def fill() -> None:
        # Futures of their own, not tasks: nothing cancels them when the loop ends.
        for coroutine in coroutines:
            coroutine.send(None)
        await gate.wait_for(1)

    server = serve(answer=gate)
    with client_of(server.address, window_requests=1) as client:
        coroutines = [client.request_async(message(str(index))) for index in range(3)]
        loop = asyncio.new_event_loop()
        loop.run_until_complete(fill())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gate.open.set()
        assert text(asyncio.run(_one(client, "awaited"))) == "awaited"
        assert text(client.request(message("blocking"))) == "blocking"
        for coroutine in coroutines:
            coroutine.close()


def test_a_lost_connection_fails_all_in_flight_and_in_line(tmp_path: Path):
    address = f"ipc://{tmp_path}/socket"
    server = transports.listen(address)

    async def main() -> list[object]:
        tasks = [asyncio.ensure_future(client.request_async(message(str(index)))) for index in range(6)]
        held = [await asyncio.to_thread(server.next, 10) for _ in range(3)]
        assert None not in held
        await asyncio.to_thread(server.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with client_of(address, window_requests=3) as client:
        started = time.perf_counter()
        results = asyncio.run(main())
        assert [type(result) for result in results] == [ConnectionLostError] * 6
        assert time.perf_counter() - started < 2.0


def test_close_with_requests_in_flight_and_in_line(serve: Serve):
    gate = Gate()

    async def main() -> list[object]:
        tasks = [asyncio.ensure_future(client.request_async(message(str(index)))) for index in range(6)]
        await gate.wait_for(3)
        client.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    server = serve(answer=gate)
    client = client_of(server.address, window_requests=3)
    results = asyncio.run(main())
    gate.open.set()
    assert [type(result) for result in results] == [ConnectionLostError] * 6


def test_the_first_exchange_gives_the_others_the_reply_time_out(scripted: Scripted):
    def script(peer) -> None:
        first, second = peer.receive(), peer.receive()
        peer.send(*first)
        threading.Event().wait(0.3)
        peer.send(*second)

    async def main() -> list[Reply]:
        return await asyncio.gather(*(client.request_async(message(str(index))) for index in range(2)))

    with client_of(scripted(script), connect_timeout_seconds=0.2, reply_timeout_seconds=10) as client:
        assert len(asyncio.run(main())) == 2


def test_garbage_fails_all_in_flight_and_the_next_request_connects_anew(scripted: Scripted):
    def script(peer) -> None:
        requests = [peer.receive() for _ in range(3)]
        peer.send(requests[0][0], b"not an envelope")
        peer.send(*peer.receive())

    async def main() -> None:
        tasks = [client.request_async(message(str(index))) for index in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [FrameError] * 3
        assert text(await client.request_async(message("again"))) == "again"

    with client_of(scripted(script)) as client:
        asyncio.run(main())


def test_a_frame_that_claims_more_than_it_holds_fails_only_its_request(scripted: Scripted):
    def script(peer) -> None:
        requests = [peer.receive() for _ in range(3)]
        for parts in requests:
            if parts[2] == b"1":
                request_id = envelope.peek_request_id(parts[1])
                assert request_id is not None
                peer.send(parts[0], envelope.pack(request_id, [100]), b"short")
            else:
                peer.send(*parts)

    async def main() -> list[object]:
        tasks = [client.request_async(message(str(index))) for index in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with client_of(scripted(script)) as client:
        assert [type(result) for result in asyncio.run(main())] == [Reply, FrameError, Reply]


def test_nothing_is_left_behind(serve: Serve):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        await asyncio.gather(*(client.request_async(message("x", 100_000)) for _ in range(10)))
        await asyncio.wait_for(client.request_async(message("x")), 10)
        assert len(asyncio.all_tasks()) == 1

    server = serve()
    with client_of(server.address) as client:
        asyncio.run(main())
        gc.collect()
        before = descriptors()
        for _ in range(20):
            asyncio.run(main())
            client.request(message("x"))
        gc.collect()
        assert descriptors() == before
        assert not client._in_flight
        assert client._in_flight_bytes == 0
