"""What privacy and verification mean for the plans of a run: neither gives way."""

from __future__ import annotations

import pytest

from teegpu import config
from teegpu.errors import ConfigError
from teegpu.tee.shield import modes


def loaded(**flags: object) -> config.Config:
    return config.load({f"run.{key}": value for key, value in flags.items()})


@pytest.mark.parametrize("privacy", ["two-server", "pads", "lwe", "reference"])
def test_a_plan_that_can_not_be_hidden_ends_the_run_before_it_begins(privacy: str) -> None:
    settings = loaded(privacy=privacy, prefill_plan="attention", decode_plan="fused")
    assert modes.plan_of(settings, "prefill") == "attention"
    with pytest.raises(ConfigError, match=r"attention and local alone, and run.decode_plan is fused"):
        modes.plan_of(settings, "decode")


def test_auto_chooses_among_what_can_be_hidden() -> None:
    settings = loaded(privacy="pads", prefill_plan="auto")
    assert modes.plan_of(settings, "prefill") == "auto"
    assert modes.allowed(settings) == ("attention", "local")
    assert "batched" in modes.allowed(loaded())
    assert modes.product_cost(settings) > modes.product_cost(loaded()) == 1.0
    assert modes.priced_as(settings, "int32") == "fp32"


def test_verification_is_on_with_privacy_and_off_without() -> None:
    assert modes.verified(loaded(privacy="pads"))
    assert not modes.verified(loaded())
    assert modes.verified(loaded(verify="on"))
    assert not modes.verified(loaded(privacy="pads", verify="off"))
    assert not modes.verified(loaded(privacy="reference", verify="on"))


def test_products_that_nothing_here_can_check() -> None:
    settings = loaded(verify="on", prefill_plan="batched", decode_plan="fused")
    assert modes.plan_of(settings, "decode") == "fused"
    with pytest.raises(ConfigError, match=r"run\.verify takes the plans attention, fused, local alone"):
        modes.plan_of(settings, "prefill")
