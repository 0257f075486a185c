"""Where settings come from, what is refused, and the generated files."""

from __future__ import annotations

import os
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import transports
from teegpu import config
from teegpu.config import SETTINGS, TRANSPORTS, Config, load, render, to_toml, variable_name
from teegpu.errors import ConfigError
from teegpu.settings import Setting

ROOT = Path(config.__file__).resolve().parent.parent


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose user configuration is under ``tmp_path/user``."""
    return {"XDG_CONFIG_HOME": str(tmp_path / "user")}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str, tmp_path: Path) -> str:
    """What ``load`` says of a file with this text, without the file's name."""
    path = write(tmp_path / "bad.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(config_file=path, environ={"HOME": str(tmp_path)})
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_defaults(environ: dict[str, str], tmp_path: Path) -> None:
    loaded = load(environ=environ, folder=tmp_path)
    assert loaded == Config()
    assert loaded.run.transport == "pipelined"
    assert loaded.sampling.stop == ()
    assert {loaded.source(key) for key in SETTINGS} == {"default"}


def test_every_default_is_allowed() -> None:
    for key, known in SETTINGS.items():
        assert known.check(known.default) == known.default, key


def test_each_source_hides_the_weaker_ones(environ: dict[str, str], tmp_path: Path) -> None:
    user = write(config.user_file(environ), "[run]\nmax_tokens = 1\nthreads = 1\nspeculate = 1\nchunk_tokens = 1\n")
    project = write(tmp_path / "config.toml", "[run]\nmax_tokens = 2\nthreads = 2\nspeculate = 2\n")
    environ |= {"TEEGPU_RUN_MAX_TOKENS": "3", "TEEGPU_RUN_THREADS": "3"}
    loaded = load({"run.max_tokens": 4, "run.link": None}, environ=environ, folder=tmp_path)
    run = loaded.run
    assert (run.max_tokens, run.threads, run.speculate, run.chunk_tokens, run.link) == (4, 3, 2, 1, "")
    assert loaded.source("run.max_tokens") == "flag"
    assert loaded.source("run.threads") == "TEEGPU_RUN_THREADS"
    assert loaded.source("run.speculate") == str(project)
    assert loaded.source("run.chunk_tokens") == str(user)
    assert loaded.source("run.link") == "default"


def test_a_given_file_replaces_the_one_in_the_folder(environ: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "config.toml", "[run]\nmax_tokens = 2\nthreads = 2\n")
    given = write(tmp_path / "given.toml", "[run]\nmax_tokens = 3\n")
    loaded = load(config_file=given, environ=environ, folder=tmp_path)
    assert (loaded.run.max_tokens, loaded.run.threads) == (3, 0)


def test_a_given_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none\.toml: there is no such file"):
        load(config_file=tmp_path / "none.toml", environ={})


def test_the_folder_is_the_current_one(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "config.toml", "[server]\nthreads = 3\n")
    monkeypatch.chdir(tmp_path)
    loaded = load(environ=environ)
    assert loaded.server.threads == 3
    assert loaded.source("server.threads") == "config.toml"


def test_user_file_ignores_a_relative_xdg_folder(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": "relative", "HOME": str(tmp_path)}
    assert config.user_file(environ) == tmp_path / ".config/teegpu/config.toml"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.name", "some/id", "some/id"),
        ("model.offline", "true", True),
        ("model.offline", "0", False),
        ("run.max_tokens", "17", 17),
        ("sampling.temperature", "0.5", 0.5),
        ("sampling.temperature", "1", 1.0),
        ("sampling.stop", "END", ("END",)),
        ("sampling.stop", '["a", "b"]', ("a", "b")),
        ("sampling.stop", "", ()),
        ("server.device", "cuda:1", "cuda:1"),
    ],
)
def test_variables(key: str, text: str, value: object, tmp_path: Path) -> None:
    loaded = load(environ={variable_name(key): text}, folder=tmp_path)
    assert loaded.values()[key] == value
    assert loaded.source(key) == variable_name(key)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("TEEGPU_RUN_MAX_TOKENS", "many", "TEEGPU_RUN_MAX_TOKENS='many' is not a whole number"),
        ("TEEGPU_RUN_MAX_TOKENS", "0", "TEEGPU_RUN_MAX_TOKENS='0' is below the least, 1"),
        ("TEEGPU_MODEL_OFFLINE", "maybe", "TEEGPU_MODEL_OFFLINE='maybe' is not true or false"),
        ("TEEGPU_SAMPLING_TEMPERATURE", "nan", "TEEGPU_SAMPLING_TEMPERATURE='nan' is not a number"),
        ("TEEGPU_SAMPLING_STOP", "[1]", "TEEGPU_SAMPLING_STOP='[1]' is not a list of strings"),
        ("TEEGPU_SAMPLING_STOP", "[a", "TEEGPU_SAMPLING_STOP='[a' is not a TOML array of strings"),
        ("TEEGPU_RUN_TRANSPROT", "zmq", "did you mean 'TEEGPU_RUN_TRANSPORT'?"),
    ],
)
def test_bad_variables(variable: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={variable: text}, folder=tmp_path)
    assert message in str(caught.value)
    assert variable in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rnu]\n", "unknown section [rnu], did you mean 'run'?"),
        ("[run]\ntransprot = 'zmq'\n", "unknown key 'run.transprot', did you mean 'run.transport'?"),
        ("[run]\nqqqqqqqqqq = 1\n", "unknown key 'run.qqqqqqqqqq'"),
        ("transport = 'zmq'\n", "'transport' stands outside of any section; did you mean it in section [run]?"),
        ("xyz = 1\n", "'xyz' stands outside of any section"),
        ("[run]\nmax_tokens = '3'\n", 'run.max_tokens = "3" is not a whole number'),
        ("[run]\nmax_tokens = 3.0\n", "run.max_tokens = 3.0 is not a whole number"),
        ("[run]\nmax_tokens = true\n", "run.max_tokens = true is not a whole number"),
        ("[run]\nmax_tokens = 0\n", "run.max_tokens = 0 is below the least, 1"),
        ("[run]\nlink = 3\n", "run.link = 3 is not a string"),
        ("[run]\nlink = 2026-01-01\n", "run.link = datetime.date(2026, 1, 1) is not a string"),
        ("[model]\noffline = 1\n", "model.offline = 1 is not true or false"),
        ("[sampling]\ntop_p = 0\n", "sampling.top_p = 0 must be above 0"),
        ("[sampling]\ntop_p = 1.5\n", "sampling.top_p = 1.5 is above the most, 1"),
        ("[sampling]\ntemperature = inf\n", "sampling.temperature = inf is not a number"),
        ("[sampling]\nstop = 'x'\n", 'sampling.stop = "x" is not a list of strings'),
        ("[sampling]\nstop = [1]\n", "sampling.stop = [1] is not a list of strings"),
        ("[server]\ndevice = 'gpu'\n", 'server.device = "gpu" is not auto, cpu, cuda or cuda:<number>'),
        (
            "[run]\ntransport = 'pipeline'\n",
            'run.transport = "pipeline" is not one of zmq, zmq+zstd, pipelined, pipelined+zstd, inprocess, '
            "did you mean 'pipelined'?",
        ),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(text, tmp_path) == message


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    assert refusal("[run\n", tmp_path).startswith("not a valid TOML file: ")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a valid TOML file"):
        load(config_file=path, environ={})


