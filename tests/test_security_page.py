"""What SECURITY.md claims, and docs/attacks.md, is held by tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "SECURITY.md").read_text(encoding="utf-8")

ATTACKS = (TESTS.parent / "docs" / "attacks.md").read_text(encoding="utf-8")

NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE + ATTACKS)))


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_pages_name_exists() -> None:
    assert len(NAMED) > 50
    missing = []
    for name, test in NAMED:
        found = [path for path in (TESTS / name, TESTS / "teegpu" / name) if path.exists()]
        if len(found) != 1 or test not in names_in(found[0]):
            missing.append(f"{name}::{test}")
    assert missing == []


def test_nothing_is_called_proven_without_a_test() -> None:
    tables = re.findall(r"^\| proven \| by \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) == PAGE.count("| proven |") > 5
    assert [row for row in rows if not re.search(r"`[\w/]+\.py::\w+`", row.split("|")[2])] == []


def test_the_page_stays_short() -> None:
    assert len(PAGE.splitlines()) < 250
