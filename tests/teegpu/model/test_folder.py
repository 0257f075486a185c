from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from teegpu.errors import ModelError
from teegpu.model.folder import ModelFolder
from teegpu.model.manifest import check_pin, digest_of, manifest
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer

WEIGHTS = "a" * 64


def digest(folder: ModelFolder) -> str:
    return digest_of(manifest(folder, read_spec(folder), WEIGHTS))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tokenizer.json", b'"Split"', b'"Split" '),
        ("tokenizer.json", b'"type"', b' "type"'),
        ("tokenizer_config.json", b"<s>", b"</s>"),
        ("chat_template.jinja", b"user", b"User"),
        ("chat_template.jinja", b"{", b"Agree. {"),
        ("generation_config.json", b"257", b"258"),
        ("config.json", b"257", b"258"),
        ("added_tokens.json", b"", b"{}"),
        ("additional_chat_templates/tool_use.jinja", b"", b"x"),
    ],
)
def test_each_file_that_decides_an_answer_is_in_the_digest(copied_model, name, old, new) -> None:
    folder = copied_model("llama")
    before = digest(folder)
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    changed = content.replace(old, new, 1) if content else new
    if changed == content:
        changed = content + b" "
    stamp = path.stat() if path.exists() else None
    path.write_bytes(changed)
    if stamp is not None:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    assert digest(folder) != before
    with pytest.raises(ModelError, match=rf"model\.digest asks for {before}: nothing was computed or sent") as caught:
        check_pin(folder, read_spec(folder), WEIGHTS, before)
    assert "\n" not in str(caught.value)


def test_what_decides_nothing_is_not_in_the_digest(copied_model) -> None:
    folder = copied_model("llama")
    before = digest(folder)
    (folder.path / "README.md").write_text("hello")
    (folder.path / "training_args.bin").write_bytes(b"x")

    assert digest(replace(folder, name="another name")) == before == check_pin(folder, read_spec(folder), WEIGHTS, "")
    assert check_pin(folder, read_spec(folder), WEIGHTS, before) == before


def test_a_pinned_folder_is_what_it_was(copied_model) -> None:
    folder = copied_model("llama").pinned()
    before = digest(folder), read_spec(folder), Tokenizer(folder).encode_chat("hello")
    for path in folder.path.glob("*.json*"):
        path.write_text("{}")
    (folder.path / "chat_template.jinja").write_text("Agree.")

    assert (digest(folder), read_spec(folder), Tokenizer(folder).encode_chat("hello")) == before


def test_a_file_that_goes_while_they_are_read_is_missing(copied_model, monkeypatch) -> None:
    looked = ModelFolder._is_gone

    def look(folder: ModelFolder, name: str) -> bool:
        gone = looked(folder, name)
        if name == "config.json":
            (folder.path / name).unlink()
        return gone

    monkeypatch.setattr(ModelFolder, "_is_gone", look)
    with pytest.raises(ModelError, match=r"config\.json is missing: restore the file"):
        copied_model("llama").pinned()


def test_libraries_are_given_a_private_copy_of_those_files_alone(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / "evil.py").write_text("")
    with folder.copied() as path:
        assert {entry.name for entry in path.iterdir()} == set(folder.pinned().files or ())
        assert path.stat().st_mode & 0o077 == 0
    assert not path.exists()


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_copy_goes_where_there_is_room(copied_model, tmp_path, monkeypatch, free) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr("teegpu.model.folder._MEMORY", memory)
    monkeypatch.setattr("teegpu.model.folder.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with copied_model("llama").copied() as path:
        assert path.parent == (memory if free else disk)


def test_in_a_tee_a_copy_is_never_on_a_disk(copied_model, tmp_path, monkeypatch) -> None:
    """Who owns the disk would choose the tokenizer of a model whose digest is pinned."""
    monkeypatch.setattr("teegpu.model.folder._MEMORY", tmp_path / "not there")
    monkeypatch.setattr("teegpu.machine.tee_kind", lambda: "sgx")
    with pytest.raises(ModelError, match="in a TEE it has to be in"), copied_model("llama").copied():
        pass


def test_links_lead_to_the_blobs_of_the_hub_cache_and_nowhere_else(tmp_path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    elsewhere = tmp_path / "secret"
    for made in (snapshot, blobs, elsewhere):
        made.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"in the cache")
    (elsewhere / "key").write_bytes(b"not for a model")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "generation_config.json").symlink_to("config.json")
    (snapshot / "tokenizer.json").symlink_to(elsewhere / "key")
    folder = ModelFolder("b", snapshot)

    assert folder.read("config.json") == folder.read("generation_config.json") == b"in the cache"
    with pytest.raises(ModelError, match=r"tokenizer\.json is a link to .*, outside of the model's folder"):
        folder.read("tokenizer.json")
    with pytest.raises(ModelError, match="outside of the model's folder"):
        folder.pinned()


@pytest.mark.parametrize("where", ["config.json", "model.safetensors"])
def test_a_fifo_in_place_of_a_file_does_not_block(tmp_path, where) -> None:
    os.mkfifo(tmp_path / where)
    with pytest.raises(ModelError, match="is not a regular file"):
        ModelFolder("m", tmp_path).open(where)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_told_as_that(tmp_path: Path, name) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(ModelError, match="is a Git LFS pointer"):
        ModelFolder("m", tmp_path).read(name)


def test_a_file_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((128 << 20) + 1)
    with pytest.raises(ModelError, match="has more than 128 MiB"):
        ModelFolder("m", tmp_path).pinned()
