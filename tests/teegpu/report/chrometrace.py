"""The rules of the Chrome trace event format (JSON), as far as Perfetto and chrome://tracing insist on them: a checker
that knows nothing of how our traces are made.

Perfetto reads times as whole nanoseconds, sorts entries by them (keeping the order of those that are equal), and drops
a slice of a track that overlaps another in part. So nesting is checked in nanoseconds, in the order of the file.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NoReturn

Entry = dict[str, Any]
Track = tuple[int, int]

METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "process_labels": ("labels", str),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
TIMED = set("BEXiCbenstf")


def problems(text: str) -> list[str]:
    """What is wrong with the trace ``text``; empty where nothing is."""
    try:
        loaded = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
    except ValueError as error:
        return [f"no JSON: {error}"]
    if not isinstance(loaded, dict) or not isinstance(loaded.get("traceEvents"), list):
        return ["no object with a list traceEvents"]
    found = []
    if loaded.get("displayTimeUnit", "ms") not in ("ms", "ns"):
        found.append("displayTimeUnit is neither ms nor ns")
    entries = loaded["traceEvents"]
    found += [f"{wrong}: {entry}" for entry in entries for wrong in _entry(entry)]
    if found:
        return found
    return [*_order(entries), *_nesting(entries), *_pairs(entries), *_names(entries)]


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> Entry:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


def _entry(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "an entry is no object"
        return
    kind = entry.get("ph")
    if kind != "M" and kind not in TIMED:
        yield "unknown ph"
        return
    for key in ("pid", "tid"):
        if type(entry.get(key)) is not int or entry[key] < 0:
            yield f"{key} is no whole number"
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        yield "no name"
    if not isinstance(entry.get("cat", ""), str):
        yield "cat is no text"
    if not isinstance(entry.get("args", {}), dict):
        yield "args is no object"
        return
    if kind == "M":
        yield from _metadata(entry)
        return
    for key in ("ts", "dur") if kind == "X" else ("ts",):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            yield f"{key} is no time"
        elif abs(value * 1000 - nanoseconds(value)) > 0.01:
            yield f"{key} is no whole number of nanoseconds"
    if kind == "i" and entry.get("s", "t") not in ("g", "p", "t"):
        yield "an instant's scope is none of g, p, t"
    if kind == "C":
        values = entry.get("args", {}).values()
        if not values or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            yield "a counter's args are no numbers"
    if kind in "benstf" and "id" not in entry:
        yield "no id"


def _metadata(entry: Entry) -> Iterator[str]:
    if entry.get("name") not in METADATA:
        yield "unknown metadata"
        return
    key, kind = METADATA[entry["name"]]
    if type(entry.get("args", {}).get(key)) is not kind:
        yield f"args.{key} is no {kind.__name__}"


def _tracks(entries: list[Entry], kinds: str) -> dict[Track, list[Entry]]:
    tracks: dict[Track, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry["ph"] in kinds:
            tracks[entry["pid"], entry["tid"]].append(entry)
    return tracks


def _order(entries: list[Entry]) -> Iterator[str]:
    """Times of a track, and of a counter, do not go back."""
    for track, found in _tracks(entries, "BEXi").items():
        last = 0
        for entry in found:
            if nanoseconds(entry["ts"]) < last:
                yield f"track {track} goes back in time: {entry}"
            last = nanoseconds(entry["ts"])
    counters: dict[tuple[int, str], float] = {}
    for entry in entries:
        if entry["ph"] == "C":
            key = entry["pid"], entry["name"]
            if entry["ts"] < counters.get(key, 0):
                yield f"a counter goes back in time: {entry}"
            counters[key] = entry["ts"]


def _nesting(entries: list[Entry]) -> Iterator[str]:
    """Slices of a track lie in each other or apart, and B and E belong together."""
    for track, found in _tracks(entries, "BEX").items():
        # Ends of the slices that are open, in nanoseconds; None: not known yet, its E is to come.
        open_until: list[tuple[int | None, str]] = []
        for entry in found:
            at = nanoseconds(entry["ts"])
            while open_until and (end := open_until[-1][0]) is not None and end <= at:
                open_until.pop()
            if entry["ph"] == "B":
                open_until.append((None, entry["name"]))
            elif entry["ph"] == "E":
                if not open_until or open_until[-1][0] is not None:
                    yield f"track {track}: an end that fits no begin, or cuts a slice: {entry}"
                    return
                if open_until.pop()[1] != entry["name"]:
                    yield f"track {track}: the end of another slice than the one that is open: {entry}"
            else:
                end = at + nanoseconds(entry["dur"])
                outer = next((until for until, _ in reversed(open_until) if until is not None), None)
                if outer is not None and end > outer:
                    yield f"track {track}: a slice that overlaps another in part: {entry}"
                open_until.append((end, entry["name"]))
        if any(until is None for until, _ in open_until):
            yield f"track {track}: a slice that never ends"


def _pairs(entries: list[Entry]) -> Iterator[str]:
    """Asynchronous begins and ends belong together, by category, id and name."""
    begun: dict[tuple[str, Any], int] = defaultdict(int)
    for entry in entries:
        key = f"{entry.get('cat')}:{entry['name']}", entry.get("id")
        if entry["ph"] == "b":
            begun[key] += 1
        elif entry["ph"] == "e":
            begun[key] -= 1
            if begun[key] < 0:
                yield f"the end of what was not begun: {entry}"
    yield from (f"an asynchronous slice that never ends: {key}" for key, count in begun.items() if count > 0)


def _names(entries: list[Entry]) -> Iterator[str]:
    """Each process and each thread that has something has one name."""
    named: dict[str, list[Any]] = defaultdict(list)
    for entry in entries:
        if entry["ph"] == "M":
            named[entry["name"]].append(entry["pid"] if entry["name"].startswith("process") else _track(entry))
    for kind, found in named.items():
        if len(set(found)) < len(found):
            yield f"{kind} is given twice for one of {found}"
    timed = [entry for entry in entries if entry["ph"] != "M"]
    if missing := {entry["pid"] for entry in timed} - set(named["process_name"]):
        yield f"processes without a name: {missing}"
    # A counter belongs to its process.
    if missing := {_track(entry) for entry in timed if entry["ph"] != "C"} - set(named["thread_name"]):
        yield f"threads without a name: {missing}"


def _track(entry: Entry) -> Track:
    return entry["pid"], entry["tid"]
