"""The pages: their links lead somewhere, the program takes their commands, the long ones begin with their contents, and
none grows without end."""

from __future__ import annotations

import itertools
import operator
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teegpu.cli.main import load_command
from teegpu.config import Config
from teegpu.model.shapes import SHAPES, spec_of
from teegpu.tee.kv_cache import bytes_of

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


def commands(page: Path) -> Iterator[str]:
    """What follows ``teegpu`` in each line that is to be typed, put into a unit, or given to an image of it: of what is
    in brackets, or between bars, each possibility."""
    for block in re.findall(r"```(?:console|sh|ini)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] or lines
        for line in typed:
            found = re.match(
                r"(?:ExecStart=\S*/|docker run .* (?=teegpu:))?teegpu(?::\w+)? (.*)", line.partition(" #")[0]
            )
            if found is None:
                continue
            parts = [[one.strip() for one in part.split(" | ")] for part in re.split(r"[\[\]]", found[1].rstrip(" &"))]
            name = found[1].split()[0]
            parts[0][1:] = [f"{name} {other}" for other in parts[0][1:]]
            yield from map(" ".join, itertools.product(*parts))


def parsed(line: str) -> None:
    """Raises where the program would refuse ``line`` before it does anything; what may be missing is an argument."""
    name, *arguments = shlex.split(line)
    command: Any = load_command(name)
    context = command.make_context(name, arguments, ignore_unknown_options=False)
    while getattr(command, "commands", None):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_program_takes_every_command_of_a_page(page: Path) -> None:
    refused = []
    for line in commands(page):
        try:
            parsed(line)
        except Exception as error:  # noqa: BLE001 (typer's own kinds have no public name)
            refused.append(f"{line}: {error}")
    assert refused == []


def test_defaults_are_as_the_pages_have_them() -> None:
    said = [
        (name, int(value.replace(",", "")))
        for page in PAGES
        for name, value in re.findall(r"`(\w+\.\w+)` \((\d[\d,]*)", page.read_text(encoding="utf-8"))
    ]
    assert len(said) > 5
    assert said == [(name, operator.attrgetter(name)(Config())) for name, _ in said]


def test_what_a_position_takes_is_as_the_page_has_it() -> None:
    text = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    found = re.search(
        r"(\d+) KB for SmolLM2, (\d+) KB for Llama-3-8B; so 32 .* 1,000 positions take (\S+) and (\S+) GB", text
    )
    assert found is not None
    takes = [bytes_of(spec_of(SHAPES[name], name), 1) for name in ("smollm2-135m", "llama-3-8b")]
    assert [float(number) for number in found.groups()] == [
        *(round(each / 1e3) for each in takes), *(round(32_000 * each / 1e9, 1) for each in takes)
    ]  # fmt: skip


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
