"""The runner does not believe the server: every way in which a reply can be wrong ends in a clear error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from teegpu.errors import BadReplyError, MismatchError, ServerRefusedError
from teegpu.facts import plan as plan_of
from teegpu.remote.calls import Call, drive
from teegpu.remote.handshake import check_digest, hello
from teegpu.tee.plans import EMBED, programs
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Refusal, Result, ServerTimes
from teegpu.wire.program import linear, single
from tests.conftest import TinyModel
from tests.teegpu.conftest import Harness, MakeHarness, random_ids
from tests.teegpu.wire.samples import result_of

Frames = list[memoryview]


def call(runner: Harness) -> Call:
    """One with two outputs: ``z`` (3, 32) and ``gate_up`` (3, 128)."""
    spec = runner.spec
    inputs = {"a": torch.randn(3, spec.heads * spec.head_dim), "x": torch.randn(3, spec.hidden_size)}
    return Call(programs(spec, plan_of("fused"))[0].after_attention, inputs, 0)


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
    weight = {name.removeprefix("layers.0."): runner.store.load(name) for name in asked.program.weights}
    z = asked.inputs["x"] + asked.inputs["a"] @ weight["o_proj"].T
    n = z * weight["post_attention_layernorm"]
    torch.testing.assert_close(out["z"], z)
    torch.testing.assert_close(out["gate_up"], n @ torch.cat([weight["gate_proj"], weight["up_proj"]]).T)
    out["gate_up"].zero_()  # the caller's own


def with_operations(operations: dict[str, tuple[int, float]]) -> Callable[[Frames], Frames]:
    return rebuilt(lambda result: replace(result, times=replace(result.times, operations=operations)))


TAMPERED: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "another shape": (with_tensor("z", lambda t: t[:1]), r"register 'z' as fp32 \(1, 32\), expected fp32 \(3, 32\)"),
    "another dtype": (rebuilt(lambda r: replace(r, encodings=r.encodings | {"z": "fp16"})), "register 'z' as fp16"),
    "NaN": (with_tensor("gate_up", poisoned(float("nan"))), "not finite in 'gate_up'"),
    "infinity": (with_tensor("gate_up", poisoned(float("-inf"))), "not finite in 'gate_up'"),
    "another order": (rebuilt(lambda r: replace(r, tensors=dict(sorted(r.tensors.items())))), "other registers"),
    "the parts of a product": (
        rebuilt(
            lambda r: replace(
                r,
                tensors={"z": r.tensors["z"], "gate": r.tensors["gate_up"][:, :64], "up": r.tensors["gate_up"][:, 64:]},
                encodings=dict.fromkeys(("z", "gate", "up"), "fp32"),
            )
        ),
        "other registers",
    ),
    "another id": (rebuilt(lambda r: replace(r, request_id=99)), "another question"),
    "a register less": (
        rebuilt(lambda r: replace(r, tensors={n: t for n, t in r.tensors.items() if n != "gate_up"})),
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


NARROW: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "another shape": (
        with_tensor("gate_up", lambda t: t[:, :8]),
        r"'gate_up' as fp16 \(3, 8\), expected fp16 \(3, 128\)",
    ),
    "NaN": (with_tensor("z", poisoned(float("nan"))), "not finite in 'z'"),
    "infinity": (with_tensor("gate_up", poisoned(float("inf"))), "not finite in 'gate_up'"),
    "a value too few": (lambda frames: [*frames[:-1], frames[-1][:-2]], "takes 768 bytes, its frame holds 766"),
    "one frame for both": (
        lambda frames: [frames[0], memoryview(bytearray(frames[1]) + bytearray(frames[2]))],
        "2 rows stands for as many frames after the header, not for 1",
    ),
}


@pytest.mark.parametrize("what", NARROW)
def test_a_reply_in_a_narrow_dtype_is_checked_as_well(what: str, tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"), wire_dtype="fp16")
    runner.client.tamper, message = NARROW[what]
    with pytest.raises(BadReplyError, match=message):
        drive(runner.gpu_client().run(call(runner)))


def test_values_that_are_not_finite_can_be_let_through(runner: Harness) -> None:
    runner.client.tamper = with_tensor("gate_up", poisoned(float("nan")))
    out = drive(runner.gpu_client(check_finite=False).run(call(runner)))
    assert out["gate_up"].isnan().any()


def test_a_server_of_the_protocol_before_is_a_mismatch(runner: Harness) -> None:
    """Its refusal of our hello is a message of version 4, and ends the run with the exit code of a mismatch."""
    runner.client.tamper = lambda _: [memoryview(bytearray(b"\x95\x04\xa7refusal\x00\xa7version\xa3old"))]
    with pytest.raises(MismatchError, match="version 4, this is version 5: install the same teegpu release") as caught:
        hello(runner.client, codec.Decoder(Limits()), 1.0)
    assert caught.value.exit_code == 5


def test_a_refusal_is_told_with_its_reason(tiny_model: TinyModel, harness: MakeHarness) -> None:
    runner = harness(tiny_model("llama"), shards=[(0, 0)])
    unknown = Call(single(["n"], linear("o", "n", "layers.1.q_proj")), {"n": torch.zeros(1, 32)})
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
    welcome = hello(runner.client, codec.Decoder(Limits()), 1.0)
    assert (welcome.model, welcome.dims["layers"]) == (runner.spec.name, runner.spec.layers)
    check_digest(welcome, runner.spec, "digest", "here")
    with pytest.raises(MismatchError, match=r"digest digest.*this runner has.*give both the same --model"):
        check_digest(welcome, runner.spec, "0123", "here")


def test_hello_to_something_else(runner: Harness) -> None:
    result = result_of({}, {}, request_id=0)
    runner.client.tamper = lambda _: [memoryview(bytearray(frame)) for frame in result.frames]
    with pytest.raises(BadReplyError, match="not a teegpu GPU server"):
        hello(runner.client, codec.Decoder(Limits()), 1.0)


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
    assert phase.ops["LINEAR"].count == 4 * runner.spec.layers
    assert phase.ops["LM_HEAD"].count == 1
