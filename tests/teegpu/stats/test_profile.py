"""Profiles on disk: kept, found, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teegpu.errors import ConfigError
from teegpu.stats import profile as profiles
from teegpu.stats.profile import Server
from tests.teegpu.stats.profiles import measured, profile


def test_a_profile_is_found_again_and_is_its_users_alone(isolated_user_files: Path) -> None:
    made = profile()
    place = profiles.write(made)
    assert place == profiles.path_of(made.endpoints, "", made.digest)
    assert place.is_relative_to(isolated_user_files / "state")
    assert place.stat().st_mode & 0o777 == 0o600
    assert profiles.read(place) == made
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_profile_that_can_not_be_looked_at_fails_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("a" * 300)))
    found, why = profiles.stored((), "", "x", 1, None)
    assert found is None
    assert why.endswith("can't be read: File name too long")


def test_each_link_and_model_has_its_own() -> None:
    one = profiles.path_of(("a", "b"), "", "x")
    assert one == profiles.path_of(("b", "a"), "", "x")
    assert len({one, profiles.path_of((), "", "x"), profiles.path_of(("a", "b"), "rtt=5ms", "x"),
                profiles.path_of(("a", "b"), "", "y")}) == 4  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "now", "reason"),
    [
        ({}, {}, ""),
        ({"digest": "e" * 64}, {}, "another model"),
        ({"machine": {"cpu": "Z80", "cores": 1}}, {}, r"another machine \(Z80, 1 cores\)"),
        ({"version": "0.0.1"}, {}, "teegpu 0.0.1"),
        ({}, {"runner_threads": 5}, "had 2 threads then, and has 5 now"),
        ({}, {"server": Server("cpu", "fp32", 1)}, "bf16 on cuda with 8 threads, and does in fp32 on cpu"),
    ],
)
def test_what_a_profile_does_not_hold_for(changes: dict, now: dict, reason: str) -> None:
    import re

    found = profile(**changes).misfit(digest="d" * 64, **now)
    assert re.search(reason, found) if reason else found == ""


def test_the_command_that_renews_it() -> None:
    made = profile(link="rtt=5ms,bandwidth=1gbit")
    assert made.command == (
        "teegpu tune --model smollm2-135m --endpoint tcp://10.0.0.1:5555 --link rtt=5ms,bandwidth=1gbit"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be used"),
        ("[]", "can't be used"),
        ('{"schema": "teegpu.profile/9"}', "schema 'teegpu.profile/9'"),
        ('{"schema": "teegpu.profile/1", "rates": {}}', "schema 'teegpu.profile/1'"),
        ('{"schema": "teegpu.profile/2"}', "damaged"),
        ("[" * 100_000, "can't be used"),
        ("1" * 5000, "can't be used"),
    ],
)
def test_a_broken_profile(tmp_path: Path, text: str, message: str) -> None:
    place = tmp_path / "p.json"
    place.write_text(text)
    with pytest.raises(ConfigError, match=message):
        profiles.read(place)


def test_a_profile_with_a_wrong_figure(tmp_path: Path) -> None:
    place = tmp_path / "p.json"
    place.write_text(json.dumps(profile().to_json() | {"runner_threads": float("inf")}))
    with pytest.raises(ConfigError, match="damaged"):
        profiles.read(place)
    broken = profile().to_json()
    broken["measured"][0]["ways"][0]["seconds"] = "fast"
    place.write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="'fast' is not a time"):
        profiles.read(place)
    with pytest.raises(ConfigError, match="can't be read"):
        profiles.read(tmp_path / "none.json")


def test_between_the_lengths_that_were_measured() -> None:
    made = profile(measured=(*measured(), *measured("zmq", faster=2.0)))
    ways = made.ways("prefill", "pipelined", "fp16", 640)
    assert [(way.plan, way.chunk_tokens) for way in ways] == [
        ("fused", 256), ("fused", 2048), ("attention", 2048), ("local", 2048)
    ]  # fmt: skip
    assert [way.seconds for way in ways] == pytest.approx([0.576, 0.64, 0.704, 1.28])
    assert made.ways("prefill", "zmq", "fp16", 640)[0].seconds == pytest.approx(0.288)
    assert made.ways("prefill", "pipelined", "fp16", 2048)[0].seconds == pytest.approx(1.8432)
    assert [way.plan for way in made.ways("decode", "pipelined", "fp16", 300)] == ["local", "fused", "attention"]


@pytest.mark.parametrize(
    ("transport", "wire", "tokens"),
    [("zmq", "fp16", 64), ("pipelined", "int8", 64), ("pipelined", "fp16", 2049)],
)
def test_of_what_was_not_measured_nothing_is_said(transport: str, wire: str, tokens: int) -> None:
    assert profile().ways("prefill", transport, wire, tokens) == []


def test_one_length_alone() -> None:
    made = profile(measured=measured()[:2])
    assert made.ways("decode", "pipelined", "fp16", 100)[0].seconds == 0.02
