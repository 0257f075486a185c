"""What ``run.privacy`` and ``run.verify`` mean for a run, before anything is opened."""

from __future__ import annotations

from typing import Final

from teegpu import endpoints, facts
from teegpu.config import Config
from teegpu.errors import ConfigError
from teegpu.options import check_required_privacy, client_options, hidden, verified
from teegpu.remote.sides import check_apart, divide
from transports import addresses
from transports.netem.spec import LinkSpec

WIRE_DTYPE: Final = "int32"
"""How the values of a run in whole numbers are encoded on the link."""


PHASES: Final = ("prefill", "decode")


def plan_of(config: Config, phase: str) -> str:
    """``run.prefill_plan`` or ``run.decode_plan``: a plan, or ``auto`` (then ``allowed`` says among which).

    Raises ``ConfigError`` for one that can't be had together with ``run.privacy`` or ``run.verify``: neither gives way.
    """
    key = f"run.{phase}_plan"
    name = str(config.values()[key])
    if name in (facts.AUTO, *allowed(config)):
        return name
    plans = " and ".join(allowed(config))
    if hidden(config):
        raise ConfigError(
            f"run.privacy = {config.run.privacy} takes the plans {plans} alone, and {key} is {name}: what that sends "
            f"can't be hidden ({facts.plan(name).shows})"
        )
    raise ConfigError(
        f"run.verify takes the plans {plans} alone, and {key} is {name}: it has products that nothing here can check"
    )


def check(config: Config) -> None:
    """Raises what a run of these settings ends with whatever its model and its servers are: ``ConfigError``,
    ``BadKeyError``, ``BadAddressError``, ``LinkSpecError`` and ``ShieldError``."""
    check_required_privacy(config)
    for phase in PHASES:
        plan_of(config, phase)
    if config.run.link:
        LinkSpec.parse(config.run.link)
    if not needs_servers(config):
        if config.run.link:
            raise ConfigError(
                "run.link emulates the link to a server, and this run has none (the plan 'local', or run.privacy = "
                "reference): choose another plan or mode"
            )
        return
    parsed = endpoints.parse_all(config.run.endpoints)
    for endpoint in parsed:
        addresses.parse(endpoint.address)
        client_options(config, endpoint)
    if parsed:
        check_apart(config, divide(config.run.privacy, parsed))


def needs_servers(config: Config) -> bool:
    """Whether a run of these settings has servers, as far as is known before ``auto`` is decided."""
    return not facts.all_local(*(plan_of(config, phase) for phase in PHASES)) and bool(
        facts.privacy(config.run.privacy).servers
    )


def allowed(config: Config) -> tuple[str, ...]:
    """The plans that may be used, whatever is quicker."""
    return facts.privacy(config.run.privacy).plans(verified=verified(config))
