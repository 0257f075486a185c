from __future__ import annotations

from collections.abc import Callable

from transports.fairqueue import FairQueue


def make(clients: int = 3, requests: int = 4, nbytes: int = 100) -> FairQueue[str]:
    return FairQueue(max_clients=clients, max_client_requests=requests, max_client_bytes=nbytes)


def test_clients_take_turns():
    queue = make()
    for item in ("a1", "a2", "a3"):
        assert queue.push(b"a", b"a", item, 1) is None
    queue.push(b"b", b"b", "b1", 1)
    queue.push(b"c", b"c", "c1", 1)
    queue.push(b"c", b"c", "c2", 1)
    assert len(queue) == 6
    assert [queue.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "c2", "a3", None]


def test_requests_of_one_client_are_bounded_until_they_are_answered():
    queue = make(requests=2)
    queue.push(b"a", b"a", "1", 1)
    queue.push(b"a", b"a", "2", 1)
    assert "limits.client_requests" in (queue.push(b"a", b"a", "3", 1) or "")
    assert queue.push(b"b", b"b", "1", 1) is None
    queue.pop()
    assert "limits.client_requests" in (queue.push(b"a", b"a", "3", 1) or "")
    queue.done(b"a", 1)
    assert queue.push(b"a", b"a", "3", 1) is None


def test_bytes_of_one_client_are_bounded():
    queue = make(nbytes=100)
    queue.push(b"a", b"a", "1", 60)
    assert "limits.client_mib" in (queue.push(b"a", b"a", "2", 41) or "")
    assert queue.push(b"a", b"a", "2", 40) is None
    assert queue.waiting_bytes == 100
    queue.pop()
    assert queue.waiting_bytes == 40


def test_one_request_larger_than_the_bound_is_let_through():
    queue = make(nbytes=100)
    assert queue.push(b"a", b"a", "1", 5000) is None
    assert "limits.client_mib" in (queue.push(b"a", b"a", "2", 1) or "")


def test_replies_that_are_not_taken_count():
    queue = make(nbytes=100)
    taken = False
    queue.push(b"a", b"a", "1", 10)
    queue.pop()
    queue.done(b"a", 10)
    queue.owe(b"a", b"a", 95, lambda: taken)
    assert "limits.client_mib" in (queue.push(b"a", b"a", "2", 10) or "")
    taken = True
    assert queue.push(b"a", b"a", "2", 10) is None


def test_clients_are_bounded_and_idle_ones_forgotten():
    queue = make(clients=2)
    queue.push(b"a", b"a", "1", 1)
    queue.push(b"b", b"b", "1", 1)
    assert "limits.clients" in (queue.push(b"c", b"c", "1", 1) or "")
    queue.pop()
    assert "limits.clients" in (queue.push(b"c", b"c", "1", 1) or "")
    queue.done(b"a", 1)
    assert queue.push(b"c", b"c", "1", 1) is None


def test_turns_go_to_who_had_the_least_of_the_servers_time():
    queue = make(requests=10)
    for item in ("a1", "a2", "a3"):
        queue.push(b"a", b"a", item, 1)
    assert queue.pop() == "a1"
    for item in ("b1", "b2", "b3"):
        queue.push(b"b", b"b", item, 1)
    queue.done(b"a", 1, cost=10.0)
    order = []
    while (item := queue.pop()) is not None:
        order.append(item)
        queue.done(item[:1].encode(), 1, cost=10.0 if item[0] == "a" else 4.0)
    assert order == ["b1", "b2", "b3", "a2", "a3"]


def test_large_requests_wait_no_longer_than_small_ones_took_as_much_time():
    queue = make(requests=100)
    for number in range(40):
        queue.push(b"small", b"small", f"s{number}", 1)
    for item in ("l1", "l2"):
        queue.push(b"large", b"large", item, 1)
    order = []
    while (item := queue.pop()) is not None:
        order.append(item)
        queue.done(b"large" if item[0] == "l" else b"small", 1, cost=10.0 if item[0] == "l" else 1.0)
    places = order.index("l1"), order.index("l2")
    assert places[0] <= 1
    assert places[1] - places[0] <= 12


def test_nobody_saves_up_turns_while_idle():
    queue = make(requests=100)
    queue.push(b"early", b"early", "e0", 1)
    queue.pop()
    queue.done(b"early", 1, cost=1.0)
    for number in range(10):
        queue.push(b"busy", b"busy", f"b{number}", 1)
        queue.pop()
        queue.done(b"busy", 1, cost=10.0)
    for number in range(3):
        queue.push(b"early", b"early", f"e{number + 1}", 1)
        queue.push(b"busy", b"busy", f"b{number + 10}", 1)
    order = []
    while (item := queue.pop()) is not None:
        order.append(item[0])
        queue.done(b"early" if item[0] == "e" else b"busy", 1, cost=10.0)
    assert sorted(order[:2]) == sorted(order[2:4]) == ["b", "e"], "they take turns from now on"


