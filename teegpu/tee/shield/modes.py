"""What ``run.privacy`` and ``run.verify`` mean for a run, before anything is opened."""

from __future__ import annotations

from typing import Final

from teegpu.config import Config
from teegpu.errors import ConfigError
from teegpu.settings import SETTINGS

NONE: Final = "none"
TWO_SERVER: Final = "two-server"
PADS: Final = "pads"
LWE: Final = "lwe"
REFERENCE: Final = "reference"

RING_COST: Final = 2.3
"""A product in the ring against one in fp32, of 128 rows and more with SmolLM2's matrices, on one core with AVX2."""

SHIELDED_PLANS: Final = ("attention", "local")
"""A chain of two matrices outgrows the ring, and scores and token ids are no products with weights."""
VERIFIED_PLANS: Final = ("attention", "fused", "local")
"""Where privacy is none: plans whose products are all with weights."""


WIRE_DTYPE: Final = "int32"
"""How the values of a shielded run are encoded on the link."""


def shielded(config: Config) -> bool:
    return config.run.privacy != NONE


def verified(config: Config) -> bool:
    """Whether the servers' products are checked. ``reference`` has none to check."""
    wanted = config.run.verify
    if config.run.privacy == REFERENCE:
        return False
    return wanted == "on" or (wanted == "auto" and shielded(config))


def plan_of(config: Config, phase: str) -> str:
    """``run.prefill_plan`` or ``run.decode_plan``: a plan, or ``auto`` (then ``allowed`` says among which).

    Raises ``ConfigError`` for one that can't be had together with ``run.privacy`` or ``run.verify``: neither gives way.
    """
    key = f"run.{phase}_plan"
    name = str(config.values()[key])
    if name in ("auto", *allowed(config)):
        return name
    if shielded(config):
        raise ConfigError(
            f"run.privacy = {config.run.privacy} takes the plans {' and '.join(SHIELDED_PLANS)} alone, and {key} is "
            f"{name}: what that sends can't be hidden"
        )
    raise ConfigError(
        f"run.verify takes the plans {', '.join(VERIFIED_PLANS)} alone, and {key} is {name}: it has products that are "
        "not with weights, which nothing here can check"
    )


def priced_as(config: Config, wire: str) -> str:
    """The wire dtype that costs what that of ``config``'s run costs, where it has ``wire``: int32 has the bytes of
    fp32."""
    return "fp32" if shielded(config) else wire


def product_cost(config: Config) -> float:
    """What a product costs both sides, as a factor on the plain one."""
    return RING_COST if shielded(config) else 1.0


def allowed(config: Config) -> tuple[str, ...]:
    """The plans that may be used, whatever is quicker."""
    if shielded(config):
        return SHIELDED_PLANS
    if verified(config):
        return VERIFIED_PLANS
    return tuple(choice for choice in SETTINGS["run.prefill_plan"].choices if choice != "auto")
