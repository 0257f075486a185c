"""The GPU servers of a run: which connection takes a call, and what happens when one is lost.

Every request holds all that it needs, so one whose reply was lost may be sent again, to the same server or another.
What the network did is mended here; what a server said (a refusal, nonsense, another model) is not, nor is our own bug.

A connection on which a request was lost takes no more of them. A new one is opened beside the work, without waiting for
it, and says hello before anything else: what answers at the address now may be another server. Servers that compute the
same layers are a group; a call goes to a member of the group that holds its weights. A group in which nobody answers is
waited for until its budget is spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from teegpu.endpoints import Endpoint, ranges
from teegpu.errors import ConnectionFailedError, TeegpuError
from teegpu.metrics.events import Noted
from teegpu.metrics.recorder import Recorder
from teegpu.tee.connections import Connections, Greets, Group, Member, RetryPolicy
from teegpu.tee.products import Call
from teegpu.wire.messages import Welcome
from transports.base import Client, Message, Reply
from transports.errors import ConnectError, ReplyTimeoutError, TransportError

POLL_SECONDS = 0.002
"""How often a connection that is being opened is looked at while nothing else can be done."""

GRACE_SECONDS = 1.0
"""At the start: how long to wait for the others when one server of each group has answered."""


class _Silent:
    """Greets nobody."""

    message = Message(())

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome:  # noqa: ARG002
        raise RuntimeError(f"nothing was asked of {endpoint}")


class Fleet:
    """The servers at ``endpoints``, of a model with ``layers`` layers.

    ``connect`` makes a client of an endpoint, ``greeter`` says hello over it. ``at_hand`` is the member to send to
    without a further thought, or None where ``pick`` has to think; ``overlaps`` is that of the clients. ``borders`` are
    the layers that another group holds than the layer before. ``gone`` gives the error to end with where it is known
    that nobody will answer any more. ``indices`` are the numbers of the servers in the record, where others come before
    them.

    Raises ``ConfigError`` where the endpoints do not cover the layers.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        layers: int,
        *,
        connect: Callable[[Endpoint], Client],
        greeter: Greets,
        policy: RetryPolicy,
        recorder: Recorder,
        spread: str = "failover",
        layer_of: Callable[[str], int] = lambda _: 0,
        gone: Callable[[], TeegpuError | None] = lambda: None,
        indices: Sequence[int] | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        numbers = range(len(endpoints)) if indices is None else indices
        self.members = [Member(index, endpoint) for index, endpoint in zip(numbers, endpoints, strict=True)]
        cut = ranges(endpoints, layers)
        self.groups = [
            Group(
                index, span, [member for member in self.members if (member.endpoint.layers or (0, layers - 1)) == span]
            )
            for index, span in enumerate(cut)
        ]
        self.borders = tuple(span[0] for span in cut[1:])
        self.at_hand: Member | None = None
        self.overlaps = False
        self.sleep = sleep
        self._connections = Connections(connect, greeter, policy, self._note)
        self._policy = policy
        self._recorder = recorder
        self._in_turn = spread == "round-robin"
        self._layer_of = layer_of
        self._gone = gone
        self._clock_ns = clock_ns
        self._turns = 0
        self._next_look_ns = 0
        self._placed: dict[tuple[bytes, int], Group] = {}

    @classmethod
    def of(cls, client: Client, recorder: Recorder) -> Fleet:
        """One connection that is there already: it is not greeted, not replaced and not retried."""

        def connect(endpoint: Endpoint) -> Client:
            raise RuntimeError(f"the connection to {endpoint} is not to be replaced")

        fleet = cls(
            [Endpoint(client.endpoint)],
            1,
            connect=connect,
            greeter=_Silent(),
            policy=RetryPolicy(budget_seconds=0.0),
            recorder=recorder,
        )
        fleet.members[0].client = client
        fleet.overlaps = client.overlaps
        fleet._settle()
        return fleet

    def tell_when_sent(self, hook: Callable[[Message, int], None]) -> None:
        """Has every connection, those to come included, call ``hook`` with each message (see ``Client.on_sent``)."""
        self._connections.on_sent = hook
        for member in self.members:
            if member.client is not None:
                member.client.on_sent = hook

    # The start and the end

    def open(self) -> None:
        """Greets all servers, and returns when they have answered, or one of each group has and the others take long.

        Raises what the first server of a group met where none of the group answers within
        ``link.connect_timeout_seconds``, and at once what no second attempt would mend: ``MismatchError``,
        ``BadReplyError``, ``ServerRefusedError``, ``TransportError``.
        """
        policy = self._policy
        began_ns = self._clock_ns()
        complete_ns: int | None = None
        while True:
            now = self._clock_ns()
            out_of_time = (now - began_ns) / 1e9 >= policy.connect_timeout_seconds
            for member in self.members:
                if member.client is None and not member.gave_up:
                    self._connections.look(member, now)
                    final = isinstance(member.error, (ConnectError, ReplyTimeoutError)) or out_of_time
                    member.gave_up = member.client is None and member.opening is None and member.failures > 0 and final
            waited = [member for member in self.members if member.client is None and not member.gave_up]
            if all(any(member.client for member in group.members) for group in self.groups):
                complete_ns = complete_ns or now
                if not waited or (now - complete_ns) / 1e9 >= GRACE_SECONDS:
                    break
            for group in self.groups:
                if (ended := self._gone()) is not None:
                    raise ended
                if all(member.gave_up for member in group.members):
                    raise group.members[0].error or RuntimeError("a server was given up without an error")
            self.sleep(POLL_SECONDS)
        for group in self.groups:
            group.current = next(member for member in group.members if member.client is not None)
        for member in self.members:
            member.gave_up = False
            member.lost_ns = began_ns
            if member.client is not None:
                member.failures = 0
                self.overlaps = member.client.overlaps
        self._settle()

    @property
    def welcome(self) -> Welcome | None:
        """What the first server of those in use says of itself."""
        return self.groups[0].current.welcome

    def close(self) -> None:
        """Closes all connections. May be called twice."""
        self.at_hand = None
        self._connections.close(self.members)

    # Which member takes a call

    def group_of(self, call: Call) -> Group:
        """The group that holds the weights of ``call``, or its layer where it has no weights."""
        groups = self.groups
        if len(groups) == 1:
            return groups[0]
        key = (call.program.packed, call.layer)
        group = self._placed.get(key)
        if group is None:
            group = self._placed[key] = self._place(call)
        return group

    def _place(self, call: Call) -> Group:
        layers = {self._layer_of(step.weight) for step in call.program.steps if step.weight} or {call.layer}
        for group in self.groups:
            if all(group.layers[0] <= layer <= group.layers[1] for layer in layers):
                return group
        raise RuntimeError(f"a program of layer {call.layer} takes weights of more than one group of servers")

    def pick(self, group: Group) -> Member | None:
        """A member that can be sent to, or None: then look again in ``pause`` seconds.

        Raises what a server that came back must not say: ``MismatchError``, ``BadReplyError``, ``ServerRefusedError``,
        and transport errors that would only happen again.
        """
        now = 0
        if self._in_turn:
            now = self._clock_ns()
            if now >= self._next_look_ns:
                self._next_look_ns = now + int(POLL_SECONDS * 1e9)
                self._look_at_all(group, now)
            found: Member | None = None
            least = (0, 0)
            for member in group.members:
                if member.client is not None:
                    load = (member.client.pending_bytes, member.turn)
                    if found is None or load < least:
                        found, least = member, load
            if found is not None:
                self._turns += 1
                found.turn = self._turns
                return found
        elif group.current.client is not None:
            return group.current
        self._look_at_all(group, now or self._clock_ns())
        after = group.current.index
        ready = [member for member in group.members if member.client is not None]
        if not ready:
            return None
        chosen = min(ready, key=lambda member: (member.index < after, member.index))
        if chosen is not group.current:
            self._note(f"going on with the server at {chosen.address}")
        group.current = chosen
        return chosen

    def _look_at_all(self, group: Group, now: int) -> None:
        for member in group.members:
            if member.client is None:
                self._connections.look(member, now, group)

    # What became of a request

    def failed(self, group: Group, member: Member, client: Client, error: TransportError) -> None:
        """A request that was sent to ``member`` over ``client`` was lost. Returns where it may be sent again.

        Raises ``error`` where that would only happen again, or where there is no budget, and ``ConnectionFailedError``
        where it is spent.
        """
        if not error.retryable or self._policy.budget_seconds <= 0:
            raise error
        now = self._clock_ns()
        self._begin_failing(group, now)
        self.at_hand = None
        if member.client is client:
            member.client = None
            member.error = error
            member.lost_ns = now
            self._connections.put_off(member, now)
            self._connections.retire(client)
            self._note(
                f"a request to the server at {member.address} was lost ({type(error).__name__}): sending it again"
            )
        self._check_budget(group, now)

    def answered(self, group: Group, member: Member, client: Client) -> None:
        """A reply has come from ``member`` over ``client``: its group does not fail any more."""
        group.failing_since_ns = None
        if member.client is client:
            member.failures = 0
            self._settle()

    def pause(self, group: Group) -> float:
        """Seconds to wait before the next ``pick``. Raises ``ConnectionFailedError`` where the budget is spent."""
        ended = self._gone()
        if ended is not None:
            raise ended
        now = self._clock_ns()
        self._begin_failing(group, now)
        self._check_budget(group, now)
        return POLL_SECONDS

    def _begin_failing(self, group: Group, now: int) -> None:
        if group.failing_since_ns is None:
            group.failing_since_ns = now
            group.attempts = 0

    def _check_budget(self, group: Group, now: int) -> None:
        since_ns, budget = group.failing_since_ns, self._policy.budget_seconds
        seconds = 0.0 if since_ns is None else (now - since_ns) / 1e9
        if seconds < budget:
            return
        names = " or ".join(member.address for member in group.members)
        reasons = "; ".join(dict.fromkeys(str(member.error) for member in group.members if member.error is not None))
        times = f"{group.attempts} attempt{'s' * (group.attempts != 1)}"
        raise ConnectionFailedError(
            f"no reply from {names} for {seconds:.1f} s, in spite of {times} to connect "
            f"(link.retry_budget_seconds is {budget:g}): {reasons}"
        )

    def _settle(self) -> None:
        """Sets ``at_hand`` where there is nothing to choose."""
        if len(self.groups) == 1 and not self._in_turn:
            current = self.groups[0].current
            self.at_hand = current if current.client is not None else None

    def _note(self, text: str) -> None:
        self._recorder.add(Noted(self._clock_ns(), text))
        self._recorder.flush()  # who watches should know now: nothing more may happen for a while
