"""``deploy/kubernetes.yaml``: Kubernetes takes it, and teegpu does what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import TinyModel

MANIFEST = Path(__file__).parent.parent / "deploy" / "kubernetes.yaml"
TEEGPU = [sys.executable, "-m", "teegpu"]


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_kubernetes_takes_it(version: str, resources: dict[str, dict[str, Any]]) -> None:
    assert len(resources) == 4
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_its_parts_are_about_the_same_pods(resources: dict[str, dict[str, Any]]) -> None:
    service, servers = resources["Service"], resources["StatefulSet"]
    labels = servers["spec"]["template"]["metadata"]["labels"]
    for each in (
        service["spec"]["selector"],
        servers["spec"]["selector"]["matchLabels"],
        resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert each == labels
    assert servers["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"  # so that its name stands for each pod
    (container,) = servers["spec"]["template"]["spec"]["containers"]
    ports = {service["spec"]["ports"][0]["port"], container["ports"][0]["containerPort"]}
    ports.add(resources["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"])
    assert ports == {5555}


class Pod:
    """What the manifest starts, in folders of its own."""

    def __init__(self, servers: dict[str, Any], root: Path) -> None:
        spec = servers["spec"]["template"]["spec"]
        (self.init,), (self.server,) = spec["initContainers"], spec["containers"]
        self.root = root
        self.env = os.environ | {each["name"]: self.here(each["value"]) for each in self.server["env"]}

    def here(self, text: str) -> str:
        for folder in ("teegpu", "gpu-key", "gpu-clients"):
            text = text.replace(f"/run/{folder}", str(self.root / folder))
        return text

    def prepare(self) -> None:
        shim = self.root / "bin" / "teegpu"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m teegpu "$@"\n')
        shim.chmod(0o700)
        env = self.env | {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
        script = [self.here(each) for each in (*self.init["command"], *self.init["args"])]
        subprocess.run(script, env=env, check=True, capture_output=True, timeout=60)

    def probe(self, model: Path, address: str) -> subprocess.CompletedProcess[str]:
        _, *command = self.server["livenessProbe"]["exec"]["command"]
        replaced = {
            "--endpoint=tcp://127.0.0.1:5555": f"--endpoint={address}",
            "--model=/models/model": f"--model={model}",
        }
        assert set(replaced) < set(command)
        command = [replaced.get(each, each) for each in command]
        return subprocess.run([*TEEGPU, *command], env=self.env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def pod(resources: dict[str, dict[str, Any]], tmp_path: Path) -> Pod:
    pod = Pod(resources["StatefulSet"], tmp_path)
    for name, files, folder in (("gpu", ("gpu.key", "gpu.pub"), "gpu-key"), ("tee", ("tee.pub",), "gpu-clients")):
        home = tmp_path / "made" / name
        env = os.environ | {"XDG_CONFIG_HOME": str(home)}
        subprocess.run([*TEEGPU, "keys", "new", name], env=env, check=True, capture_output=True, timeout=60)
        (tmp_path / folder).mkdir()
        for file in files:
            mounted = tmp_path / folder / file
            mounted.write_bytes((home / "teegpu" / "keys" / file).read_bytes())
            mounted.chmod(0o440)  # as fsGroup has it
    return pod


@pytest.mark.extra
def test_the_server_starts_as_it_says_and_the_probe_asks_it(pod: Pod, tiny_model: TinyModel) -> None:
    model = tiny_model("llama").path
    pod.prepare()
    first, *args = [pod.here(each) for each in pod.server["args"]]
    assert first == "serve"
    replaced = {"--model=/models/model": f"--model={model}", "--bind=tcp://0.0.0.0:5555": "--bind=tcp://127.0.0.1:0"}
    assert set(replaced) < set(args)
    command = [*TEEGPU, "serve", *(replaced.get(each, each) for each in args), "--threads=1", "--dtype=fp32"]
    with subprocess.Popen(command, env=pod.env, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = map(json.loads, server.stderr)
            address = next(line["fields"]["address"] for line in lines if line["event"] == "ready")
            probed = pod.probe(model, address)
            assert probed.returncode == 0, probed.stdout + probed.stderr
        finally:
            server.terminate()
        server.stderr.read()
        assert server.wait(30) == 0
    assert pod.probe(model, address).returncode == 4
