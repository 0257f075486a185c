"""The runner does not believe the server: every way in which a reply can be wrong ends in a clear error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from teegpu.errors import BadReplyError, MismatchError, ServerRefusedError
from teegpu.tee.plans import EMBED, programs
from teegpu.tee.plans import get as plan_of
from teegpu.tee.products import Call, drive
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Refusal, Result, ServerTimes
from teegpu.wire.program import linear, single
from tests.conftest import TinyModel
from tests.teegpu.tee.conftest import Harness, MakeHarness, random_ids
from tests.teegpu.wire.samples import result_of

Frames = list[memoryview]


@pytest.fixture
def runner(tiny_model: TinyModel, harness: MakeHarness) -> Harness:
    return harness(tiny_model("llama"))


def call(runner: Harness) -> Call:
    return Call(programs(runner.spec, plan_of("fused"))[0].qkv[0], {"n": torch.randn(3, runner.spec.hidden_size)}, 0)


@dataclass(frozen=True)
class Opened:
    """A result, taken apart."""

    request_id: int
    tensors: dict[str, torch.Tensor]
    encodings: dict[str, str]
    times: ServerTimes


def rebuilt(change: Callable[[Opened], Opened]) -> Callable[[Frames], Frames]:
    """Tampers with a result by decoding, changing and encoding it again, as a server could have written it."""

    def tamper(frames: Frames) -> Frames:
        result = codec.Decoder(Limits()).decode(frames)
        assert isinstance(result, Result)
        new = change(Opened(result.request_id, result.tensors, result.encodings, result.times))
        encoded = result_of(new.tensors, new.encodings, request_id=new.request_id, times=new.times)
        return [memoryview(bytearray(frame)) for frame in encoded.frames]

    return tamper


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Frames], Frames]:
    return rebuilt(lambda result: replace(result, tensors=result.tensors | {name: change(result.tensors[name])}))


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return change


def test_the_outputs_are_the_products(runner: Harness) -> None:
    asked = call(runner)
    out = drive(runner.gpu_client().run(asked))
    want = asked.inputs["n"] @ runner.store.load("layers.0.q_proj").T
    torch.testing.assert_close(out["q"], want)
    out["q"].zero_()  # the caller's own


def with_operations(operations: dict[str, tuple[int, float]]) -> Callable[[Frames], Frames]:
    return rebuilt(lambda result: replace(result, times=replace(result.times, operations=operations)))


TAMPERED: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "another shape": (with_tensor("q", lambda t: t[:1]), r"register 'q' as fp32 \(1, 32\), expected fp32 \(3, 32\)"),
    "another dtype": (rebuilt(lambda r: replace(r, encodings=r.encodings | {"k": "fp16"})), "register 'k' as fp16"),
    "NaN": (with_tensor("v", poisoned(float("nan"))), "not finite in 'v'"),
    "infinity": (with_tensor("v", poisoned(float("-inf"))), "not finite in 'v'"),
    "another id": (rebuilt(lambda r: replace(r, request_id=99)), "another question"),
    "a register less": (
        rebuilt(lambda r: replace(r, tensors={n: t for n, t in r.tensors.items() if n != "v"})),
        "other registers",
    ),
    "a register more": (
        rebuilt(lambda r: replace(r, tensors=r.tensors | {"w": torch.ones(1)}, encodings=r.encodings | {"w": "fp32"})),
        "other registers",
    ),
    "an operation that was not asked for": (with_operations({"MATMUL": (1, 0.1)}), "count of operations.*MATMUL × 1"),
    "another count of operations": (with_operations({"LINEAR": (2**62, 0.1)}), "count of operations.*LINEAR × 4611"),
    "no reply at all": (lambda _: [], "not valid"),
    "garbage": (lambda _: [memoryview(bytearray(b"\xc1garbage"))], "not valid"),
    "a frame cut short": (lambda frames: [*frames[:-1], frames[-1][:-4]], "not valid"),
    "a question": (
        lambda _: [memoryview(bytearray(f)) for f in codec.encode_hello(codec.Hello(1, "x")).frames],
        "another question",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_reply_that_can_not_be_right_is_refused(what: str, runner: Harness) -> None:
    tamper, message = TAMPERED[what]
    runner.client.tamper = tamper
    with pytest.raises(BadReplyError, match=message):
        drive(runner.gpu_client().run(call(runner)))


SHARED: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "another shape": (with_tensor("v", lambda t: t[:, :8]), r"register 'v' as fp16 \(3, 8\), expected fp16 \(3, 16\)"),
    "another cut": (
        rebuilt(lambda r: replace(r, tensors=r.tensors | {"q": torch.ones(3, 16), "k": torch.ones(3, 32)})),
        r"register 'q' as fp16 \(3, 16\)",
    ),
    "another order": (
        rebuilt(lambda r: replace(r, tensors=dict(sorted(r.tensors.items())))),
        "other registers",
    ),
    "NaN": (with_tensor("k", poisoned(float("nan"))), "not finite in 'q' or 'k' or 'v'"),
    "a value too few": (lambda frames: [*frames[:-1], frames[-1][:-2]], "takes 384 bytes, its frame holds 382"),
    "a frame for each": (
        lambda frames: [frames[0], frames[1][:192], frames[1][192:288], frames[1][288:]],
        "1 frames? after the header, not for 3",
    ),
}


@pytest.mark.parametrize("what", SHARED)
def test_a_frame_that_several_share_is_checked_as_well(what: str, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"), wire_dtype="fp16")
    runner.client.tamper, message = SHARED[what]
    with pytest.raises(BadReplyError, match=message):
        drive(runner.gpu_client().run(call(runner)))


def test_values_that_are_not_finite_can_be_let_through(runner: Harness) -> None:
    runner.client.tamper = with_tensor("v", poisoned(float("nan")))
    out = drive(runner.gpu_client(check_finite=False).run(call(runner)))
    assert out["v"].isnan().any()


def test_a_refusal_is_told_with_its_reason(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"), groups=[(0, 0)])
    unknown = Call(single(["n"], linear("o", "layers.1.q_proj", "n")), {"n": torch.zeros(1, 32)})
    with pytest.raises(ServerRefusedError, match=r"unknown-weight.*layers\.1\.q_proj"):
        drive(runner.gpu_client().run(unknown))


def test_a_refusal_of_the_version_is_a_mismatch(runner: Harness) -> None:
    refusal = codec.encode_refusal(Refusal(1, "version", "other release"))
    runner.client.tamper = lambda _: [memoryview(bytearray(frame)) for frame in refusal.frames]
    with pytest.raises(MismatchError, match="other release"):
        drive(runner.gpu_client().run(call(runner)))


def test_ids_outside_of_the_vocabulary_are_refused(runner: Harness) -> None:
    with pytest.raises(ServerRefusedError, match="vocabulary"):
        drive(runner.gpu_client().run(Call(EMBED, {"ids": torch.tensor([100_000])})))


def test_hello_checks_the_model(runner: Harness) -> None:
    client = runner.gpu_client()
    welcome = client.hello(1.0, "digest")
    assert (welcome.model, welcome.dims["layers"]) == (runner.spec.name, runner.spec.layers)
    with pytest.raises(MismatchError, match=r"digest digest.*this runner has.*give both the same --model"):
        client.hello(1.0, "0123")


def test_hello_to_something_else(runner: Harness) -> None:
    result = result_of({}, {}, request_id=0)
    runner.client.tamper = lambda _: [memoryview(bytearray(frame)) for frame in result.frames]
    with pytest.raises(BadReplyError, match="not a teegpu GPU server"):
        runner.gpu_client().hello(1.0)


def test_a_request_is_the_same_bytes_but_for_its_id(runner: Harness) -> None:
    client = runner.gpu_client()
    asked = call(runner)
    drive(client.run(asked))
    drive(client.run(asked))
    first, second = runner.client.sent
    assert first[1:] == second[1:]
    assert len(first[0]) == len(second[0])


def test_every_rpc_is_recorded_with_what_crossed(runner: Harness) -> None:
    runner.recorder.begin("prefill")
    runner.logits("fused", random_ids(6))
    runner.recorder.end(6, 1)
    phase = runner.summary.phases["prefill"]
    assert phase.rpc_calls == len(runner.client.sent) == 2 * runner.spec.layers + 1
    assert phase.bytes_up == sum(len(frame) for frames in runner.client.sent for frame in frames)
    assert phase.ops["LINEAR"].count == 7 * runner.spec.layers
    assert phase.ops["LM_HEAD"].count == 1
