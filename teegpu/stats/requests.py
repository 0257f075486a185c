"""Requests to numbers, where an engine serves several at once. Pure, and bounded in memory, as the summary is."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Final

from teegpu.record import events as ev
from teegpu.stats.totals import Latencies

WAITING: Final = "waiting"
READING: Final = "reading"
GENERATING: Final = "generating"

MAX_OPEN: Final = 16_384
"""Requests under way that are told apart; a damaged log may begin any number."""


@dataclass(slots=True)
class Open:
    """A request under way. Times are the run's clock, 0: not yet. ``read`` of its prompt's tokens were computed."""

    number: int
    arrived_ns: int
    prompt_tokens: int = 0
    max_tokens: int = 0
    state: str = WAITING
    admitted_ns: int = 0
    reused_tokens: int = 0
    read: int = 0
    made: int = 0
    first_ns: int = 0
    latest_ns: int = 0


@dataclass(slots=True)
class Batch:
    """Steps that computed about as many requests."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Requests:
    """Adds requests up. ``open``: those under way by number, as they came. ``ended``: how many by reason.

    ``queue``: from arrival until it was begun, ``ttft``: to the first token, ``e2e``: to the last; ``itl``: between two
    tokens of a request, where those made in one step share its time. ``batches``: steps that only generated, by the
    power of two that the number of their requests does not exceed. ``seconds``: of all steps, ``waited_seconds``: of
    those behind which others were in line.
    """

    def __init__(self) -> None:
        self.open: OrderedDict[int, Open] = OrderedDict()
        self.arrived = 0
        self.ended: dict[str, int] = {}
        self.prompt_tokens = self.reused_tokens = self.made = 0
        self.gave_way = 0
        self.ttft, self.itl, self.queue, self.e2e = Latencies(), Latencies(), Latencies(), Latencies()
        self.batches: dict[int, Batch] = {}
        self.steps = 0
        self.seconds = self.waited_seconds = 0.0
        self.kv_bytes = 0
        self.most_running = self.most_waiting = self.most_kv_bytes = 0

    def add(self, event: ev.Event) -> None:
        if isinstance(event, ev.Stepped):
            self._stepped(event)
        elif isinstance(event, ev.Arrived):
            self.arrived += 1
            one = self._opened(event.request, event.at_ns)
            one.prompt_tokens, one.max_tokens = event.prompt_tokens, event.max_tokens
        elif isinstance(event, ev.Admitted):
            one = self._opened(event.request, event.at_ns)
            one.state = READING
            one.read = event.reused_tokens
            if not one.admitted_ns:
                one.admitted_ns, one.reused_tokens = event.at_ns, event.reused_tokens
                self.prompt_tokens += one.prompt_tokens
                self.reused_tokens += event.reused_tokens
                self.queue.add(_seconds(one.arrived_ns, event.at_ns))
        elif isinstance(event, ev.GaveWay):
            self.gave_way += 1
            self._opened(event.request, event.at_ns).state = WAITING
        elif isinstance(event, ev.Left):
            self._left(event)

    def _opened(self, number: int, at_ns: int) -> Open:
        """The request of that number. Where its arrival was lost it came now."""
        one = self.open.get(number)
        if one is None:
            one = self.open[number] = Open(number, at_ns)
            if len(self.open) > MAX_OPEN:
                self.open.popitem(last=False)
        return one

    def _left(self, event: ev.Left) -> None:
        self.ended[event.reason] = self.ended.get(event.reason, 0) + 1
        one = self.open.pop(event.request, None)
        if one is not None and one.latest_ns:
            self.e2e.add(_seconds(one.arrived_ns, one.latest_ns))

    def _stepped(self, event: ev.Stepped) -> None:
        made, reads = 0, False
        for number, rows, tokens in event.rows:
            one = self._opened(number, event.began_ns)
            if one.state != GENERATING:
                reads = True
                one.read += rows
                one.state = GENERATING if tokens else READING
            if tokens:
                made += tokens
                self._made(one, tokens, event.at_ns)
        seconds = _seconds(event.began_ns, event.at_ns)
        self.steps += 1
        self.seconds += seconds
        if event.waiting:
            self.waited_seconds += seconds
        self.kv_bytes = event.kv_bytes
        self.most_running = max(self.most_running, event.running)
        self.most_waiting = max(self.most_waiting, event.waiting)
        self.most_kv_bytes = max(self.most_kv_bytes, event.kv_bytes)
        if event.rows and not reads:
            batch = self.batches.setdefault(1 << (len(event.rows) - 1).bit_length(), Batch())
            batch.steps += 1
            batch.seconds += seconds
            batch.tokens += made

    @property
    def running(self) -> int:
        return len(self.open) - self.waiting

    @property
    def waiting(self) -> int:
        return sum(one.state == WAITING for one in self.open.values())

    def _made(self, one: Open, tokens: int, at_ns: int) -> None:
        self.made += tokens
        if not one.first_ns:
            one.first_ns = at_ns
            self.ttft.add(_seconds(one.arrived_ns, at_ns))
            more = tokens - 1
            each = 0.0
        else:
            more = tokens
            each = _seconds(one.latest_ns, at_ns) / tokens
        self.itl.add(each, more)
        one.made += tokens
        one.latest_ns = at_ns

    def __bool__(self) -> bool:
        """Whether there was any request: a run of one prompt has none."""
        return bool(self.arrived or self.steps or self.ended)

    def to_json(self) -> dict[str, Any]:
        """As the document has it."""
        return {
            "arrived": self.arrived,
            "open": len(self.open),
            "ended": dict(self.ended),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "made_tokens": self.made,
            "gave_way": self.gave_way,
            "steps": self.steps,
            "step_seconds": self.seconds,
            "waited_seconds": self.waited_seconds,
            "most_running": self.most_running,
            "most_waiting": self.most_waiting,
            "most_kv_bytes": self.most_kv_bytes,
            **{f"{name}_seconds": spread(getattr(self, name)) for name in ("queue", "ttft", "itl", "e2e")},
            "batches": [{"upto": upto, **asdict(batch)} for upto, batch in sorted(self.batches.items())],
        }


def spread(latencies: Latencies) -> dict[str, float | None]:
    """Median, p95, p99 and the largest; None where there was nothing."""
    found = {name: latencies.quantile(share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    return {**found, "max": latencies.max_seconds if latencies.count else None}


def _seconds(since_ns: int, at_ns: int) -> float:
    return max(0, at_ns - since_ns) / 1e9
