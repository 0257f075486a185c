"""The overview: big figures, progress, where the time goes, both sides, and what the run has to say."""

from __future__ import annotations

from teegpu.formats import NOTHING
from teegpu.monitor import snapshot as snap
from teegpu.monitor import words
from teegpu.monitor.draw import Line, Look, Span, clip, fit, gauge, pairs, paragraph, sides, stacked, wrapped
from teegpu.monitor.panels import requests
from teegpu.monitor.panels.digits import big
from teegpu.monitor.snapshot import Parts, PhaseView, Snapshot
from teegpu.report.facts import remarks
from teegpu.units import human_bytes, plural, printable

STATUS = {
    snap.STARTING: ("◌", "dim", "starting"),
    snap.RUNNING: ("●", "good", "running"),
    snap.COMPLETE: ("✔", "good", "complete"),
    snap.INTERRUPTED: ("■", "warn", "interrupted"),
    snap.FAILED: ("✘", "bad", "failed"),
}


def header(state: Snapshot, width: int, paused: bool = False) -> Line:
    """One line: what is run, and how it goes."""
    mark, role, word = STATUS[state.status]
    if state.retrying:
        mark, role, word = "●", "bad", "server lost"
    elif state.serving is not None and state.status == snap.RUNNING:
        word = "serving" if state.serving.running else "idle"
    elif state.status == snap.RUNNING:
        if not state.phase:
            mark, role, word = STATUS[snap.STARTING]
        elif state.current.running:
            word = state.phase
    right: list[Span] = []
    if state.replay:
        right.append((f"replay {state.replay}  ", "accent"))
    if paused:
        right.append(("view paused  ", "bold warn"))
    elif state.behind:
        right.append(("catching up  ", "warn"))
    if state.document is not None and remarks(state.document):
        right.append(("record cut  ", "bold warn"))
    right += [(f"{mark} ", role), (word, f"bold {role}"), (f"  {words.clock(state.seconds)} ", "")]
    left: list[Span] = [(" teegpu ", "bold accent"), (" ", "")]
    for number, word in enumerate(state.facts.how):
        left += [(" · ", "dim"), (word, "")] if number else [(word, "bold")]
    return sides(left, right, width)


def tiles(state: Snapshot) -> list[tuple[str, str, str, str]]:
    """The big figures: (figure, role, caption, what is beside it)."""
    if state.serving is not None:
        return requests.tiles(state, state.serving)
    phase = state.current
    share = phase.parts.communication_share
    decoding = state.decode.passes or state.phase == "decode"
    speed = state.decode.tokens_per_second if decoding else state.prefill.tokens_per_second
    return [
        (
            f"{share * 100:.0f}%" if phase.parts.total else NOTHING,
            "network" if phase.parts.total else "dim",
            "communication",
            f"of {state.phase}" if state.phase else "",
        ),
        (
            f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}" if speed else NOTHING,
            "gpu",
            "tokens/s",
            "decode" if decoding else "prefill",
        ),
        (
            f"{state.rpcs_per_token:.0f}" if state.rpcs_per_token else NOTHING,
            "serialization",
            "RPCs per token" if decoding else "RPCs",
            f"per-op: {_per_op(state)}",
        ),
        (
            f"{state.ttft_seconds:.2f}" if state.ttft_seconds is not None else NOTHING,
            "tee",
            "s to first token",
            f"TPOT {words.span_of(state.tpot_median_seconds)}" if state.tpot_median_seconds else "",
        ),
    ]


def _per_op(state: Snapshot) -> str:
    layers = state.facts.layers
    return f"{9 * layers + 2}" if layers else NOTHING


def tile(figure: tuple[str, str, str, str], width: int) -> list[Line]:
    """One of them, three rows high, its caption at the side."""
    text, role, caption, beside = figure
    rows = big(text)
    size = max(len(row) for row in rows)
    notes = ["", caption, beside]
    lines = []
    for row, note, kind in zip(rows, notes, ("", "bold", "dim"), strict=True):
        lines.append(
            fit(((" " + row.ljust(size), role), ("  ", ""), (clip(note, max(0, width - size - 3)), kind)), width)
        )
    return lines


