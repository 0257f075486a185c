"""What an audit makes for itself serves a run; and in whichever mode, the answer is that of the reference."""

from __future__ import annotations

from typing import Any

import pytest

from teegpu import config
from teegpu.audit.examine import LEAST_PROMPT
from teegpu.audit.kit import kit
from teegpu.model.folder import ModelFolder
from teegpu.tee.generate import Generation
from teegpu.tee.runner import Runner
from tests.teegpu.audit.conftest import PROMPT_IDS
from tests.teegpu.cli.conftest import LocalServer, ServerFor

TOKENS = 12


def answer(folder: ModelFolder, mode: str, *addresses: str, **settings: Any) -> list[int]:
    values = {
        "run.privacy": mode,
        "run.endpoints": addresses,
        "run.prefill_plan": "attention",
        "run.decode_plan": "attention",
        "run.max_tokens": TOKENS,
        # Drawn from the distribution, each token depends on the logits' last bits, which greedy ones do not.
        "sampling.temperature": 1.5,
        "sampling.seed": 11,
    }
    chosen = config.load(values | settings, None)
    with kit(chosen, folder, 96, 24, lambda _: None) as ready, Runner(ready, folder) as runner:
        done = runner.generate(
            PROMPT_IDS, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
        )
    return done.token_ids


def test_all_modes_say_what_the_reference_says(
    audit_model: ModelFolder, server_for: ServerFor, second_server: LocalServer
) -> None:
    first, second = server_for(audit_model).address, second_server.address
    reference = answer(audit_model, "reference")
    assert len(set(reference)) > TOKENS // 2
    assert answer(audit_model, "two-server", first, second, **{"run.chunk_tokens": LEAST_PROMPT}) == reference
    assert answer(audit_model, "pads", first, **{"run.transport": "zmq", "run.speculate": 3}) == reference


def test_a_plain_run_needs_nothing(audit_model: ModelFolder, isolated_user_files: Any) -> None:
    chosen = config.load({}, None)
    with kit(chosen, audit_model, 8, 8, pytest.fail) as ready:
        assert ready is chosen
    assert not (isolated_user_files / "data").exists()
