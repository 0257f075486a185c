"""The report on a terminal: what it says, at every width, with and without colour."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from teegpu.report import facts
from teegpu.report.exports import as_plain
from teegpu.report.sections import Strip
from teegpu.report.tables import ASCII_SHADES, SHADES, strip_lines, tables
from tests.teegpu.report.samples import DECODE, HOSTILE, document, on_terminal


def text(width: int = 80, **changes: Any) -> str:
    return on_terminal(tables(document(**changes)), width)


def row(shown: str, section: str, label: str) -> list[str]:
    """The cells of the row ``label`` that follows the line which begins with ``section``."""
    lines = shown[shown.index(section) :].splitlines()
    return next(line.split()[len(label.split()) :] for line in lines if line.strip().startswith(label))


def test_the_rows_of_the_original_are_there_for_each_phase() -> None:
    shown = text()
    for phase in ("Prefill: 1,024 tokens in 2.000 s, 512.0 tokens/s", "Decode: 31 tokens in 1.550 s, 20.0 tokens/s"):
        place = -1
        part = shown[shown.index(phase) :]
        for heading in (
            "Communication Overhead", "RPC calls", "Serialization", "Total",
            "GPU Operations", "EMBEDDING", "LINEAR", "MATMUL", "LM_HEAD",
            "TEE Operations", "RMSNORM", "ROTARY", "SILU",
            "GPU Compute", "TEE Compute", "Communication", "TOTAL",
        ):  # fmt: skip
            place = part.index(heading, place + 1)


def test_count_total_average_and_share() -> None:
    shown = text()
    assert row(shown, "Prefill:", "RPC calls") == ["60", "0.800", "13.333", "40.0%"]
    assert row(shown, "Prefill:", "Serialization") == ["60", "0.250", "4.167", "12.5%"]
    assert row(shown, "Prefill:", "LINEAR") == ["210", "0.750", "3.571", "12.5%"]
    assert row(shown, "Prefill:", "MATMUL") == ["0", "0.000", "–", "0.0%"]
    assert row(shown, "Where the time went", "GPU Compute") == ["0.300", "15.0%"]
    assert row(shown, "Where the time went", "TOTAL") == ["2.000", "100.0%"]


@pytest.mark.parametrize("seconds", [2.0, 2.345, 1.9999, 7.0])
def test_the_printed_shares_add_up_to_100(seconds: float) -> None:
    shown = text(phases__prefill__seconds=seconds)
    part = shown[: shown.index("Decode:")]
    lines = [line for line in part[part.index("Communication Overhead") :].splitlines() if line.endswith("%")]
    found = [(line.split("  ")[1].strip(), int(line.split()[-1].rstrip("%").replace(".", ""))) for line in lines]
    last = dict(found[-6:])
    assert list(last) == ["GPU Compute", "TEE Compute", "Communication", "Server overhead", "Other", "TOTAL"]
    assert sum(last.values()) - last["TOTAL"] == 1000 == last["TOTAL"]
    operations = sum(tenths for name, tenths in found[:-6] if name != "Total")
    assert operations + last["Server overhead"] + last["Other"] == 1000
    assert sum(tenths for name, tenths in found[:-6] if name == "Total") == operations


def test_the_link() -> None:
    shown = text()
    figures = {
        "RPCs per token": ["0.06", "61.00"],
        "Retries": ["2", "0"],
        "RPC latency, p95": ["80", "ms", "80", "ms"],
        "Bytes up": ["100.0", "MiB", "1.0", "MiB"],
        "Rate down": ["75.0", "MiB/s", "1.3", "MiB/s"],
        "Compression saved up": ["20.0", "MiB", "(16.7%)", "–"],
        "Compression spent, busy": ["40", "ms", "–"],
        "Communication, exposed": ["1.050", "s", "1.150", "s"],
        "Communication, busy": ["2.150", "s", "1.150", "s"],
        "GPU compute, busy": ["900", "ms", "150", "ms"],
    }
    for label, cells in figures.items():
        assert row(shown, "Link and overlap", label) == cells
    assert "Link (measured): RTT 5 ms, up 119.2 MiB/s, down 119.2 MiB/s." in shown


def test_latency_limit_servers_environment_and_advice() -> None:
    shown = text(140)
    assert "TTFT 2.001 s · TPOT 50 ms median, 62.5 ms p95 · 20.0 tokens/s" in shown
    assert row(shown, "Limit\n", "Link: bytes and rounds") == ["2.000"]
    assert row(shown, "Limit\n", "This run took") == ["1.42×"]
    assert row(shown, "Servers", "tcp://10.0.0.2:5555") == ["1,000", "1.0", "MiB", "2.0", "MiB", "2"]
    assert "Some CPU · 2 cores · 8.00 GiB · Linux 6.1 · teegpu 0.1.0 · torch 2.11.0 · python 3.12.1" in shown
    assert "TEE tdx, not attested" in shown
    assert "operators" not in shown
    assert "server · cuda:0 · bf16 · 8 threads · teegpu 0.1.0" in shown
    assert "note: 10GbE, jumbo frames" in shown
    assert "run.decode_plan = local · saves about 800 ms" in shown
    assert "2. The prefill is within 10 % of its limit." in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_width_and_nothing_is_cut(width: int) -> None:
    shown = text(width)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown
    assert shown.count("100.0%") == 2
    assert "61.00" in shown


def test_a_terminal_that_is_far_too_narrow() -> None:
    assert "Communication" in text(30)
    assert "TOTAL" in text(30)
    assert text(5)


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=80, markup=False, highlight=False, **options)


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_without_colour_there_is_none(environ: dict[str, str]) -> None:
    plain = console(force_terminal=True, _environ=environ)
    with plain.capture() as shown:
        for block in tables(document()):
            plain.print(block)
    assert not re.search(r"\x1b\[[\d;]*3\d", shown.get())
    assert "TOTAL" in shown.get()


def test_with_colour_the_words_are_the_same() -> None:
    coloured = console(force_terminal=True, color_system="truecolor", _environ={})
    with coloured.capture() as shown:
        for block in tables(document()):
            coloured.print(block)
    assert "\x1b[" in shown.get()
    words = re.sub(r"\x1b\[[\d;]*m", "", shown.get())
    assert "\n".join(line.rstrip() for line in words.splitlines()) + "\n" == text()


# Layers


def strip(count: int, worst: int) -> Strip:
    values = tuple(0.3 if layer == worst else 0.1 for layer in range(count))
    return Strip("Prefill, by layer", tuple(range(count)), {"TEE compute": values, "Network": (0.0,) * count})


def test_a_strip_has_a_character_per_layer_and_marks_the_worst() -> None:
    title, tee, network, every, ruler, mark = strip_lines(strip(30, 7), 80)
    assert title == "Prefill, by layer"
    bar = tee.index("|") + 1
    assert tee[bar:] == SHADES[3] * 7 + "█" + SHADES[3] * 22 + "|"
    assert network[bar:] == " " * 30 + "|"
    assert every[bar:] == tee[bar:]
    assert (ruler.index("0"), ruler.index("10"), ruler.index("20")) == (bar, bar + 10, bar + 20)
    assert mark.index("^") == bar + 7
    assert "layer 7: 300 ms, 3.00× the median" in mark


@pytest.mark.parametrize("worst", [0, 40, 79])
@pytest.mark.parametrize("width", [60, 80])
def test_more_layers_than_columns_share_characters(worst: int, width: int) -> None:
    lines = strip_lines(strip(80, worst), width)
    assert max(map(cell_len, lines)) <= width
    bar = lines[1].index("|") + 1
    assert "█" in lines[1][bar:]
    assert lines[-1].index("^") == lines[1].index("█")
    assert f"layer {worst}:" in lines[-1]


def test_shades_for_terminals_without_unicode() -> None:
    assert strip_lines(strip(3, 1), 80, ASCII_SHADES)[1].endswith("|=@=|".replace("=", ASCII_SHADES[3]))

    class Ascii(io.StringIO):
        encoding = "ascii"

    plain = Console(file=Ascii(), width=80, force_terminal=False)
    with plain.capture() as shown:
        for block in tables(document()):
            plain.print(block)
    assert not set(SHADES[1:]) & set(shown.get())
    assert "@" in shown.get()


def test_in_a_file_what_is_no_table_keeps_its_lines() -> None:
    """Who searches it finds them whole."""
    note = "over the switch in the other room, " * 8
    assert f"note: {note.strip()}\n" in as_plain(tables(document(note=note.strip())), 40)


# What is missing, and what is hostile


def test_what_a_record_lacks_is_left_out() -> None:
    shown = as_plain(
        tables({"schema": "teegpu.report/1", "id": "x", "phases": {"decode": {"tokens": 3, "seconds": 1.0}}}), 80
    )
    assert "unknown model" in shown
    assert "Decode: 3 tokens in 1.000 s, 3.0 tokens/s" in shown
    assert row(shown, "Decode:", "TOTAL") == ["1.000", "100.0%"]
    assert row(shown, "Decode:", "Other") == ["1.000", "100.0%"]
    assert "Limit" not in text(limit={"link_seconds": None, "gpu_seconds": 0, "tee_seconds": 0.0})
    for word in ("Prefill", "Link", "Limit", "Advice", "layer"):
        assert word not in shown


@pytest.mark.parametrize(
    "nonsense", [{}, {"phases": []}, {"phases": {"decode": {"layers": 3, "ops": "x"}}, "advice": 7}]
)
def test_nonsense_is_no_error(nonsense: dict[str, Any]) -> None:
    assert "run (without an id)" in as_plain(tables(nonsense), 80)


def test_an_older_record_without_the_new_keys() -> None:
    new = ("rpcs_per_token", "rpc_latency", "rpc_retries")
    old = {name: value for name, value in DECODE.items() if name not in new}
    shown = text(phases__prefill={}, phases__decode=old, link=None, environment=None, record=None)
    assert row(shown, "Link and overlap", "RPCs per token") == ["61.00"]
    assert "latency," not in shown
    assert "Retries" not in shown


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        ("running", None, "running: figures so far"),
        ("interrupted", None, "interrupted"),
        ("failed", "no server", "failed: no server"),
        (None, None, "of unknown status"),
    ],
)
def test_how_the_run_ended_is_said_at_the_top(status: str | None, error: str | None, told: str) -> None:
    assert text(status=status, error=error).splitlines()[1] == told
    assert "complete" not in text()


def test_an_unfinished_phase_says_so() -> None:
    shown = text(phases__decode__seconds=0.0)
    assert "Decode: 31 tokens in 1.550 s, 20.0 tokens/s (not ended)" in shown


def test_what_is_wrong_with_the_record_is_said() -> None:
    shown = text(record={"truncated": True, "failure": "no space left", "damage": ["block 3 is damaged"]})
    assert "recording ended early: no space left" in shown
    assert "damaged record: block 3 is damaged" in shown
    assert "record.events_mib was reached" in shown


def test_parts_that_exceed_the_wall_are_said() -> None:
    assert "exceed its wall time by 25.0%" in text(phases__prefill__seconds=1.6)


def test_hostile_strings_do_nothing() -> None:
    shown = as_plain(
        tables(
            document(
                id=HOSTILE,
                note=HOSTILE,
                model={"name": HOSTILE},
                server={"device": HOSTILE, "version": HOSTILE},
                phases__prefill__ops={HOSTILE: {"where": "gpu", "count": 1, "seconds": 1.0}},
                advice=[{"text": HOSTILE, "setting": HOSTILE, "value": HOSTILE}],
                endpoints=[{"address": HOSTILE, "retries": 1}],
                error=HOSTILE,
                status=HOSTILE,
            )
        ),
        80,
    )
    assert not {char for char in shown if not char.isprintable()} - {"\n"}
    assert "[bold]x[/bold]" in shown


def test_who_runs_the_servers_is_told_with_what_is_known_of_it() -> None:
    sample = document()
    sample["settings"] = dict(sample["settings"])
    sample["settings"]["identities"] = [
        {"operator": "Alpha", "proof": "pinned", "share": 1},
        {"operator": "Alpha", "proof": "pinned", "share": 1},
        {"operator": "Beta", "proof": "attested: tdx", "share": 2},
        {"operator": "", "proof": "pinned"},
        "damaged",
    ]
    assert facts.operators(sample) == "Alpha (pinned), Beta (attested: tdx)"
    assert "operators: Alpha (pinned), Beta (attested: tdx)" in facts.environment(sample)
