"""Lines, bars and charts: always as wide as they are to be, in proportion, with letters and without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teegpu.monitor.draw import (
    Look,
    area,
    clip,
    columns,
    fit,
    gauge,
    length,
    paragraph,
    plain,
    resampled,
    sides,
    sparkline,
    stacked,
    table,
    wrapped,
)  # fmt: skip
from teegpu.monitor.themes import COLOURS, style
from teegpu.report.parts import PARTS

COLOUR, LETTERS = Look(), Look(letters=True)
values = st.lists(st.floats(0, 1e3), min_size=6, max_size=6)


@given(values, st.integers(1, 120), st.booleans())
def test_a_bar_is_as_wide_as_its_room(parts: list[float], width: int, letters: bool) -> None:
    assert length(tuple(stacked(parts, width, Look(letters)))) == width


@given(values, st.integers(1, 60), st.floats(1, 1e4))
def test_a_bar_with_a_scale_too(parts: list[float], width: int, scale: float) -> None:
    assert length(tuple(stacked(parts, width, COLOUR, scale=scale))) == width


def test_letters_are_in_proportion() -> None:
    line = plain(tuple(stacked([10, 20, 40, 10, 20, 0], 10, LETTERS)))
    assert line == "TSSNNNNQGG"


def test_colours_are_to_an_eighth_of_a_cell() -> None:
    assert stacked([1, 1, 0, 0, 0, 0], 3, COLOUR) == [
        (" ", "on tee"), ("▌", "tee on serialization"), (" ", "on serialization"),
    ]  # fmt: skip


def test_an_empty_bar_is_a_track() -> None:
    assert stacked([0] * 6, 5, COLOUR) == [("     ", "on track")]


def test_every_role_has_its_colour_in_both_themes() -> None:
    for colours in COLOURS.values():
        assert set(PARTS) <= set(colours)
        assert len({colours[part] for part in PARTS}) == len(PARTS)


def test_roles_become_styles() -> None:
    assert style("gpu on network").color is not None
    assert style("gpu on network").bgcolor is not None
    assert style("on tee").color is None
    assert style("bold good").bold
    assert style("").color is None


@given(st.floats(-1, 2), st.integers(1, 80), st.booleans())
def test_a_gauge_is_as_wide_as_its_room(fraction: float, width: int, letters: bool) -> None:
    assert length(tuple(gauge(fraction, width, "gpu", Look(letters)))) == width


@given(st.text(), st.integers(0, 40))
def test_clipped_text_fits(text: str, width: int) -> None:
    assert length(((clip(text, width), ""),)) <= width


@given(st.lists(st.tuples(st.text(alphabet="ab 漢字é"), st.just("dim")), max_size=5), st.integers(1, 40))
def test_a_line_is_made_to_fit(spans: list[tuple[str, str]], width: int) -> None:
    assert length(fit(tuple(spans), width)) == width


def test_two_sides_of_a_line() -> None:
    assert plain(sides([("left", "")], [("right", "")], 12)) == "left   right"
    assert plain(sides([("a long left side", "")], [("right", "")], 12)) == "a lon… right"


@given(st.lists(st.floats(0, 100), max_size=200), st.integers(1, 50))
def test_charts_fill_their_width(series: list[float], width: int) -> None:
    assert len(sparkline(series, width)) == width
    assert all(length(row) == width for row in area(series, width, 3, "gpu", top=100))
    shown = resampled(series, width)
    assert len(shown) == (width if series else 0)


def test_resampling_keeps_the_mean_of_what_goes_together() -> None:
    assert resampled([1, 3, 5, 7], 2) == [2, 6]
    assert resampled([1, 3], 4) == [1, 1, 3, 3]


@pytest.mark.parametrize("look", [COLOUR, LETTERS])
def test_columns(look: Look) -> None:
    rows = columns([(1, 0, 1, 0, 0, 0), (0, 0, 0, 0, 4, 0)], 2, 4, look)
    assert [length(row) for row in rows] == [2] * 4
    if look.letters:
        assert [plain(row) for row in rows] == [" G", " G", "NG", "TG"]
    else:
        assert rows[3] == ((" ", "on tee"), (" ", "on gpu"))


def test_a_column_has_two_colours_in_a_cell() -> None:
    (row,) = columns([(1, 0, 1, 0, 0, 0)], 1, 1, COLOUR)
    assert row == (("▄", "tee on network"),)


def test_tables_are_aligned() -> None:
    rows = [[("op", ""), ("count", "")], [("LINEAR", ""), ("7", "")]]
    assert [plain(line) for line in table(rows, 15)] == ["op      count  ", "LINEAR      7  "]


@given(st.text(alphabet="ab c漢\n"), st.integers(2, 20))
def test_paragraphs_break_lines(text: str, width: int) -> None:
    lines = paragraph(text, width)
    assert all(length(line) <= width for line in lines)
    said = "".join(plain(line) for line in lines)
    assert sorted(said.replace(" ", "")) == sorted(text.replace(" ", "").replace("\n", ""))


def test_parts_of_a_line_are_not_torn_apart() -> None:
    lines = wrapped([[("one", "")], [("two", "")], [("three", "")]], (" ", ""), 8)
    assert [plain(line) for line in lines] == ["one two", "three"]
