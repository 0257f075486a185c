"""Ranks compute what one process does. Here they are threads of this one, each with its own part of the weights."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from teegpu.errors import ConfigError
from teegpu.gpu.executor import Executor
from teegpu.gpu.group import HUNG_SECONDS, Group
from teegpu.gpu.ranks import Ranks
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import pick_ranks
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import Cut, WeightStore
from teegpu.ring import Seed
from teegpu.wire.limits import Limits
from teegpu.wire.program import Program, Step, linear, ring_linear, single
from tests.conftest import TinyModel
from tests.teegpu.conftest import MakeHarness, random_ids
from tests.teegpu.gpu.conftest import MemoryStore, decoded

CPU = torch.device("cpu")
Together = Callable[..., list[Executor]]

AFTER_ATTENTION = Program(
    ("a", "x"),
    (
        linear("z0", "a", "layers.0.o_proj"),
        Step("add", "z", ("z0", "x")),
        Step("scale", "n", ("z",), ("layers.0.post_attention_layernorm",)),
        linear("gate_up", "n", "layers.0.gate_proj", "layers.0.up_proj"),
    ),
    ("z", "gate_up"),
)


@pytest.fixture
def together() -> Iterator[Together]:
    """``together(ranks, store, spec)`` → the executors of all ranks; the others follow the first one."""
    threads: list[threading.Thread] = []
    firsts: list[Executor] = []
    folders: list[Path] = []

    def make(
        ranks: int,
        store: MemoryStore | WeightStore,
        spec: ModelSpec,
        dtype: torch.dtype = torch.float32,
        layers: tuple[int, int] | None = None,
        int8: bool = False,
    ) -> list[Executor]:
        folders.append(Path(tempfile.mkdtemp()))
        made: dict[int, Executor] = {}
        all_made = threading.Barrier(ranks, timeout=30)

        def be(cut: Cut) -> None:
            held = DeviceWeights(store, spec, device=CPU, dtype=dtype, layers=layers, int8=int8, cut=cut)
            ring = RingWeights(lambda: Open(store), spec, device=CPU, layers=held.layers, cut=cut)
            ranks = Ranks(cut, CPU, folders[-1]) if cut.ranks > 1 else None
            made[cut.rank] = Executor(held, Limits(), ring=ring, ranks=ranks)
            all_made.wait()
            if cut.rank:
                with pytest.raises(RuntimeError):  # of gloo: the first one is gone
                    made[cut.rank].follow()

        cuts = Cut(0, ranks).others()
        others = [threading.Thread(target=be, args=(cut,)) for cut in cuts[1:]]
        threads.extend(others)
        for thread in others:
            thread.start()
        be(cuts[0])
        firsts.append(made[0])
        return [made[rank] for rank in range(ranks)]

    yield make
    for first in firsts:
        if first._ranks is not None:
            first._ranks.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for folder in folders:
        shutil.rmtree(folder)


class Open:
    """A store that is open already."""

    def __init__(self, store: MemoryStore | WeightStore) -> None:
        self.store = store

    def __enter__(self) -> MemoryStore | WeightStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        pass


def run(
    executor: Executor, program: Program, inputs: Mapping[str, torch.Tensor | Seed], encoding: str = "fp32"
) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return decoded(executor.run(program, inputs, dict.fromkeys(program.outputs, encoding)))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs_give_what_one_process_gives(
    ranks: int, dtype: torch.dtype, store: MemoryStore, spec: ModelSpec, together: Together
) -> None:
    (alone,), (first, *_) = together(1, store, spec, dtype), together(ranks, store, spec, dtype)
    programs = [
        AFTER_ATTENTION,
        single(["x"], linear("q", "x", "layers.1.k_proj")),
        single(["x"], linear("qkv", "x", *(f"layers.1.{name}_proj" for name in "qkv"))),
        single(["x"], linear("logits", "x", "lm_head")),
        single(["x", "a"], Step("add", "sum", ("x", "a"))),
    ]
    for program in programs:
        # A message may have them in any order.
        inputs = {name: values(5, 32).to(dtype) * ord(name[0]) / 100 for name in reversed(program.inputs)}
        expected, found = run(alone, program, inputs), run(first, program, inputs)
        assert list(found) == list(expected)
        for name, value in found.items():
            near = 2**-6 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(value, expected[name], rtol=near, atol=near)
    program = single(["ids"], Step("embedding", "h", ("ids",), ("embed_tokens",)))
    ids = torch.randint(0, 50, (9,), dtype=torch.int32)
    assert torch.equal(run(first, program, {"ids": ids})["h"], run(alone, program, {"ids": ids})["h"])


def test_ring_products_are_the_same_bits_for_any_number_of_ranks(
    store: MemoryStore, spec: ModelSpec, together: Together
) -> None:
    program = Program(
        ("x", "y"),
        (
            ring_linear("gate_up", "x", "layers.0.gate_proj", "layers.0.up_proj"),
            ring_linear("q", "y", "layers.1.q_proj"),
            ring_linear("o", "q", "layers.1.o_proj"),
            ring_linear("logits", "y", "lm_head"),
        ),
        ("gate_up", "q", "o", "logits"),
    )
    inputs = {
        "x": torch.randint(-(2**31), 2**31, (7, 32), dtype=torch.int64).to(torch.int32),
        "y": Seed(bytes(range(32)), (7, 32)),
    }
    groups = [together(ranks, store, spec) for ranks in (1, 2, 3)]
    for first, *_ in groups:
        first.make_ring()
    found = [run(group[0], program, inputs, "int32") for group in groups]
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in program.outputs)
    digests = [first.make_ring().digest for first, *_ in groups]
    assert digests[0] == digests[1] == digests[2] != ""
    whole = groups[0][0].make_ring().nbytes
    for group in groups[1:]:
        parts = [executor.ring.nbytes for executor in group if executor.ring is not None]
        assert (sum(parts), len(parts)) == (whole, len(group))
        assert max(parts) <= whole / len(group) * 1.05


@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_holds_its_share_of_the_memory(
    tied: bool, spec: ModelSpec, tied_spec: ModelSpec, make_store: Callable[[ModelSpec], MemoryStore]
) -> None:
    of = tied_spec if tied else spec
    norms = sum(4 * shape[0] for name, shape in of.weights.items() if len(shape) == 1 and not name.endswith("bias"))
    whole = DeviceWeights(make_store(of), of, device=CPU, dtype=torch.float32).nbytes - norms
    for ranks in (2, 3, 4):
        parts = [
            DeviceWeights(make_store(of), of, device=CPU, dtype=torch.float32, cut=cut).nbytes - norms
            for cut in Cut(0, ranks).others()
        ]
        assert sum(parts) == whole
        assert max(parts) <= whole / ranks * 1.05


def test_a_rank_reads_only_its_rows(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama")
    spec = read_spec(folder)
    read: list[int] = []

    def counted(function: Callable[[int, memoryview], None]) -> Callable[[int, memoryview], None]:
        def counting(offset: int, into: memoryview) -> None:
            read.append(into.nbytes)
            function(offset, into)

        return counting

    with WeightStore(folder, spec) as store:
        for file in store._files.values():
            monkeypatch.setattr(file, "read_into", counted(file.read_into))
        held = DeviceWeights(store, spec, device=CPU, dtype=torch.float32, cut=Cut(1, 2))
        assert sum(read) == held.nbytes
        expected = store.load("layers.0.up_proj")
    found = held.matrix("layers.0.up_proj")
    assert found is not None
    assert torch.equal(found.rows(0, found.shape[0]), expected[32:])


def test_what_is_long_is_announced_as_well(store: MemoryStore, spec: ModelSpec, together: Together) -> None:
    steps = [linear("r0", "x", "layers.0.o_proj")]
    steps += [linear(f"r{number}", f"r{number - 1}", "layers.0.o_proj") for number in range(1, 60)]
    program = Program(("x",), tuple(steps), ("r59",))
    assert len(program.packed) > 2**10
    (alone,), (first, *_) = together(1, store, spec), together(2, store, spec)
    x = values(300, 32)
    torch.testing.assert_close(run(first, program, {"x": x})["r59"], run(alone, program, {"x": x})["r59"])


def test_int8_weights_and_some_of_the_layers(store: MemoryStore, spec: ModelSpec, together: Together) -> None:
    program = single(["x"], linear("gate_up", "x", "layers.1.gate_proj", "layers.1.up_proj"))
    x = {"x": values(40, 32)}
    (alone,), (first, *_) = (together(ranks, store, spec, layers=(1, 1), int8=True) for ranks in (1, 2))
    torch.testing.assert_close(run(first, program, x)["gate_up"], run(alone, program, x)["gate_up"])
    assert first.weights.elsewhere("layers.0.gate_proj")


def test_who_fails_in_the_middle_of_a_program_is_lost(store: MemoryStore, spec: ModelSpec, together: Together) -> None:
    class LostError(Exception):
        pass

    def lose(reason: str) -> None:
        raise LostError(reason)

    first, *_ = together(2, store, spec)
    ranks = first._ranks
    assert ranks is not None
    ranks._lost = lose  # type: ignore[assignment]
    ranks.share = lambda _: torch.zeros(1).view(7)  # type: ignore[assignment, return-value]
    with pytest.raises(LostError, match="RuntimeError: "):
        run(first, AFTER_ATTENTION, {"a": values(2, 32), "x": values(2, 32)})


@pytest.mark.parametrize("plan", ["per-op", "batched", "attention", "fused"])
def test_each_plan_gives_the_tokens_of_transformers(
    plan: str,
    tiny_model: TinyModel,
    harness: MakeHarness,
    together: Together,
    reference: Callable[[ModelFolder], object],
) -> None:
    folder = tiny_model("llama")
    runner = harness(folder)
    runner.client.servers[0]._executor = together(2, runner.store, runner.spec)[0]
    prompt = random_ids(9)
    expected = reference(
        folder
    ).generate(  # type: ignore[attr-defined]
        prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None
    )[0, len(prompt) :]
    ids = prompt
    for _ in range(8):
        logits = runner.logits(plan, ids)
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    assert ids[len(prompt) :].tolist() == expected.tolist()


def test_wrong_numbers_of_ranks_are_refused(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_ranks(2, torch.device("cuda"), spec) == torch.device("cuda", 0)
    assert pick_ranks(16, CPU, spec) == CPU
    for ranks, device, reason in [
        (17, CPU, "has 16 rows"),
        (3, torch.device("cuda"), r"torch sees 2 CUDA device\(s\)"),
        (2, torch.device("cuda:1"), "takes the devices from cuda:0 on"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            pick_ranks(ranks, device, spec)


def test_others_that_say_nothing_for_too_long_are_lost() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def lost(reason: str) -> None:
        told.put(reason)
        group._closing.set()

    group = Group(2, lost)  # type: ignore[arg-type]
    with group:
        group._ranks = SimpleNamespace(waits_since=time.monotonic() - HUNG_SECONDS - 1)  # type: ignore[assignment]
        watching = threading.Thread(target=group._watch)
        watching.start()
        assert told.get(timeout=10) == "no word from other ranks for 60 s"
        watching.join(10)
