"""The decoder's layers: a stacked bar each, and one layer over time."""

from __future__ import annotations

from teegpu.formats import NOTHING
from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, Span, columns, fit, gauge, resampled, sides, stacked, wrapped
from teegpu.monitor.snapshot import ChunkView, LayerView, Parts, Snapshot
from teegpu.units import plural

SORTS = ("layer", "time", "communication")
PLACES = {
    "waiting": ("waiting", "dim"),
    "tee": ("TEE", "tee"),
    "up": ("link ↑", "network"),
    "gpu": ("GPU", "gpu"),
    "down": ("link ↓", "network"),
    "done": ("done", "dim"),
}


def sorted_layers(state: Snapshot, order: str) -> list[LayerView]:
    views = list(state.layers)
    if order == "time":
        views.sort(key=lambda view: -view.mean.total)
    elif order == "communication":
        views.sort(key=lambda view: -view.mean.communication)
    return views


def profile(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """All layers at a glance: a bar on a line each where there is room, else a column each."""
    views = list(state.layers)
    if not views:
        return [(("no layer yet", "dim"),)]
    if height >= len(views) + 1:
        return rows(state, views, width, look)
    each = max(1, min(4, width // len(views)))  # columns of equal width, as far as they go
    means = [view.mean for view in views]
    used = min(width, each * len(views))
    chart = columns(means, used, max(1, height - 1), look)
    worst = next(view for view in views if view.worst)
    told = f"worst: {worst.layer}, {words.span_of(worst.mean.total)}"
    left = "0" if used < 36 else "layer 0"
    return [*chart, sides([(left, "dim")], [(told, "warn"), (f"  {views[-1].layer}", "dim")], max(used, 26))]


def heading(width: int) -> Line:
    return fit((("layer", "dim"), (" " * max(1, _bar_width(width) + 4), ""), (_FIGURES, "dim")), width)


_FIGURES = "      now      mean  comm."


def _bar_width(width: int) -> int:
    return max(6, width - 8 - len(_FIGURES) - 3)


def rows(state: Snapshot, views: list[LayerView], width: int, look: Look) -> list[Line]:
    """Headings, and a line for each of ``views``: the pass that is running, the mean, communication's share."""
    scale = max((max(view.now.total, view.mean.total) for view in views), default=0.0)
    return [heading(width), *(row(state, view, scale, width, look) for view in views)]


def row(state: Snapshot, view: LayerView, scale: float, width: int, look: Look) -> Line:
    here = view.layer == state.layer
    now = view.now if view.now.total else Parts()
    mark: Span = ("▶", "bold accent") if here else (" ", "")
    name: Span = (f"{view.layer:>4} ", "bold warn" if view.worst else "bold" if here else "")
    bar = stacked(now, _bar_width(width), look, scale=scale or None)
    figures = (
        f"{words.span_of(now.total) if now.total else NOTHING:>9} "
        f"{words.span_of(view.mean.total) if view.mean.total else NOTHING:>9} "
        f"{words.percent(view.mean.communication_share) if view.mean.total else NOTHING:>6}"
    )
    tail: Span = (" ◀", "warn") if view.worst else ("  ", "")
    return fit((mark, name, (" ", ""), *bar, (figures, ""), tail), width)


def detail(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """One layer (``state.focus``) from the run's first pass to the latest: stacked columns, and its figures."""
    view = next((view for view in state.layers if view.layer == state.focus), None)
    if view is None:
        return [(("no layer yet", "dim"),)]
    history = state.layer_history
    key = wrapped(
        [[*item[:-1], (words.span_of(seconds), "")] for item, seconds in zip(
            words.legend(view.mean, look, other=False), view.mean, strict=False)],
        ("   ", ""),
        width,
    )  # fmt: skip
    room = max(1, height - len(key) - 2)
    # One long first pass (the prompt's) would flatten all that follow.
    totals = sorted(parts.total for parts in history)
    top = min(totals[-1], 2.5 * totals[len(totals) // 2]) if totals else 0.0
    chart = columns(list(history), width, room, look, top=top or None)
    passes = plural(len(history) * state.layer_history_passes, "pass", "passes")
    latest = resampled([parts.total for parts in history], 1)
    foot = sides(
        [("first pass", "dim")],
        [
            (f"full height {words.span_of(top)}", "dim"),
            (f"   mean {words.span_of(latest[0]) if latest else NOTHING} over {passes}", ""),
        ],
        width,
    )
    return [*key, *chart, foot]


def chunks(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """Which chunk of the prompt is where, and how far each has come."""
    views = state.chunks
    if not views:
        return [(("the prompt is computed in one piece", "dim"),)]
    layers = max(1, state.facts.layers)
    lines: list[Line] = [_stations(views, width)]
    shown = list(views)
    room = max(1, height - 1)
    if len(shown) > room:
        busy = [view for view in shown if view.place not in ("done", "waiting")]
        first = min((view.chunk for view in busy), default=0)
        first = max(0, min(first, len(shown) - room))
        shown = shown[first : first + room]
    size = max(6, width - 26)
    for view in shown:
        text, role = PLACES[view.place]
        fraction = 1.0 if view.place == "done" else view.layer / layers
        bar = gauge(fraction, size, role, look)
        lines.append(
            fit(
                ((f"chunk {view.chunk + 1:>3} ", "dim"), *bar, (f" {text:<7}", role),
                 (f"{view.layer + 1:>3}/{layers}" if view.place not in ("done", "waiting") else "", "dim")),
                width,
            )
        )  # fmt: skip
    return lines[:height]


def _stations(views: tuple[ChunkView, ...], width: int) -> Line:
    """TEE, link, GPU, link, and how many chunks are at each."""
    spans: list[Span] = []
    for place in ("tee", "up", "gpu", "down"):
        text, role = PLACES[place]
        here = [str(view.chunk + 1) for view in views if view.place == place]
        spans += [(f"{text} ", f"bold {role}"), (" ".join(here) or "·", "" if here else "dim"), ("   ", "")]
    done = sum(view.place == "done" for view in views)
    spans.append((f"{done} of {len(views)} done", "dim"))
    return fit(tuple(spans), width)
