"""What privacy and verification mean for the plans of a run: neither gives way."""

from __future__ import annotations

import pytest

from teegpu import config
from teegpu.errors import ConfigError
from teegpu.options import verified
from teegpu.shield import modes


def loaded(**flags: object) -> config.Config:
    return config.load({f"run.{key}": value for key, value in flags.items()})


@pytest.mark.parametrize("privacy", ["two-server", "pads", "reference"])
def test_a_plan_that_can_not_be_hidden_ends_the_run_before_it_begins(privacy: str) -> None:
    settings = loaded(privacy=privacy, prefill_plan="attention", decode_plan="fused")
    assert modes.plan_of(settings, "prefill") == "attention"
    with pytest.raises(ConfigError, match=r"local and attention alone, and run.decode_plan is fused"):
        modes.plan_of(settings, "decode")


def test_auto_chooses_among_what_can_be_hidden() -> None:
    settings = loaded(privacy="pads", prefill_plan="auto")
    assert modes.plan_of(settings, "prefill") == "auto"
    assert modes.allowed(settings) == ("local", "attention")
    assert "batched" in modes.allowed(loaded())


def test_verification_is_on_with_privacy_and_off_without() -> None:
    assert verified(loaded(privacy="pads"))
    assert not verified(loaded())
    assert verified(loaded(verify="on"))
    assert not verified(loaded(privacy="pads", verify="off"))
    assert not verified(loaded(privacy="reference", verify="on"))


def test_products_that_nothing_here_can_check() -> None:
    settings = loaded(verify="on", prefill_plan="batched", decode_plan="fused")
    for phase in ("prefill", "decode"):
        with pytest.raises(ConfigError, match=r"run\.verify takes the plans local and attention alone"):
            modes.plan_of(settings, phase)
    checked = loaded(verify="on", prefill_plan="attention", decode_plan="auto")
    assert modes.plan_of(checked, "prefill") == "attention"
    assert modes.allowed(checked) == ("local", "attention")
