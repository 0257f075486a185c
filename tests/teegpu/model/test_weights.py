from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teegpu.errors import ModelError
from teegpu.files import user_folder
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.safetensors_file import DamagedFileError, SafetensorsFile
from teegpu.model.weights import INDEX, SINGLE, WeightStore, checkpoint_name

BIASED = {"attention_bias": True, "mlp_bias": True}


def open_store(folder: ModelFolder) -> WeightStore:
    return WeightStore(folder, read_spec(folder))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_file(path: Path, header: object, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def cut_into_shards(folder: ModelFolder) -> None:
    """Two files and an index, in place of the one file."""
    header, body = read_header(folder.path / SINGLE)
    header.pop("__metadata__", None)
    places = {}
    for number in (1, 2):
        part, data = {}, b""
        for name in sorted(header)[number - 1 :: 2]:
            begin, end = header[name]["data_offsets"]
            part[name] = header[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += body[begin:end]
            places[name] = f"part-{number}.safetensors"
        write_file(folder.path / f"part-{number}.safetensors", part, data)
    (folder.path / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder.path / SINGLE).unlink()


def settle(folder: ModelFolder) -> None:
    """Date the weights back, so that their digest may be kept."""
    for path in folder.path.glob("*.safetensors"):
        os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed_tokens", "model.embed_tokens.weight"),
        ("norm", "model.norm.weight"),
        ("lm_head", "lm_head.weight"),
        ("layers.3.q_proj", "model.layers.3.self_attn.q_proj.weight"),
        ("layers.3.o_proj.bias", "model.layers.3.self_attn.o_proj.bias"),
        ("layers.3.down_proj", "model.layers.3.mlp.down_proj.weight"),
        ("layers.3.up_proj.bias", "model.layers.3.mlp.up_proj.bias"),
        ("layers.3.k_norm", "model.layers.3.self_attn.k_norm.weight"),
        ("layers.3.input_layernorm", "model.layers.3.input_layernorm.weight"),
    ],
)
def test_names_in_the_checkpoint(name, expected) -> None:
    assert checkpoint_name(name) == expected


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", BIASED),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_every_weight_is_transformers_own(tiny_model, architecture, overrides) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, **overrides)
    expected = AutoModelForCausalLM.from_pretrained(str(folder.path)).state_dict()
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        loaded = {checkpoint_name(name): store.load(name) for name in spec.weights}
        assert store.tied == spec.tied_embeddings

    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_loading_into_slices_converts_and_leaves_the_rest_alone(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("teegpu.model.weights.BLOCK_BYTES", 5 * 32 * 4)  # five rows at a time, the last block shorter
    with open_store(tiny_model("qwen2")) as store:
        query, key = store.load("layers.1.q_proj"), store.load("layers.1.k_proj")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            both = torch.full((query.shape[0] + key.shape[0] + 1, 32), 7.0, dtype=dtype)
            store.load_into("layers.1.q_proj", both[: query.shape[0]])
            store.load_into("layers.1.k_proj", both[query.shape[0] : -1])
            assert torch.equal(both[:-1], torch.cat([query, key]).to(dtype))
            assert torch.equal(both[-1], torch.full((32,), 7.0, dtype=dtype))


def test_loading_into_a_transposed_or_strided_destination(tiny_model) -> None:
    with open_store(tiny_model("qwen2")) as store:
        transposed = torch.zeros(32, 64).t()
        store.load_into("layers.0.gate_proj", transposed)
        strided = torch.zeros(64)[::2]
        store.load_into("layers.0.q_proj.bias", strided)

        assert torch.equal(transposed, store.load("layers.0.gate_proj"))
        assert torch.equal(strided, store.load("layers.0.q_proj.bias"))


def test_a_dtype_can_be_asked_for(tiny_model) -> None:
    with open_store(tiny_model("llama")) as store:
        assert store.stored_dtype("norm") == torch.float32
        assert torch.equal(store.load("norm", torch.bfloat16), store.load("norm").to(torch.bfloat16))


def test_a_destination_of_another_shape_and_an_unknown_name_are_mistakes_of_the_caller(tiny_model) -> None:
    with open_store(tiny_model("llama")) as store:
        with pytest.raises(ValueError, match="shape"):
            store.load_into("norm", torch.zeros(31))
        with pytest.raises(ValueError, match=r"no weight 'layers\.9\.q_proj'"):
            store.load("layers.9.q_proj")


def test_what_is_loaded_belongs_to_the_caller(tiny_model) -> None:
    with open_store(tiny_model("llama")) as store:
        store.load("norm").zero_()
        assert store.load("norm").abs().min() > 0


def test_shards_read_like_one_file(copied_model) -> None:
    folder = copied_model("llama", **BIASED)
    with open_store(folder) as store:
        before = {name: store.load(name) for name in read_spec(folder).weights}
        digest, size = store.digest(), store.size_bytes
    cut_into_shards(folder)

    with open_store(folder) as store:
        assert len(store.files) == 2
        assert all(torch.equal(store.load(name), value) for name, value in before.items())
        assert (store.digest(), store.size_bytes) == (digest, size)


def test_opening_reads_no_weights_and_closing_lets_go_of_the_files(tiny_model) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(tiny_model("llama"))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named_and_so_is_the_repair(copied_model, keep) -> None:
    folder = copied_model("llama")
    path = folder.path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(ModelError, match=r"model\.safetensors.*(restore|fetch)") as caught:
        open_store(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_while_it_is_open_is_an_error_not_a_crash(copied_model) -> None:
    folder = copied_model("llama")
    with open_store(folder) as store:
        os.truncate(folder.path / SINGLE, 5000)
        with pytest.raises(ModelError, match=r"model\.norm\.weight.*ends before byte"):
            store.load("norm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(shape=[31]), r"can't have 128 bytes"),
        (lambda entry: entry.update(shape="wide"), r"model\.norm\.weight.*no valid dtype, shape"),
        (lambda entry: entry.update(data_offsets=[128, 0]), r"ends before it begins"),
        (lambda entry: entry.update(data_offsets=[-128, 0]), r"no valid dtype, shape"),
        (lambda entry: entry.update(data_offsets=[0, 10**11]), r"truncated"),
        (lambda entry: entry.update(shape=[True] * 3), r"no valid dtype, shape"),
        (lambda entry: entry.update(dtype="F16", shape=[64]), r"shape \(64,\).*config\.json asks for \(32,\)"),
        (lambda entry: entry.update(dtype="I32"), r"dtype I32, which is not supported"),
    ],
)
def test_a_header_that_lies_is_refused(copied_model, change, message) -> None:
    folder = copied_model("llama")
    header, body = read_header(folder.path / SINGLE)
    change(header["model.norm.weight"])
    write_file(folder.path / SINGLE, header, body)

    with pytest.raises(ModelError, match=message):
        open_store(folder)


@pytest.mark.parametrize("header", [[], "x", {"model.norm.weight": 3}])
def test_a_header_of_another_form_is_refused(copied_model, header) -> None:
    folder = copied_model("llama")
    write_file(folder.path / SINGLE, header, b"")

    with pytest.raises(ModelError, match="is damaged"):
        open_store(folder)


def test_garbage_in_place_of_a_header_is_refused(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / SINGLE).write_bytes(os.urandom(7) + b"\0" + os.urandom(4096))

    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        open_store(folder)


def test_a_missing_tensor_is_named(copied_model) -> None:
    folder = copied_model("qwen2")
    header, body = read_header(folder.path / SINGLE)
    del header["model.layers.1.self_attn.k_proj.bias"]
    write_file(folder.path / SINGLE, header, body)

    with pytest.raises(ModelError, match=r"holds no tensor 'model\.layers\.1\.self_attn\.k_proj\.bias'"):
        open_store(folder)


def test_weights_of_another_size_than_the_config_are_refused(copied_model) -> None:
    folder = copied_model("llama")
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))

    with pytest.raises(ModelError, match=r"gate_proj\.weight' has shape \(64, 32\).*asks for \(65, 32\)"):
        open_store(folder)


