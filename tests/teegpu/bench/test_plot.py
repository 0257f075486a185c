"""The picture of the ladder: a row for each rung, a column for each link, the figures in it."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from teegpu.bench.plot import Panel, check_phase, link_name, plot
from teegpu.bench.rungs import RUNGS
from teegpu.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"


def entry(rung: str, seconds: float, **more: Any) -> dict[str, Any]:
    spread = {"median": seconds, "min": seconds * 0.9, "max": seconds * 1.1}
    figures = {
        "rung": rung,
        "label": RUNGS[rung].label,
        "track": RUNGS[rung].track,
        "case": {"remote": bool(RUNGS[rung].transport)},
        "cold": False,
        "prefill": {"seconds": spread, "limit_seconds": seconds / 2},
        "decode": {"seconds_per_token": spread, "limit_seconds": seconds, "steps": 2, "tokens_per_step": 2.0},
    }
    return figures | more


def document(*results: dict[str, Any], link: str = "", **more: Any) -> dict[str, Any]:
    settings = {"prompt_tokens": 1024, "link": link, "endpoint": ""}
    return {
        "model": {"name": "tiny <1>"},
        "machine": {"cpu": "Some & CPU", "cores": 1},
        "versions": {"teegpu": "1.2.3"},
        "settings": settings | more,
        "results": list(results),
    }


def drawn(*documents: dict[str, Any], phase: str = "prefill") -> ElementTree.Element:
    svg = plot([Panel.read(each, phase) for each in documents], phase)
    root = ElementTree.fromstring(svg)
    assert (root.get("width"), root.find(f"{SVG}rect").get("fill")) == ("880", "#ffffff")  # type: ignore[union-attr]
    # nothing leaves the picture
    height = float(root.get("height") or 0)
    for shape in root.iter():
        for name, value in shape.attrib.items():
            if name in ("x", "x1", "x2", "y", "y1", "y2"):
                assert 0 <= float(value) <= (880 if name[0] == "x" else height), ElementTree.tostring(shape)
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def bars(root: ElementTree.Element) -> list[float]:
    return [float(rect.get("width") or 0) for group in root.iter(f"{SVG}g") for rect in group.iter(f"{SVG}rect")]


def test_a_row_for_each_rung_and_a_column_for_each_link() -> None:
    loopback = document(entry("local", 1.0), entry("per-op", 4.0), entry("fused", 2.0), entry("kv-cache", 9.0))
    slow = document(entry("per-op", 160.25), entry("local", 1.0), link="rtt=20ms,bandwidth=200mbit")
    root = drawn(loopback, slow)
    found = texts(root)
    assert found[0] == "tiny <1>: prefill of 1,024 tokens, in seconds"
    assert found[1] == "Some & CPU, 1 core, teegpu 1.2.3"
    # in the ladder's order, the rungs of decode left out
    assert found[2:5] == ["per-op, packed in msgpack", "+ fused", "local: all in the TEE"]
    assert found[5:9] == ["loopback", "4.00", "2.00", "1.00"]
    assert found[9:13] == ["200 Mbit/s, 20 ms", "160", "–", "1.00"]
    # each column has its own scale, from zero
    lengths = bars(root)
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01) == pytest.approx(4 * lengths[2], rel=0.01)
    assert lengths[3] == pytest.approx(lengths[0], rel=0.01)
    assert "Offloading pays where a bar ends before it" in found[-1]


def test_decode_is_told_in_milliseconds_a_token() -> None:
    root = drawn(document(entry("no-kv-cache", 0.2), entry("kv-cache", 0.05), entry("fused", 0.1)), phase="decode")
    found = texts(root)
    assert found[0] == "tiny <1>: decode after 1,024 tokens, in milliseconds a token"
    assert found[2:7] == ["without caches", "+ KV cache", "loopback", "200", "50.0"]
    # the limit of four tokens is 0.2 s, so a quarter of the bar is one token's
    (first, *_), *_ = (list(group.iter(f"{SVG}line")) for group in root.iter(f"{SVG}g"))
    assert first.get("stroke") == "#222222"


def test_more_links_than_fit_beside_each_other_go_below() -> None:
    five = [document(entry("fused", 1.0), link=f"rtt={n}ms") for n in range(1, 6)]
    assert texts(drawn(*five)).count("+ fused") == 2
    assert float(drawn(*five).get("height") or 0) > float(drawn(*five[:4]).get("height") or 0)


def test_what_is_the_first_run_alone_is_marked() -> None:
    found = texts(drawn(document(entry("per-op", 12.0, cold=True))))
    assert "12.0*" in found
    assert found[-1] == "* one run alone, the first one."
    assert not any("Dashed" in text for text in found)


def test_a_rung_that_was_not_measured_has_no_bar() -> None:
    failed = {"rung": "fused", "track": "prefill", "cold": False, "error": "no server"}
    assert texts(drawn(document(entry("per-op", 1.0), failed)))[2:4] == ["per-op, packed in msgpack", "loopback"]


def test_cases_of_one_s_own_come_after_the_rungs() -> None:
    own = entry("fused", 2.0) | {"rung": "mine", "label": "mine", "track": "case"}
    assert texts(drawn(document(own, entry("per-op", 4.0))))[2:4] == ["per-op, packed in msgpack", "mine"]


@pytest.mark.parametrize(
    ("link", "endpoint", "name"),
    [
        ("", "", "loopback"),
        ("", "tcp://10.0.0.1:5555", "server at the endpoint"),
        ("rtt=200us,bandwidth=10gbit", "", "10 Gbit/s, 200 µs"),
        ("rtt=5ms,bandwidth=unlimited", "", "no limit, 5 ms"),
        ("rtt=5ms,up=1gbit,down=2gbit", "", "rtt=5ms,up=1gbit,down=2gbit"),
    ],
)
def test_names_of_links(link: str, endpoint: str, name: str) -> None:
    assert link_name(link, endpoint) == name


def test_what_can_not_be_drawn() -> None:
    one = document(entry("fused", 1.0))
    with pytest.raises(UsageError, match="--phase prefil is not one of prefill, decode, did you mean 'prefill'"):
        check_phase("prefil")
    with pytest.raises(UsageError, match="there is no prefill in these results"):
        drawn(document(entry("kv-cache", 1.0)))
    other = document(entry("fused", 1.0), prompt_tokens=64)
    with pytest.raises(UsageError, match=re.escape("not of one model and prompt, but of tiny <1>: prefill of 1,024")):
        drawn(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1"])
def test_figures_that_can_not_be(value: Any) -> None:
    bad = entry("fused", 1.0)
    bad["prefill"]["seconds"]["median"] = value
    with pytest.raises((ValueError, TypeError)):
        Panel.read(document(bad), "prefill")
