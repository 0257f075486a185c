"""The page: well-formed, self-contained, and what it says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from teegpu.report.page import page
from tests.teegpu.report.samples import HOSTILE, document, events

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what a reader would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def words(**changes: Any) -> str:
    return " ".join(" ".join(read(page(document(**changes), events())).words).split())


def test_it_is_well_formed_and_needs_nothing_from_elsewhere() -> None:
    text = page(document(), events())
    reader = read(text)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not [value for name, value in reader.attributes if name in ("src", "href", "action")]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_every_chart_is_xml_and_says_what_it_is() -> None:
    charts = re.findall(r"<svg.*?</svg>", page(document(), events()), re.DOTALL)
    assert len(charts) == 6  # shares, timeline and layers of two phases
    ids = []
    for chart in charts:
        root = ET.fromstring(chart)
        title, description = root[0], root[1]
        assert title.text
        assert description.text
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        ids += [title.get("id"), description.get("id")]
    assert len(set(ids)) == len(ids)


def test_it_shows_the_same_figures_as_the_tables() -> None:
    shown = words()
    for told in ("2.001 s", "50 ms", "p95 62.5 ms", "20.0 tokens/s", "52.5%", "Network 40.0%", "100.0%", "1.42×",
                 "RPC calls 60 0.800 13.333 40.0%", "layer 7: 150 ms, 3.00× the median", "10GbE, jumbo frames",
                 "run.decode_plan = local saves about 800 ms", "Some CPU · 2 cores"):  # fmt: skip
        assert told in shown


def test_shapes_stay_within_their_charts() -> None:
    boxes = 0
    for chart in re.findall(r"<svg.*?</svg>", page(document(), events()), re.DOTALL):
        root = ET.fromstring(chart)
        width, height = map(float, root.get("viewBox", "").split()[2:])
        for path in root.iter("{http://www.w3.org/2000/svg}path"):
            for box in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-", path.get("d", "")):
                x, y, w, h = map(float, box)
                assert -0.1 <= x <= x + w <= width + 0.1
                assert -0.1 <= y <= y + h <= height + 0.1
                boxes += 1
    assert boxes > 50


def test_hostile_strings_are_text() -> None:
    text = page(
        document(
            id=HOSTILE,
            note=HOSTILE,
            status=HOSTILE,
            model={"name": HOSTILE},
            server={"device": HOSTILE},
            environment={"cpu": HOSTILE},
            phases__prefill__ops={HOSTILE: {"where": "tee", "count": 1, "seconds": 1.0}},
            advice=[{"text": HOSTILE, "setting": '"><img src=x onerror=alert(1)>', "value": 1}],
            endpoints=[{"address": HOSTILE, "retries": 1}],
        ),
        events(),
    )
    reader = read(text)
    assert not {"script", "img", "b"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "\x1b" not in text


def test_without_events_there_is_no_timeline() -> None:
    text = page(document())
    assert "Timeline" not in text
    assert text.count("<svg") == 4


@pytest.mark.parametrize("nothing", [{}, {"phases": {"decode": {"tokens": 1, "seconds": 1.0}}}, {"phases": 3}])
def test_a_record_that_lacks_nearly_all(nothing: dict[str, Any]) -> None:
    assert "unknown model" in " ".join(read(page(nothing)).words)
