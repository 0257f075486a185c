"""Programs that are recorded on a CUDA device give what launched ones give, and their times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from teegpu.gpu import cuda
from teegpu.gpu.executor import Execution, Executor
from teegpu.wire.program import Program
from tests.teegpu.gpu.conftest import decoded
from tests.teegpu.gpu.test_executor import EMBED, FUSED, QKV, random

MakeExecutor = Callable[..., Executor]


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device("cuda")


def execute(executor: Executor, program: Program, encoding: str, *inputs: torch.Tensor) -> Execution:
    given = dict(zip(program.inputs, inputs, strict=True))
    return executor.run(program, given, dict.fromkeys(program.outputs, encoding))


def recorded(executor: Executor) -> int:
    device = executor._device
    assert device is not None
    assert device.replays, "the driver refused to record a program"
    return sum(replay is not None for replay in device.recorded.found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_replay_is_the_same_program(
    make_executor: MakeExecutor, dtype: torch.dtype, encoding: str, rows: int
) -> None:
    executor, launching = make_executor(dtype), make_executor(dtype)
    assert launching._device is not None
    launching._device.replays = False
    for turn in range(4):  # other values each time
        inputs = (random(rows, 32, seed=turn), random(rows, 32, seed=100 + turn))
        got, expected = execute(executor, FUSED, encoding, *inputs), execute(launching, FUSED, encoding, *inputs)
        for name, value in decoded(expected).items():
            torch.testing.assert_close(decoded(got)[name], value, rtol=1e-2, atol=1e-2)
    assert recorded(executor) == 1


def test_frames_are_not_written_by_the_next_replay(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    done = [execute(executor, QKV, "fp32", random(1, 32, seed=turn)) for turn in range(5)]
    again = make_executor()
    for turn, earlier in enumerate(done):
        alone = execute(again, QKV, "fp32", random(1, 32, seed=turn))
        for name, value in decoded(alone).items():
            torch.testing.assert_close(decoded(earlier)[name], value)


def test_token_ids_are_read_anew(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    rows = [decoded(execute(executor, EMBED, "fp32", torch.tensor([i], dtype=torch.int32)))["x"] for i in range(4)]
    assert recorded(executor) == 1
    assert not torch.equal(rows[2], rows[3])


def test_times_are_those_of_the_device(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    for _ in range(4):
        done = execute(executor, FUSED, "fp16", random(1, 32), random(1, 32))
        assert {name: count for name, (count, _) in done.operations.items()} == {"LINEAR": 3, "ADD": 1, "SCALE": 1}
        assert 0 < sum(seconds for _, seconds in done.operations.values()) < 1.0
        assert done.compute_seconds == pytest.approx(sum(seconds for _, seconds in done.operations.values()))
        assert done.bring_in_seconds > 0
        assert done.bring_out_seconds > 0


def test_long_programs_are_launched(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    for _ in range(3):
        execute(executor, FUSED, "fp16", random(cuda.REPLAYED_ROWS + 1, 32), random(cuda.REPLAYED_ROWS + 1, 32))
    assert recorded(executor) == 0


def test_no_more_are_kept_than_is_said(make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "REPLAYS", 3)
    executor = make_executor()
    for rows in range(1, 9):
        for _ in range(2):
            execute(executor, FUSED, "fp16", random(rows, 32), random(rows, 32))
    assert executor._device is not None
    assert len(executor._device.recorded.found) == 3


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> cuda.Recorded[str]:
    """Of 8 recordings, of 40 bytes each and 100 bytes together at most."""
    for name, most in (("REPLAYS", 8), ("REPLAY_BYTES", 40), ("REPLAYS_BYTES", 100)):
        monkeypatch.setattr(cuda, name, most)
    return cuda.Recorded()


def test_what_recordings_pin_is_bounded(small: cuda.Recorded[str]) -> None:
    """A client that sends ever new shapes twice pushes out the oldest recordings, and pins no more than is said."""
    for key in range(20):
        assert small.get(key, 30, lambda: "never") is None
        assert small.get(key, 30, lambda key=key: f"recording {key}") == f"recording {key}"  # type: ignore[misc]
        assert small.nbytes <= 100
    assert [key for key, recording in small.found.items() if recording is not None] == [17, 18, 19]
    assert small.get(19, 30, lambda: "another") == "recording 19"


def test_a_program_with_large_registers_is_not_recorded(small: cuda.Recorded[str]) -> None:
    """Few rows may have millions of columns each."""
    assert [small.get("wide", 41, lambda: "recording") for _ in range(3)] == [None, None, None]
    assert not small.found


def test_shapes_that_come_once_take_nothing_from_recordings(small: cuda.Recorded[str]) -> None:
    small.get("ours", 30, lambda: "recording")
    small.get("ours", 30, lambda: "recording")
    for key in range(100):
        small.get(key, 40, lambda: "never")
        assert small.get("ours", 30, lambda: "another") == "recording"
    assert (len(small.found), small.nbytes) == (8, 30)


def test_where_nothing_can_be_recorded_programs_are_launched(
    make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda, "_Replay", refuse)
    executor = make_executor()
    found = [decoded(execute(executor, QKV, "fp32", random(1, 32)))["q"] for _ in range(3)]
    assert torch.equal(found[0], found[2])
    assert executor._device is not None
    assert not executor._device.replays
