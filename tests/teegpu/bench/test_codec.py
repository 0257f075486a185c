"""``bench codec`` on a tiny model's activations, and the arithmetic behind its figures."""

from __future__ import annotations

import json
import math

import pytest
import torch

from teegpu.bench import activations
from teegpu.bench.activations import NAMES, Tap, sampled_layers
from teegpu.bench.cases import from_values
from teegpu.bench.codec import CodecBenchmark, break_even, deviation
from teegpu.bench.measure import Progress
from teegpu.bench.render import FORMATS, render
from teegpu.errors import PromptError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.settings import WIRE_DTYPES
from teegpu.tee.plans import SCORES
from teegpu.tee.products import Call, drive
from tests.conftest import TinyModel

TOKENS = 24


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def measured(model: ModelFolder) -> CodecBenchmark:
    threads = torch.get_num_threads()
    benchmark = CodecBenchmark(model, from_values({}), prompt_tokens=TOKENS, repeats=2)
    steps: list[Progress] = []
    benchmark.run(steps.append)
    assert [step.stage for step in steps] == ["capturing", "warm-up", "repeat 1 of 2", "repeat 2 of 2"]
    assert torch.get_num_threads() == threads
    return benchmark


def test_every_kind_is_measured_in_every_dtype_and_compressed(measured: CodecBenchmark) -> None:
    document = json.loads(render(measured.document("complete"), "json"))
    dtypes = [entry for entry in document["results"] if "encode" in entry]
    assert [(entry["activations"], entry["wire_dtype"]) for entry in dtypes] == [
        (kind, name) for kind in NAMES for name in WIRE_DTYPES
    ]
    zstd = [entry for entry in document["results"] if "zstd" in entry]
    # int8 has no bytes to shuffle
    assert len(zstd) == len(NAMES) * (3 * 4 + 2)
    for entry in document["results"]:
        assert all(len(samples) == 2 for samples in entry["samples"].values())


def test_values_are_those_that_cross_the_link(measured: CodecBenchmark) -> None:
    """Layers 0 and 1 of 3: hidden size 32, 4 heads and 2 of keys and values of 8 each, an MLP of 64."""
    entries = {
        entry["activations"]: entry
        for entry in measured.document("complete")["results"]
        if entry["wire_dtype"] == "fp32" and "encode" in entry
    }
    per_token = {"attended": 32, "gate+up": 2 * 64, "mlp": 64, "hidden": 2 * 32}
    for kind, values in per_token.items():
        assert entries[kind]["values"] == 2 * TOKENS * values
    # into and out of both programs of both layers; Q, K and V of layers 1 and 2, and those that enter layer 0
    assert entries["residual"]["values"] == 2 * 4 * TOKENS * 32
    assert entries["qkv"]["values"] == 3 * TOKENS * (32 + 16 + 16)
    assert entries["scores"]["values"] == entries["probabilities"]["values"] == 2 * 4 * TOKENS * TOKENS


def test_a_narrower_dtype_has_fewer_bytes_and_a_larger_error(measured: CodecBenchmark) -> None:
    found = [entry for entry in measured.document("complete")["results"] if "encode" in entry]
    for kind in NAMES:
        fp32, bf16, fp16, int8 = (entry for entry in found if entry["activations"] == kind)
        assert fp32["deviation"] == {"relative_rms": 0.0, "largest": 0.0}
        assert fp16["bytes_share"] == bf16["bytes_share"] == 0.5
        assert 0.25 < int8["bytes_share"] < 0.35
        assert (
            0
            < fp16["deviation"]["relative_rms"]
            < bf16["deviation"]["relative_rms"]
            < int8["deviation"]["relative_rms"]
        )
        assert int8["deviation"]["relative_rms"] < 0.02
        assert fp16["deviation"]["relative_rms"] < fp16["deviation"]["largest"]


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_shown_in_every_format(measured: CodecBenchmark, form: str) -> None:
    text = render(measured.document("complete"), form)
    assert "probabilities" in text
    assert "failed" not in text
    if form == "md":
        wire, zstd = text.split("Wire dtypes\n")[1].split("\nzstd\n")
        assert "pays below" not in wire.split("\n\n")[0]
        assert "| probabilities" in zstd


def test_where_compression_pays() -> None:
    """Half is saved, at 8 ns a byte for both sides: a link that takes less than 16 ns a byte is quicker without."""
    assert break_even(0.5, 8e-9) == pytest.approx(1 / 16e-9)
    assert break_even(1.2, 8e-9) == 0.0


def test_deviation_is_over_the_values_own_size() -> None:
    tensors = [torch.full((2, 2), 10.0), torch.full((4,), -10.0)]
    decoded = [torch.full((2, 2), 10.5), torch.full((4,), -10.0)]
    found = deviation(tensors, decoded)
    assert found["largest"] == pytest.approx(0.05)
    assert found["relative_rms"] == pytest.approx(math.sqrt(4 * 0.25 / 800))
    assert deviation([torch.zeros(3)], [torch.zeros(3)]) == {"relative_rms": 0.0, "largest": 0.0}


def test_layers_are_sampled_over_the_model() -> None:
    assert sampled_layers(1) == sampled_layers(2) == [0]
    assert sampled_layers(3) == [0, 1]
    assert sampled_layers(30) == [0, 7, 14, 21, 28]


def test_what_a_call_gave_is_kept_before_it_is_written_to() -> None:
    class Owner:
        narrow_range = False

        async def run(self, call: Call) -> dict[str, torch.Tensor]:
            return {"scores": torch.ones(1, 2, 2)}

        async def run_all(self, calls: object) -> list[dict[str, torch.Tensor]]:
            raise NotImplementedError

    tap = Tap(Owner(), {"scores": "scores", "q": "queries"}, [4])
    for layer in (3, 4):
        queries = torch.ones(1, 2, 8)
        (outputs,) = drive(tap.run_all([Call(SCORES, {"q": queries, "k": queries}, layer)]))
        outputs["scores"].zero_()
        queries.zero_()
    assert [float(tensor.sum()) for kind in ("queries", "scores") for (tensor,) in tap.found[kind]] == [16.0, 4.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0 is below"),
        ({"repeats": 0}, "--repeats 0 is below"),
        ({"levels": (20,)}, "--level 20 is not between 1 and 19"),
        ({"kinds": ("resdual",)}, "did you mean 'residual'"),
        ({"wire_dtypes": ("fp8",)}, "--wire-dtype fp8 is not one of"),
    ],
)
def test_what_can_not_be_measured(model: ModelFolder, options: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        CodecBenchmark(model, from_values({}), **({"prompt_tokens": 8, "repeats": 1} | options))  # type: ignore[arg-type]


def test_a_prompt_that_is_longer_than_the_context(model: ModelFolder) -> None:
    with pytest.raises(PromptError, match="which ends at 256"):
        CodecBenchmark(model, from_values({}), prompt_tokens=257, repeats=1)


def test_the_kinds_of_the_help_are_all_there_are() -> None:
    import inspect

    from teegpu.cli import benchlink

    help_text = inspect.get_annotations(benchlink.codec, eval_str=True)["kind"].__metadata__[0].help
    assert all(name in help_text for name in activations.NAMES)
