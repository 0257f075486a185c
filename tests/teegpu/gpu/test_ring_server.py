"""A server that is asked for products in the ring: its int8 weights, their digest, and its no."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu import ring
from teegpu.gpu import server as serving
from teegpu.gpu.executor import Executor
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.server import GpuServer, Identity
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.ring import Seed
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Health, HealthReport, Hello, Refusal, Result, Welcome
from teegpu.wire.program import Program, linear, ring_linear, single
from tests.conftest import TinyModel
from transports.base import Incoming, ServerLoad

LAYERS = 3
HIDDEN = 32
GATE_UP = single(["n"], ring_linear("gate_up", "n", "layers.1.gate_proj", "layers.1.up_proj"))


@pytest.fixture
def folder(tiny_model: TinyModel) -> Any:
    return tiny_model("llama", num_hidden_layers=LAYERS)


def serve(folder: Any, shield: str = "auto", layers: tuple[int, int] | None = None, **more: Any) -> GpuServer:
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        executor, identity = serving.load(
            store, spec, device="cpu", dtype="bf16", limits=Limits(), layers=layers, shield=shield, **more
        )
    return serving_of(executor, identity)


def serving_of(executor: Executor, identity: Identity) -> GpuServer:
    transport: Any = SimpleNamespace(user_bytes=0, load=ServerLoad())
    return GpuServer(transport, executor, identity, Limits())


def answer(server: GpuServer, encoded: codec.Encoded) -> Any:
    frames = [memoryview(bytearray(frame)) for frame in encoded.frames]
    reply = server.answer(Incoming(frames, b"", None, 0))
    return codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in reply.frames])


def ask(server: GpuServer, program: Program, operand: ring.Operand, encoding: str = "") -> Any:
    encoding = encoding or ("seed" if isinstance(operand, Seed) else "int32")
    replies = dict.fromkeys(program.outputs, "int32" if program.in_ring else "fp32")
    (register,) = program.inputs
    return answer(server, codec.encode_execute(Execute(1, program, {register: operand}, {register: encoding}, replies)))


def digest_by_hand(folder: Any, layers: range, *, lm_head: bool) -> str:
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        names = [
            name
            for name, shape in spec.weights.items()
            if len(shape) == 2
            and name != "embed_tokens"
            and (lm_head if name == "lm_head" else spec.layer_of(name) in layers)
        ]
        return ring.combined((name, ring.digest(*ring.quantise(store.load(name)))) for name in names)


def health(server: GpuServer) -> HealthReport:
    report = answer(server, codec.encode_health(Health(1, "1")))
    assert isinstance(report, HealthReport)
    return report


def test_a_hello_that_asks_has_them_made_from_the_files(folder: Any) -> None:
    """Not from the device's weights: those were rounded to bf16."""
    server = serve(folder)
    plain = answer(server, codec.encode_hello(Hello(1, "1")))
    assert isinstance(plain, Welcome)
    assert plain.ring_digest == ""
    assert health(server).ring_bytes == 0
    asked = answer(server, codec.encode_hello(Hello(2, "1", ring=True)))
    assert isinstance(asked, Welcome)
    assert asked.ring_digest == digest_by_hand(folder, range(LAYERS), lm_head=True)
    assert health(server).ring_bytes > 0
    assert answer(server, codec.encode_hello(Hello(1, "1"))).ring_digest == asked.ring_digest


