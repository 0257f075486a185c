"""Where settings come from, what is refused, and the generated files."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import transports
from teegpu import config, settings
from teegpu.config import SETTINGS, TRANSPORTS, Config, load, render, to_toml, updated, variable_name
from teegpu.errors import ConfigError
from teegpu.fields import Setting

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


def test_a_file_that_can_not_be_looked_at_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    far = tmp_path / ("a" * 300)
    with pytest.raises(ConfigError, match="a: can't be read: File name too long"):
        load(config_file=far, environ=environ, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"config\.toml: can't be read: File name too long"):
        load(environ=environ | {"XDG_CONFIG_HOME": str(far)}, folder=tmp_path)


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


GUARDED = [key for key, known in SETTINGS.items() if known.guarded]


def other_value(key: str) -> object:
    """One that is not the default."""
    known = SETTINGS[key]
    if known.choices:
        return known.choices[1]
    if isinstance(known.default, bool):
        return not known.default
    if key == "model.digest":
        return "ab" * 32
    return ["tcp://evil.example:1"] if isinstance(known.default, tuple) else 8 if known.default == 40 else "x"


def test_what_decides_secrecy_and_belief_is_guarded() -> None:
    assert {"run.endpoints", "run.privacy", "run.verify", "link.server_key", "link.insecure"} <= set(GUARDED)
    assert {"server.key", "server.auth_dir", "record.save_text", "shield.checks"} <= set(GUARDED)


@pytest.mark.parametrize("key", GUARDED)
def test_a_guarded_setting_comes_from_flags_and_a_given_file_alone(
    key: str, environ: dict[str, str], tmp_path: Path
) -> None:
    value = other_value(key)
    if key == "run.operators":  # it is read at once
        operator = '[[operator]]\nname = "A"\nservers = ["tcp://a:1"]\nkey = "a"\n'
        value = str(write(tmp_path / "operators.toml", operator))
    section, name = key.split(".")
    text = f"[{section}]\n{name} = {to_toml(value)}\n"
    refused = f"{key} decides what is secret or believed, so only flags and the file of --config may set it"
    with pytest.raises(ConfigError, match=re.escape(f"{variable_name(key)}: {refused}")):
        load(environ={variable_name(key): to_toml(value).strip('"')}, folder=tmp_path)
    project = write(tmp_path / "config.toml", text)
    with pytest.raises(ConfigError, match=re.escape(f"{project}: {refused}")):
        load(environ=environ, folder=tmp_path)
    own = write(config.user_file(environ), text)
    with pytest.raises(ConfigError, match=re.escape(f"{own}: {refused}")):
        load(environ=environ, folder=tmp_path / "elsewhere")
    assert to_toml(load(config_file=own, environ=environ).values()[key]) == to_toml(value)
    own.unlink()
    assert to_toml(load({key: value}, environ={}, folder=tmp_path / "elsewhere").values()[key]) == to_toml(value)


def test_a_default_from_outside_does_not_weaken_what_was_given(tmp_path: Path) -> None:
    write(tmp_path / "config.toml", render(active=True))
    given = write(tmp_path / "given.toml", "[run]\nprivacy = 'pads'\n")
    environ = {"TEEGPU_RUN_PRIVACY": "none", "HOME": str(tmp_path)}
    assert load(config_file=given, environ=environ).run.privacy == "pads"
    assert load({"run.privacy": "pads"}, environ=environ, folder=tmp_path).run.privacy == "pads"


def test_the_privacy_that_is_required_can_only_be_tightened(environ: dict[str, str], tmp_path: Path) -> None:
    write(config.user_file(environ), "[run]\nrequire_privacy = 'two-server'\n")
    for stronger in ("pads", "two-server", "none"):
        loaded = load({"run.require_privacy": stronger}, environ=environ, folder=tmp_path)
        assert loaded.run.require_privacy == ("pads" if stronger == "pads" else "two-server")
    environ["TEEGPU_RUN_REQUIRE_PRIVACY"] = "pads"
    loaded = load({"run.require_privacy": "none"}, environ=environ, folder=tmp_path)
    assert (loaded.run.require_privacy, loaded.source("run.require_privacy")) == ("pads", "TEEGPU_RUN_REQUIRE_PRIVACY")


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
        (
            "[run]\nmax_tokens = 0\nthread = 2\nplan = 'local'\n[rnu]\nx = 1\n",
            "run.max_tokens = 0 is below the least, 1; unknown key 'run.thread', did you mean 'run.threads'?; "
            "unknown key 'run.plan', did you mean 'run.decode_plan' or 'run.prefill_plan'?; "
            "unknown section [rnu], did you mean 'run'?",
        ),
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
        ("[run]\ntransport = '\x9b2J'\n", 'run.transport = "\\u009b2J" is not one of zmq, zmq+zstd, pipelined, '
         "pipelined+zstd, inprocess"),
        ('"\\u001b[2J" = 1\n', "'\ufffd[2J' stands outside of any section"),
        ('["\\u001b[2J"]\n', "unknown section [\ufffd[2J]"),
        ('[run]\n"\\u001b[2J" = 1\n', "unknown key 'run.\ufffd[2J'"),
    ],
)  # fmt: skip
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


GONE = {"run.colour": "use run.theme", "old.key": "leave it out", "run.transport=tcp": "use zmq"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\ncolour = 1\n", "run.colour is gone: use run.theme"),
        ("[old]\nkey = 1\n", "old.key is gone: leave it out"),
        ("[run]\ntransport = 'tcp'\n", 'run.transport = "tcp" is gone: use zmq'),
    ],
)
def test_what_is_gone_is_refused_with_what_to_do(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, told in GONE.items():
        monkeypatch.setitem(settings.GONE, key, told)
    assert refusal(text, tmp_path) == message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TEEGPU_RUN_COLOUR", "1", "environment variable TEEGPU_RUN_COLOUR: run.colour is gone: use run.theme"),
        ("TEEGPU_OLD_KEY", "1", "environment variable TEEGPU_OLD_KEY: old.key is gone: leave it out"),
        ("TEEGPU_RUN_TRANSPORT", "tcp", "TEEGPU_RUN_TRANSPORT='tcp' is gone: use zmq"),
    ],
)
def test_variables_that_are_gone(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, told in GONE.items():
        monkeypatch.setitem(settings.GONE, key, told)
    with pytest.raises(ConfigError) as caught:
        load(environ={variable: value}, folder=tmp_path)
    assert str(caught.value) == message


def test_everything_in_the_table_of_what_is_gone_is_refused(tmp_path: Path) -> None:
    for key, told in settings.GONE.items():
        name, _, value = key.partition("=")
        section, short = name.split(".")
        assert refusal(f"[{section}]\n{short} = '{value}'\n", tmp_path).endswith(f" is gone: {told}")


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


CHANGES = {"run.transport": "zmq", "run.chunk_tokens": 64}


def test_an_empty_file_gets_a_section() -> None:
    assert updated("", CHANGES, "f") == '[run]\ntransport = "zmq"\nchunk_tokens = 64\n'


def test_values_change_where_they_stand_and_comments_stay() -> None:
    text = '# mine\n[run]\n  transport = "pipelined" # quick\nthreads = 2\n\n# more\n[server]\nthreads = 3\n'
    assert updated(text, CHANGES, "f") == (
        '# mine\n[run]\n  transport = "zmq" # quick\nthreads = 2\nchunk_tokens = 64\n\n# more\n[server]\nthreads = 3\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        'run.transport = "pipelined"\n',
        'run = { transport = "pipelined" }\n',
        "[run]\ntransport = '''\nx'''\n",
        "[run]\nstop = [\n 'a', # one\n]\n# the end\n",
        "[server]\nthreads = 3",
        "[run]\r\nthreads = 3\r\n",
    ],
)
def test_a_file_may_be_written_in_any_way(text: str) -> None:
    before, after = tomllib.loads(text), tomllib.loads(updated(text, CHANGES, "f"))
    changed = before.get("run", {}) | {"transport": "zmq", "chunk_tokens": 64}
    assert after == before | {"run": changed}


@pytest.mark.parametrize("active", [True, False])
def test_the_generated_file_takes_all_of_it(tmp_path: Path, active: bool) -> None:
    text = render(active=active)
    path = write(tmp_path / "config.toml", updated(text, CHANGES | {"run.prefill_plan": "local"}, "f"))
    loaded = load(config_file=path, environ={"HOME": str(tmp_path)})
    assert (loaded.run.transport, loaded.run.chunk_tokens, loaded.run.prefill_plan) == ("zmq", 64, "local")
    assert path.read_text().count("#") == text.count("#")
    lines = path.read_text().splitlines()
    assert lines[lines.index("[sampling]") - 1].startswith("# How the next token"), "its comment stays above a section"


@pytest.mark.parametrize(("text", "message"), [("[run\n", "not a valid TOML file"), ("run = 3\n", "outside of any")])
def test_a_file_that_can_not_be_changed_is_left_alone(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        updated(text, CHANGES, "f")
