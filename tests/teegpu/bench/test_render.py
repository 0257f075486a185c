"""A document as a table, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from teegpu.bench.render import choose, render, side_by_side
from teegpu.errors import UsageError


def entry(label: str, seconds: float, **more: Any) -> dict[str, Any]:
    figures = {
        "label": label,
        "track": "case",
        "repeats": 5,
        "cold": False,
        "case": {"prefill_plan": "fused", "decode_plan": "fused", "transport": "zmq", "wire_dtype": "fp16"},
        "server": {"dtype": "bf16"},
        "threads": {"runner": 1, "server": 1},
        "prefill": {
            "seconds": {"median": seconds, "min": seconds - 0.5, "max": seconds + 0.5},
            "rpc_calls": 1067,
            "bytes_up": 1.5 * 2**20,
            "bytes_down": 2 * 2**20,
            "communication_share": 0.125,
            "speed_up": 9 / seconds,
            "ratio_to_limit": None,
        },
        "decode": {
            "seconds_per_token": {"median": 0.032, "min": 0.03125, "max": 0.0333},
            "tokens_per_second": {"median": 31.25, "min": 30.0, "max": 32.0},
            "rpc_calls_per_step": 30.5,
            "bytes_up_per_step": 100.0,
            "bytes_down_per_step": 200.0,
            "communication_share": 0.5,
            "speed_up": None,
            "ratio_to_limit": None,
        },
        "output": {"tokens": 33, "agreeing_tokens": 7, "identical": False},
        "peak_memory_bytes": 2**29,
        "samples": [],
    }
    return figures | more


def document(*results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": "teegpu.bench/1",
        "benchmark": "ladder",
        "status": "complete",
        "machine": {"cpu": "Some CPU", "cores": 2},
        "versions": {"teegpu": "1.2.3", "torch": "2.0"},
        "model": {"name": "tiny"},
        "settings": {"prompt_tokens": 1024, "decode_tokens": 32, "repeats": 5, "link": ""},
        "notes": [],
        "results": list(results),
    } | more


def test_a_table_for_people() -> None:
    text = render(document(entry("fused zmq fp16", 2.0), entry("per-op", 9.0)), "table")
    head, machine, _, title, headings, first, second, *_ = text.splitlines()
    told = "tiny · 1,024 prompt tokens · 32 decode tokens · 5 repeats · no emulated link"
    assert head == f"teegpu bench ladder · {told}"
    assert machine == "Some CPU · 2 cores · teegpu 1.2.3 · torch 2.0"
    assert title == "Prefill"
    assert headings.split("  ")[0] == "rung"
    assert " ".join(first.split()) == "fused zmq fp16 1,067 1.5 2.0 2.000 1.500–2.500 5 4.50× 12.5%"
    assert len(first) == len(second) == len(headings)
    assert "30.5" in text
    assert "first 7 of 33" in text
    assert "512.0" in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_columns_without_figures_are_left_out_and_come_with_a_link() -> None:
    without = render(document(entry("fused", 2.0)), "table")
    assert "limit" not in without
    result = entry("fused", 2.0)
    result["prefill"] |= {"limit_seconds": 1.6, "ratio_to_limit": 1.25}
    local = entry("local", 2.0)
    text = render(document(result, local, settings={"link": "rtt=5ms"}), "table")
    assert "link rtt=5ms" in text.splitlines()[0]
    assert "× limit" in text
    assert "1.25×" in text
    assert "–" in text.split("local")[1]


def test_failures_notes_and_interruptions_are_said() -> None:
    failed = {"label": "batched", "track": "case", "case": {}, "error": "no server", "samples": []}
    text = render(document(entry("fused", 2.0), failed, notes=["too many threads"], status="interrupted"), "table")
    assert text.splitlines()[0].endswith("· interrupted")
    assert text.splitlines()[-2:] == ["batched failed: no server", "too many threads"]
    assert text.count("batched") == 1


def test_several_results_side_by_side() -> None:
    settings = {"prompt_tokens": 1024, "endpoint": "", "link": "rtt=5ms,bandwidth=1gbit"}
    slow = document(entry("fused", 20.0, rung="fused", cold=True), entry("local", 1.5, rung="local"), settings=settings)
    quick = document(entry("fused", 2.0, rung="fused"), settings=settings | {"link": ""})
    lines = side_by_side([quick, slow], markdown=True).splitlines()
    assert "| rung | loopback | 1 Gbit/s, 5 ms |" in lines
    assert "| fused | 2.000 | 20.000* |" in lines
    assert "| local | – | 1.500 |" in lines
    assert lines[-1] == "* one run alone, the first one"
    assert "Decode, ms a token" in lines
    assert not any("limit" in line for line in lines)  # no entry has one


def test_markdown() -> None:
    text = render(document(entry("a|b", 2.0), notes=["a note"]), "md")
    lines = text.splitlines()
    assert "| rung | RPC calls |" in text
    assert "| --- | ---: | ---: |" in text
    assert any(line.startswith("| a\\|b | 1,067 |") for line in lines)
    assert lines[-1] == "- a note"


def test_csv_has_a_row_for_each_case_and_units_in_its_names() -> None:
    failed = {"label": "batched", "case": {"prefill_plan": "batched"}, "error": "no, server", "samples": []}
    rows = list(csv.DictReader(io.StringIO(render(document(entry("fused", 2.0), failed), "csv"))))
    assert rows[0]["prefill_seconds_median"] == "2.0"
    assert rows[0]["prefill_seconds_min"] == "1.5"
    assert rows[0]["server_dtype"] == "bf16"
    assert rows[0]["output_identical"] == "False"
    assert rows[0]["error"] == ""
    assert rows[1]["error"] == "no, server"
    assert rows[1]["prefill_seconds_median"] == ""


def test_json_is_the_document_with_lists_of_numbers_on_one_line() -> None:
    result = entry("fused", 2.0, samples=[{"token_ids": [1, 2, 3]}], numbers=[1.5, -2e-05], text="[\n 1,\n 2]")
    text = render(document(result), "json")
    assert json.loads(text) == document(result)
    assert "[1, 2, 3]" in text
    assert "[1.5, -2e-05]" in text


def test_the_tables_of_the_other_benchmarks() -> None:
    accuracy = {
        "label": "int8 wire",
        "kl_nats": 4.1e-3,
        "top1_agreement": 0.9634,
        "perplexity": 14.5,
        "positions": 5120,
    }
    text = render(document(accuracy, benchmark="accuracy", settings={"tokens": 1024}), "table")
    assert "1,024 tokens a text" in text
    assert text.splitlines()[-1].split() == ["int8", "wire", "4.1e-03", "0.9634", "14.5000", "5,120"]


@pytest.mark.parametrize(
    ("given", "out", "form"),
    [
        ("", "", "table"),
        ("md", "", "md"),
        ("", "result.json", "json"),
        ("", "result.CSV", "csv"),
        ("table", "result.json", "table"),
        ("", "result.txt", "table"),
        ("", "json", "json"),
    ],
)
def test_the_format(given: str, out: str, form: str) -> None:
    assert choose(given, out) == form


def test_an_unknown_format() -> None:
    with pytest.raises(UsageError, match="--format jsn is not one of table, json, csv, md, did you mean 'json'"):
        choose("jsn", "")
