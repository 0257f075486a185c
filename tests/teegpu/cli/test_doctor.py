"""``teegpu doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import transports.errors
from teegpu import errors, machine
from teegpu.attest import sources
from teegpu.cli import doctor
from teegpu.cli.main import run
from teegpu.config import Config, load
from teegpu.endpoints import Endpoint
from teegpu.errors import EvidenceError
from teegpu.model.folder import ModelFolder
from teegpu.remote import health
from teegpu.wire.messages import HealthReport, Welcome

WELCOME = Welcome(
    request_id=0,
    software="9.8.7",
    instance="i",
    model="some-model",
    digest="0123456789abcdef",
    dims={"layers": 30},
    device="cuda:0",
    dtype="bf16",
    threads=4,
    memory_bytes=2**28,
    limits={},
    layers=(0, 29),
)
HEALTH = HealthReport(
    request_id=0,
    software="9.8.7",
    instance="i",
    model="some-model",
    digest="0123456789abcdef",
    device="cuda:0",
    dtype="bf16",
    layers=(0, 29),
    uptime_seconds=7300.0,
    clients=2,
    connections=3,
    requests_served=12345,
    refused=1,
    in_flight=3,
    waiting_requests=2,
    waiting_bytes=3 * 2**20,
    busy_share=0.125,
    rss_bytes=2**30,
    weight_bytes=2**28,
    ring_bytes=0,
    draining=False,
)
ANSWER = health.Probe(WELCOME, HEALTH, 0.00123)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server answers everywhere; → the endpoints asked."""
    asked: list[str] = []

    def probe(endpoint: Endpoint, config: Config) -> health.Probe:
        asked.append(endpoint.address)
        return ANSWER

    monkeypatch.setattr(health, "probe", probe)
    return asked


def report(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, tuple[str, str]]:
    """What ``doctor --json`` finds: name → (status, detail)."""
    assert run(["doctor", "--json", *args]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0)
    return {check["name"]: (check["status"], check["detail"]) for check in document["checks"]}


def test_nothing_failed(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert list(found) == [
        *("teegpu", "packages", "settings", "machine", "processor"),
        *("threads", "devices", "TEE", "evidence", "model", "server"),
    ]
    assert f"torch {importlib.metadata.version('torch')}" in found["packages"][1]
    assert found["model"][0] == "warn"
    assert "has still to be fetched" in found["model"][1]
    assert found["server"] == ("ok", "none configured (run.endpoints): each run starts its own")


def test_rows_are_readable_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    teegpu     ")
    assert any(line.startswith("warn  model ") for line in lines)
    assert all(line[:4].strip() for line in lines), "no line is broken, as nobody said how wide it may be"
    assert "\x1b" not in "".join(lines)


def test_a_server_that_answers(capsys: pytest.CaptureFixture[str], answered: list[str]) -> None:
    found = report(capsys, "--endpoint", "tcp://host:1")
    assert answered == ["tcp://host:1"]
    expected = "tcp://host:1 answers in 1.23 ms: some-model (0123456789ab) on cuda:0 in bf16, version 9.8.7"
    assert found["server"] == ("ok", expected)
    assert found["load"] == (
        "ok",
        "up 2 h, 2 clients, 12.5% busy in the last 10 s, 3 requests in hand, 2 of them waiting (3.0 MiB), "
        "12,345 served, 1 refused, 1.00 GiB of memory, weights 256.0 MiB",
    )
    assert "the server at tcp://host:1 has its own" in found["threads"][1]


def test_a_server_that_is_being_stopped_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = replace(ANSWER, health=replace(HEALTH, draining=True, clients=1))
    monkeypatch.setattr(health, "probe", lambda *_: stopping)
    status, detail = report(capsys, "--endpoint", "tcp://host:1")["load"]
    assert status == "warn"
    assert detail.startswith("it is being stopped, up 2 h, 1 client, ")


def test_part_of_a_model_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "probe", lambda *_: replace(ANSWER, welcome=replace(WELCOME, layers=(10, 20))))
    assert "in bf16, layers 10-20, version" in report(capsys, "--endpoint", "tcp://host:1")["server"][1]


