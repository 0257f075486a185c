"""CSV, Markdown and SVG."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET

from teegpu.report.exports import COLUMNS, as_csv, as_markdown, as_svg, cell, escape
from teegpu.report.tables import tables
from tests.teegpu.report.samples import HOSTILE, document


def test_csv_has_a_row_for_each_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(document()))))
    assert tuple(rows[0]) == COLUMNS
    figures = {(row["phase"], row["metric"]): row["value"] for row in rows}
    assert len(figures) == len(rows)
    assert figures["decode", "rpc_calls"] == "1891"
    assert figures["prefill", "busy.gpu_seconds"] == "0.9"
    assert figures["prefill", "ops.LINEAR.seconds"] == "0.75"
    assert figures["decode", "layers.29.gpu_seconds"] == str(0.015 * 3)
    assert figures["", "latency.ttft_seconds"] == "2.001"
    assert figures["", "limit.ratio"] == "1.42"
    assert {row["model"] for row in rows} == {"smollm2-135m"}


def test_csv_cells_are_no_formulas() -> None:
    assert cell("=1+1") == "'=1+1"
    assert cell("plain") == "plain"
    assert cell("") == ""
    assert ",'=HYPERLINK()," in as_csv(document(model={"name": "=HYPERLINK()"}))


def test_markdown_has_the_same_rows_in_tables_of_their_own() -> None:
    shown = as_markdown(document())
    assert shown.startswith("### Run 20260102-030405-abcdef\n")
    assert "| Communication Overhead | count | total s | avg ms | share |\n| --- | ---: |" in shown
    assert "| RPC calls | 60 | 0.800 | 13.333 | 40.0% |" in shown
    assert "| **TOTAL** |  | **2.000** |  | **100.0%** |" in shown
    assert "| KV\\_CACHE | 30 |" in shown
    assert (
        "1. Decoding in the TEE avoids 61 round trips a token. · `run.decode_plan = local` · saves about 800 ms"
        in shown
    )
    assert "> 10GbE, jumbo frames" in shown
    tables_of = re.findall(r"(?:^\|.*\n?)+", shown, re.MULTILINE)
    assert all(len({row.count("|") for row in table.strip().splitlines()}) == 1 for table in tables_of)


def test_markdown_of_hostile_strings() -> None:
    shown = as_markdown(document(note=HOSTILE, id=HOSTILE, advice=[{"text": HOSTILE, "setting": HOSTILE, "value": 1}]))
    outside = re.sub(r"`[^`\n]*`", "", shown)
    assert "<script>" not in re.sub(r"\\<", "", outside)
    assert "@all" not in outside
    assert "\x1b" not in shown
    assert escape("tcp://a_b") == "tcp:&#8203;//a\\_b"


def test_svg_is_one_image_that_needs_nothing() -> None:
    shown = as_svg(tables(document(note=HOSTILE)), f"teegpu report {HOSTILE!r}", 88)
    root = ET.fromstring(shown)
    assert root.tag.endswith("svg")
    assert "url(http" not in shown
    assert "@font-face" not in shown
    words = "".join(root.itertext()).replace("\xa0", " ")
    assert "Communication Overhead" in words
    assert "100.0%" in words
    assert "<script" not in shown
