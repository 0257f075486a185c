"""The tables agree with what they describe."""

from __future__ import annotations

import pytest
import torch

import transports
from teegpu import facts
from teegpu.errors import ConfigError
from teegpu.wire import dtypes
from transports.registry import client_class


def test_the_plans_that_auto_may_take_show_neither_ids_nor_scores() -> None:
    assert [name for name, plan in facts.PLANS.items() if plan.offered] == ["local", "attention", "fused"]
    assert not any(plan.offered and (plan.remote_embedding or plan.remote_attention) for plan in facts.PLANS.values())


def test_what_can_be_hidden_and_what_can_be_verified() -> None:
    assert facts.PADS.plans(verified=True) == facts.TWO_SERVER.plans(verified=False) == ("local", "attention")
    assert facts.NO_PRIVACY.plans(verified=True) == ("local", "attention")
    assert facts.NO_PRIVACY.plans(verified=False) == tuple(facts.PLANS)


@pytest.mark.parametrize("name", facts.WIRE_DTYPES)
def test_a_wire_dtype_has_the_bytes_that_the_codec_makes(name: str) -> None:
    row = facts.WIRE_DTYPES[name]
    for values in (1, 63, 64, 65, 576):
        assert dtypes.nbytes((3, values), name) == 3 * row.row_bytes(values)


def test_rows_are_scaled_for_the_dtypes_that_activations_may_be_too_large_for() -> None:
    assert {name: row.narrow_range for name, row in facts.WIRE_DTYPES.items()} == {
        "fp32": False, "bf16": False, "fp16": True, "int8": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_wire_dtypes_range_and_roundoff_are_those_of_torch(name: str) -> None:
    row, info = facts.WIRE_DTYPES[name], torch.finfo(dtypes.PLAIN[name])
    assert row.largest == info.max
    assert row.roundoff == info.eps / 2


def test_the_residual_is_never_narrower_than_fp16() -> None:
    assert facts.INT8.for_register("x") is facts.FP16
    assert facts.INT8.for_register("q") is facts.INT8
    assert facts.BF16.for_register("logits") is facts.BF16


def test_the_transports_are_those_that_can_be_connected() -> None:
    assert tuple(facts.TRANSPORTS) == transports.names()
    for row in facts.TRANSPORTS.values():
        client = client_class(row.name)
        assert (client.name, client.overlaps, client.compresses) == (row.name, row.overlaps, row.compresses)
        assert row.overlapping.overlaps
        assert row.overlapping.compresses == row.compresses
        assert row.compressing.compresses
        assert row.compressing.overlaps == row.overlaps


@pytest.mark.parametrize("look_up", [facts.plan, facts.wire_dtype, facts.transport, facts.privacy])
def test_an_unknown_name_lists_those_that_there_are(look_up: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown .* 'fussed'.*; there are "):
        look_up("fussed")  # type: ignore[operator]
