"""The cost of an RPC: its parts, the bare echo beside it, and the real thing on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zmq

from teegpu.bench import overhead
from teegpu.bench.cases import from_values
from teegpu.bench.echo import Echo
from teegpu.bench.overhead import PARTS, OverheadBenchmark, Trip, figures, fused_calls, parts, trip_of
from teegpu.errors import ConnectionFailedError, UsageError
from teegpu.metrics.events import OTHER, SERIALIZATION, WAIT, Lap, Rpc
from teegpu.model.reader import read_spec
from teegpu.wire.program import infer_shapes
from tests.conftest import TinyModel

MS = 1_000_000
TRIP = Trip(
    round_trip=10 * MS,
    encode=1 * MS,
    wait=7 * MS,
    decode=1 * MS,
    queue=100_000,
    server_decode=200_000,
    compute=3 * MS,
    server_encode=300_000,
    echo=2 * MS,
)


def test_the_parts_of_a_trip_add_up_to_its_overhead() -> None:
    seconds = parts([TRIP])
    assert seconds["overhead"] == [pytest.approx(0.010 - 0.003 - 0.002)]
    inner = ("encode", "decode", "runner_rest", "queue", "server_decode", "server_encode", "transport")
    assert sum(seconds[key][0] for key in inner) == pytest.approx(seconds["overhead"][0])
    assert seconds.keys() == {key for key, _ in PARTS}


def test_an_outlier_of_the_echo_is_not_charged_to_the_rpc() -> None:
    seconds = parts([TRIP, TRIP, TRIP._replace(echo=500 * MS)])
    assert seconds["overhead"] == pytest.approx([0.005] * 3)
    assert figures(seconds["echo"])["p95"] > 0.4


def test_figures() -> None:
    assert figures([3.0, 1.0, 2.0]) == {"median": 2.0, "p95": pytest.approx(2.9), "min": 1.0}


def test_a_trip_is_read_from_its_events() -> None:
    events = [
        Lap(0, 5, OTHER, "OTHER", -1, 0, 0),
        Lap(5, 15, SERIALIZATION, "ENCODE", 0, 0, 0),
        Rpc(1, "z", 0, 0, 20, 90, 10, 10, 10, 10, 0.0, 1e-9, 2e-9, 30e-9, 4e-9, {}),
        Lap(15, 90, WAIT, "WAIT", 0, 0, 1),
        Lap(90, 97, SERIALIZATION, "DECODE", 0, 0, 0),
    ]
    assert trip_of(events, 95, 12) == Trip(95, 10, 70, 7, 1, 2, 30, 4, 12)


@pytest.mark.parametrize(("layers", "pairs"), [(1, 1), (3, 2)])
def test_the_calls_are_a_step_without_its_lm_head(tiny_model: TinyModel, layers: int, pairs: int) -> None:
    spec = read_spec(tiny_model("llama", num_hidden_layers=layers))
    calls = fused_calls(spec)
    assert len(calls) == pairs
    for first, second in calls:
        for call in (first, second):
            shapes = {name: tuple(tensor.shape) for name, tensor in call.inputs.items()}
            assert all(shape[0] == 1 for shape in infer_shapes(call.program, shapes, spec.weights.get).values())
        assert first.program.outputs == ("z", "gate", "up")
        assert second.program.outputs[0] == "x"
        assert ("logits" in second.program.outputs) == (layers == 1)


def test_the_echo_answers_with_the_sizes_that_it_was_told(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/echo"
    with Echo(address, [([40, 100], [30, 7]), ([8], [5000])], spin_seconds=0.001) as echo:
        assert echo.round_trip_ns(0) > 0
        assert echo.round_trip_ns(1) > 0
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(address)
            socket.send_multipart([bytes([0]), b"x"])
            assert list(map(len, socket.recv_multipart())) == [30, 7]
            socket.send_multipart([bytes([1])])
            assert list(map(len, socket.recv_multipart())) == [5000]


def test_an_echo_with_keys_takes_batches_and_any_port() -> None:
    with Echo("tcp://127.0.0.1:0", [([8, 70_000], [100_000])], spin_seconds=0.001, keys=True) as echo:
        assert echo.round_trip_ns(0) > 0
        assert echo.batch_ns(0, 5) > 0


def test_an_echo_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.bench.echo._ANSWER_MS", 50)
    with Echo(f"ipc://{tmp_path}/echo", [([8], [8])], spin_seconds=0) as echo:
        echo._child.close()
        with pytest.raises(ConnectionFailedError, match="does not answer"):
            echo.round_trip_ns(0)


def test_settings_that_can_not_be_measured(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    with pytest.raises(UsageError, match="--rounds 0 is below the least, 1"):
        OverheadBenchmark(folder, from_values({}), rounds=0)
    with pytest.raises(UsageError, match="use zmq or pipelined"):
        OverheadBenchmark(folder, from_values({"run.transport": "inprocess"}), rounds=1)


def test_a_tiny_model(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WARM_UP_ROUNDS", 2)
    threads = torch.get_num_threads()
    bench = OverheadBenchmark(
        tiny_model("llama"), from_values({"run.transport": "zmq", "server.dtype": "fp32"}), rounds=20
    )
    assert bench.document("interrupted")["results"] == []
    outcomes: list[str] = []
    bench.run(lambda step: outcomes.append(step.outcome))
    assert torch.get_num_threads() == threads
    assert len([outcome for outcome in outcomes if outcome.startswith("overhead ")]) == 10
    document = bench.document("complete")
    figure = {entry["part"]: entry["seconds"] for entry in document["results"]}
    assert list(figure) == [key for key, _ in PARTS]
    assert figure["round_trip"]["median"] > figure["overhead"]["median"]
    assert all(figure[part]["min"] > 0 for part in ("round_trip", "encode", "decode", "compute", "echo"))
    first, second = document["programs"]
    assert [len(samples) for samples in first["samples_nanoseconds"].values()] == [20] * len(Trip._fields)
    # one token of fp16: z (32), gate and up (64 each) down; down (32), q (32), k and v (16 each)
    assert sum(first["frame_bytes_down"]) > 2 * (32 + 64 + 64)
    assert sum(second["frame_bytes_down"]) > 2 * (32 + 32 + 16 + 16)
    assert document["server"]["dtype"] == "fp32"
    assert document["notes"][0].startswith("zmq, fp16 wire, server in fp32 on cpu; threads: ")
    assert "× 5 RPCs = " in document["notes"][1]