def progress(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """A line for each phase: how far, how quick, how long still. Of a run that serves several: how full it is."""
    if state.serving is not None:
        return requests.progress(state.serving, width, height, look)
    return [_phase_line(phase, state, width, look) for phase in (state.prefill, state.decode)]


def _phase_line(phase: PhaseView, state: Snapshot, width: int, look: Look) -> Line:
    started = bool(phase.running or phase.passes)
    role = {"prefill": "gpu", "decode": "tee"}[phase.name]
    told: list[Span] = []
    if phase.name == "prefill":
        told.append((plural(phase.expected, "token") if phase.expected else NOTHING, ""))
        if phase.chunks > 1:
            told.append((f"{phase.chunks} chunks", "dim"))
    else:
        if not started:
            told.append((NOTHING, "dim"))
        elif phase.running and phase.expected:
            told.append((f"{phase.tokens:,} of ≤ {phase.expected:,} tokens", ""))
        else:
            told.append((plural(phase.tokens, "token"), ""))
    if started:
        told.append((words.tokens_rate(phase.tokens_per_second), "bold"))
        told.append((words.clock(phase.seconds), ""))
    if phase.running and phase.seconds_left is not None:
        told.append((f"≤ {words.clock(phase.seconds_left)} left" if phase.name == "decode"
                     else f"about {words.clock(phase.seconds_left)} left", "dim"))  # fmt: skip
    elif phase.running and state.layer >= 0:
        told.append((f"layer {state.layer + 1}/{max(state.facts.layers, state.layer + 1)}", "dim"))
    spans: list[Span] = []
    for number, span in enumerate(told):
        spans += [(" · ", "dim"), span] if number else [span]
    room = max(8, min(60, width - 9 - 2 - max(44, sum(len(text) for text, _ in spans))))
    fraction = phase.fraction or 0.0
    if phase.name == "decode" and started and not phase.running:
        fraction = 1.0
    bar = gauge(fraction, room, role if phase.running or started else "dim", look)
    return fit(((phase.name.ljust(9), "bold" if phase.running else "dim"), *bar, ("  ", ""), *spans), width)


def time(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
    """Where the time goes: now, in each phase, and what the colours mean."""
    rows: list[tuple[str, Parts, float]] = []
    if not state.ended:
        rows.append(("now", state.now, 0.0))
    rows += [(phase.name, phase.parts, phase.seconds) for phase in (state.prefill, state.decode) if phase.parts.total]
    if not any(parts.total for _, parts, _ in rows):
        return [(("nothing has been computed yet", "dim"),)]
    short = width < 90
    key = wrapped(words.legend(state.current.parts, look, short=short), ("  " if short else "   ", ""), width)
    room = max(1, height - len(key))
    if len(rows) > room:  # what is running says more than what is done
        rows = [row for row in rows if row[0] in ("now", state.phase)][-room:]
    lines = []
    for name, parts, _ in rows:
        share = words.percent(parts.communication_share) if parts.total else NOTHING
        tail: list[Span] = (
            [(share.rjust(7), "bold"), (" communication", "dim")] if width >= 70 else [(share.rjust(7), "bold")]
        )
        size = width - 9 - sum(len(text) for text, _ in tail)
        lines.append(((name.ljust(9), "dim"), *stacked(parts, size, look), *tail))
    if room > len(rows):
        lines.append(())
    return lines + key


def both_sides(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG001
    """The two processes and what is between them."""
    facts = state.facts
    memory: list[Span] = [(human_bytes(state.runner_bytes) if state.runner_bytes else NOTHING, "bold tee")]
    if state.runner_cores is not None:
        memory.append((f"  {state.runner_cores:.1f} cores", "dim"))
    if facts.runner_threads:
        memory.append((f"  {plural(facts.runner_threads, 'thread')}", "dim"))
    server: list[Span] = [(human_bytes(state.server_bytes) if state.server_bytes else NOTHING, "bold gpu")]
    device = " ".join(word for word in (facts.device, facts.dtype) if word)
    if device:
        server.append((f"  {device}", ""))
    if facts.server_threads:
        server.append((f"  {plural(facts.server_threads, 'thread')}", "dim"))
    rows: list[tuple[str, str | list[Span]]] = [("runner", memory)]
    if facts.remote:
        where = facts.endpoints[0] if facts.endpoints else "embedded"
        if len(facts.endpoints) > 1:
            where += f" and {len(facts.endpoints) - 1} more"
        rows += [("server", server), ("at", where)]
    rows.append(("TEE", [(words.tee(facts), "good" if facts.tee_kind else "warn")]))
    if facts.remote:
        rows.append(("keys", words.keys(facts)))
    if facts.privacy:
        rows.append(("privacy", facts.privacy))
    if facts.note:
        rows.append(("note", facts.note))
    return pairs(rows, width)


def said(state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG001
    """Advice, the error, and the latest notes: the last ones where there is no room for all."""
    lines: list[Line] = []
    if state.error:
        lines += paragraph(printable(state.error, 2000), width, "bad")
    if state.retrying:
        lines += paragraph(f"server lost: {state.retrying}", width, "bad")
    for text in state.advice:
        marked = paragraph(printable(text, 1000), max(8, width - 2))
        lines += [((("→ " if number == 0 else "  "), "accent"), *line) for number, line in enumerate(marked)]
    room = max(0, height - len(lines))
    notes: list[Line] = []
    for note in reversed(state.notes):
        told = paragraph(printable(note.text, 1000), max(8, width - 9), "dim")
        block: list[Line] = [
            ((words.clock(note.at_seconds).rjust(7) + "  " if number == 0 else " " * 9, "dim"), *line)
            for number, line in enumerate(told)
        ]
        if len(notes) + len(block) > room:
            if not notes and room:  # rather the begin of the latest note than nothing
                clipped = clip(printable(note.text, 1000), max(8, width - 9))
                notes = [((words.clock(note.at_seconds).rjust(7) + "  ", "dim"), (clipped, "dim"))]
            break
        notes = block + notes
    if not lines and not notes:
        return [(("nothing to tell so far", "dim"),)]
    return [fit(line, width) for line in lines + notes]
