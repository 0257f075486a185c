"""Audits of tiny models, on a real server in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from teegpu import config
from teegpu.audit.examine import Audit, Report
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, ServerFor
from tests.teegpu.cli.conftest import server_for as server_for

PROMPT_IDS = list(b"The quick brown fox jumps over a lazy dog; and why not?")
"""Token ids of a tiny model are bytes."""

Audited = Callable[..., Report]


@pytest.fixture(scope="session")
def audit_model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", num_hidden_layers=4, hidden_size=64, num_attention_heads=8, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def second_server(audit_model: ModelFolder) -> Iterator[LocalServer]:
    """Another server of the model: a run with two shares takes two."""
    server = LocalServer(audit_model)
    yield server
    server.close()


@pytest.fixture
def audited(audit_model: ModelFolder, server_for: ServerFor) -> Audited:
    """``audited(plan="fused", lies=False, second="", most_bytes=…, model=…, **settings)`` → the report of an audit of
    ``PROMPT_IDS``. A setting ``run.x`` is written ``run__x``; ``second`` is the address of a second server."""

    def make(
        *,
        plan: str = "fused",
        lies: bool = False,
        second: str = "",
        most_bytes: int = 2**30,
        model: ModelFolder = audit_model,
        **settings: Any,
    ) -> Report:
        values: dict[str, Any] = {
            "run.endpoints": tuple(filter(None, (server_for(model).address, second))),
            "run.prefill_plan": plan,
            "run.decode_plan": plan,
            "run.max_tokens": 12,
            "run.prefix_cache_mib": 0,
        }
        chosen = config.load(values | {key.replace("__", "."): value for key, value in settings.items()}, None)
        audit = Audit(model, chosen, lambda _: PROMPT_IDS, training_tokens=120, most_bytes=most_bytes, lies=lies)
        return audit.run()

    return make
