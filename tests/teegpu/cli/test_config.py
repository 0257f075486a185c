"""``teegpu config``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teegpu import config
from teegpu.cli.main import run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, object]]:
    assert run(["config", "show", "--json", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document: dict[str, dict[str, object]] = json.loads(captured.out)
    return document


def test_show_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_RUN_TRANSPORT", "zmq")
    document = shown(capsys)
    assert list(document) == list(config.SETTINGS)
    assert document["run.transport"] == {"value": "zmq", "source": "TEEGPU_RUN_TRANSPORT"}
    assert document["sampling.stop"] == {"value": [], "source": "default"}


def test_show_as_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated_user_files: Path
) -> None:
    monkeypatch.setenv("TEEGPU_RUN_TRANSPORT", "zmq")
    assert run(["config", "show"]) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["run.transport", '"zmq"', "TEEGPU_RUN_TRANSPORT"] in rows
    assert ["sampling.stop", "[]", "default"] in rows
    assert len([row for row in rows if row and row[0] in config.SETTINGS]) == len(config.SETTINGS), "no line is broken"
    assert captured.err == "files read: none\n"


def test_show_names_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "init"]) == 0
    Path("config.toml").write_text("[model]\nname = 'a [bold]name[/bold]'\n")
    capsys.readouterr()
    assert run(["config", "show"]) == 0
    captured = capsys.readouterr()
    assert "a [bold]name[/bold]" in captured.out
    assert captured.err == f"files read: config.toml, {config.user_file()}\n"


def test_show_of_a_given_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("[limits]\nclients = 3\n")
    document = shown(capsys, "--config", "mine.toml")
    assert document["limits.clients"] == {"value": 3, "source": "mine.toml"}


def test_show_refuses_a_typo(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.toml").write_text("[run]\ntransprot = 'zmq'\n")
    assert run(["config", "show"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "teegpu: config.toml: unknown key 'run.transprot', did you mean 'run.transport'?\n"


def test_path(capsys: pytest.CaptureFixture[str], isolated_user_files: Path) -> None:
    assert run(["config", "path"]) == 0
    assert capsys.readouterr().out == f"{isolated_user_files}/config/teegpu/config.toml\n"


def test_init_writes_the_user_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "init"]) == 0
    written = config.user_file()
    assert capsys.readouterr().out == f"{written}\n"
    assert written.read_text(encoding="utf-8") == config.render(active=False)
    assert written.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in written.parent.iterdir()] == ["config.toml"]


def test_init_keeps_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("[run]\n")
    assert run(["config", "init", "mine.toml"]) == 2
    assert capsys.readouterr().err == "teegpu: mine.toml exists: give --force to replace it\n"
    assert Path("mine.toml").read_text() == "[run]\n"
    assert run(["config", "init", "mine.toml", "--force", "--active"]) == 0
    assert Path("mine.toml").read_text(encoding="utf-8") == config.render(active=True)


def test_init_into_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["config", "init", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"name the file to write, as in '{tmp_path}/config.toml'\n")


def test_init_where_nothing_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert run(["config", "init", "file/config.toml"]) == 2
    assert capsys.readouterr().err == "teegpu: file/config.toml: can't be written: File exists\n"


def test_init_with_a_name_that_can_not_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "init", "a" * 300]) == 2
    assert capsys.readouterr().err.endswith("a: can't be written: File name too long\n")
