"""Keys as words and as files: nothing is taken for what it is not, and no secret is read that others could read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from transports import security
from transports.errors import BadKeyError
from transports.security import PUBLIC_LABEL, SECRET_LABEL, KeyPair, PublicKey


@pytest.fixture(scope="module")
def pair() -> KeyPair:
    return security.new_pair()


@pytest.fixture
def files(pair: KeyPair, tmp_path: Path) -> tuple[Path, Path]:
    """The public and the secret file of ``pair``."""
    public, secret = tmp_path / "keys" / "a.pub", tmp_path / "keys" / "a.key"
    security.write_pair(pair, public, secret)
    return public, secret


def test_a_pair_is_what_its_secret_half_makes_of_it(pair: KeyPair) -> None:
    assert security.pair_of(pair.secret) == pair
    assert len(pair.secret) == len(pair.public.raw) == 32
    assert security.new_pair() != pair


def test_the_secret_is_in_no_repr(pair: KeyPair) -> None:
    told = repr(security.ClientKeys(pair, pair.public)) + repr(security.ServerKeys(pair, None)) + repr(pair)
    assert repr(pair.secret) not in told


def test_a_fingerprint_tells_keys_apart(pair: KeyPair) -> None:
    assert len(pair.public.fingerprint) * 4 == 128
    assert str(pair.public) == pair.public.fingerprint != security.new_pair().public.fingerprint


def test_a_key_as_a_word(pair: KeyPair) -> None:
    assert pair.public.text.startswith(PUBLIC_LABEL)
    assert security.parse_public(f"# of nobody\n\n {pair.public.text} \n", "here") == pair.public


def test_no_key_is_taken_for_one_of_the_other_kind(files: tuple[Path, Path]) -> None:
    public, secret = files
    with pytest.raises(BadKeyError, match=r"a\.key: this is a secret key, and a public one belongs here"):
        security.read_public(secret)
    public.chmod(0o600)
    with pytest.raises(BadKeyError, match=r"a\.pub: this is a public key, and a secret one is needed here"):
        security.read_secret(public)


def test_a_label_that_was_edited_does_not_change_what_a_key_is(files: tuple[Path, Path]) -> None:
    public, secret = files
    for path, theirs, ours, read in (
        (public, PUBLIC_LABEL, SECRET_LABEL, security.read_secret),
        (secret, SECRET_LABEL, PUBLIC_LABEL, security.read_public),
    ):
        path.write_text(path.read_text().replace(theirs, ours))
        path.chmod(0o600)
        with pytest.raises(BadKeyError, match="the key is damaged, its checksum is wrong"):
            read(path)


@pytest.mark.parametrize("place", [0, 20, 44])
def test_a_character_that_was_changed(pair: KeyPair, place: int) -> None:
    word = pair.public.text.removeprefix(PUBLIC_LABEL)
    other = "0" if word[place] != "0" else "1"
    with pytest.raises(BadKeyError, match="here: the key is damaged"):
        security.parse_public(PUBLIC_LABEL + word[:place] + other + word[place + 1 :], "here")


@pytest.mark.parametrize("word", ["", "0" * 40, "0" * 45, "0" * 90, "#" * 45, "é" * 45, '"' * 45, "0" * 44])
def test_a_word_that_is_no_key(word: str) -> None:
    with pytest.raises(BadKeyError, match="here: the key is damaged"):
        security.parse_public(PUBLIC_LABEL + word, "here")


@pytest.mark.parametrize("content", ["", "# nothing\n", "ssh-ed25519 AAAA", "0" * 40])
def test_what_is_no_key_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.pub"
    path.write_text(content)
    with pytest.raises(BadKeyError, match=r"a\.pub: this is no key of teegpu"):
        security.read_public(path)


def test_two_keys_in_one_file(pair: KeyPair, tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    path.write_text(f"{pair.public.text}\n{pair.public.text}\n")
    with pytest.raises(BadKeyError, match="this is no key of teegpu"):
        security.read_public(path)


def test_no_error_shows_what_the_file_holds(pair: KeyPair, files: tuple[Path, Path]) -> None:
    word = files[1].read_text().splitlines()[-1].removeprefix(SECRET_LABEL)
    for text in (SECRET_LABEL + word, SECRET_LABEL + word[:-1], PUBLIC_LABEL + word, word):
        with pytest.raises(BadKeyError) as raised:
            security.parse_public(text, "here")
        assert word[:10] not in str(raised.value)


# ---- files


def test_files_are_private_from_their_first_moment_on(files: tuple[Path, Path], pair: KeyPair) -> None:
    public, secret = files
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert security.read_secret(secret) == pair
    assert security.read_public(public) == pair.public
    assert sorted(path.name for path in secret.parent.iterdir()) == ["a.key", "a.pub"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_secret_that_others_can_get_at(files: tuple[Path, Path], mode: int) -> None:
    secret = files[1]
    secret.chmod(mode)
    with pytest.raises(BadKeyError, match=rf"others on this machine can get at it \(mode {mode:o}\): chmod 600 "):
        security.read_secret(secret)


def test_a_secret_of_another_user(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    owner = files[1].stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(BadKeyError, match=rf"it belongs to another user \(uid {owner}\)"):
        security.read_secret(files[1])


def test_a_public_key_that_everybody_can_change(files: tuple[Path, Path]) -> None:
    files[0].chmod(0o646)
    with pytest.raises(BadKeyError, match=r"others could have changed this key: .*can be written by others .mode 646"):
        security.read_public(files[0])


def test_nothing_is_replaced_unless_it_is_meant(files: tuple[Path, Path], pair: KeyPair) -> None:
    public, secret = files
    other = security.new_pair()
    with pytest.raises(BadKeyError, match=r"a\.key: this key exists already; .* --force"):
        security.write_pair(other, public, secret)
    assert security.read_secret(secret) == pair
    secret.unlink()
    with pytest.raises(BadKeyError, match=r"a\.pub: this key exists already"):
        security.write_pair(other, public, secret)
    assert not secret.exists()
    security.write_pair(other, public, secret, replace=True)
    assert (security.read_secret(secret), security.read_public(public)) == (other, other.public)


def test_no_secret_is_put_where_others_are(tmp_path: Path, pair: KeyPair) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(BadKeyError, match=r"secret keys are to be kept there, but others .*chmod 700"):
        security.write_pair(pair, tmp_path / "a.pub", tmp_path / "a.key")
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadKeyError, match="nothing: this key file can't be read: no such file"):
        security.read_public(tmp_path / "nothing")
    with pytest.raises(BadKeyError, match="this is not a file"):
        security.read_public(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BadKeyError, match="this is not a file"):
        security.read_public(pipe)
    large = tmp_path / "large"
    large.write_bytes(b"x" * 5000)
    with pytest.raises(BadKeyError, match="it is too large"):
        security.read_public(large)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    path.write_bytes(PUBLIC_LABEL.encode() + bytes(range(128, 173)))
    with pytest.raises(BadKeyError, match="damaged"):
        security.read_public(path)


def test_equal_keys_are_equal(pair: KeyPair) -> None:
    assert PublicKey(pair.public.raw) == pair.public