def test_a_folder_without_safetensors_says_what_is_read(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / SINGLE).rename(folder.path / "pytorch_model.bin")

    with pytest.raises(ModelError, match="no safetensors weights"):
        open_store(folder)


def test_a_missing_shard_is_named(copied_model) -> None:
    folder = copied_model("llama")
    cut_into_shards(folder)
    (folder.path / "part-2.safetensors").unlink()

    with pytest.raises(ModelError, match=r"part-2\.safetensors is missing"):
        open_store(folder)


@pytest.mark.parametrize(
    "index",
    [
        *("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'),
        *('{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": ".."}}'),
    ],
)
def test_a_damaged_index_is_named_and_never_leads_out_of_the_folder(copied_model, index) -> None:
    folder = copied_model("llama")
    cut_into_shards(folder)
    (folder.path / INDEX).write_text(index)

    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged"):
        open_store(folder)


@pytest.mark.parametrize("change", ["./{}", "wrong"])
def test_an_index_says_no_more_than_which_files_there_are(copied_model, change) -> None:
    """transformers, too, takes each tensor from whatever shard holds it."""
    folder = copied_model("llama")
    cut_into_shards(folder)
    document = json.loads((folder.path / INDEX).read_text())
    places = document["weight_map"]
    if change == "wrong":
        others = {"part-1.safetensors": "part-2.safetensors", "part-2.safetensors": "part-1.safetensors"}
        document["weight_map"] = {tensor: others[place] for tensor, place in places.items()}
    else:
        document["weight_map"] = {tensor: change.format(place) for tensor, place in places.items()}
    (folder.path / INDEX).write_text(json.dumps(document))

    open_store(folder).close()


def test_a_tensor_that_no_shard_holds_is_named(copied_model) -> None:
    folder = copied_model("llama")
    cut_into_shards(folder)
    (folder.path / INDEX).write_text('{"weight_map": {"lm_head.weight": "part-1.safetensors"}}')

    with pytest.raises(ModelError, match=r"no shard of .* holds tensor 'model\."):
        open_store(folder)


def rewrite(folder: ModelFolder, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The folder's weights after ``change``."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder.path / SINGLE)
    change(tensors)
    save_file(tensors, folder.path / SINGLE, metadata={"format": "pt"})


def _only_the_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def _equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0


def _no_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "tied"), [(_only_the_head, True), (_equal_head, True), (_other_head, False), (_no_prefix, True)]
)
@pytest.mark.parametrize("checked", [False, True])
def test_a_head_beside_the_embedding_or_in_its_place_is_read_as_transformers_does(
    copied_model, change, tied, checked
) -> None:
    from transformers import AutoModelForCausalLM

    folder = copied_model("llama", tie_word_embeddings=True)
    rewrite(folder, change)
    expected = AutoModelForCausalLM.from_pretrained(str(folder.path))
    with WeightStore(folder, read_spec(folder), checked=checked) as store:
        assert store.tied == tied
        assert torch.equal(store.load("embed_tokens"), expected.get_input_embeddings().weight)
        assert torch.equal(store.load("lm_head"), expected.get_output_embeddings().weight)


