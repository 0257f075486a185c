"""Int8 weights in the plan local and on a server: what is computed is the model whose weights they are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teegpu import config, kernels
from teegpu.gpu import server as gpu
from teegpu.kernels import Int8Matrix
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import wire_limits
from teegpu.runner import Runner
from teegpu.tee.choose import BlankWeights, local_bytes
from teegpu.tee.sequence import Generation
from teegpu.tee.weights import TeeWeights
from tests.conftest import TinyModel
from tests.teegpu.model.packing import FORMATS, rewritten


@pytest.fixture
def int8_model(tiny_model: TinyModel, tmp_path: Path) -> tuple[ModelFolder, ModelFolder]:
    """A model of int8 weights, and one of their values."""
    folder = tiny_model("llama")
    shutil.copytree(folder.path, tmp_path / "model")
    return rewritten(replace(folder, path=tmp_path / "model"), FORMATS["int8-channel"], head=True)


@pytest.mark.parametrize("plan", ["local", "fused"])
def test_an_answer_is_that_of_the_models_int8_weights(
    plan: str, int8_model: tuple[ModelFolder, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "int8_rows", lambda _: 16)
    folder, plain = int8_model
    answers, said = {}, []
    for where, weights in ((folder, "int8"), (plain, "full")):
        settings = config.load(
            {
                "run.prefill_plan": plan,
                "run.decode_plan": plan,
                "run.max_tokens": 4,
                "run.wire_dtype": "fp32",
                "server.dtype": "fp32",
                "run.local_weights": weights,
                "server.weights": weights,
            }
        )
        with Runner(settings, where, notify=said.append) as runner:
            done = Generation()
            runner.generate([1, 2, 3, 4, 5], sampler=runner.sampler(), on_token=lambda _: None, result=done,
                            ignore_end=True)  # fmt: skip
            answers[weights] = done.token_ids
            report = runner.report("completed")
        used = report["settings"]["local_dtype"] if plan == "local" else report["server"]["dtype"]
        assert used == ("fp32+int8" if weights == "int8" else "fp32")
    assert answers["int8"] == answers["full"]


def test_a_server_holds_int8_weights_and_says_so(int8_model: tuple[ModelFolder, ModelFolder]) -> None:
    folder, _ = int8_model
    spec, limits = read_spec(folder), wire_limits(config.Config())
    with WeightStore(folder, spec) as store:
        full, _ = gpu.load(store, spec, device="cpu", dtype="fp32", limits=limits)
        executor, identity = gpu.load(store, spec, device="cpu", dtype="fp32", weights="int8", limits=limits)
        more = executor.weights.nbytes - full.weights.nbytes
        for names in (("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"), ("lm_head",), ("layers.1.up_proj",)):
            found, wanted = executor.weights.matrix(*names), full.weights.matrix(*names)
            assert isinstance(found, Int8Matrix)
            assert wanted is not None
            x = torch.randn(20, found.shape[1])
            torch.testing.assert_close(found.product(x), wanted.product(x))
    values = sum(spec.weights[name][0] * spec.weights[name][1] for name in spec.weights if name.endswith("proj"))
    assert identity.dtype == "fp32+int8"
    assert more == values + spec.vocab_size * spec.hidden_size


def test_predictions_know_int8_weights(int8_model: tuple[ModelFolder, ModelFolder]) -> None:
    folder, _ = int8_model
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        blank = BlankWeights(TeeWeights(store, spec, int8=True)).matrix(("lm_head",))
    assert isinstance(blank, Int8Matrix)
    assert local_bytes(spec, kernels.matrix_bytes(torch.float32, int8=True)) == local_bytes(spec) * 5 // 4
