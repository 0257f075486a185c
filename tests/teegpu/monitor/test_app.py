"""The screen, with Textual's pilot: every key, every view, every end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from textual.geometry import Size
from textual.widgets import Input, Static

from teegpu.monitor.players import LivePlayer
from teegpu.monitor.widgets.dialogs import Help, Jump, Quit
from teegpu.monitor.widgets.main import VIEWS
from teegpu.monitor.widgets.panel import Panel
from teegpu.monitor.widgets.tables import LayerTable, OpTable
from teegpu.record.events import Event
from tests.teegpu.monitor.madeup import MadeUp, Script
from tests.teegpu.monitor.scene import TEXT, WORDS, Scene, decoding, perform, prefilling


def test_the_overview_of_a_decode() -> None:
    async def play(scene: Scene) -> None:
        assert "smollm2-135m · fused · pipelined · fp16" in scene.header
        assert "decode" in scene.header
        assert "12 of ≤ 128 tokens" in scene.text("#p-progress")
        assert "% communication" in scene.text("#p-time")
        assert "36 per token" in scene.text("#p-communication")
        assert "would have made" in scene.text("#p-communication")
        assert "none: development mode" in scene.text("#p-sides")
        assert scene.text("#p-tail").startswith(TEXT[:30])
        assert "no endpoint given" in scene.text("#p-said")

    perform(play)


def test_numbers_and_tab_choose_views() -> None:
    async def play(scene: Scene) -> None:
        for number, view in enumerate(VIEWS, 1):
            await scene.press(str(number))
            assert scene.app.view == view
        await scene.press("tab")
        assert scene.app.view == "overview"
        await scene.press("shift+tab", "shift+tab")
        assert scene.app.view == "text"

    perform(play)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_every_view_says_something_at_every_size(size: tuple[int, int]) -> None:
    async def play(scene: Scene) -> None:
        for view in VIEWS[:5]:
            scene.app.action_view(view)
            await scene.settle()
            shown = [
                panel
                for panel in scene.app.screen.query(f"#{view} Panel").results(Panel)
                if panel.size.height
                and all(node.display for node in panel.ancestors_with_self if hasattr(node, "styles"))
            ]
            assert shown
            for panel in shown:
                assert panel.lines, panel.id
                assert panel.region.right <= size[0]
                assert panel.region.bottom <= size[1]

    perform(play, size=size)


def test_a_resize_lays_out_anew() -> None:
    async def play(scene: Scene) -> None:
        for width, height in ((80, 24), (200, 60), (40, 10), (120, 40)):
            await scene.pilot.resize_terminal(width, height)
            await scene.update()
            assert scene.app.size == Size(width, height)
            tiles = scene.app.screen.query_one("#tiles")
            assert tiles.display == (height >= 32)
        assert "per token" in scene.text("#p-communication")

    perform(play)


def test_new_events_are_shown_and_only_lines_that_changed_drawn() -> None:
    async def play(scene: Scene) -> None:
        panel = scene.app.screen.query_one("#p-sides", Panel)
        before, progress = panel.drawn_lines, scene.text("#p-progress")
        scene.made.token()
        await scene.update()
        assert "13 of ≤ 128 tokens" in scene.text("#p-progress")
        assert scene.text("#p-progress") != progress
        assert panel.drawn_lines == before

    perform(play)


def test_space_holds_the_view_and_the_run_goes_on() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("space")
        assert "view paused" in scene.header
        scene.made.token()
        await scene.update()
        assert "12 of" in scene.text("#p-progress")
        await scene.press("space")
        await scene.update()
        assert "13 of" in scene.text("#p-progress")
        assert "paused" not in scene.header

    perform(play)


def test_layers_are_walked_through_sorted_and_opened() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("2")
        table = scene.app.screen.query_one(LayerTable)
        assert table.has_focus
        await scene.press("down", "down", "up", "down")
        assert table.chosen == 2
        assert not scene.app.screen.query_one("#layers").has_class("-detail")
        await scene.press("enter")
        await scene.update()
        assert scene.app.screen.query_one("#layers").has_class("-detail")
        assert scene.app.screen.query_one("#p-detail", Panel).border_title == "layer 2 over time"
        assert "over 13 passes" in scene.text("#p-detail")
        await scene.press("s", "home")
        assert table.order == "time"
        assert table.chosen == 17  # the slow one comes first
        await scene.press("end")
        assert table.cursor == 17
        await scene.press("enter")
        await scene.press("enter")

    perform(play)


def test_operations_are_sorted_and_by_phase() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("3")
        assert scene.text("#t-ops").splitlines()[1].split()[:2] == ["LINEAR", "GPU"]
        orders = []
        for _ in range(4):
            orders.append(scene.app.screen.query_one(OpTable).order)
            await scene.press("s")
        assert orders == ["total", "count", "average", "name"]
        both = scene.text("#t-ops")
        await scene.press("p")
        assert scene.text("#t-ops") != both
        assert str(scene.app.screen.query_one(OpTable).border_subtitle).startswith("prefill")

    perform(play)


def test_the_mouse_chooses_views_and_rows() -> None:
    async def play(scene: Scene) -> None:
        await scene.pilot.click("#views", offset=(18, 0))
        await scene.settle()
        assert scene.app.view == "layers"
        await scene.pilot.click("#t-layers", offset=(30, 6))
        await scene.settle()
        assert scene.app.screen.query_one(LayerTable).cursor == 4
        await scene.pilot.click("#t-layers", offset=(30, 1))
        await scene.settle()
        assert scene.app.screen.query_one(LayerTable).order == "time"

    perform(play)


def test_letters_and_themes() -> None:
    async def play(scene: Scene) -> None:
        assert "TTT" not in scene.text("#p-time")
        await scene.press("l")
        assert "NNNNN" in scene.text("#p-time")
        assert "T TEE" in scene.text("#p-time")
        await scene.press("t")
        assert scene.app.theme == "teegpu-light"
        await scene.press("t")
        assert scene.app.theme == "teegpu-dark"

    perform(play)


def test_no_color_means_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def play(scene: Scene) -> None:
        assert "NNNNN" in scene.text("#p-time")

    perform(play)


def test_help_and_the_command_palette() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("question_mark")
        assert isinstance(scene.app.screen, Help)
        await scene.press("escape")
        await scene.press("ctrl+p")
        assert type(scene.app.screen).__name__ == "CommandPalette"
        names = [command.title for command in scene.app.get_system_commands(scene.app.screen)]
        assert "View: network" in names
        assert "Export" in names
        await scene.press("escape")

    perform(play)


def test_export_writes_the_screen_and_the_run(tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        await scene.press("4", "e")

    perform(play, folder=tmp_path)
    picture = (tmp_path / "teegpu-20260101-120000-abc123-network.svg").read_text()
    assert picture.startswith("<svg")
    assert "latency" in picture
    document = json.loads((tmp_path / "teegpu-20260101-120000-abc123.json").read_text())
    assert document["schema"] == "teegpu.report/1"
    assert document["phases"]["decode"]["tokens"] == 12


@pytest.mark.parametrize("view", ["overview", "text"])
@pytest.mark.parametrize("private", [True, False])
def test_an_export_is_private_and_has_text_only_where_the_record_has_it(
    tmp_path: Path, view: str, private: bool
) -> None:
    made = decoding(text=() if private else WORDS)

    async def play(scene: Scene) -> None:
        scene.app.action_view(view)
        await scene.settle()
        if private:
            assert isinstance(scene.player, LivePlayer)
            scene.player.add_text(TEXT)
            await scene.update()
        panel = "#p-tail" if view == "overview" else "#p-text"
        shown = scene.text(panel)
        assert shown.startswith(TEXT[:20])
        await scene.press("e")
        assert scene.text(panel) == shown
        told = [
            note.message.endswith("which may hold the text: only you may read them")
            for note in scene.app._notifications
        ]
        assert told == [not private]

    perform(play, made, folder=tmp_path)
    found = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(found) == {".svg", ".json"}
    assert {path.stat().st_mode & 0o777 for path in found.values()} == {0o600}
    assert ("trusted&#160;process" in found[".svg"].read_text()) == (not private)


def test_an_export_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        await scene.press("e")
        assert "can't write" in next(iter(scene.app._notifications)).message

    perform(play, folder=tmp_path / "not there")


@pytest.mark.parametrize(
    ("keys", "result"), [(["q", "g"], "go-on"), (["q", "s"], "stop"), (["ctrl+c", "ctrl+c"], "stop")]
)
def test_leaving_a_run_of_ours_asks(keys: list[str], result: str) -> None:
    async def play(scene: Scene) -> None:
        await scene.press("q")
        assert isinstance(scene.app.screen, Quit)
        await scene.press("escape")
        assert not isinstance(scene.app.screen, Quit)
        assert scene.app.is_running
        await scene.press(*keys)

    assert perform(play, ours=True).return_value == result


def test_leaving_a_run_of_somebody_else_does_not_ask() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("q")

    assert perform(play).return_value == "done"


def test_a_question_can_be_answered_with_the_mouse() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("q")
        await scene.pilot.click("#stop")
        await scene.settle()

    assert perform(play, ours=True).return_value == "stop"


# Ends


@pytest.mark.parametrize("status", ["complete", "interrupted", "failed"])
def test_the_end_has_the_report(status: str) -> None:
    async def play(scene: Scene) -> None:
        await scene.end(status, **({"error": "the server at tcp://b:1 is gone"} if status == "failed" else {}))
        assert status in scene.header
        assert scene.app.view == "report"
        shown = scene.app.screen.query_one("#p-report", Static)
        assert shown.size.height > 20
        assert status in str(scene.app.screen.query_one("#report").border_subtitle)
        if status == "failed":
            assert "tcp://b:1 is gone" in scene.text("#p-said")
        await scene.press("1")
        assert scene.app.view == "overview"
        assert scene.app.is_running
        await scene.press("q")

    app = perform(play, ours=True)
    assert app.return_value == "done"


def test_a_run_that_came_to_nothing_ends_the_view() -> None:
    async def play(scene: Scene) -> None:
        await scene.end("failed", error="no such model")
        await scene.settle()

    assert perform(play, MadeUp(), ours=True).return_value == "done"


def test_a_server_that_is_lost_and_back() -> None:
    made = decoding()
    made.lose(times=2)

    async def play(scene: Scene) -> None:
        assert "server lost" in scene.header
        assert "retried 2 times" in scene.text("#p-said")
        scene.made.token()
        await scene.update()
        assert "server lost" not in scene.header
        await scene.press("4")
        assert scene.text("#p-endpoints").splitlines()[1].split()[3] == "2"

    perform(play, made)


def test_one_token() -> None:
    made = MadeUp(Script(layers=4, chunks=1, expected=1))
    made.prefill()

    async def play(scene: Scene) -> None:
        await scene.end("complete")
        for view in VIEWS:
            scene.app.action_view(view)
            await scene.settle()

    perform(play, made)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_eighty_layers(size: tuple[int, int]) -> None:
    made = decoding(tokens=2, layers=80)

    async def play(scene: Scene) -> None:
        assert scene.text("#p-profile")
        await scene.press("2", "end")
        table = scene.app.screen.query_one(LayerTable)
        assert table.chosen == 79
        assert table.scroll_offset.y > 0 or size[1] > 80 or table.size.height >= 81

    perform(play, made, size=size)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_chunks_of_a_prefill_take_the_place_of_the_text(size: tuple[int, int]) -> None:
    async def play(scene: Scene) -> None:
        assert scene.app.screen.query_one("#p-chunks").display
        assert not scene.app.screen.query_one("#p-tail").display
        told = scene.text("#p-chunks")
        assert "link ↑" in told
        assert "GPU" in told
        scene.made.prefill()
        scene.made.decode(1, ends=False)
        await scene.update()
        assert not scene.app.screen.query_one("#p-chunks").display

    perform(play, prefilling(), size=size)


def test_a_flood_of_events_does_not_stop_the_view() -> None:
    made = decoding(tokens=1)

    async def play(scene: Scene) -> None:
        for _ in range(60):
            scene.made.token()
        assert len(scene.made.events) > 20_000
        await scene.update()
        assert "61 of" in scene.text("#p-progress")
        await scene.press("2")
        assert scene.app.view == "layers"

    perform(play, made)


def test_a_reader_that_fails_ends_the_screen_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(limit: int | None = None) -> list[Event]:
        raise OSError("the record is gone")

    async def play(scene: Scene) -> None:
        monkeypatch.setattr(scene.run.readers[0], "read", broken)
        scene.app.pull()

    with pytest.raises(OSError, match="the record is gone"):
        perform(play)


def test_a_signal_ends_the_screen() -> None:
    async def play(scene: Scene) -> None:
        scene.player.leave()
        scene.app.pull()
        await scene.settle()

    assert perform(play, ours=True).return_value == "done"


# Replays


def test_a_replay_is_steered_by_keys() -> None:
    made = decoding(tokens=8)
    made.end(8, 8)
    now = [0.0]

    async def play(scene: Scene) -> None:
        assert "replay ×1" in scene.header
        await scene.press("space")
        await scene.update()
        assert "replay paused" in scene.header
        await scene.press("full_stop")
        await scene.update()
        assert scene.player.state.tokens == 1
        await scene.press("full_stop")
        await scene.update()
        assert scene.player.state.tokens == 2
        await scene.press("j")
        assert isinstance(scene.app.screen, Jump)
        scene.app.screen.query_one(Input).value = "6"
        await scene.press("enter")
        await scene.update()
        assert scene.player.state.tokens == 6
        await scene.press("j")
        await scene.press("escape")
        await scene.press("space", "plus", "plus")
        await scene.update()
        assert "×4" in scene.header
        await scene.press("minus")
        await scene.update()
        assert "×2" in scene.header
        now[0] = 1000.0
        await scene.update()
        await scene.update()
        assert "complete" in scene.header
        assert scene.app.view == "report"
        await scene.press("q")

    app = perform(play, made, replay=1.0, clock=lambda: now[0])
    assert app.return_value == "done"


def test_keys_of_a_replay_do_nothing_to_a_run_that_goes_on() -> None:
    async def play(scene: Scene) -> None:
        await scene.press("j", "full_stop", "plus")
        assert not isinstance(scene.app.screen, Jump)
        assert "12 of" in scene.text("#p-progress")

    perform(play)
