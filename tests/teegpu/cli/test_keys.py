"""Keys as their user meets them: ``teegpu keys``, ``serve --key --auth``, ``run --server-key --client-key``."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import transports
from teegpu import keys
from teegpu.gpu import server as gpu
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.wire.limits import Limits
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import ServerFor, Start, Teegpu
from transports import security
from transports.base import ServerOptions
from transports.security import KeyPair, ServerKeys


def test_a_pair_is_made_listed_and_shown(teegpu: Teegpu) -> None:
    done = teegpu("keys", "new", "alice")
    assert (done.code, done.out) == (0, "")
    shown = teegpu("keys", "show", "alice")
    assert shown.code == 0
    assert security.parse_public(shown.out, "stdout") == keys.public("alice")
    assert "--auth" in shown.err
    listed = teegpu("keys", "list")
    assert listed.code == 0
    assert keys.public("alice").fingerprint in listed.out
    secret = keys.secret_path("alice").read_text().splitlines()[-1].partition(":")[2]
    for outcome in (done, shown, listed):
        assert secret not in outcome.out + outcome.err


def test_what_show_prints_is_a_key_file(teegpu: Teegpu, tmp_path: Path) -> None:
    teegpu("keys", "new", "alice")
    (tmp_path / "a.pub").write_text(teegpu("keys", "show", "alice").out)
    assert security.read_public(tmp_path / "a.pub") == keys.public("alice")


def test_no_key_is_replaced_by_accident(teegpu: Teegpu) -> None:
    teegpu("keys", "new", "alice")
    before = keys.public("alice")
    done = teegpu("keys", "new", "alice")
    assert done.code == 2
    assert "this key exists already" in done.err
    assert keys.public("alice") == before
    assert teegpu("keys", "new", "alice", "--force").code == 0
    assert keys.public("alice") != before


def test_unsafe_files_are_marked(teegpu: Teegpu) -> None:
    for name in ("alice", "bob"):
        teegpu("keys", "new", name)
    keys.secret_path("bob").chmod(0o644)
    done = teegpu("keys", "list", "--json")
    assert done.code == 2
    listed = {key["name"]: key for key in json.loads(done.out)["keys"]}
    assert listed["alice"]["trouble"] == ""
    assert "others on this machine can get at it (mode 644)" in listed["bob"]["trouble"]
    assert "UNSAFE" in teegpu("keys", "list").out
    keys.secret_path("bob").chmod(0o600)
    keys.folder().chmod(0o755)
    assert "others on this machine can get at it (mode 755)" in teegpu("keys", "list").err


def test_no_keys(teegpu: Teegpu) -> None:
    done = teegpu("keys", "list")
    assert (done.code, done.out) == (0, "")
    assert "no keys in" in done.err
    done = teegpu("keys", "show", "alice")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


# ---- serve


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--key", "srv"), "server.key is set and server.auth_dir is not"),
        (("--auth", "."), "server.auth_dir is set and server.key is not"),
        (("--key", "nobody", "--auth", "."), "server.key: there is no key 'nobody'"),
        (("--key", "srv", "--auth", "./nothing"), "nothing: this folder of clients' keys can't be read"),
        (("--bind", "tcp://0.0.0.0:0"), "server.bind: tcp://0.0.0.0:0 can be reached from other machines"),
    ],
)
def test_a_server_that_is_not_started(teegpu: Teegpu, model: ModelFolder, args: tuple[str, ...], told: str) -> None:
    teegpu("keys", "new", "srv")
    where = () if "--bind" in args else ("--bind", "tcp://127.0.0.1:0")
    done = teegpu("serve", "--model", model.path, *where, *args)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1


def test_what_insecure_means_is_said_at_every_start(teegpu: Teegpu) -> None:
    teegpu("keys", "new", "srv")
    for args, told in (
        ((), "anybody who reaches this address can use the server, read its traffic and change it"),
        (("--key", "srv"), "the link is encrypted, and anybody who has this server's public key can use it"),
    ):
        done = teegpu("serve", "--model", "./nowhere", "--bind", "tcp://0.0.0.0:0", "--insecure", *args)
        assert done.code == 3
        assert done.err.startswith(f"warning: --insecure: {told}")


def test_with_keys_an_address_may_be_open(teegpu: Teegpu, tmp_path: Path) -> None:
    teegpu("keys", "new", "srv")
    done = teegpu("serve", "--model", "./nowhere", "--bind", "tcp://0.0.0.0:0", "--key", "srv", "--auth", tmp_path)
    assert done.code == 3
    assert "insecure" not in done.err


# ---- run


class Locked:
    """A GPU server with the key ``srv`` for the client ``alice``."""

    def __init__(self, folder: ModelFolder, clients: Path) -> None:
        self.pair, self.alice = security.new_pair(), security.new_pair()
        (clients / "alice.pub").write_text(self.alice.public.text)
        spec, limits = read_spec(folder), Limits()
        with WeightStore(folder, spec) as store:
            executor, identity = gpu.load(store, spec, device="cpu", dtype="fp32", limits=limits)
        options = ServerOptions(keys=ServerKeys(self.pair, clients))
        self._transport = transports.listen("tcp://127.0.0.1:0", options)
        self.address = self._transport.address
        self._server = gpu.GpuServer(self._transport, executor, identity, limits)
        self._thread = threading.Thread(target=self._server.serve)
        self._thread.start()

    def close(self) -> None:
        self._server.stop()
        self._thread.join()
        self._transport.close()


@pytest.fixture(scope="module")
def locked(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    server = Locked(model, tmp_path_factory.mktemp("clients"))
    yield server
    server.close()


@pytest.fixture
def at_hand(locked: Locked) -> Locked:
    """The user has the keys ``alice`` and ``mallory``, the server's as ``srv`` and that of another one as ``other``."""

    def keep(name: str, pair: KeyPair) -> None:
        security.write_pair(pair, keys.public_path(name), keys.secret_path(name))

    keep("alice", locked.alice)
    keep("mallory", security.new_pair())
    keys.public_path("srv").write_text(locked.pair.public.text)
    keys.public_path("other").write_text(security.new_pair().public.text)
    return locked