def test_at_the_start_or_never(folder: Any) -> None:
    shares: list[float] = []
    on = serve(folder, "on", progress=shares.append)
    assert answer(on, codec.encode_hello(Hello(1, "1"))).ring_digest == digest_by_hand(
        folder, range(LAYERS), lm_head=True
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    off = serve(folder, "off")
    assert isinstance(answer(off, codec.encode_hello(Hello(1, "1"))), Welcome)
    for refusal in (answer(off, codec.encode_hello(Hello(1, "1", ring=True))), ask(off, GATE_UP, zeros(2))):
        assert isinstance(refusal, Refusal)
        assert refusal.code == "not-offered"
        assert "server.shield is off" in refusal.text


def zeros(rows: int) -> torch.Tensor:
    return torch.zeros((rows, HIDDEN), dtype=torch.int32)


def test_two_shares_add_up_to_the_product(folder: Any) -> None:
    """What two servers do with a masked message and the seed of its mask."""
    server, spec = serve(folder), read_spec(folder)
    values = torch.randint(-(2**20), 2**20, (5, HIDDEN), dtype=torch.int32)
    seed = Seed(bytes(range(32)), (5, HIDDEN))
    first, second = ask(server, GATE_UP, values + seed.expand()), ask(server, GATE_UP, seed)
    assert isinstance(first, Result)
    assert isinstance(second, Result)
    assert first.times.operations["RING_LINEAR"][0] == 1
    with WeightStore(folder, spec) as store:
        weight = torch.cat([ring.quantise(store.load(name))[0] for name in GATE_UP.weights])
    expected = values.to(torch.int64) @ weight.to(torch.int64).T
    assert torch.equal(first.tensors["gate_up"] - second.tensors["gate_up"], expected.to(torch.int32))


def test_a_part_of_the_layers(folder: Any) -> None:
    server = serve(folder, layers=(1, 1))
    welcome = answer(server, codec.encode_hello(Hello(1, "1", ring=True)))
    assert welcome.ring_digest == digest_by_hand(folder, range(1, 2), lm_head=False)
    assert isinstance(ask(server, GATE_UP, zeros(2)), Result)
    for weight in ("layers.0.q_proj", "lm_head"):
        refusal = ask(server, single(["n"], ring_linear("q", "n", weight)), zeros(2))
        assert isinstance(refusal, Refusal)
        assert (refusal.code, "holds layers 1-1 of 3" in refusal.text) == ("unknown-weight", True)
    last = serve(folder, layers=(2, 2))
    assert answer(last, codec.encode_hello(Hello(1, "1", ring=True))).ring_digest == digest_by_hand(
        folder, range(2, 3), lm_head=True
    )
    assert isinstance(ask(last, single(["n"], ring_linear("logits", "n", "lm_head")), zeros(1)), Result)


@pytest.mark.parametrize(
    ("program", "operand", "encoding", "code"),
    [
        pytest.param(GATE_UP, torch.ones(2, HIDDEN), "fp32", "bad-shape", id="floats"),
        pytest.param(GATE_UP, torch.ones(2, HIDDEN), "int8", "bad-shape", id="quantised floats"),
        pytest.param(GATE_UP, torch.zeros((2, HIDDEN + 1), dtype=torch.int32), "", "bad-shape", id="another width"),
        pytest.param(GATE_UP, torch.zeros((1, 2, HIDDEN), dtype=torch.int32), "", "bad-shape", id="three dimensions"),
        pytest.param(GATE_UP, Seed(bytes(32), (2**23, HIDDEN)), "", "too-large", id="a seed of 1 GiB"),
        pytest.param(GATE_UP, Seed(bytes(32), (2**24, HIDDEN)), "", "too-large", id="a seed of 2 GiB"),
        pytest.param(
            single(["n"], linear("q", "n", "layers.0.q_proj")),
            Seed(bytes(32), (2, HIDDEN)),
            "",
            "bad-shape",
            id="plain",
        ),
        pytest.param(
            single(["n"], linear("q", "n", "layers.0.q_proj")), zeros(2), "", "bad-shape", id="int32 as values"
        ),
        pytest.param(
            single(["n"], ring_linear("q", "n", "embed_tokens")), zeros(2), "", "unknown-weight", id="the embedding"
        ),
        pytest.param(single(["n"], ring_linear("q", "n", "norm")), zeros(2), "", "bad-shape", id="a norm"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_made(
    folder: Any, program: Program, operand: ring.Operand, encoding: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "expand", lambda *_: pytest.fail("expanded"))
    monkeypatch.setattr(RingWeights, "make", lambda *_: pytest.fail("made"))
    server = serve(folder)
    refusal = ask(server, program, operand, encoding)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert server._executor.ring is not None


def test_files_that_are_gone_are_the_servers_fault(folder: Any, tmp_path: Path) -> None:
    server = serve(folder)

    def gone() -> contextlib.AbstractContextManager[Any]:
        raise FileNotFoundError(tmp_path)

    executor = server._executor
    assert executor.ring is not None
    executor.ring._open_store = gone
    refusal = ask(server, GATE_UP, zeros(2))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, str(tmp_path) in refusal.text) == ("internal", False)
    assert isinstance(answer(server, codec.encode_hello(Hello(1, "1"))), Welcome)
