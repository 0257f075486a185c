"""A server that holds some of a model's layers: what it loads, what that takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu.config import Config
from teegpu.errors import ConfigError
from teegpu.gpu import server as serving
from teegpu.gpu.executor import Executor
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import held_layers
from teegpu.settings import ServerSettings
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Hello, Refusal, Welcome
from teegpu.wire.program import Program, ShapeError, Step, linear, single
from tests.conftest import TinyModel
from transports.base import Incoming

CPU = torch.device("cpu")
LAYERS = 4
PARTS = [(0, 0), (0, 2), (1, 2), (3, 3), (0, 3)]
MakeStore = Callable[[ModelSpec], Any]


@pytest.fixture
def deep(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=LAYERS, layer_windows=(None,) * LAYERS)


def load(store: Any, spec: ModelSpec, layers: tuple[int, int] | None) -> DeviceWeights:
    return DeviceWeights(store, spec, device=CPU, dtype=torch.float32, layers=layers)


def expected(spec: ModelSpec, layers: tuple[int, int]) -> set[str]:
    """The weights that programs may use on a server of ``layers``."""
    first, last = layers
    usable = {name for name in spec.weights if not name.endswith((".bias", "q_norm", "k_norm"))}
    held = {name for name in usable if name.startswith(tuple(f"layers.{layer}." for layer in range(first, last + 1)))}
    ends = {"embed_tokens"} if first == 0 else set()
    return held | ends | ({"norm", "lm_head"} if last == LAYERS - 1 else set())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", PARTS)
def test_it_reads_and_holds_the_weights_of_its_layers_alone(
    layers: tuple[int, int], tied: bool, make_store: MakeStore, deep: ModelSpec
) -> None:
    spec = replace(deep, tied_embeddings=tied)
    store = make_store(spec)
    weights = load(store, spec, layers)
    held = expected(spec, layers)
    assert {name for name in spec.weights if weights.shape(name) is not None} == held
    shared = {"lm_head"} if tied and layers == (0, LAYERS - 1) else set()
    assert sorted(store.loaded) == sorted(held - shared)
    for name in held - {"embed_tokens", "norm", "lm_head"}:
        if name.endswith("_proj"):
            matrix = weights.matrix(name)
            assert matrix is not None
            assert torch.equal(matrix.rows(0, matrix.shape[0]), store.tensors[name])


@pytest.mark.parametrize("layers", PARTS)
def test_its_memory_is_that_of_its_weights(layers: tuple[int, int], make_store: MakeStore, deep: ModelSpec) -> None:
    weights = load(make_store(deep), deep, layers)
    values = sum(torch.Size(deep.weights[name]).numel() for name in expected(deep, layers))
    assert weights.nbytes == 4 * values


def test_parts_together_take_what_the_whole_takes(make_store: MakeStore, deep: ModelSpec) -> None:
    whole = load(make_store(deep), deep, None).nbytes
    assert sum(load(make_store(deep), deep, layers).nbytes for layers in [(0, 0), (1, 2), (3, 3)]) == whole


def test_progress_of_a_part_goes_to_one(make_store: MakeStore, deep: ModelSpec) -> None:
    seen: list[float] = []
    DeviceWeights(make_store(deep), deep, device=CPU, dtype=torch.float32, layers=(1, 2), progress=seen.append)
    assert seen == [0.5, 1.0]


NOT_HELD = {
    "another layer": single(["x"], linear("y", "x", "layers.3.q_proj")),
    "a norm of another layer": single(["x"], Step("scale", "y", ("x",), ("layers.0.input_layernorm",))),
    "lm_head": single(["x"], linear("y", "x", "lm_head")),
    "the final norm": single(["x"], Step("scale", "y", ("x",), ("norm",))),
    "half of it": Program(
        ("x",), (linear("a", "x", "layers.1.q_proj"), linear("b", "x", "layers.3.q_proj")), ("a", "b")
    ),
}


@pytest.mark.parametrize("what", NOT_HELD)
def test_a_weight_that_is_not_held_is_refused_with_what_is(what: str, make_store: MakeStore, deep: ModelSpec) -> None:
    program = NOT_HELD[what]
    executor = Executor(load(make_store(deep), deep, (1, 2)), Limits())
    with pytest.raises(ShapeError, match=r"this server holds layers 1-2 of 4, and weight '.*' is not placed") as caught:
        executor.run(program, {"x": torch.ones(2, deep.hidden_size)}, dict.fromkeys(program.outputs, "fp32"))
    assert caught.value.code == "unknown-weight"


def test_token_ids_are_refused_where_there_is_no_embedding(make_store: MakeStore, deep: ModelSpec) -> None:
    executor = Executor(load(make_store(deep), deep, (1, 3)), Limits())
    program = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))
    with pytest.raises(ShapeError, match="holds layers 1-3 of 4, and weight 'embed_tokens'"):
        executor.run(program, {"ids": torch.tensor([1, 2])}, {"x": "fp32"})


@pytest.mark.parametrize("name", ["layers.4.q_proj", "layers.1.q_proj.weight", "layers.x.q_proj", "secret"])
def test_a_weight_that_no_model_has_is_unknown_as_before(name: str, make_store: MakeStore, deep: ModelSpec) -> None:
    executor = Executor(load(make_store(deep), deep, (1, 2)), Limits())
    with pytest.raises(ShapeError, match="the model has no weight"):
        executor.run(single(["x"], linear("y", "x", name)), {"x": torch.ones(2, 32)}, {"y": "fp32"})


def answer(server: GpuServer, encoded: codec.Encoded) -> Any:
    frames = [memoryview(bytearray(frame)) for frame in encoded.frames]
    reply = server.answer(Incoming(frames, b"", None, 0))
    return codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in reply.frames])


def test_a_part_of_a_folder_has_the_digest_of_the_whole_and_says_what_it_holds(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", num_hidden_layers=LAYERS)
    spec = read_spec(folder)

    def loaded(layers: tuple[int, int] | None) -> tuple[Executor, Identity]:
        with WeightStore(folder, spec) as store:
            return serving.load(store, spec, device="cpu", dtype="fp32", limits=Limits(), layers=layers)

    (_, whole), (executor, part) = loaded(None), loaded((2, 3))
    assert part.digest == whole.digest
    assert part.memory_bytes < whole.memory_bytes
    assert (whole.layers, part.layers) == ((0, 3), (2, 3))

    transport: Any = SimpleNamespace(user_bytes=0)  # the server is asked directly
    server = GpuServer(transport, executor, part, Limits())
    welcome = answer(server, codec.encode_hello(Hello(5, "1")))
    assert isinstance(welcome, Welcome)
    assert (welcome.layers, welcome.dims["layers"], welcome.memory_bytes) == ((2, 3), LAYERS, part.memory_bytes)
    asked = Execute(
        1, single(["n"], linear("q", "n", "layers.0.q_proj")), {"n": torch.ones(1, 32)}, {"n": "fp32"}, {"q": "fp32"}
    )
    refusal = answer(server, codec.encode_execute(asked))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "unknown-weight"
    assert "holds layers 2-3 of 4" in refusal.text


def test_the_setting_names_layers_of_the_model() -> None:
    def held(text: str) -> tuple[int, int] | None:
        return held_layers(Config(server=ServerSettings(layers=text)), LAYERS)

    assert [held(text) for text in ("", "0-3", "1-1")] == [None, (0, 3), (1, 1)]
    for text in ("2-1", "0-4", "4-4"):
        with pytest.raises(
            ConfigError, match=f"server.layers: {text} is no range of this model's layers, which are 0-3"
        ):
            held(text)