def test_several_servers_are_all_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer hides none of the others, and the machine-readable form says which is which."""

    def probe(endpoint: Endpoint, config: Config) -> health.Probe:
        if endpoint.address == "tcp://b:2":
            raise transports.errors.ConnectError("nobody at tcp://b:2")
        return ANSWER

    monkeypatch.setattr(health, "probe", probe)
    ends = ["tcp://a:1#layers=0-9", "tcp://b:2", "tcp://c:3"]
    assert run(["doctor", "--json", *(argument for end in ends for argument in ("--endpoint", end))]) == 4
    rows = [row for row in json.loads(capsys.readouterr().out)["checks"] if row["name"] in ("server", "load")]
    assert [(row["name"], row["status"], row["endpoint"]) for row in rows] == [
        ("server", "ok", ends[0]),
        ("load", "ok", ends[0]),
        ("server", "fail", ends[1]),
        ("server", "ok", ends[2]),
        ("load", "ok", ends[2]),
    ]
    assert rows[0]["rtt_seconds"] == 0.00123
    assert rows[0]["health"]["busy_share"] == 0.125
    assert rows[0]["health"]["layers"] == [0, 29]


def test_an_endpoint_that_can_not_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    status, detail = report(capsys, "--endpoint", "tcp://a:1#layres=0-9", code=2)["server"]
    assert status == "fail"
    assert "did you mean 'layers'?" in detail


def test_the_configured_endpoint_is_asked(
    capsys: pytest.CaptureFixture[str], answered: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("TEEGPU_")]:
        monkeypatch.delenv(name)
    (tmp_path / "my.toml").write_text("[run]\nendpoints = ['tcp://host:2']\n")
    found = report(capsys, "--config", str(tmp_path / "my.toml"))
    assert found["settings"] == ("ok", "changed from the default: run.endpoints")
    assert answered == ["tcp://host:2"]


def test_no_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_LINK_CONNECT_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setenv("TEEGPU_LINK_HELLO_TIMEOUT_SECONDS", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, detail = report(capsys, "--endpoint", f"tcp://127.0.0.1:{port}", code=4)["server"]
    assert status == "fail"
    assert str(port) in detail


def test_a_real_server(capsys: pytest.CaptureFixture[str], tiny_model: Callable[..., ModelFolder]) -> None:
    folder = tiny_model("llama")
    serve = ["serve", "--bind", "tcp://127.0.0.1:0", "--device", "cpu", "--dtype", "fp32", "--model", str(folder.path)]
    with subprocess.Popen(
        [sys.executable, "-m", "teegpu", *serve], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            banner = ""
            while not (ready := re.search(r"tcp://127\.0\.0\.1:[1-9]\d*", banner)):
                line = process.stdout.readline()
                assert line, f"the server ended: {banner}"
                banner += line
            found = report(capsys, "--endpoint", ready[0])
            status, detail = found["server"]
        finally:
            process.terminate()
    assert status == "ok"
    assert re.fullmatch(
        rf"{ready[0]} answers in \d+\.\d\d ms: .* \([0-9a-f]{{12}}\) on cpu in fp32, version .*", detail
    )
    assert re.fullmatch(
        r"up \d+ s, 1 client, \d+\.\d% busy in the last 10 s, 1 request in hand, 0 of them waiting \(0 B\), "
        r"5 served, 0 refused, \d.* of memory, weights \d.*",
        found["load"][1],
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (transports.errors.ConnectError("nobody there"), 4),
        (transports.errors.BadAddressError("nobody there"), 2),
        (errors.MismatchError("nobody there"), 5),
    ],
)
def test_a_server_that_fails(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(endpoint: Endpoint, config: Config) -> health.Probe:
        raise error

    monkeypatch.setattr(health, "probe", probe)
    assert report(capsys, "--endpoint", "tcp://host:1", code=code)["server"] == ("fail", "nobody there")


def test_a_bug_in_the_probe_stays_a_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "probe", lambda *_: 1 / 0)
    assert run(["doctor", "--endpoint", "tcp://host:1"]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_settings_that_can_not_be_read(capsys: pytest.CaptureFixture[str], answered: list[str]) -> None:
    Path("config.toml").write_text("[rnu]\n")
    found = report(capsys, "--endpoint", "tcp://host:1", code=2)
    assert found["settings"] == ("fail", "config.toml: unknown section [rnu], did you mean 'run'?")
    assert answered == ["tcp://host:1"]


def test_a_model_that_is_there(capsys: pytest.CaptureFixture[str], tiny_model: Callable[..., ModelFolder]) -> None:
    path = tiny_model("llama").path
    Path("mine.toml").write_text(f"[model]\nname = '{path}'\n")
    assert report(capsys, "--config", "mine.toml")["model"] == ("ok", f"{path}: llama, 2 layers, in {path}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name = 'smolm2-135m'", "unknown model 'smolm2-135m', did you mean 'smollm2-135m'?"),
        ("name = './none'", "there is no model at './none'"),
        ("name = 'smollm2-135m'\noffline = true", "model 'smollm2-135m' is not in"),
        ("name = '.'", "config.json"),
    ],
)
def test_a_model_that_can_not_be_had(text: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.toml").write_text(f"[model]\n{text}\n")
    status, detail = report(capsys, code=3)["model"]
    assert status == "fail"
    assert part in detail


def test_a_model_that_has_to_be_converted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("some.gguf").write_bytes(b"GGUF")
    Path("config.toml").write_text("[model]\nname = 'some.gguf'\n")
    assert report(capsys)["model"][1].startswith("some.gguf has still to be converted")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    check = doctor.threads(Config(), 4)
    assert (check.status, check.detail) == ("ok", "runner 2, embedded server 2, on 4 core(s)")
    crowded = doctor.threads(load({"run.threads": 4}, environ={}), 4)
    assert (crowded.status, crowded.exit_code) == ("warn", 0)
    assert "more threads than cores; set run.threads and server.threads to 0" in crowded.detail


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.toml").write_text("[server]\ndevice = 'cuda:99'\n")
    status, detail = report(capsys, code=1)["devices"]
    assert status == "fail"
    assert detail.startswith("server.device is cuda:99, but PyTorch finds ")


@pytest.mark.gpu
def test_devices_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert torch.cuda.get_device_name(0) in report(capsys)["devices"][1]


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("typer", "no-such-package-here"))
    failed = [check for check in doctor.versions() if check.status == "fail"]
    assert [check.detail for check in failed] == [
        "not installed: no-such-package-here; 'pip install teegpu' brings them"
    ]


@pytest.mark.parametrize("kind", ["sgx", "tdx", "sev-snp"])
def test_inside_a_tee(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tee", lambda: machine.Tee(kind, ("/dev/x",), "not attested"))
    check = doctor.trusted_execution()
    assert (check.status, check.detail) == ("ok", f"{kind} (/dev/x): not attested")


def test_outside_of_a_tee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tee", lambda: machine.Tee("none", (), "development mode"))
    assert doctor.trusted_execution() == doctor.Check("TEE", "warn", "none: development mode")


def test_whether_evidence_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.attestation() == doctor.Check("evidence", "warn", "none: nothing here can be attested to anybody")
    monkeypatch.setattr(sources, "find", sources.Simulated)
    check = doctor.attestation()
    assert (check.status, check.detail.startswith("simulated by a simulation, which proves nothing")) == ("ok", True)

    class Broken(sources.Simulated):
        def quote(self, report_data: bytes) -> sources.Quoted:
            raise EvidenceError("the kernel has none")

    monkeypatch.setattr(sources, "find", Broken)
    assert doctor.attestation() == doctor.Check("evidence", "warn", "the kernel has none")


def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "teegpu", "doctor"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
