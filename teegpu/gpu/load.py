"""How busy the server was in the last seconds."""

from __future__ import annotations

WINDOW_SECONDS = 10
_BUCKETS = 40
_BUCKET_NS = WINDOW_SECONDS * 1_000_000_000 // _BUCKETS


class Busy:
    """Busy time in buckets of a quarter of a second, so that it takes the same memory whatever it was busy with.

    Times are readings of ``time.perf_counter_ns``, and never go back.
    """

    def __init__(self, now_ns: int) -> None:
        self._started_ns = now_ns
        self._spent = [0] * _BUCKETS
        self._last = now_ns // _BUCKET_NS

    def add(self, start_ns: int, end_ns: int) -> None:
        """It was busy from ``start_ns`` to ``end_ns``."""
        self._move_on(end_ns)
        # Only what lies within the window is still counted: a request may have taken minutes.
        at = max(start_ns, (self._last - _BUCKETS + 1) * _BUCKET_NS)
        while at < end_ns:
            bucket = at // _BUCKET_NS
            until = min(end_ns, (bucket + 1) * _BUCKET_NS)
            self._spent[bucket % _BUCKETS] += until - at
            at = until

    def share(self, now_ns: int) -> float:
        """The busy part, 0 to 1, of the last 10 seconds, or of the time since the start."""
        self._move_on(now_ns)
        begin = max(self._started_ns, (self._last - _BUCKETS + 1) * _BUCKET_NS)
        return min(1.0, sum(self._spent) / max(1, now_ns - begin))

    def _move_on(self, now_ns: int) -> None:
        bucket = now_ns // _BUCKET_NS
        for old in range(max(self._last + 1, bucket - _BUCKETS + 1), bucket + 1):
            self._spent[old % _BUCKETS] = 0
        self._last = max(self._last, bucket)
