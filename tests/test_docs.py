"""The pages: their links lead somewhere, the long ones begin with their contents, and none grows without end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LONG_LINES = 90
"""From here on a page says first what is in it; README's own sections fit on a screen."""


def prose(page: Path) -> str:
    """Without its blocks of code, in which a line may begin like a heading."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page)):
        path, _, anchor = "".join(target).partition("#")
        if "://" in path:
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append("".join(target))
    assert lost == []


@pytest.mark.parametrize("page", [each for each in PAGES if each.parent.name == "docs" or each.name == "SECURITY.md"],
                         ids=lambda page: page.name)  # fmt: skip
def test_a_long_page_begins_with_its_contents(page: Path) -> None:
    text = prose(page)
    if len(text.splitlines()) < LONG_LINES:
        return
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    contents = text.partition("\n## ")[0]
    assert len(re.findall(r"\]\(#", contents)) >= len(sections) > 0


@pytest.mark.parametrize(("name", "lines"), [("README.md", 170), ("docs/benchmarks.md", 400)])
def test_pages_that_are_to_stay_short(name: str, lines: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < lines
