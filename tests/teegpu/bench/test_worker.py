"""What a case's process measures: the same tokens by teegpu and by transformers, and logits that can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teegpu.bench.samples import Sample
from teegpu.bench.worker import Worker
from teegpu.config import Config
from teegpu.errors import ModelError, UsageError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel


def command(folder: ModelFolder, **chosen: Any) -> dict[str, Any]:
    model = {"name": folder.name, "path": str(folder.path)}
    return {"do": "load", "model": model, "prompt_tokens": 20, "decode_tokens": 4, **chosen}


def local_settings(**settings: Any) -> dict[str, Any]:
    plan = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.max_tokens": 5, "run.threads": 1}
    plan["run.local_dtype"] = "fp32"
    return Config().values() | plan | {"run.prefix_cache_mib": 0} | settings


def measured(worker: Worker) -> Sample:
    return Sample.from_json(worker.handle({"do": "measure"})["sample"])


def test_both_sides_make_the_same_tokens_and_every_repeat_is_a_run_of_its_own(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    ours, theirs = Worker(), Worker()
    facts = ours.handle(command(folder, settings=local_settings()))["facts"]
    assert facts["threads"] == {"runner": 1, "server": None}
    assert theirs.handle(command(folder, transformers={"dtype": "fp32", "threads": 1}))["facts"]["notes"] == []
    for worker in (ours, theirs):
        first, second = measured(worker), measured(worker)
        assert first.token_ids == second.token_ids
        for sample in (first, second):
            assert (sample.prefill.tokens, sample.prefill.passes) == (20, 1)
            assert (sample.decode.tokens, sample.decode.passes) == (4, 4)
            assert sample.prefill.rpc_calls == sample.prefill.bytes_up == 0
            assert sample.peak_memory_bytes > 2**20
    assert measured(ours).token_ids == measured(theirs).token_ids
    assert len(measured(ours).token_ids) == 5


def test_prefill_alone(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    ours, theirs = Worker(), Worker()
    ours.handle(command(folder, settings=local_settings(**{"run.max_tokens": 1})))
    theirs.handle(command(folder, transformers={"dtype": "fp32", "threads": 1}) | {"decode_tokens": 0})
    first, second = measured(ours), measured(theirs)
    assert first.token_ids == second.token_ids
    assert first.decode.tokens == second.decode.tokens == 0
    assert first.tpot_median_seconds is second.tpot_median_seconds is None


def test_the_baseline_in_bf16(tiny_model: TinyModel) -> None:
    worker = Worker()
    worker.handle(command(tiny_model("qwen3"), transformers={"dtype": "bf16", "threads": 1}))
    assert len(measured(worker).token_ids) == 5


def test_logits_are_held_against_the_reference_s(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    ours, theirs = Worker(), Worker()
    theirs.handle(command(folder, transformers={"dtype": "fp32", "threads": 1}))
    ways = ["no-kv-cache", "no-position-cache"]
    ours.handle(command(folder, settings=local_settings(), ways=ways))
    path = str(tmp_path / "reference.npy")
    with pytest.raises(UsageError, match='can\'t do "save" now'):
        theirs.handle({"do": "save", "path": path})
    for worker in (ours, theirs, ours):
        measured(worker)
    theirs.handle({"do": "save", "path": path})
    accuracy = ours.handle({"do": "compare", "path": path})["accuracy"]
    assert accuracy["positions"] == 5  # of the first run alone
    assert accuracy["top1_agreement"] == 1.0
    assert 0 <= accuracy["kl_nats"] < 1e-9


def test_a_run_has_a_limit_where_nothing_is_sent(tiny_model: TinyModel) -> None:
    worker = Worker()
    worker.handle(command(tiny_model("llama"), settings=local_settings()))
    sample = measured(worker)
    for phase in (sample.prefill, sample.decode):
        assert phase.limit_seconds == pytest.approx(phase.tee_seconds)
        assert phase.raw_bytes == 0


def test_commands_that_can_not_be() -> None:
    with pytest.raises(UsageError, match='can\'t do "measure" now'):
        Worker().handle({"do": "measure"})
    with pytest.raises(UsageError, match='can\'t do "sleep" now'):
        Worker().handle({"do": "sleep"})


def test_a_model_that_is_not_there(tiny_model: TinyModel) -> None:
    nowhere = ModelFolder("nowhere", tiny_model("llama").path / "nowhere")
    with pytest.raises(ModelError):
        Worker().handle(command(nowhere, settings=local_settings()))
