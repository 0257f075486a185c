"""Which processes a benchmark has: servers that are shared, cases that make room, and what failures come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from teegpu import machine
from teegpu.bench.cases import Case, from_values, parse_all
from teegpu.bench.pool import PROCESS_BYTES, Pool, Workload, case_bytes, server_bytes
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.config import Config
from teegpu.errors import ConnectionFailedError, ModelError, TeegpuError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from tests.conftest import TinyModel

SAMPLE = Sample(PhaseSample(4, 1, 0.5), PhaseSample(2, 2, 0.25), 0.5, 0.125, [1, 2, 3], 10)


@dataclass
class FakeChild:
    what: str
    log: list[str]
    commands: list[dict[str, Any]] = field(default_factory=list)
    error: TeegpuError | None = None

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self.commands.append(command)
        self.log.append(f"{command['do']} {self.what}")
        if self.error is not None:
            raise self.error
        answers = {"load": {"facts": {"who": self.what}}, "compare": {"accuracy": {"kl_nats": 0.5}}}
        return answers.get(command["do"], {"sample": SAMPLE.to_json()})

    def close(self) -> None:
        self.log.append(f"close {self.what}")


@dataclass
class FakeServer:
    endpoint: str
    config: Config
    threads: int
    log: list[str]
    ended: bool = False
    broken: bool = False
    entry: Sequence[str] = ()

    def wait(self) -> dict[str, object]:
        if self.broken:
            raise ModelError("it can't be loaded")
        return {}

    def failure(self) -> TeegpuError:
        return ModelError("the server ran out of luck")

    def close(self) -> None:
        self.log.append(f"close server {self.config.server.dtype}")


class House:
    """A pool of fakes. ``room`` is how many processes fit, None: as many as there are."""

    def __init__(self, folder: ModelFolder, *texts: str, room: int | None = None, **flags: object) -> None:
        self.base = from_values({key.replace("__", "."): value for key, value in flags.items()})
        self.cases: list[Case] = parse_all(texts, self.base)
        self.log: list[str] = []
        self.children: dict[str, FakeChild] = {}
        self.servers: list[FakeServer] = []
        self.room = room
        self.broken_servers = False
        self.spec = read_spec(folder)
        work = Workload(folder, self.spec, self.base, 16, 4)
        self.pool = Pool(
            self.cases, work, start_child=self._child, start_server=self._server, available_bytes=self._available
        )

    def _child(self, what: str, alone: bool) -> FakeChild:
        self.children[what] = FakeChild(what, self.log)
        return self.children[what]

    def _server(self, folder: ModelFolder, config: Config, threads: int, entry: Sequence[str]) -> FakeServer:
        self.log.append(f"start server {config.server.dtype}")
        self.servers.append(
            FakeServer(
                f"ipc:///{len(self.servers)}", config, threads, self.log, broken=self.broken_servers, entry=entry
            )
        )
        return self.servers[-1]

    def _available(self) -> int | None:
        if self.room is None:
            return None
        counted = [line.split()[0] for line in self.log]
        used = counted.count("load") + counted.count("start") - counted.count("close")
        return (self.room - used) * (PROCESS_BYTES + self.spec.parameters * 4) + 2**29

    def settings(self, label: str) -> dict[str, Any]:
        settings: dict[str, Any] = self.children[label].commands[0]["settings"]
        return settings


@pytest.fixture
def folder(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)


def test_a_case_is_loaded_and_warmed_up_once(folder: ModelFolder) -> None:
    house = House(folder, "local")
    with house.pool as pool:
        loaded = pool.load(0)
        assert pool.load(0) is loaded
        assert (loaded.facts, loaded.warm_up) == ({"who": "local"}, SAMPLE)
        assert pool.sample(0) == SAMPLE
    assert house.log == ["load local", "measure local", "measure local", "close local"]
    assert house.children["local"].commands[0]["model"] == {"name": folder.name, "path": str(folder.path)}


def test_cases_that_need_the_same_server_share_it(folder: ModelFolder) -> None:
    house = House(folder, "fused,dtype=fp32", "batched,dtype=fp32,transport=zmq", "fused,dtype=bf16", "local")
    with house.pool as pool:
        for index in range(4):
            pool.load(index)
    assert [server.config.server.dtype for server in house.servers] == ["fp32", "bf16"]
    endpoints = [house.settings(case.label)["run.endpoints"] for case in house.cases]
    assert endpoints == [("ipc:///0",), ("ipc:///0",), ("ipc:///1",), ()]
    assert house.log[-2:] == ["close server bf16", "close server fp32"]


@pytest.mark.parametrize("other", ["server-threads=7", "compression.level=3"])
def test_what_a_server_is_told_makes_it_another(folder: ModelFolder, other: str) -> None:
    house = House(folder, "fused", f"fused,{other}")
    with house.pool as pool:
        pool.load(0)
        pool.load(1)
    assert len(house.servers) == 2


def test_runner_and_server_share_the_cores_and_others_have_all(folder: ModelFolder) -> None:
    house = House(
        folder, "fused", "fused,threads=5,server-threads=7", "local", "transformers", "transformers,threads=1"
    )
    with house.pool as pool:
        for index in range(5):
            pool.load(index)
    labels = [case.label for case in house.cases]
    assert [server.threads for server in house.servers] == [1, 7]
    assert [house.settings(label)["run.threads"] for label in labels[:3]] == [1, 5, 0]
    told = [house.children[label].commands[0]["transformers"] for label in labels[3:]]
    assert told == [{"dtype": "fp32", "threads": 2}, {"dtype": "fp32", "threads": 1}]


def test_a_server_that_is_there_is_used_with_all_cores(folder: ModelFolder) -> None:
    house = House(folder, "fused", run__endpoints=("tcp://10.0.0.1:5555",))
    with house.pool as pool:
        pool.load(0)
    assert house.servers == []
    settings = house.settings(house.cases[0].label)
    assert (settings["run.endpoints"], settings["run.threads"]) == (("tcp://10.0.0.1:5555",), 0)


def test_the_case_whose_turn_is_last_makes_room(folder: ModelFolder) -> None:
    house = House(folder, "local,label=A", "local,label=B", "local,label=C", room=2)
    with house.pool as pool:
        for index in (0, 1, 2, 0, 1):
            pool.sample(index)
    ended = [line for line in house.log if line.startswith(("load", "close"))]
    # C comes, and B is further away than A; then B comes, and A, which has just had its turn, is further than C
    assert ended[:6] == ["load A", "load B", "close B", "load C", "close A", "load B"]


def test_a_server_that_nobody_needs_makes_room_too(folder: ModelFolder) -> None:
    house = House(folder, "fused,dtype=fp32", "fused,dtype=bf16", room=2)
    with house.pool as pool:
        pool.load(0)
        pool.load(1)
    first, second = (case.label for case in house.cases)
    before = house.log[: house.log.index("start server bf16")]
    assert before[-2:] == [f"close {first}", "close server fp32"]
    assert f"load {second}" in house.log


def test_what_does_not_fit_is_tried_all_the_same(folder: ModelFolder) -> None:
    house = House(folder, "local", room=0)
    with house.pool as pool:
        assert pool.sample(0) == SAMPLE


def test_a_case_that_fails_is_ended_and_loaded_anew_when_asked_again(folder: ModelFolder) -> None:
    house = House(folder, "local")
    with house.pool as pool:
        pool.load(0)
        house.children["local"].error = ModelError("no")
        with pytest.raises(ModelError, match="no"):
            pool.sample(0)
        assert house.log[-1] == "close local"
        assert pool.sample(0) == SAMPLE


def test_a_case_that_can_not_be_loaded_is_ended(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(folder, "local")
    monkeypatch.setattr(FakeChild, "ask", lambda *_: (_ for _ in ()).throw(ModelError("no")))
    with house.pool as pool, pytest.raises(ModelError):
        pool.load(0)
    assert house.log == ["close local"]


def test_a_server_that_can_not_be_loaded_is_ended(folder: ModelFolder) -> None:
    house = House(folder, "fused")
    house.broken_servers = True
    with house.pool as pool, pytest.raises(ModelError, match="it can't be loaded"):
        pool.load(0)
    assert house.log == ["start server auto", "close server auto"]


def test_a_lost_server_is_told_as_what_it_is_and_not_used_again(folder: ModelFolder) -> None:
    house = House(folder, "fused", "batched")
    with house.pool as pool:
        pool.load(0)
        child = house.children[house.cases[0].label]
        child.error = ConnectionFailedError("the connection was lost")
        house.servers[0].ended = True
        with pytest.raises(ModelError, match="ran out of luck"):
            pool.sample(0)
        pool.load(1)
    assert len(house.servers) == 2


def test_a_lost_connection_to_a_server_that_lives_stays_what_it_is(folder: ModelFolder) -> None:
    house = House(folder, "fused")
    with house.pool as pool:
        pool.load(0)
        house.children[house.cases[0].label].error = ConnectionFailedError("the connection was lost")
        with pytest.raises(ConnectionFailedError, match="the connection was lost"):
            pool.sample(0)


def test_what_is_released_makes_room_before_a_case_has_to(folder: ModelFolder) -> None:
    house = House(folder, "fused,dtype=fp32", "local,label=A", "local,label=B", room=3)
    with house.pool as pool:
        pool.load(0)
        pool.load(1)
        pool.release(0)
        pool.release(0)
        assert house.log[-1] == f"close {house.cases[0].label}"
        pool.load(2)  # there is room for it
        assert "close server fp32" not in house.log
        house.room = 2
        house.cases.append(parse_all(["local,label=C"], house.base)[0])
        house.pool._loaded.pop(2).process.close()
        pool.load(3)  # the server that nobody uses goes, and A stays
    assert house.log[house.log.index("close B") : house.log.index("load C")] == ["close B", "close server fp32"]


def test_a_case_with_the_packed_codec_has_a_server_of_its_own(folder: ModelFolder) -> None:
    house = House(folder, "fused,dtype=fp32")
    house.cases.append(replace(house.cases[0], label="packed", ways=("packed",), decode_tokens=2))
    with house.pool as pool:
        pool.load(0)
        pool.load(1)
    assert [server.entry for server in house.servers] == [("teegpu", "serve"), ("teegpu.bench.before",)]
    first, second = (house.children[case.label].commands[0] for case in house.cases)
    assert (first["ways"], second["ways"]) == ([], ["packed"])
    assert (first["decode_tokens"], second["decode_tokens"]) == (4, 2)
    assert (first["settings"]["run.max_tokens"], second["settings"]["run.max_tokens"]) == (5, 3)


def test_a_case_is_compared_with_the_reference_after_its_first_run(folder: ModelFolder) -> None:
    house = House(folder, "local")
    house.pool._work = replace(house.pool._work, reference=Path("/some/where.npy"))
    with house.pool as pool:
        assert pool.load(0).facts == {"who": "local", "accuracy": {"kl_nats": 0.5}}
        pool.save_logits(0, Path("/else/where.npy"))
    assert house.log[:4] == ["load local", "measure local", "compare local", "save local"]
    assert [command.get("path") for command in house.children["local"].commands[2:]] == [
        "/some/where.npy", "/else/where.npy",
    ]  # fmt: skip


def test_two_servers_are_started_where_a_case_needs_two(folder: ModelFolder) -> None:
    house = House(folder, "attention,privacy=two-server", "fused", "attention,privacy=reference")
    with house.pool as pool:
        for index in range(3):
            pool.load(index)
        labels = [case.label for case in house.cases]
        assert house.settings(labels[0])["run.endpoints"] == ("ipc:///0", "ipc:///1")
        assert house.settings(labels[1])["run.endpoints"] == ("ipc:///0",)  # any server of its kind will do
        assert house.settings(labels[2])["run.endpoints"] == ()
        house.children[labels[0]].error = ConnectionFailedError("the connection was lost")
        house.servers[1].ended = True
        with pytest.raises(ModelError, match="ran out of luck"):
            pool.sample(0)
        pool.load(0)
        assert house.settings(labels[0])["run.endpoints"] == ("ipc:///0", "ipc:///2")


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 4), ("auto", 4), ("bf16", 2), ("fp16", 2)])
def test_needs_grow_with_the_weights(folder: ModelFolder, dtype: str, each: int) -> None:
    spec = read_spec(folder)
    process = server_bytes(spec, dtype) - spec.parameters * each
    assert process > 0
    assert case_bytes(spec, all_weights=True, dtype=dtype) == process + spec.parameters * each
    assert case_bytes(spec, all_weights=False) == process + spec.vocab_size * spec.hidden_size * 4