def test_a_file_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load(config_file=tmp_path, environ={})


def test_bad_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^the command line: run\.prefill_plan = "fast" is not one of auto, local, '):
        load({"run.prefill_plan": "fast"}, environ={}, folder=tmp_path)
    with pytest.raises(KeyError, match=r"run\.plan"):
        load({"run.plan": "fused"}, environ={}, folder=tmp_path)


def test_source_of_an_unknown_key() -> None:
    with pytest.raises(KeyError):
        Config().source("run.transprot")


def test_a_config_can_not_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().run.threads = 3  # type: ignore[misc]


def test_cache_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert Config().model.cache_path is None
    given = load({"model.cache_dir": "~/models"}, environ={}, folder=Path(os.devnull).parent)
    assert given.model.cache_path == Path("/home/user/models")


def test_the_project_file_is_the_generated_one_and_says_the_defaults(tmp_path: Path) -> None:
    committed = ROOT / "config.toml"
    hint = "renew it with: teegpu config init --active --force config.toml"
    assert committed.read_text(encoding="utf-8") == render(active=True), hint
    loaded = load(config_file=committed, environ={"HOME": str(tmp_path)})
    assert loaded == Config()
    assert {loaded.source(key) for key in SETTINGS} == {str(committed)}


def test_the_user_file_changes_nothing_until_a_line_is_uncommented(tmp_path: Path) -> None:
    text = render(active=False)
    path = write(tmp_path / "user.toml", text)
    assert load(config_file=path, environ={"HOME": str(tmp_path)}).sources == {}
    write(path, text.replace("#wire_dtype =", "wire_dtype ="))
    assert set(load(config_file=path, environ={"HOME": str(tmp_path)}).sources) == {"run.wire_dtype"}


def test_generated_lines_are_short_and_every_setting_is_explained() -> None:
    assert max(len(line) for line in render(active=True).splitlines()) <= 120
    for key, known in SETTINGS.items():
        assert known.comment.endswith("."), key


@pytest.mark.parametrize("value", ['a "quoted" \\ text', "tab\tnewline\n", "\x7f\x00", "grün", True, 3, 0.0005, 1e-05])
def test_toml_values_read_back(value: object) -> None:
    assert tomllib.loads(f"x = {to_toml(value)}")["x"] == value


def test_toml_lists_read_back() -> None:
    values = ("a", 'b"')
    assert tomllib.loads(f"x = {to_toml(values)}")["x"] == list(values)


def test_transport_names_are_those_that_exist() -> None:
    assert transports.names() == TRANSPORTS


def test_kinds_in_words() -> None:
    kinds = {Setting(default, "").kind for default in ("", True, 1, 1.0, ())}
    assert kinds == {"a string", "true or false", "a whole number", "a number", "a list of strings"}
