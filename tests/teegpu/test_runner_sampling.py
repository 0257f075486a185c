"""Who says how tokens are drawn: the user, else the model where it is asked, else nobody."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teegpu import config
from teegpu.model.folder import ModelFolder
from teegpu.runner import Runner
from teegpu.tee.engine import Capacity
from tests.conftest import TinyModel

SUGGESTED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture
def suggesting(tiny_model: TinyModel, tmp_path: Path) -> ModelFolder:
    folder = tiny_model("llama")
    shutil.copytree(folder.path, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SUGGESTED))
    return replace(folder, path=tmp_path / "model")


def decided(folder: ModelFolder, *, serves: bool = False, **sampling: Any) -> tuple[dict[str, Any], list[str]]:
    """What a runner draws by, and what it says."""
    said: list[str] = []
    flags = {f"sampling.{key}": value for key, value in sampling.items()}
    settings = config.load({"run.prefill_plan": "local", "run.decode_plan": "local", **flags})
    with Runner(settings, folder, notify=said.append, capacity=Capacity() if serves else None) as runner:
        options = runner.sampling_options
        made = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        report = runner.report("completed")["settings"]["sampling"]
        assert {name: report[name] for name in made} == made
    return made, [line for line in said if "sampling" in line or "not applied" in line]


USUAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
MODELS = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}  # 50: as in transformers
TOLD = "temperature=0.6, top_k=50, top_p=0.95, repetition_penalty=1.1"


def test_a_run_is_greedy_and_says_what_the_model_suggests(suggesting: ModelFolder) -> None:
    assert decided(suggesting) == (USUAL, [f"the model suggests {TOLD}, which is not applied: --from-model does"])


def test_what_serves_others_draws_as_the_model_suggests(suggesting: ModelFolder) -> None:
    assert decided(suggesting, serves=True) == (MODELS, [f"sampling: {TOLD}, as the model suggests"])
    assert decided(suggesting, from_model="on") == (MODELS, [f"sampling: {TOLD}, as the model suggests"])


def test_what_the_user_sets_goes_first_be_it_the_default(suggesting: ModelFolder) -> None:
    made, said = decided(suggesting, from_model="on", temperature=0.0, top_k=7)
    assert made == MODELS | {"temperature": 0.0, "top_k": 7}
    assert said == ["sampling: top_p=0.95, repetition_penalty=1.1, as the model suggests"]


def test_off_is_off(suggesting: ModelFolder) -> None:
    assert decided(suggesting, serves=True, from_model="off") == (
        USUAL,
        ["the model's generation_config.json asks for repetition_penalty=1.1, which is not applied"],
    )


def test_a_model_that_suggests_nothing_is_not_spoken_of(tiny_model: TinyModel) -> None:
    assert decided(tiny_model("llama"), serves=True) == (USUAL, [])
