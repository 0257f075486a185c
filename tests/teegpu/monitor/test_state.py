"""Events to snapshots: progress, layers, chunks, rates, the baseline; in bounded memory, and quickly."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from teegpu.monitor import snapshot as snap
from teegpu.monitor.players import BATCH
from teegpu.monitor.state import MAX_TEXT, LiveState
from teegpu.record import events as ev
from teegpu.stats.document import rebuild
from teegpu.stats.summary import Summary
from tests.teegpu.monitor.madeup import BEGAN, MS, MadeUp, Script, meta, whole_run

SMALL = Script(layers=4, prompt=64, chunks=4, tokens=6, expected=16)


def state_of(made: MadeUp, **changes: object) -> LiveState:
    state = LiveState(meta(made.script, **changes))
    state.add(made.events)
    return state


def test_before_the_first_event_there_is_nothing() -> None:
    now = LiveState().snapshot(status=snap.STARTING)
    assert (now.status, now.seconds, now.phase, now.layers, now.ops) == ("starting", 0.0, "", (), ())
    assert now.per_op_calls == 0


def test_the_parts_are_those_of_the_summary() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode()
    summary = Summary()
    summary.add(made.events)
    now = state_of(made).snapshot()
    for view in (now.prefill, now.decode):
        total = summary.phases[view.name]
        assert view.parts.total == pytest.approx(total.seconds)
        assert view.parts.communication_share == pytest.approx(total.communication_share)
        assert view.rpc_calls == total.rpc_calls
    assert now.latency.calls == summary.phases["decode"].latencies.count


def test_the_same_in_any_pieces() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode()
    whole, pieces = state_of(made), LiveState(meta(SMALL))
    for event in made.events:
        pieces.add([event])
    one, other = whole.snapshot(), pieces.snapshot()
    assert [view.mean for view in one.layers] == [view.mean for view in other.layers]
    assert one.layer_history == other.layer_history
    assert sum(moment.parts.total for moment in one.history) == pytest.approx(
        sum(moment.parts.total for moment in other.history)
    )


def test_prefill_advances_with_its_layers_and_chunks() -> None:
    made = MadeUp(SMALL)
    made.prefill(upto=3)
    now = state_of(made).snapshot()
    assert now.prefill.running
    assert now.prefill.chunks == 4
    assert 0.0 < (now.prefill.fraction or 0.0) < 0.75
    assert now.prefill.tokens == round(64 * (now.prefill.fraction or 0.0))
    assert now.prefill.seconds_left is not None
    assert now.prefill.seconds_left > 0.0


def test_decode_has_a_rate_and_at_most_so_much_left() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(6, ends=False)
    now = state_of(made).snapshot()
    assert (now.decode.tokens, now.decode.expected) == (6, 16)
    assert now.decode.fraction == pytest.approx(6 / 16)
    assert now.decode.seconds_left == pytest.approx(10 / now.decode.tokens_per_second)


def test_time_goes_on_without_events() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(6, ends=False)
    state = state_of(made)
    later = state.snapshot(made.clock.at + 10_000 * MS)
    assert later.seconds == pytest.approx(state.snapshot().seconds + 10)
    assert later.token_rate == later.up_rate == 0.0
    assert state.snapshot().token_rate > 0.0


def test_layers_have_the_last_pass_their_mean_and_the_worst() -> None:
    made = MadeUp(Script(layers=30, chunks=1))
    made.prefill()
    made.decode(5, ends=False)
    layers = state_of(made).snapshot().layers
    assert len(layers) == 30
    assert [view.layer for view in layers if view.worst] == [17]
    assert layers[17].mean.total == pytest.approx(layers[17].now.total, rel=0.1)
    assert layers[17].mean.network > 1.5 * layers[3].mean.network


def test_a_pass_under_way_shows_as_far_as_it_has_come() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(2, ends=False)
    before = state_of(made).snapshot()
    made.tee(0, 0)
    made.script.gpu *= 10
    made.receive(made.send(0, 0), 0, 0, 1)
    now = state_of(made).snapshot()
    assert now.layer == 0
    assert now.layers[0].now.gpu > before.layers[0].now.gpu
    assert now.layers[1].now == before.layers[1].now


def test_one_layer_over_time() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(6)
    state = state_of(made)
    state.focus = 2
    now = state.snapshot()
    assert now.focus == 2
    assert len(now.layer_history) == 7
    assert now.layer_history[-1].total == pytest.approx(now.layers[2].now.total)


def test_where_chunks_are() -> None:
    made = MadeUp(SMALL)
    made.prefill(upto=3)
    state = state_of(made)
    just_sent = {view.chunk: view for view in state.snapshot(made.clock.at).chunks}
    assert just_sent[2].place == "up"
    assert just_sent[3].place == "waiting"
    assert just_sent[0].layer > just_sent[2].layer
    later = state.snapshot(made.clock.at + 10 * MS)
    assert later.in_flight == 3
    assert {view.place for view in later.chunks} == {"down", "waiting"}
    made.receive((1, made.clock.at), 2, 0, 16)


def test_chunks_are_only_told_of_a_prefill_in_chunks() -> None:
    made = MadeUp(Script(layers=4, chunks=1))
    made.prefill(upto=2)
    assert state_of(made).snapshot().chunks == ()
    made.prefill()
    made.decode(1, ends=False)
    assert state_of(made).snapshot().chunks == ()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_what_per_op_would_have_made(tokens: int) -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(tokens)
    assert state_of(made).snapshot().per_op_calls == (9 * 4 + 2) * (1 + tokens)


def test_rpcs_per_token() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(5)
    assert state_of(made).snapshot().rpcs_per_token == pytest.approx(2 * 4)


def test_a_lost_server_is_seen_and_that_it_is_back() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(1, ends=False)
    made.lose(times=3)
    state = state_of(made)
    lost = state.snapshot()
    assert "retried 3 times" in lost.retrying
    assert "ConnectionLostError" in lost.retrying
    assert lost.retries == 3
    made.events = []
    made.token()
    state.add(made.events)
    back = state.snapshot()
    assert (back.retrying, back.retries, back.endpoints[0].retries) == ("", 3, 3)


def test_notes_memory_and_text() -> None:
    made = MadeUp(Script(layers=2, text=("Hel", "lo")))
    made.prefill()
    made.decode(9, ends=False)
    made.note("going on without the server at tcp://b:1")
    now = state_of(made).snapshot()
    assert now.text == "Hello"
    assert now.text_known
    assert now.notes[-1].text.startswith("going on")
    assert now.runner_bytes == 412 << 20
    assert now.runner_cores == pytest.approx(1.3)


def test_a_second_prompt_begins_its_own_progress() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(6)
    made.prefill()
    made.decode(2, ends=False)
    now = state_of(made).snapshot()
    assert now.prompt == 2
    assert now.decode.tokens == 2
    assert now.decode.passes == 8
    assert now.tokens == 10


def test_an_interrupted_run_keeps_how_far_it_came() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode(4, ends=False)
    now = state_of(made).snapshot(made.clock.at + 10**12, status=snap.INTERRUPTED)
    assert not now.decode.running
    assert now.decode.tokens == 4
    assert now.seconds < 100
    assert now.layer == -1


def test_one_token_and_eighty_layers() -> None:
    made = MadeUp(Script(layers=80, chunks=1, expected=1))
    made.prefill()
    now = state_of(made).snapshot(status=snap.COMPLETE)
    assert len(now.layers) == 80
    assert now.tokens == 1
    assert now.decode.passes == 0
    assert now.ttft_seconds is not None


def test_what_a_damaged_record_may_hold() -> None:
    state = LiveState({"model": {"layers": "many"}, "settings": None, "clock": 3})
    state.add(
        [
            ev.Lap(5, 3, "tee", "X", 2**31, -5, 0),
            ev.PhaseEnded(7, "decode", -3, 0),
            ev.PhaseBegan(BEGAN, "prefill", -1, 0),
            ev.Lap(BEGAN, BEGAN + 5, "wait", "SEND", 10**9, 10**9, 7),
            ev.Lap(BEGAN + 9, BEGAN + 2, "wait", "WAIT", -7, 0, 7),
            ev.PhaseEnded(BEGAN - 100, "other", 1, 1),
            ev.TokensMade(1, 0),
        ]
    )
    now = state.snapshot()
    assert len(now.layers) <= 1024
    assert now.seconds >= 0.0


def test_the_document_of_a_run_that_goes_on() -> None:
    made = MadeUp(SMALL)
    made.prefill()
    state = state_of(made)
    assert rebuild(state.meta, state.summary, "running")["phases"]["prefill"]["tokens"] == 64


def test_memory_is_flat_however_long_a_run_is() -> None:
    """What 900 tokens leave behind is not more than what 300 have left."""
    made = MadeUp(Script(layers=2, chunks=1, expected=10**6))
    made.prefill()
    made.begin_decode()
    state = LiveState(meta(made.script))
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(3):
            for _ in range(300):
                made.token()
                state.add(made.events)
                state.add_text("a few words ")
                made.events = []
            state.snapshot()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 150_000


def test_text_is_kept_to_a_bound() -> None:
    state = LiveState()
    for _ in range(100):
        state.add_text("x" * 10_000)
    assert len(state.snapshot().text) <= MAX_TEXT


@pytest.mark.alone
def test_a_hundred_thousand_events_a_second_are_digested() -> None:
    events = [event for piece in whole_run(Script(tokens=160)) for event in piece][:100_000]
    assert len(events) >= 90_000
    state = LiveState(meta())
    started = time.process_time()
    for start in range(0, len(events), BATCH):
        state.add(events[start : start + BATCH])
        state.snapshot()
    assert time.process_time() - started < 1.0