@pytest.mark.parametrize("name", ["scales", "qweight", "weight_packed", "weight_scale"])
def test_quantised_weights_are_called_that(copied_model, name) -> None:
    folder = copied_model("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.0.mlp.up_proj.{name}"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    rewrite(folder, change)
    with pytest.raises(ModelError, match=rf"holds quantised weights \('model.layers.0.mlp.up_proj.{name}'\)"):
        open_store(folder)


def test_a_stray_file_beside_shards_is_told_of(copied_model) -> None:
    folder = copied_model("llama")
    cut_into_shards(folder)
    write_file(folder.path / SINGLE, {}, b"")

    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is there as well"):
        open_store(folder)


# ---- what is used is what was hashed


def flip_last_bit(folder: ModelFolder) -> None:
    """Another value in the last tensor, with the same size and time stamps as before."""
    path = folder.path / SINGLE
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_checked_digest_is_of_the_bytes_whatever_the_time_stamps_say(copied_model) -> None:
    folder = copied_model("llama")
    settle(folder)
    digests = {}
    for checked in (False, True):
        with WeightStore(folder, read_spec(folder), checked=checked) as store:
            digests[checked] = store.digest()
    flip_last_bit(folder)
    with open_store(folder) as store:
        assert store.digest() == digests[True] == digests[False]  # kept by size and time: what the servers go by
    with WeightStore(folder, read_spec(folder), checked=True) as store:
        assert store.digest() != digests[True]


@pytest.mark.parametrize("first", ["load", "digest"])
def test_weights_that_change_after_they_were_hashed_are_not_computed_with(copied_model, first) -> None:
    folder = copied_model("llama")
    header, _ = read_header(folder.path / SINGLE)
    header.pop("__metadata__", None)
    last = max(header, key=lambda tensor: header[tensor]["data_offsets"])
    spec = read_spec(folder)
    name = next(name for name in spec.weights if checkpoint_name(name) == last)
    with WeightStore(folder, spec, checked=True) as store:
        store.load(name, torch.bfloat16) if first == "load" else store.digest()
        other = store.reopen()
        flip_last_bit(folder)
        for opened in (store, other):
            with pytest.raises(ModelError, match=rf"has changed since it was first read: tensor '{last}'"):
                opened.load(name)
        other.close()


def test_what_is_hashed_as_it_is_loaded_gives_the_same_digest(copied_model, monkeypatch) -> None:
    monkeypatch.setattr("teegpu.model.weights.BLOCK_BYTES", 5 * 32 * 4)
    folder = copied_model("qwen2")
    spec = read_spec(folder)
    with WeightStore(folder, spec, checked=True) as store, open_store(folder) as other:
        for name in spec.weights:
            store.load(name)
        assert store.digest() == other.digest()


# ---- headers of any content


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused_in_one_line(tiny_model, tmp_path, data) -> None:
    content = (tiny_model("llama").path / SINGLE).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    edited = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        edited[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / SINGLE
    path.write_bytes(edited[: data.draw(st.one_of(st.just(len(edited)), st.integers(0, header)))])
    told = ""
    try:
        SafetensorsFile(path).close()
    except DamagedFileError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 2500) + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 8 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776,0],"data_offsets":[0,0]}}',
        b" " * (16 << 20) + b"{}",
        b"[" * 100_000,
        b"{" + b",".join(b'"%x":0' % number for number in range(70_000)) + b"}",
    ],
)
def test_a_header_that_would_take_long_to_read_is_refused_at_once(tmp_path, header) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    began = time.monotonic()
    with pytest.raises(DamagedFileError) as caught:
        SafetensorsFile(path)
    assert time.monotonic() - began < 5
    assert len(str(caught.value)) < 300


