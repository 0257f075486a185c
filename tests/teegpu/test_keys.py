"""What the settings mean by a key: a name, a file, or a public key itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from teegpu import keys, options
from teegpu.config import Config, LinkSettings, RunSettings, ServerSettings
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError
from transports.errors import BadKeyError
from transports.security import KeyPair

ENDPOINT = Endpoint("tcp://10.0.0.1:5555")


def config(**link: str) -> Config:
    return Config(run=RunSettings(endpoints=(ENDPOINT.address,)), link=LinkSettings(**link))


@pytest.fixture
def pairs() -> tuple[KeyPair, KeyPair]:
    """The keys ``server`` and ``me``."""
    return keys.new("server"), keys.new("me")


def test_the_folder_is_beside_the_settings(isolated_user_files: Path) -> None:
    assert keys.folder() == isolated_user_files / "config" / "teegpu" / "keys"


def test_a_connection_has_the_keys_of_the_settings(pairs: tuple[KeyPair, KeyPair]) -> None:
    server, me = pairs
    found = options.client_options(config(server_key="server", client_key="me"), ENDPOINT).keys
    assert found is not None
    assert (found.own, found.server) == (me, server.public)


def test_an_endpoint_has_its_own_key(pairs: tuple[KeyPair, KeyPair]) -> None:
    other = keys.new("other")
    for settings in (config(client_key="me"), config(client_key="me", server_key="server")):
        found = keys.client_keys(settings, replace(ENDPOINT, key="other"))
        assert found is not None
        assert found.server == other.public


def test_a_public_key_may_be_given_as_it_is(pairs: tuple[KeyPair, KeyPair]) -> None:
    found = keys.client_keys(config(server_key=pairs[0].public.text, client_key="me"), ENDPOINT)
    assert found is not None
    assert found.server == pairs[0].public


def test_files_are_given_with_their_path(pairs: tuple[KeyPair, KeyPair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(keys.folder()))
    public, secret = keys.public_path("server"), keys.secret_path("me")
    for settings in (config(server_key=str(public), client_key=str(secret)),
                     config(server_key="~/server.pub", client_key="~/me.key")):  # fmt: skip
        found = keys.client_keys(settings, ENDPOINT)
        assert found is not None
        assert (found.own, found.server) == (pairs[1], pairs[0].public)


def test_without_keys_there_is_no_encryption() -> None:
    assert options.client_options(config(), ENDPOINT).keys is None
    assert options.server_options(Config()).keys is None


def test_a_server_of_the_runs_own_needs_none(pairs: tuple[KeyPair, KeyPair]) -> None:
    link = LinkSettings(server_key="server", client_key="me")
    assert options.client_options(Config(link=link), Endpoint("ipc:///private/gpu")).keys is None
    assert options.client_options(Config(link=link, run=RunSettings(endpoints=("tcp://a:1",)))).keys is None


def test_one_key_without_the_other() -> None:
    with pytest.raises(ConfigError, match=r"link\.server_key is set and link\.client_key is not.*run --client-key"):
        keys.client_keys(config(server_key="server"), ENDPOINT)
    with pytest.raises(ConfigError, match=r"link\.client_key is set and link\.server_key is not.*run --server-key"):
        keys.client_keys(config(client_key="me"), ENDPOINT)


def test_the_keys_of_a_server(pairs: tuple[KeyPair, KeyPair], tmp_path: Path) -> None:
    found = keys.server_keys(Config(server=ServerSettings(key="server", auth_dir=str(tmp_path))))
    assert found is not None
    assert (found.own, found.clients) == (pairs[0], tmp_path)
    alone = keys.server_keys(Config(server=ServerSettings(key="server")))
    assert alone is not None
    assert alone.clients is None
    with pytest.raises(ConfigError, match=r"server\.auth_dir is set and server\.key is not"):
        keys.server_keys(Config(server=ServerSettings(auth_dir=str(tmp_path))))


def test_a_name_that_is_not_there(pairs: tuple[KeyPair, KeyPair]) -> None:
    with pytest.raises(ConfigError, match=r"link\.server_key: there is no key 'sever' in .*, did you mean 'server'\?"):
        keys.client_keys(config(server_key="sever", client_key="me"), ENDPOINT)
    with pytest.raises(ConfigError, match=r"link\.client_key: there is no key 'mee'"):
        keys.client_keys(config(server_key="server", client_key="mee"), ENDPOINT)
    with pytest.raises(ConfigError, match=r"run\.endpoints, key=: there is no key 'x'"):
        keys.client_keys(config(client_key="me"), replace(ENDPOINT, key="x"))


def test_keys_in_the_wrong_place(pairs: tuple[KeyPair, KeyPair]) -> None:
    secret, public = str(keys.secret_path("me")), str(keys.public_path("server"))
    with pytest.raises(ConfigError, match=r"link\.server_key: .*me\.key: this is a secret key"):
        keys.client_keys(config(server_key=secret, client_key="me"), ENDPOINT)
    with pytest.raises(ConfigError, match=r"link\.client_key: .*server\.pub: this is a public key, and a secret"):
        keys.client_keys(config(server_key="server", client_key=public), ENDPOINT)
    word = Path(secret).read_text().splitlines()[-1]
    with pytest.raises(ConfigError, match=r"link\.client_key is a key itself") as raised:
        keys.client_keys(config(server_key="server", client_key=word), ENDPOINT)
    assert word not in str(raised.value)
    with pytest.raises(ConfigError, match=r"link\.server_key: this is a secret key") as raised:
        keys.client_keys(config(server_key=word, client_key="me"), ENDPOINT)
    assert word not in str(raised.value)


def test_a_secret_that_others_can_read(pairs: tuple[KeyPair, KeyPair]) -> None:
    keys.secret_path("me").chmod(0o644)
    with pytest.raises(ConfigError, match=r"link\.client_key: .*me\.key: others on this machine can get at it"):
        keys.client_keys(config(server_key="server", client_key="me"), ENDPOINT)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "a b", "é", "a" * 101, "a.pub", "a.key"])
def test_names_that_can_not_be(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a key"):
        keys.new(name)
    assert not keys.folder().exists()


def test_every_key_is_listed_with_what_is_wrong_with_it(pairs: tuple[KeyPair, KeyPair]) -> None:
    theirs = keys.folder() / "theirs.pub"
    keys.public_path("server").rename(theirs)
    mixed = keys.new("mixed")
    keys.public_path("mixed").write_text(pairs[1].public.text)
    keys.secret_path("me").chmod(0o640)
    (keys.folder() / "damaged.pub").write_text("teegpu-public:")
    (keys.folder() / "notes.txt").write_text("")
    found = {key.name: key for key in keys.all_keys()}
    assert list(found) == ["damaged", "me", "mixed", "server", "theirs"]
    assert "is damaged" in found["damaged"].trouble
    assert "others on this machine" in found["me"].trouble
    assert "is not the public key of" in found["mixed"].trouble
    assert found["mixed"].fingerprint == mixed.public.fingerprint
    assert (found["server"].has_secret, found["server"].trouble) == (True, "")
    assert (found["theirs"].has_secret, found["theirs"].trouble) == (False, "")
    assert found["theirs"].fingerprint == found["server"].fingerprint == pairs[0].public.fingerprint


def test_a_public_key_without_its_file_is_that_of_the_pair(pairs: tuple[KeyPair, KeyPair]) -> None:
    keys.public_path("me").unlink()
    assert keys.public("me") == pairs[1].public


def test_no_pair_is_made_over_another(pairs: tuple[KeyPair, KeyPair]) -> None:
    with pytest.raises(BadKeyError, match="exists already"):
        keys.new("me")
    assert keys.new("me", replace=True) != pairs[1]


def test_a_folder_that_can_not_be_looked_at_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ("a" * 300)))
    assert not keys.folder_trouble()
    with pytest.raises(ConfigError, match="/keys can't be read: File name too long"):
        keys.all_keys()
