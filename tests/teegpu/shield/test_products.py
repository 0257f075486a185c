"""All modes give the bits of the reference, servers see nothing but masked values, and a wrong answer ends the run."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from teegpu.errors import VerificationError
from teegpu.facts import plan as plan_of
from teegpu.remote.calls import Call, drive
from teegpu.tee.plans import EMBED, programs
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Result
from tests.conftest import TinyModel
from tests.teegpu import families
from tests.teegpu.conftest import random_ids
from tests.teegpu.shield.conftest import MakeWorld, World
from tests.teegpu.wire.samples import result_of


def prompt(count: int = 20) -> list[int]:
    return random_ids(count, seed=5).tolist()


@pytest.mark.parametrize(("architecture", "overrides"), families.each())
def test_modes_give_the_bits_of_the_reference(
    architecture: str, overrides: families.Overrides, tiny_model: TinyModel, world: MakeWorld
) -> None:
    one = world(tiny_model(architecture, **overrides))
    reference = one.products("reference")
    for chunk_tokens in (4096, 7):
        wanted = one.generate(reference, prompt(), 8, chunk_tokens=chunk_tokens)
        for mode in ("two-server", "pads", "none"):
            assert one.generate(one.products(mode), prompt(), 8, chunk_tokens=chunk_tokens) == wanted
    values = [one.harness.logits("attention", random_ids(9), 7, products=one.products(mode))
              for mode in ("reference", "two-server", "pads", "none")]  # fmt: skip
    assert len(values[0].argmax(-1).unique()) > 1
    assert all(torch.equal(each, values[0]) for each in values)


@pytest.mark.parametrize("mode", ["two-server", "pads", "none"])
def test_values_are_the_references_to_the_bit(mode: str, tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("qwen2"))
    for rows in (1, 5):
        call = qkv(one, rows)
        wanted, found = (drive(one.products(name).run(call)) for name in ("reference", mode))
        assert list(found) == list(wanted) == ["qkv"]
        assert torch.equal(found["qkv"], wanted["qkv"])
        found["qkv"].zero_()  # the caller's own


def test_the_reference_is_near_the_plain_product(tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("llama"))
    call = qkv(one, 9)
    found = drive(one.products("reference").run(call))["qkv"]
    weight = torch.cat([one.harness.store.load(name) for name in call.program.weights])
    plain = call.inputs["n"] @ weight.T
    assert float((found - plain).norm() / plain.norm()) < 0.01


def qkv(one: World, rows: int) -> Call:
    generator = torch.Generator().manual_seed(rows)
    n = torch.randn(rows, one.harness.spec.hidden_size, generator=generator)
    return Call(programs(one.harness.spec, plan_of("attention"))[0].qkv[0], {"n": n}, 0)


def executes(sent: list[list[bytes]]) -> list[Execute]:
    found = [codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in frames]) for frames in sent]
    assert all(isinstance(message, Execute) for message in found)
    return [message for message in found if isinstance(message, Execute)]


@pytest.mark.parametrize("mode", ["two-server", "pads"])
def test_nothing_but_masked_values_leaves(mode: str, tiny_model: TinyModel, world: MakeWorld) -> None:
    """Every frame is a header of names and shapes, uniform int32, or a seed; and no mask serves twice."""
    one = world(tiny_model("llama"))
    for _ in range(2):  # the same prompt twice
        one.generate(one.products(mode), prompt(64), 3)
    first, second = (executes(sent) for sent in one.sent)
    assert len(first) == 2 * (4 * one.harness.spec.layers + 1) * 3
    assert len(second) == (len(first) if mode == "two-server" else 0)
    values = []
    for message in first:
        assert {step.op for step in message.program.steps} == {"ring_linear"}
        assert set(message.encodings.values()) == set(message.reply_encodings.values()) == {"int32"}
        values += [tensor for tensor in message.tensors.values() if isinstance(tensor, torch.Tensor)]
    assert len(values) == len(first)
    everything = torch.cat([tensor.flatten() for tensor in values]).to(torch.int64)
    # 16 bins of the values, and each bit: within 5 standard deviations of uniform
    count = everything.numel()
    assert count > 20_000
    bins = torch.bincount((everything + 2**31) >> 28, minlength=16).to(torch.float64)
    assert float((bins - count / 16).abs().max()) < 5 * (count / 16) ** 0.5
    for bit in range(32):
        assert abs(float(((everything >> bit) & 1).sum()) - count / 2) < 2.5 * count**0.5
    rows = {row.numpy().tobytes() for tensor in values for row in tensor}
    assert len(rows) == sum(tensor.shape[0] for tensor in values)
    for sent in one.sent:
        # what else there is are the frames of the header: no longer than names and shapes take
        assert all(len(frames) == 2 and len(frames[0]) < 400 for frames in sent)
    if mode == "two-server":
        seeds = [frames[1] for frames in one.sent[1]]
        assert all(len(seed) == 32 for seed in seeds)
        assert len(set(seeds)) == len(seeds)


def test_a_program_that_is_not_one_product_is_never_sent(tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("llama"))
    fused = programs(one.harness.spec, plan_of("fused"))[0].after_attention
    hidden = torch.randn(2, one.harness.spec.hidden_size)
    for call in (
        Call(EMBED, {"ids": torch.tensor([1, 2])}),
        Call(fused, {"a": hidden, "x": hidden}, 0),
    ):
        with pytest.raises(RuntimeError, match="can't be shielded"):
            drive(one.products("two-server").run(call))
    assert one.sent == [[], []]


# Servers that lie


Tamper = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def lying(change: Tamper) -> Callable[[list[memoryview]], list[memoryview]]:
    def tamper(frames: list[memoryview]) -> list[memoryview]:
        result = codec.Decoder(Limits()).decode(frames)
        assert isinstance(result, Result)
        new = change({name: value.clone() for name, value in result.tensors.items()})
        encoded = result_of(new, result.encodings, request_id=result.request_id, times=result.times)
        return [memoryview(bytearray(frame)) for frame in encoded.frames]

    return tamper


def flipped(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values["qkv"][2, 3] ^= 1
    return values


def far(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values["qkv"][0, 0] ^= -(2**31)
    return values


def swapped(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return values | {"qkv": values["qkv"].flip(0)}


def nothing(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in values.items()}


@pytest.mark.parametrize("change", [flipped, far, swapped, nothing])
@pytest.mark.parametrize(("mode", "liar"), [("two-server", 0), ("two-server", 1), ("pads", 0), ("none", 0)])
def test_a_wrong_answer_ends_the_run_and_says_whose_it_was(
    change: Tamper, mode: str, liar: int, tiny_model: TinyModel, world: MakeWorld
) -> None:
    one = world(tiny_model("llama"))
    products = one.products(mode, one.checks())
    drive(products.run(qkv(one, 5)))  # an honest answer passes
    one.clients[liar].tamper = lying(change)
    named = re.escape(f"the server at tcp://server{liar + 1}:5555 answered layer 0, q_proj+k_proj+v_proj")
    with pytest.raises(VerificationError, match=f"^{named}"):
        drive(products.run(qkv(one, 5)))


@pytest.mark.parametrize("mode", ["two-server", "pads", "none"])
def test_vectors_that_found_a_lie_are_drawn_anew(mode: str, tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("llama"))
    checks = one.checks()
    products = one.products(mode, checks)
    honest = one.clients[0].tamper
    seeds = {checks._seed}
    for _ in range(2):
        one.clients[0].tamper = lying(flipped)
        with pytest.raises(VerificationError):
            drive(products.run(qkv(one, 5)))
        one.clients[0].tamper = honest
        drive(products.run(qkv(one, 5)))
        seeds.add(checks._seed)
    assert len(seeds) == 3


def test_a_request_that_is_given_up_has_used_its_mask_up(tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("llama"))
    products = one.products("pads")
    honest = one.clients[0].tamper
    wanted = drive(products.run(qkv(one, 5)))

    def interrupted(_: list[memoryview]) -> list[memoryview]:
        raise KeyboardInterrupt

    one.clients[0].tamper = interrupted
    with pytest.raises(KeyboardInterrupt):
        drive(products.run(qkv(one, 5)))
    one.clients[0].tamper = honest
    found = drive(products.run(qkv(one, 5)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    masks = [row.numpy().tobytes() for mask in one.masks.taken for row in mask]
    assert len(one.masks.taken) == 3
    assert len(set(masks)) == len(masks)
    assert len({frames[-1] for frames in one.sent[0]}) == 3


def test_both_are_named_where_both_lie(tiny_model: TinyModel, world: MakeWorld) -> None:
    one = world(tiny_model("llama"))
    for client in one.clients:
        client.tamper = lying(nothing)
    with pytest.raises(VerificationError, match="server1:5555 and the server at tcp://server2:5555 answered"):
        drive(one.products("two-server", one.checks()).run(qkv(one, 5)))


def test_two_servers_that_lie_by_the_same_amount_do_no_harm(tiny_model: TinyModel, world: MakeWorld) -> None:
    """The difference is what the run goes on with, and it is right."""
    one = world(tiny_model("llama"))
    wanted = drive(one.products("reference").run(qkv(one, 5)))
    for client in one.clients:
        client.tamper = lying(lambda values: {name: value + 12345 for name, value in values.items()})
    found = drive(one.products("two-server", one.checks()).run(qkv(one, 5)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
