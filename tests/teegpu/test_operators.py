"""The file that says who runs which servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from teegpu import config, operators
from teegpu.endpoints import parse
from teegpu.errors import ConfigError

GOOD = """
[[operator]]
name = "Alpha AG, no"
share = 1
servers = ["tcp://a.example:5555#layers=0-10", "tcp://a.example:5556#layers=11-21"]
key = "alpha"

[[operator]]
name = "Beta"
share = 2
servers = ["tcp://b.example:5555"]
key = "teegpu-public:#=x"
evidence = "beta.json"
policy = "beta.toml"
""".replace(" AG, no", "")


def read(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "operators.toml"
    path.write_text(text)
    return operators.read(path)


def test_each_server_is_an_endpoint(tmp_path: Path) -> None:
    first, second, third = map(parse, read(tmp_path, GOOD))
    assert (first.address, first.layers, first.key, first.share, first.operator) == (
        "tcp://a.example:5555", (0, 10), "alpha", 1, "Alpha",
    )  # fmt: skip
    assert second.layers == (11, 21)
    assert third.key == "teegpu-public:#=x"  # keys are written with signs such as these
    assert (third.evidence, third.policy) == (str(tmp_path / "beta.json"), str(tmp_path / "beta.toml"))
    settings = config.load({"run.operators": str(tmp_path / "operators.toml")})
    assert [parse(each).operator for each in settings.run.endpoints] == ["Alpha", "Alpha", "Beta"]
    assert settings.source("run.endpoints") == str(tmp_path / "operators.toml")
    with pytest.raises(ConfigError, match="give one of them"):
        config.load({"run.operators": "x", "run.endpoints": ("tcp://a:1",)})
    with pytest.raises(ConfigError, match="decides what is secret"):
        config.load({}, environ={"TEEGPU_RUN_OPERATORS": str(tmp_path / "operators.toml")}, folder=tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('key = "alpha"', "", "there is no key"),
        ('name = "Beta"', 'name = "Alpha"', "'Alpha' is there twice"),
        ('name = "Beta"', 'name = "Be, ta"', "name has a comma"),
        ('name = "Beta"', 'nam = "Beta"', "unknown key 'nam', did you mean 'name'"),
        ("share = 2", "share = 3", "share=3 is neither"),
        ("share = 2", "share = true", "share is not what it should be"),
        ('servers = ["tcp://b.example:5555"]', "servers = [5]", "a list of addresses"),
        ('servers = ["tcp://b.example:5555"]', "servers = []", "servers is not a list"),
        ("b.example:5555", "b.example:5555#key=other", "more than layers="),
        ('policy = "beta.toml"', "", "evidence= and policy= go together"),
        ("[[operator]]", "[operator]", "is not a valid TOML file"),
        ("\n[[operator]]", "\nx = 1\n[[operator]]", "a list of [[operator]], and nothing else"),
    ],
)
def test_mistakes_are_told(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, GOOD.replace(old, new, 1 if old.startswith("\n") else -1))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for text in ("", "x", "operator = 1"):
        with pytest.raises(ConfigError):
            read(tmp_path, text)
    with pytest.raises(ConfigError, match="can't be read"):
        operators.read(tmp_path / "none")