def test_who_leaves_takes_along_what_nobody_works_on():
    queue = make()
    for item in ("a1", "a2"):
        queue.push(b"a", b"a", item, 30)
    queue.push(b"b", b"b", "b1", 7)
    assert queue.pop() == "a1"
    queue.leave(b"a", b"a")
    assert (len(queue), queue.waiting_bytes, queue.clients, queue.in_flight) == (1, 7, 2, 2)
    queue.done(b"a", 30)
    queue.owe(b"a", b"a", 100, lambda: False)
    assert (queue.clients, queue.in_flight, queue.held_bytes) == (1, 1, 7)
    assert queue.pop() == "b1"
    assert queue.pop() is None
    queue.leave(b"nobody", b"nobody")


def test_who_comes_back_under_its_name_is_served():
    queue = make()
    queue.push(b"a", b"a", "1", 1)
    queue.pop()
    queue.leave(b"a", b"a")
    queue.push(b"a", b"a", "2", 1)
    queue.done(b"a", 1)
    assert queue.pop() == "2"
    queue.done(b"a", 1)
    assert queue.clients == 1


def test_silent_clients_are_forgotten_and_those_that_owe_something_are_not():
    queue = make()
    for client in (b"a", b"b", b"c"):
        queue.push(client, client, "x", 1, now=10.0)
        queue.pop()
    queue.done(b"a", 1)
    queue.done(b"b", 1)
    queue.owe(b"b", b"b", 5, lambda: False)
    assert queue.forget_silent(before=10.0) == 0
    assert queue.forget_silent(before=10.5) == 1
    assert queue.clients == 2


def test_the_largest_account():
    queue = make()
    assert queue.largest() is None
    queue.push(b"a", b"a", "x", 1)
    queue.push(b"b", b"b", "x", 3)
    assert queue.largest() == b"b"


# One key with several connections


def work_off(queue: FairQueue[str], cost: Callable[[str], float]) -> list[str]:
    """What is waiting, in its order; ``item`` is of the account that its first letter names."""
    order = []
    while (item := queue.pop()) is not None:
        order.append(item)
        queue.done(item[:1].encode(), 1, cost=cost(item))
    return order


def test_connections_of_a_key_have_one_share_together() -> None:
    queue = make(requests=100)
    for number in range(12):
        queue.push(b"k", b"connection %d" % (number % 6), f"k{number}", 1)
    for number in range(3):
        queue.push(b"a", b"a", f"a{number}", 1)
    order = work_off(queue, lambda _: 1.0)
    assert [order.index(f"a{number}") for number in range(3)] == [1, 3, 5]


def test_connections_of_a_key_are_bounded_together() -> None:
    queue = make(requests=3, nbytes=100)
    for number in range(3):
        assert queue.push(b"k", b"%d" % number, "x", 20) is None
    assert "limits.client_requests" in (queue.push(b"k", b"3", "x", 1) or "")
    queue.pop()
    queue.done(b"k", 20)
    queue.owe(b"k", b"0", 50, lambda: False)
    assert "limits.client_mib" in (queue.push(b"k", b"3", "x", 11) or "")
    queue.leave(b"k", b"0")
    assert queue.held_bytes == 40
    assert queue.push(b"k", b"3", "x", 11) is None


def test_connections_of_a_key_take_turns() -> None:
    queue = make(requests=10)
    for item in ("k0", "k1", "k2"):
        queue.push(b"k", b"one", item, 1)
    queue.push(b"k", b"other", "k3", 1)
    assert work_off(queue, lambda _: 1.0) == ["k0", "k3", "k1", "k2"]


def test_what_is_taken_over_one_connection_does_not_wait_for_another() -> None:
    queue = make(nbytes=100)
    for client, taken in ((b"deaf", False), (b"reads", True)):
        queue.push(b"k", client, "x", 1)
        queue.pop()
        queue.done(b"k", 1)
        queue.owe(b"k", client, 40, lambda taken=taken: taken)  # type: ignore[misc]
    assert queue.push(b"k", b"reads", "x", 60) is None
    assert queue.held_bytes == 100


def test_who_leaves_and_comes_back_has_the_time_that_it_took() -> None:
    """Else a key that connects anew for each long program would have one for each program of others."""
    queue = make(requests=100)
    for number in range(20):
        queue.push(b"a", b"a", f"a{number}", 1)
    order = []
    for number in range(3):
        queue.push(b"k", b"%d" % number, "k", 1)
        while (item := queue.pop()) is not None:
            order.append(item[:1])
            queue.done(item[:1].encode(), 1, cost=10.0 if item == "k" else 1.0)
            if item == "k":
                break
        queue.leave(b"k", b"%d" % number)
    assert order.count("a") >= 19
    queue.leave(b"a", b"a")
    assert (queue.clients, len(queue)) == (0, 0)


def test_a_debt_is_forgotten_with_the_silent() -> None:
    queue = make()
    queue.push(b"k", b"1", "x", 1, now=10.0)
    queue.pop()
    queue.done(b"k", 1, cost=5.0)
    queue.leave(b"k", b"1")
    assert (queue.clients, queue.forget_silent(before=10.5), queue.forget_silent(before=10.5)) == (0, 1, 0)


def test_the_largest_connection_of_the_largest_account() -> None:
    queue = make(requests=10, nbytes=1000)
    queue.push(b"a", b"a", "x", 90)
    for client, nbytes in ((b"1", 30), (b"2", 40), (b"3", 30)):
        queue.push(b"k", client, "x", 1)
        queue.owe(b"k", client, nbytes, lambda: False)
    assert queue.largest() == b"2"
