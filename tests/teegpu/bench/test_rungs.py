"""The rungs: each adds one thing to the one before, and what is asked for that can't be measured is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from teegpu.bench.cases import from_values
from teegpu.bench.rungs import RUNGS, Rung, before, chosen, has_expected_shape
from teegpu.errors import UsageError
from teegpu.model.reader import read_spec
from tests.conftest import TinyModel

BASE = from_values({})


def names(text: str = "", *, endpoint: bool = False, decode_tokens: int = 32) -> list[str]:
    return [rung.name for rung in chosen(text, endpoint=endpoint, decode_tokens=decode_tokens)]


def what_it_is(rung: Rung) -> dict[str, Any]:
    """What there is to a rung, its settings and ways taken apart."""
    given = dict(rung.case(BASE, 1024, 32).given)
    given.pop("run.decode_plan")
    transport, _, zstd = str(given.pop("run.transport")).partition("+")
    return {**given, "transport": transport, "zstd": zstd, **{way: way in rung.ways for way in WAYS}}


WAYS = ("packed", "no-kv-cache", "no-position-cache")


@pytest.mark.parametrize("rung", [rung for rung in RUNGS.values() if rung.before], ids=lambda rung: rung.name)
def test_a_rung_differs_in_one_thing_from_the_one_before(rung: Rung) -> None:
    own, below = what_it_is(rung), what_it_is(RUNGS[rung.before])
    assert own.keys() == below.keys()
    assert len([key for key in own if own[key] != below[key]]) == 1
    assert rung.adds
    assert rung.label.startswith("+ ") == (rung.track != "beside")


def test_the_chain_begins_with_the_packed_plan_and_ends_with_what_teegpu_does() -> None:
    assert what_it_is(RUNGS["per-op"])["packed"]
    last = RUNGS["int8"].case(BASE, 1024, 32).config(BASE, 32)
    assert (last.run.prefill_plan, last.run.transport, last.run.wire_dtype) == ("fused", "pipelined+zstd", "int8")
    assert last.run.chunk_tokens == 0
    assert RUNGS["fp16"].case(BASE, 1024, 32).config(BASE, 32).run.chunk_tokens == 1024


def test_what_the_original_document_expected() -> None:
    expected = [(rung.name, rung.expected_seconds) for rung in RUNGS.values() if rung.expected_seconds]
    assert expected == [("per-op", 40), ("batched", 22), ("zstd", 15), ("async", 8), ("fused", 4)]


def test_settings_in_force_do_not_change_a_rung() -> None:
    odd = from_values(
        {
            "run.privacy": "pads",
            "run.transport": "zmq",
            "run.speculate": 3,
            "run.chunk_tokens": 5,
            "server.dtype": "bf16",
        }
    )
    for rung in RUNGS.values():
        ours, theirs = rung.case(odd, 64, 4).config(odd, 4), rung.case(BASE, 64, 4).config(BASE, 4)
        if rung.transport:
            assert ours.run == theirs.run
            assert ours.server.dtype == "fp32"


def test_slow_rungs_make_fewer_tokens() -> None:
    assert [RUNGS[name].steps(32) for name in ("per-op", "int8", "no-kv-cache", "kv-cache", "local")] == [
        4, 4, 2, 32, 32,
    ]  # fmt: skip
    assert [RUNGS[name].steps(1) for name in ("per-op", "no-kv-cache")] == [1, 1]


def test_all_by_name_by_kind_and_in_their_order() -> None:
    assert names() == list(RUNGS)
    assert names("fused, per-op") == ["per-op", "fused"]
    assert names("decode,fused") == ["fused", "no-kv-cache", "kv-cache", "position-cache", "speculation"]
    assert names("baseline") == ["local", "transformers"]


@pytest.mark.parametrize(
    ("text", "endpoint", "decode_tokens", "told"),
    [
        ("fussed", False, 32, "there is no rung 'fussed', did you mean 'fused'?; there are per-op, batched, "),
        ("per-op,", False, 32, "there is no rung ''"),
        ("decod", False, 32, "did you mean 'decode'"),
        ("batched", True, 32, "--rungs batched: it needs a server that packs tensors in msgpack"),
        ("kv-cache", False, 0, "--rungs kv-cache: with --decode-tokens 0 there is no decode"),
        ("decode", False, 0, "--rungs decode: with --decode-tokens 0"),
    ],
)
def test_what_can_not_be(text: str, endpoint: bool, decode_tokens: int, told: str) -> None:
    with pytest.raises(UsageError) as error:
        names(text, endpoint=endpoint, decode_tokens=decode_tokens)
    assert told in str(error.value)


def test_what_can_not_be_measured_is_left_out_where_it_was_not_named() -> None:
    assert not {"per-op", "batched"} & set(names(endpoint=True))
    assert names("prefill", endpoint=True)[0] == "raw-frames"
    assert not {"no-kv-cache", "speculation"} & set(names(decode_tokens=0))


def test_the_one_before_is_the_nearest_that_was_measured() -> None:
    assert before(RUNGS["fused"], ["per-op", "zstd", "fused"]) == "zstd"
    assert before(RUNGS["fused"], ["fused"]) == ""


def test_only_one_shape_is_what_was_expected(tiny_model: TinyModel) -> None:
    tiny = read_spec(tiny_model("llama"))
    assert not has_expected_shape(tiny, 1024)
    shape = replace(tiny, layers=22, hidden_size=2048, intermediate_size=5632, heads=32, kv_heads=4)
    assert has_expected_shape(shape, 1024)
    assert not has_expected_shape(shape, 512)
