from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from teegpu.api.keys import ApiKeys
from teegpu.errors import ConfigError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_who_has_a_key_is_known_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# team\n{digest('one')}  -\n\n{digest('two').upper()} alice\n")
    keys = ApiKeys(str(path))
    assert keys.whose("Bearer one") == digest("one")
    assert keys.whose("bearer two") == digest("two")
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer three",
        "one",
        "Basic one",
        f"Bearer {digest('one')}",
        "Bearer \xff",
    ):
        assert keys.whose(wrong) is None


@pytest.mark.parametrize("key", ["schlüssel", "voilà", "键", "sk-_=+/.~"])
def test_a_key_is_the_bytes_that_are_sent(key: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(digest(key))
    assert ApiKeys(str(path)).whose(f"Bearer  {key} ".encode().decode("latin-1")) == digest(key)


@pytest.mark.parametrize("text", ["", "# none\n", "abc\n", digest("a")[:-1], digest("a") + "b", digest("")])
def test_files_that_hold_no_digests(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"api\.keys"):
        ApiKeys(str(path))
    with pytest.raises(ConfigError, match="can't be read"):
        ApiKeys(str(tmp_path / "none"))
