from __future__ import annotations

from transports.fairqueue import FairQueue


def make(clients: int = 3, requests: int = 4, nbytes: int = 100) -> FairQueue[str]:
    return FairQueue(max_clients=clients, max_client_requests=requests, max_client_bytes=nbytes)


def test_clients_take_turns():
    queue = make()
    for item in ("a1", "a2", "a3"):
        assert queue.push(b"a", item, 1) is None
    queue.push(b"b", "b1", 1)
    queue.push(b"c", "c1", 1)
    queue.push(b"c", "c2", 1)
    assert len(queue) == 6
    assert [queue.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "c2", "a3", None]


def test_requests_of_one_client_are_bounded_until_they_are_answered():
    queue = make(requests=2)
    queue.push(b"a", "1", 1)
    queue.push(b"a", "2", 1)
    assert "limits.client_requests" in (queue.push(b"a", "3", 1) or "")
    assert queue.push(b"b", "1", 1) is None
    queue.pop()
    assert "limits.client_requests" in (queue.push(b"a", "3", 1) or "")
    queue.done(b"a", 1)
    assert queue.push(b"a", "3", 1) is None


def test_bytes_of_one_client_are_bounded():
    queue = make(nbytes=100)
    queue.push(b"a", "1", 60)
    assert "limits.client_mib" in (queue.push(b"a", "2", 41) or "")
    assert queue.push(b"a", "2", 40) is None
    assert queue.waiting_bytes == 100
    queue.pop()
    assert queue.waiting_bytes == 40


def test_one_request_larger_than_the_bound_is_let_through():
    queue = make(nbytes=100)
    assert queue.push(b"a", "1", 5000) is None
    assert "limits.client_mib" in (queue.push(b"a", "2", 1) or "")


def test_replies_that_are_not_taken_count():
    queue = make(nbytes=100)
    taken = False
    queue.push(b"a", "1", 10)
    queue.pop()
    queue.done(b"a", 10)
    queue.owe(b"a", 95, lambda: taken)
    assert "limits.client_mib" in (queue.push(b"a", "2", 10) or "")
    taken = True
    assert queue.push(b"a", "2", 10) is None


def test_clients_are_bounded_and_idle_ones_forgotten():
    queue = make(clients=2)
    queue.push(b"a", "1", 1)
    queue.push(b"b", "1", 1)
    assert "limits.clients" in (queue.push(b"c", "1", 1) or "")
    queue.pop()
    assert "limits.clients" in (queue.push(b"c", "1", 1) or "")
    queue.done(b"a", 1)
    assert queue.push(b"c", "1", 1) is None