def test_the_digest_depends_on_weights_and_dimensions_and_not_on_names(tiny_model, copied_model) -> None:
    original = tiny_model("llama")
    renamed = copied_model("llama")
    config = json.loads((renamed.path / "config.json").read_text())

    def digest(folder: ModelFolder) -> str:
        with open_store(folder) as store:
            return store.digest()

    assert digest(ModelFolder("another name", renamed.path)) == digest(original)
    assert digest(tiny_model("llama", seed=1)) != digest(original)
    (renamed.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert digest(renamed) != digest(original)


def test_the_digest_is_kept_until_a_weight_changes(copied_model, monkeypatch) -> None:
    folder = copied_model("llama")
    settle(folder)
    hashed = []
    real = WeightStore._hash
    monkeypatch.setattr(WeightStore, "_hash", lambda self, text: hashed.append(1) or real(self, text))
    with open_store(folder) as store:
        first = store.digest()
        assert store.digest() == first
    assert len(hashed) == 1

    with (folder.path / SINGLE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with open_store(folder) as store:
        assert store.digest() != first
    assert len(hashed) == 2


def test_the_digest_of_a_file_written_just_now_is_not_kept_yet(copied_model) -> None:
    folder = copied_model("llama")
    os.utime(folder.path / SINGLE)
    with open_store(folder) as store:
        store.digest()

    assert not list(user_folder("cache").rglob("*.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 1}', "\0" * 100])
def test_an_unreadable_digest_cache_is_ignored(copied_model, text) -> None:
    folder = copied_model("llama")
    settle(folder)
    with open_store(folder) as store:
        expected = store.digest()
        (kept,) = user_folder("cache").rglob("*.json")
        kept.write_text(text)
        assert store.digest() == expected
        assert json.loads(kept.read_text())["digest"] == expected


def test_a_cache_that_can_not_be_written_costs_only_time(copied_model, tmp_path, monkeypatch) -> None:
    folder = copied_model("llama")
    settle(folder)
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open_store(folder) as store:
        assert store.digest() == store.digest()
