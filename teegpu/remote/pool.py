"""The GPU servers of a run: which connection takes a call, and what happens when one is lost.

Every request holds all that it needs, so one whose reply was lost may be sent again, to the same server or another.
What the network did is mended here; what a server said (a refusal, nonsense, another model) is not, nor is our own bug.

A connection on which a request was lost takes no more of them. A new one is opened beside the work, without waiting for
it, and says hello before anything else: what answers at the address now may be another server. Layers are cut into
shards; a call goes to a replica of the shard that holds its weights. A shard of which no replica answers is waited for
until its budget is spent.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence

from teegpu.endpoints import Endpoint, ranges
from teegpu.errors import ConfigError, ConnectionFailedError, TeegpuError
from teegpu.record.events import Noted
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call
from teegpu.remote.connections import Connections, Handshake, Replica, RetryPolicy, Shard
from teegpu.remote.deadline import Deadline
from teegpu.remote.waiting import Waiting
from teegpu.wire.messages import Welcome
from transports.base import Client, Message, Reply
from transports.errors import ConnectError, ReplyTimeoutError, TransportError

POLL_SECONDS = 0.002
"""How often a connection that is being opened is looked at while nothing else can be done."""

GRACE_SECONDS = 1.0
"""At the start: how long to wait for the others when one server of each shard has answered."""


class _Silent:
    """Says hello to nobody."""

    message = Message(())

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome:  # noqa: ARG002
        raise RuntimeError(f"nothing was asked of {endpoint}")


class Pool:
    """The servers at ``endpoints``, of a model with ``layers`` layers.

    ``connect`` makes a client of an endpoint, ``handshake`` says hello over it. ``at_hand`` is the replica to send to
    without a further thought, or None where ``pick`` has to think; ``overlaps`` is that of the clients. ``borders`` are
    the layers that another shard holds than the layer before. ``gone`` gives the error to end with where it is known
    that nobody will answer any more. ``deadline``: how long the run waits for the servers in all. ``indices`` are the
    numbers of the servers in the record, where others come before them, and ``number`` gives that of one that joins.
    ``say`` is told in lines whom it waits for, ``on_loss`` that a server was lost.

    Raises ``ConfigError`` where the endpoints do not cover the layers.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        layers: int,
        *,
        connect: Callable[[Endpoint], Client],
        handshake: Handshake,
        policy: RetryPolicy,
        recorder: Recorder,
        spread: str = "failover",
        layer_of: Callable[[str], int] = lambda _: 0,
        gone: Callable[[], TeegpuError | None] = lambda: None,
        indices: Sequence[int] | None = None,
        number: Callable[[Endpoint], int] | None = None,
        say: Callable[[str], None] | None = None,
        on_loss: Callable[[], None] = lambda: None,
        deadline: Deadline | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._layers = layers
        numbers = range(len(endpoints)) if indices is None else indices
        self.replicas = [Replica(index, endpoint) for index, endpoint in zip(numbers, endpoints, strict=True)]
        cut = ranges(endpoints, layers)
        self.shards = [
            Shard(
                index,
                span,
                [replica for replica in self.replicas if self._span(replica.endpoint) == span],
            )
            for index, span in enumerate(cut)
        ]
        self.borders = tuple(span[0] for span in cut[1:])
        self._number = number or (lambda _: len(self.replicas))
        # From other threads: which servers there are now, or a line to note.
        self._news: deque[Sequence[Endpoint] | str] = deque()
        self.at_hand: Replica | None = None
        self.overlaps = False
        self.deadline = deadline or Deadline()
        self.sleep = sleep
        self._connections = Connections(connect, handshake, policy, self._note)
        self._policy = policy
        self._recorder = recorder
        self._choose = {"round-robin": self._next_in_turn, "least-loaded": self._least_of_two}.get(spread)
        self._draw = random.Random()
        self._layer_of = layer_of
        self._gone = gone
        self._on_loss = on_loss
        self._waiting = Waiting(say) if say is not None else None
        self._clock_ns = clock_ns
        self._turns = 0
        self._next_look_ns = 0
        self._placed: dict[tuple[bytes, int], Shard] = {}

    @classmethod
    def of(cls, client: Client, recorder: Recorder) -> Pool:
        """One connection that is there already: it is not greeted, not replaced and not retried."""

        def connect(endpoint: Endpoint) -> Client:
            raise RuntimeError(f"the connection to {endpoint} is not to be replaced")

        pool = cls(
            [Endpoint(client.endpoint)],
            1,
            connect=connect,
            handshake=_Silent(),
            policy=RetryPolicy(budget_seconds=0.0),
            recorder=recorder,
        )
        pool.replicas[0].client = client
        pool.overlaps = client.overlaps
        pool._settle()
        return pool

    # The start and the end

    def open(self) -> None:
        """Says hello to all servers, until they have answered, or one of each shard and the rest takes long.

        Raises what the first server of a shard met where none of the shard answers within
        ``link.connect_timeout_seconds``, and at once what no second attempt would mend: ``MismatchError``,
        ``BadReplyError``, ``ServerRefusedError``, ``TransportError``.
        """
        policy = self._policy
        began_ns = self._clock_ns()
        complete_ns: int | None = None
        while True:
            now = self._clock_ns()
            out_of_time = (now - began_ns) / 1e9 >= policy.connect_timeout_seconds
            for replica in self.replicas:
                if replica.client is None and not replica.gave_up:
                    self._connections.look(replica, now)
                    final = isinstance(replica.error, (ConnectError, ReplyTimeoutError)) or out_of_time
                    replica.gave_up = (
                        replica.client is None and replica.opening is None and replica.failures > 0 and final
                    )
            waited = [replica for replica in self.replicas if replica.client is None and not replica.gave_up]
            if all(any(replica.client for replica in shard.replicas) for shard in self.shards):
                complete_ns = complete_ns or now
                if not waited or (now - complete_ns) / 1e9 >= GRACE_SECONDS:
                    break
            for shard in self.shards:
                if (ended := self._gone()) is not None:
                    raise ended
                if all(replica.gave_up for replica in shard.replicas):
                    raise shard.replicas[0].error or RuntimeError("a server was given up without an error")
            left = policy.connect_timeout_seconds - (now - began_ns) / 1e9
            self._tell_waiting("waiting for the server at", waited, now, left)
            self.sleep(POLL_SECONDS)
        for shard in self.shards:
            shard.current = next(replica for replica in shard.replicas if replica.client is not None)
        for replica in self.replicas:
            replica.gave_up = False
            replica.lost_ns = began_ns
            if replica.client is not None:
                replica.failures = 0
                self.overlaps = replica.client.overlaps
        if self._waiting is not None:
            self._waiting.over()
        self._settle()

    @property
    def welcome(self) -> Welcome | None:
        """What the first server of those in use says of itself."""
        return self.shards[0].current.welcome

    def close(self) -> None:
        """Closes all connections. May be called twice."""
        self.at_hand = None
        self._connections.close(self.replicas)

    # Which replica takes a call

    def shard_of(self, call: Call) -> Shard:
        """The shard that holds the weights of ``call``, or its layer where it has no weights."""
        shards = self.shards
        if len(shards) == 1:
            return shards[0]
        key = (call.program.packed, call.layer)
        shard = self._placed.get(key)
        if shard is None:
            shard = self._placed[key] = self._place(call)
        return shard

    def _place(self, call: Call) -> Shard:
        layers = {self._layer_of(name) for name in call.program.weights} or {call.layer}
        for shard in self.shards:
            if all(shard.layers[0] <= layer <= shard.layers[1] for layer in layers):
                return shard
        raise RuntimeError(f"a program of layer {call.layer} takes weights of more than one shard of servers")

    def pick(self, shard: Shard) -> Replica | None:
        """A replica that can be sent to, or None: then look again in ``pause`` seconds.

        Raises what a server that came back must not say: ``MismatchError``, ``BadReplyError``, ``ServerRefusedError``,
        and transport errors that would only happen again.
        """
        while self._news:
            self._heard(self._news.popleft())
        now = 0
        if self._choose is not None:
            now = self._clock_ns()
            if now >= self._next_look_ns:
                self._next_look_ns = now + int(POLL_SECONDS * 1e9)
                self._look_at_all(shard, now)
            ready = [replica for replica in shard.replicas if replica.client is not None]
            if ready:
                chosen = self._choose(ready, now)
                self._turns += 1
                chosen.turn = self._turns
                return chosen
        elif shard.current.client is not None:
            return shard.current
        self._look_at_all(shard, now or self._clock_ns())
        after = shard.current.index
        ready = [replica for replica in shard.replicas if replica.client is not None]
        if not ready:
            return None
        chosen = min(ready, key=lambda replica: (replica.index < after, replica.index))
        if chosen is not shard.current:
            self._note(f"going on with the server at {chosen.address}")
        shard.current = chosen
        return chosen

    def _next_in_turn(self, ready: Sequence[Replica], now: int) -> Replica:  # noqa: ARG002 (as the other is called)
        return min(ready, key=lambda replica: (_pending(replica), replica.turn))

    def _least_of_two(self, ready: Sequence[Replica], now: int) -> Replica:
        """The one with less to do of two that are drawn: who took the best of all that it knows, as all others do,
        would send to where all others send (Mitzenmacher, The power of two choices, 2001)."""
        two = self._draw.sample(ready, min(2, len(ready)))
        return min(two, key=lambda replica: (replica.waits_seconds(now), _pending(replica), replica.turn))

    # Which servers there are

    def check_cut(self, endpoints: Sequence[Endpoint]) -> None:
        """Raises ``ConfigError`` where ``endpoints`` cut the model's layers in another way than those that are used:
        programs are made for one."""
        if ranges(endpoints, self._layers) != [shard.layers for shard in self.shards]:
            raise ConfigError("run.endpoints: other servers have to hold the same ranges of layers as those before")

    def expect(self, endpoints: Sequence[Endpoint]) -> None:
        """From a request soon on these are the servers, for which ``check_cut`` has nothing to say. May be called from
        any thread."""
        self._news.append(endpoints)
        self.at_hand = None

    def tell(self, line: str) -> None:
        """Notes ``line`` when it suits. May be called from any thread."""
        self._news.append(line)
        self.at_hand = None

    def _heard(self, news: Sequence[Endpoint] | str) -> None:
        if isinstance(news, str):
            self._note(news)
        else:
            self._follow(news)
        self._settle()

    def _follow(self, expected: Sequence[Endpoint]) -> None:
        """Lets those go that are no longer expected, once they have answered what they were asked, and those join that
        are new."""
        known = {replica.endpoint for replica in self.replicas}
        for shard in self.shards:
            gone = [replica for replica in shard.replicas if replica.endpoint not in expected]
            stay = [replica for replica in shard.replicas if replica.endpoint in expected]
            new = [each for each in expected if each not in known and self._span(each) == shard.layers]
            for replica in gone:
                self._note(f"the server at {replica.address} leaves: it is asked nothing more")
                self._connections.leave(replica)
            for endpoint in new:
                self._note(f"the server at {endpoint.address} joins")
                joined = Replica(self._number(endpoint), endpoint)
                joined.lost_ns = self._clock_ns()
                stay.append(joined)
            shard.replicas = stay
            if shard.current in gone:
                shard.current = next((replica for replica in stay if replica.client is not None), stay[0])
        self.replicas = [replica for shard in self.shards for replica in shard.replicas]

    def _span(self, endpoint: Endpoint) -> tuple[int, int]:
        return endpoint.layers or (0, self._layers - 1)

    def _look_at_all(self, shard: Shard, now: int) -> None:
        for replica in shard.replicas:
            if replica.client is None:
                self._connections.look(replica, now, shard)

    # What became of a request

    def failed(self, shard: Shard, replica: Replica, client: Client, error: TransportError) -> None:
        """A request that was sent to ``replica`` over ``client`` was lost. Returns where it may be sent again.

        Raises ``error`` where that would only happen again, or where there is no budget, and ``ConnectionFailedError``
        where it is spent.
        """
        if not error.retryable or self._policy.budget_seconds <= 0:
            raise error
        now = self._clock_ns()
        self._begin_failing(shard, now)
        self.at_hand = None
        if replica.client is client:
            replica.client = None
            replica.error = error
            replica.lost_ns = now
            self._connections.put_off(replica, now)
            self._connections.retire(client)
            self._on_loss()
            self._note(
                f"a request to the server at {replica.address} was lost ({type(error).__name__}): sending it again"
            )
        self._check_budget(shard, now)

    def answered(self, shard: Shard, replica: Replica, client: Client) -> None:
        """A reply has come from ``replica`` over ``client``: its shard does not fail any more."""
        if shard.failing_since_ns is not None:
            shard.failing_since_ns = None
            if self._waiting is not None:
                self._waiting.over()
        if replica.client is client:
            replica.failures = 0
            self._settle()

    def pause(self, shard: Shard) -> float:
        """Seconds to wait before the next ``pick``. Raises ``ConnectionFailedError`` where the budget is spent."""
        ended = self._gone()
        if ended is not None:
            raise ended
        now = self._clock_ns()
        self._begin_failing(shard, now)
        self._check_budget(shard, now)
        left = self._policy.budget_seconds - (now - (shard.failing_since_ns or now)) / 1e9
        self._tell_waiting("lost the server at", shard.replicas, now, left)
        return POLL_SECONDS

    def _tell_waiting(self, what: str, replicas: Sequence[Replica], now: int, left_seconds: float) -> None:
        if self._waiting is not None:
            silent = [replica.address for replica in replicas if replica.client is None]
            self._waiting.tick(what, silent, now, left_seconds)

    def _begin_failing(self, shard: Shard, now: int) -> None:
        if shard.failing_since_ns is None:
            shard.failing_since_ns = now
            shard.attempts = 0

    def _check_budget(self, shard: Shard, now: int) -> None:
        since_ns, budget = shard.failing_since_ns, self._policy.budget_seconds
        seconds = 0.0 if since_ns is None else (now - since_ns) / 1e9
        if seconds < budget:
            return
        names = " or ".join(replica.address for replica in shard.replicas)
        reasons = "; ".join(
            dict.fromkeys(str(replica.error) for replica in shard.replicas if replica.error is not None)
        )
        times = f"{shard.attempts} attempt{'s' * (shard.attempts != 1)}"
        raise ConnectionFailedError(
            f"no reply from {names} for {seconds:.1f} s, in spite of {times} to connect "
            f"(link.retry_budget_seconds is {budget:g}): {reasons}"
        )

    def _settle(self) -> None:
        """Sets ``at_hand`` where there is nothing to choose."""
        if self._news:
            self.at_hand = None
        elif len(self.shards) == 1 and self._choose is None:
            current = self.shards[0].current
            self.at_hand = current if current.client is not None else None

    def _note(self, text: str) -> None:
        self._recorder.add(Noted(self._clock_ns(), text))
        self._recorder.flush()  # who watches should know now: nothing more may happen for a while


def _pending(replica: Replica) -> int:
    """Bytes that this run has asked of it without an answer yet."""
    return 0 if replica.client is None else replica.client.pending_bytes
