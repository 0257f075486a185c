"""Options that are made from the table of settings."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
import typer

from teegpu.cli import main as cli
from teegpu.cli.flags import Flags, flags_of, takes_settings
from teegpu.config import load
from teegpu.errors import ConfigError
from teegpu.settings import SETTINGS
from tests.teegpu.cli.conftest import Teegpu

COMMANDS = sorted({command for known in SETTINGS.values() for flag in known.flags for command in flag.commands.split()})


def given(command: str, *args: str) -> Flags:
    """What a command that takes the flags of ``command`` gets for ``args``."""
    got: list[Flags] = []

    @takes_settings(command)
    def probe(*, own: Annotated[int, typer.Option()] = 1, flags: Flags) -> None:
        assert own == 1
        got.append(flags)

    app = typer.Typer(add_completion=False)
    app.command()(probe)
    typer.main.get_command(app).main(args=list(args), standalone_mode=False)
    return got[0]


def a_value(key: str) -> str:
    """A value of the setting that is not its default, as it is typed."""
    known = SETTINGS[key]
    if isinstance(known.default, tuple):
        return "tcp://127.0.0.1:1"
    if known.choices:
        return next(choice for choice in known.choices if choice != known.default)
    if isinstance(known.default, (int, float)):
        return str(type(known.default)(1 if known.default != 1 else 2 if isinstance(known.default, int) else 0.5))
    return {"server.device": "cpu", "server.layers": "0-3", "model.digest": "ab" * 32}.get(key, "words")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_table_is_in_the_help_of_its_commands(command: str, teegpu: Teegpu) -> None:
    words = command.split("-") if "-" in command else [command] if command != "bench" else ["bench", "ladder"]
    out = " ".join(teegpu(*words, "--help").out.replace("│", "").split())
    for key, flag in flags_of(command):
        names = flag.names.split()[0].split("/") if flag.names else ["--" + key.split(".")[1].replace("_", "-")]
        for name in names:
            assert re.search(rf"{name}\b", out), key


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_given_gives_nothing(command: str) -> None:
    flags = given(command)
    assert set(flags) == {key for key, _ in flags_of(command)} | {flag.also for _, flag in flags_of(command)} - {""}
    assert set(flags.values()) == {None}


@pytest.mark.parametrize(
    ("command", "key", "name"),
    [
        (command, key, (flag.names.split() or ["--" + key.split(".")[1].replace("_", "-")])[0])
        for command in COMMANDS
        for key, flag in flags_of(command)
        if not flag.values and SETTINGS[key].default is not False
        # Its file is read at once: test_operators.
        if key != "run.operators"
    ],
)
def test_a_value_reaches_its_setting(command: str, key: str, name: str) -> None:
    flags = given(command, name, a_value(key))
    loaded = load(flags, environ={})
    assert loaded.values()[key] == SETTINGS[key].parse(a_value(key)) != SETTINGS[key].default
    assert loaded.source(key) == "flag"


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--offline"], "model.offline", True),
        (["--verify"], "run.verify", "on"),
        (["--no-verify"], "run.verify", "off"),
        (["--no-record"], "record.keep", False),
        (["--save-text"], "record.save_text", True),
        (["--stop", "a", "--stop", "b"], "sampling.stop", ("a", "b")),
        (["--max-new-tokens", "3"], "run.max_tokens", 3),
    ],
)
def test_options_that_are_not_simply_a_value(args: list[str], key: str, value: Any) -> None:
    assert given("run", *args)[key] == value


@pytest.mark.parametrize(
    ("args", "plans"),
    [
        (["--plan", "fused"], ("fused", "fused")),
        (["--decode-plan", "local"], (None, "local")),
        (["--prefill-plan", "local", "--plan", "fused"], ("local", "fused")),
        (["--decode-plan", "local", "--plan", "fused"], ("fused", "local")),
    ],
)
def test_one_flag_for_two_settings_gives_way_to_their_own(args: list[str], plans: tuple[str, str]) -> None:
    flags = given("run", *args)
    assert (flags["run.prefill_plan"], flags["run.decode_plan"]) == plans


def test_a_flag_that_another_command_takes_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--wire-dtype", "fp16"]) == 2
    assert "there is no option --wire-dtype" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_option_of_a_command_means_two_things(name: str) -> None:
    command = cli.load_command(name)
    for each in vars(command).get("commands", {"": command}).values():
        names = [option for parameter in each.params for option in (*parameter.opts, *parameter.secondary_opts)]
        assert len(names) == len(set(names)), name


@pytest.mark.parametrize(
    ("option", "value"), [("--plan", "fussed"), ("--decode-plan", "fussed"), ("--temperature", "-3")]
)
def test_what_is_refused_is_called_what_was_typed(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} = "):
        given("run", option, value)