def ask(teegpu: Teegpu, model: ModelFolder, address: str, *args: str) -> tuple[int, str, dict[str, object]]:
    """Exit code, stderr, and the settings in the document of a run."""
    done = teegpu("run", "--model", model.path, "--endpoint", address, "--max-tokens", "2", "--json", "Hi", *args)
    return done.code, done.err, done.document["settings"] if done.out else {}


@pytest.mark.parametrize("transport", ["zmq", "pipelined+zstd"])
def test_a_run_with_keys(teegpu: Teegpu, model: ModelFolder, at_hand: Locked, transport: str) -> None:
    args = ("--server-key", "srv", "--client-key", "alice", "--transport", transport)
    code, err, settings = ask(teegpu, model, at_hand.address, *args)
    assert (code, settings["encrypted"]) == (0, True), err


def test_a_run_with_keys_over_an_emulated_link(teegpu: Teegpu, model: ModelFolder, at_hand: Locked) -> None:
    args = ("--client-key", "alice", "--link", "rtt=1ms,bandwidth=1gbit")
    code, err, settings = ask(teegpu, model, f"{at_hand.address}#key=srv", *args)
    assert (code, settings["encrypted"]) == (0, True), err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--server-key", "srv", "--client-key", "mallory"), "does not know this client's key"),
        (("--server-key", "other", "--client-key", "alice"), "has another key than"),
        ((), "takes clients with keys only"),
    ],
)
def test_keys_that_do_not_fit(
    teegpu: Teegpu, model: ModelFolder, at_hand: Locked, args: tuple[str, ...], told: str
) -> None:
    started = time.monotonic()
    code, err, _ = ask(teegpu, model, at_hand.address, *args)
    assert code == 4
    assert told in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("teegpu: the server at ")
    assert time.monotonic() - started < 10


def test_a_client_with_keys_and_a_server_without(
    teegpu: Teegpu, model: ModelFolder, at_hand: Locked, server_for: ServerFor
) -> None:
    args = ("--server-key", "srv", "--client-key", "alice")
    code, err, _ = ask(teegpu, model, server_for(model).address, *args)
    assert code == 4
    assert "has no key, and link.server_key says that it must prove to have" in err


def test_doctor_asks_with_keys(teegpu: Teegpu, model: ModelFolder, at_hand: Locked) -> None:
    args = ("doctor", "--endpoint", at_hand.address, "--model", model.path, "--server-key", "srv", "--client-key")
    for client, code in (("alice", 0), ("mallory", 4)):
        assert teegpu(*args, client).code == code


def test_a_run_says_which_key_its_server_proves_to_have(teegpu: Teegpu, model: ModelFolder, at_hand: Locked) -> None:
    _, err, _ = ask(teegpu, model, at_hand.address, "--server-key", "srv", "--client-key", "alice")
    told = "privacy none: servers see the activations, products are not verified; servers: "
    assert f"{told}{at_hand.address} (key {keys.public('srv').fingerprint})" in err


def test_a_link_without_keys_to_another_machine_is_told_of(
    teegpu: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "0.05")
    monkeypatch.setenv("TEEGPU_LINK_RETRY_BUDGET_SECONDS", "0")
    done = teegpu("run", "--model", model.path, "--endpoint", "tcp://192.0.2.1:5555", "Hi")
    assert done.code == 4
    assert "the link to tcp://192.0.2.1:5555 has no keys" in done.err


def test_the_whole_way_with_processes(teegpu: Teegpu, start: Start, model: ModelFolder, tmp_path: Path) -> None:
    """Step by step what the documentation tells an operator to do; and the keys of a run's own server are none."""
    teegpu("keys", "new", "srv")
    teegpu("keys", "new", "me")
    (tmp_path / "me.pub").write_text(teegpu("keys", "show", "me").out)
    process = start(
        "serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--key", "srv", "--auth", tmp_path,
        "--threads", "1", "--dtype", "fp32",
    )  # fmt: skip
    while not (found := re.search(r"ready at (tcp://127\.0\.0\.1:\d+)", process.line())):
        pass
    code, err, settings = ask(teegpu, model, found[1], "--server-key", "srv", "--client-key", "me")
    assert (code, settings["encrypted"]) == (0, True), err
