"""Changing somebody's settings file."""

from __future__ import annotations

from pathlib import Path

import pytest

from teegpu import config
from teegpu.configfile import updated
from teegpu.errors import ConfigError

CHANGES = {"run.transport": "zmq", "run.chunk_tokens": 64}


def test_an_empty_file_gets_a_section() -> None:
    assert updated("", CHANGES, "f") == '[run]\ntransport = "zmq"\nchunk_tokens = 64\n'


def test_values_change_where_they_stand_and_comments_stay() -> None:
    text = '# mine\n[run]\n  transport = "pipelined" # quick\nthreads = 2\n\n# more\n[server]\nthreads = 3\n'
    assert updated(text, CHANGES, "f") == (
        '# mine\n[run]\n  transport = "zmq" # quick\nthreads = 2\nchunk_tokens = 64\n\n# more\n[server]\nthreads = 3\n'
    )


@pytest.mark.parametrize("active", [True, False])
def test_the_generated_file_takes_all_of_it(tmp_path: Path, active: bool) -> None:
    text = config.render(active=active)
    path = tmp_path / "config.toml"
    path.write_text(updated(text, CHANGES | {"run.prefill_plan": "local"}, "f"))
    loaded = config.load(config_file=path, environ={"HOME": str(tmp_path)})
    assert (loaded.run.transport, loaded.run.chunk_tokens, loaded.run.prefill_plan) == ("zmq", 64, "local")
    assert path.read_text().count("#") == text.count("#")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('run.transport = "pipelined"\n', "set run.transport"),
        ('run = { transport = "pipelined" }\n', "by hand"),
        ("[run]\ntransport = '''\nx'''\n", "by hand"),
        ("[run\n", "not a valid TOML file"),
    ],
)
def test_what_can_not_be_changed_is_left_alone(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        updated(text, CHANGES, "f")
