"""A benchmark's document as a table for people, as Markdown, CSV or JSON. Pure: text out of a document."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from teegpu import formats
from teegpu.bench.columns import SHEETS, TABLES, Column, Entry
from teegpu.formats import NOTHING

FORMATS = ("table", "json", "csv", "md")


def choose(given: str, out: str) -> str:
    """The format: the one that is given, else that of the file's suffix, else ``table``. Raises ``UsageError``."""
    return formats.choose(given, out, FORMATS)


def render(document: Entry, form: str) -> str:
    """``document`` in ``form``, one of ``FORMATS``, ending in a line break."""
    if form == "json":
        return formats.as_json(document)
    if form == "csv":
        return _csv(document)
    return _text(document, markdown=form == "md")


def _csv(document: Entry) -> str:
    sheet = SHEETS[document["benchmark"]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(sheet)
    for entry in document["results"]:
        writer.writerow(value(entry) for value in sheet.values())
    return out.getvalue()


def _text(document: Entry, *, markdown: bool) -> str:
    results = document["results"]
    blocks = [_heading(document)]
    tables = TABLES[document["benchmark"]]
    for title, columns in tables(document) if callable(tables) else tables:
        rows = [[column.heading for column in columns]]
        for entry in results:
            row = [_cell(column, entry) for column in columns]
            if any(cell != NOTHING for cell in row[1:]):
                rows.append(row)
        if len(rows) == 1:
            continue
        table = _columns_that_say_something(rows)
        blocks.append(f"{title}\n\n{formats.markdown(table)}" if markdown else f"{title}\n{formats.aligned(table)}")
    failures = [f"{entry['label']} failed: {entry['error']}" for entry in results if entry.get("error")]
    remarks = [*failures, *document["notes"]]
    if remarks:
        blocks.append("\n".join(f"- {line}" if markdown else line for line in remarks))
    return "\n\n".join(blocks) + "\n"


def _heading(document: Entry) -> str:
    model, machine, settings = document["model"], document["machine"], document["settings"]
    facts = [f"teegpu bench {document['benchmark']}", *([model["name"]] if model else [])]
    facts += [f"{settings[key]:,} {word}" for key, word in _NUMBERS if key in settings]
    if "link" in settings:
        facts.append(f"link {settings['link']}" if settings["link"] else "no emulated link")
    if document["status"] != "complete":
        facts.append(document["status"])
    cores = machine["cores"]
    where = [machine["cpu"], f"{cores} core{'s' * (cores != 1)}", f"teegpu {document['versions']['teegpu']}"]
    versions = document["versions"]
    where += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return " · ".join(facts) + "\n" + " · ".join(where)


_NUMBERS = (
    ("prompt_tokens", "prompt tokens"),
    ("decode_tokens", "decode tokens"),
    ("tokens", "tokens a text"),
    ("repeats", "repeats"),
    ("rounds", "rounds"),
    ("pairs", "pairs"),
)


def _cell(column: Column, entry: Entry) -> str:
    value = column.value(entry)
    return NOTHING if value is None else column.shown(value)


def _columns_that_say_something(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """``rows`` without the columns that are empty in all of them (a link's limit where there is no link)."""
    kept = [place for place in range(len(rows[0])) if place == 0 or any(row[place] != NOTHING for row in rows[1:])]
    return [[row[place] for place in kept] for row in rows]
