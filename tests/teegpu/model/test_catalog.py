from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from teegpu.errors import ModelError
from teegpu.files import user_folder
from teegpu.model import catalog
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries to fetch anything is refused at once."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def pretend_in_hub(repository: str, model: Path, hub: Path) -> Path:
    folder = hub / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(model, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


def test_the_default_model_is_whole(smollm2) -> None:
    spec = read_spec(smollm2)
    with WeightStore(smollm2, spec) as weights:
        assert weights.size_bytes == 4 * spec.parameters

    assert (spec.layers, spec.hidden_size, spec.heads, spec.kv_heads, spec.vocab_size) == (30, 576, 9, 3, 49152)
    assert spec.parameters == 134_515_008
    assert smollm2.name == catalog.DEFAULT


def test_a_folder_is_used_where_it_is(tiny_model) -> None:
    path = tiny_model("llama").path
    folder = catalog.resolve(str(path), offline=True)

    assert (folder.name, folder.path, folder.pull_as) == (path.name, path, "")
    assert not (user_folder("cache") / "models").exists()


def test_a_relative_folder_and_one_below_home(tiny_model, monkeypatch) -> None:
    path = tiny_model("llama").path
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))

    assert catalog.resolve(path.name).path == path
    assert catalog.resolve(f"./{path.name}").path == path
    assert catalog.resolve(f"~/{path.name}").path == path


def test_a_catalogue_name_goes_before_a_folder(tiny_model, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny_model("llama").path, tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)

    assert catalog.kind_of("smollm2-135m") == "entry"
    assert catalog.resolve("./smollm2-135m").path == tmp_path / "smollm2-135m"


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"])
def test_what_was_fetched_is_found_without_a_network_under_both_names(tiny_model, tmp_path, name) -> None:
    path = pretend_in_hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0", tiny_model("llama").path, tmp_path / "hub")

    folder = catalog.resolve(name, cache_dir=tmp_path, offline=True)
    assert (folder.name, folder.path, folder.pull_as) == (name, path, name)


def test_a_whole_model_in_the_users_hub_cache_is_used_there(tiny_model, tmp_path, monkeypatch) -> None:
    snapshot = pretend_in_hub("org/name", tiny_model("llama").path, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    assert catalog.resolve("org/name", offline=True).path == snapshot
    os.truncate(snapshot / "model.safetensors", 1000)
    assert catalog.find_local("org/name") is None


@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b", "org/name"])
def test_offline_says_what_is_missing_and_how_to_get_it(tmp_path, name) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is not in .*--offline.*'teegpu model pull {name}'"):
        catalog.resolve(name, cache_dir=tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_gets_the_nearest_and_all_known_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'smolm2-135m', did you mean 'smollm2-135m'.*tinyllama-1\.1b"):
        catalog.resolve("smolm2-135m")


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./nowhere", "~nobody-of-that-name/x", "nowhere.gguf", "a/b.gguf", "a/b/c"]
)
def test_a_path_that_does_not_exist_is_no_network_name(name) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        catalog.resolve(name)


def test_a_name_that_no_path_can_have_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match="can't be looked at: File name too long"):
        catalog.resolve("x" * 5000)


def test_a_file_that_is_no_gguf_is_refused(tmp_path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        catalog.resolve(str(tmp_path / "model.bin"))


def test_looking_for_a_model_fetches_and_writes_nothing(tmp_path) -> None:
    assert catalog.find_local("smollm2-135m", cache_dir=tmp_path) is None
    assert catalog.find_local("org/name", cache_dir=tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_entries_have_names_sources_sizes_and_licences() -> None:
    assert catalog.DEFAULT in catalog.ENTRIES
    for name, entry in catalog.ENTRIES.items():
        assert entry.name == name
        assert entry.download_bytes > 10_000_000
        assert entry.spec.parameters
        assert entry.licence
        assert str(entry.source)
        assert catalog.kind_of(name) == "entry"
