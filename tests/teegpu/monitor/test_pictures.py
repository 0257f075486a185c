"""Pictures of the screen, compared with those that were looked at: sizes, themes, a table with its cursor.

``pytest tests/teegpu/monitor/test_pictures.py --snapshot-update`` makes them anew.
"""

from __future__ import annotations

import re

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from tests.teegpu.monitor.scene import Scene, decoding, perform, prefilling


class Svg(SingleFileSnapshotExtension):
    """A file for each picture, which a browser shows."""

    _write_mode = WriteMode.TEXT
    file_extension = "svg"


@pytest.fixture
def picture(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(Svg)


def normalised(svg: str) -> str:
    """Without what differs from one release of rich to the next, or from one process to another."""
    svg = re.sub(r"terminal-\d+-", "t-", svg)
    svg = re.sub(r"@font-face \{[^}]*\}\s*", "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def screen(keys: list[str], *, size: tuple[int, int], theme: str, prefill: bool = False) -> str:
    made = prefilling() if prefill else decoding(tokens=9)
    pictures: list[str] = []

    async def play(scene: Scene) -> None:
        await scene.press(*keys)
        await scene.update()
        pictures.append(scene.app.export_screenshot(simplify=True))

    perform(play, made, size=size, theme=theme)
    return normalised(pictures[0])


@pytest.mark.parametrize(
    ("size", "theme"), [((120, 40), "teegpu-dark"), ((80, 24), "teegpu-light")], ids=["120x40-dark", "80x24-light"]
)
def test_the_overview(picture: SnapshotAssertion, size: tuple[int, int], theme: str) -> None:
    assert screen([], size=size, theme=theme) == picture


def test_layers(picture: SnapshotAssertion) -> None:
    assert screen(["2", "down", "enter"], size=(80, 24), theme="teegpu-dark") == picture


def test_chunks(picture: SnapshotAssertion) -> None:
    assert screen([], size=(120, 40), theme="teegpu-dark", prefill=True) == picture
