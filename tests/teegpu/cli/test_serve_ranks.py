"""``teegpu serve --ranks``: what users of it see while ranks come, are lost and go."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.model.folder import ModelFolder
from teegpu.remote.health import probe
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import Outcome, Process, ServerFor, Start, Teegpu, processes_naming, until

QUICK = "import teegpu.gpu.group as group; group.HUNG_SECONDS = 3; from teegpu.cli.main import main; main()"


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", vocab_size=1000)


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder) -> Callable[..., Outcome]:
    def call(address: str, *args: object) -> Outcome:
        common = ("--model", model.path, "--raw", "--ignore-eos", "--max-tokens", 24, "--threads", 1, "--json")
        return teegpu("run", *common, "--wire-dtype", "fp32", "--endpoint", address, *args, "To be shared by ranks")

    return call


def tokens(done: Outcome) -> list[int]:
    assert done.code == 0, done.err
    found: list[int] = done.document["outputs"][0]["token_ids"]
    return found


def banner(process: Process) -> tuple[str, str]:
    """The address of a server that has loaded, and its line of facts."""
    while not (line := process.line()).startswith("teegpu GPU server ready at "):
        pass
    return line.split()[-1], process.line()


def others(model: ModelFolder) -> list[int]:
    """The processes that are ranks but the first."""
    return [pid for pid in processes_naming(str(model.path)) if b'{"rank": ' in _command(pid)]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def listening(pid: int) -> set[str]:
    """The addresses, as the kernel writes them, at which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "rank 1 ended by signal SIGKILL, which may mean that this machine is out of memory"),
        pytest.param(signal.SIGSTOP, "no word from other ranks for 3 s", marks=pytest.mark.extra),
    ],
)
def test_a_rank_that_is_lost_in_the_middle_costs_a_run_none_of_its_tokens(
    number: int, said: str, start: Start, run: Callable[..., Outcome], model: ModelFolder, server_for: ServerFor
) -> None:
    expected = tokens(run(server_for(model).address))
    process = start(
        "serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "fp32", "--ranks", 2, "--threads", 2,
        entry=("-c", QUICK),
    )  # fmt: skip
    address, facts = banner(process)
    assert " · 2 CPU threads · 2 ranks, with as many weights each · " in facts

    assert {where for pid in [process.pid, *others(model)] for where in listening(pid)} == {"0100007F"}

    (rank,) = others(model)
    before = probe(Endpoint(address), Config()).health
    answers: list[Outcome] = []
    asking = threading.Thread(target=lambda: answers.append(run(address)))
    asking.start()
    until(lambda: probe(Endpoint(address), Config()).health.requests_served > before.requests_served + 20)
    os.kill(rank, number)
    asking.join()
    assert tokens(answers[0]) == expected
    after = probe(Endpoint(address), Config())
    assert (after.health.instance != before.instance, after.welcome.ranks, after.health.ranks) == (True, 2, 2)

    (rank,) = others(model)
    os.kill(rank, signal.SIGTERM)  # as who ends all processes of a service does: the first decides
    process.send_signal(signal.SIGTERM)
    done = process.finish()
    assert done.code == 0
    assert f"{said}: all ranks begin again" in done.err
    until(lambda: not processes_naming(str(model.path)))


def test_shielded_products_are_shared_by_ranks(start: Start, teegpu: Teegpu, model: ModelFolder) -> None:
    def answer(*where: object) -> list[int]:
        common = ("--model", model.path, "--raw", "--ignore-eos", "--max-tokens", 6, "--threads", 1, "--json")
        return tokens(teegpu("run", *common, "--plan", "attention", *where, "To be shared by ranks"))

    common = ("--model", model.path, "--bind", "tcp://127.0.0.1:0", "--log-format", "json")
    process = start("serve", *common, "--threads", 2, "--ranks", 2, "--shield", "on")
    while (line := json.loads(process.line()))["event"] != "ready":
        pass
    said = line["fields"]
    assert (said["ranks"], said["threads"], said["ring_bytes"] > 0) == (2, 2, True)
    assert answer("--privacy", "pads", "--endpoint", said["address"]) == answer("--privacy", "reference")
    process.send_signal(signal.SIGINT)
    assert process.finish().code == 0


@pytest.mark.gpu
def test_two_cuda_devices_are_one_server(
    start: Start, run: Callable[..., Outcome], model: ModelFolder, server_for: ServerFor
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are no two CUDA devices here")
    common = ("--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "fp32")
    process = start("serve", *common, "--device", "cuda", "--ranks", 2)
    address, _ = banner(process)
    assert tokens(run(address)) == tokens(run(server_for(model).address))
    process.send_signal(signal.SIGTERM)
    assert process.finish().code == 0


def test_a_rank_that_can_not_load_ends_the_start_with_a_reason(
    start: Start, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'teegpu.gpu.group' in sys.orig_argv:\n    os.write(2, b'no memory\\n'); os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--ranks", 2).finish()
    assert done.code == 3
    assert "rank 1 ended while it loaded the model with exit code 7: no memory" in done.err


@pytest.mark.parametrize(("ranks", "reason"), [("0", "--ranks"), ("65", "--ranks"), ("17", "a matrix of")])
def test_numbers_of_ranks_that_can_not_be(ranks: str, reason: str, teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--device", "cpu", "--ranks", ranks)
    assert done.code == 2
    assert reason in done.err
    assert "Traceback" not in done.err
