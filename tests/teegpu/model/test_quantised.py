from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu import ring
from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.gpu.ringweights import RingWeights
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.shield.quantised import Measures
from tests.teegpu.conftest import MakeHarness
from tests.teegpu.model.conftest import CopiedModel
from tests.teegpu.model.packing import FORMATS, Change, compressed, declare, rewritten

UP = "model.layers.1.mlp.up_proj"


# ---- what is read is what was meant


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_the_one_that_the_format_describes(
    name: str, copied_model: CopiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teegpu.model.weights.BLOCK_BYTES", 4 * 32 * 5)  # blocks of five rows end within words
    folder, plain = rewritten(copied_model("llama"), FORMATS[name], head=name in ("awq", "gptq-4", "fp8-blocks"))
    spec = read_spec(folder)
    with WeightStore(folder, spec, checked=True) as store, WeightStore(plain, spec) as expected:
        for weight in spec.weights:
            assert torch.equal(store.load(weight, torch.float32), expected.load(weight)), weight
        assert store.quantisation is not None
        assert store.size_bytes < expected.size_bytes
        with WeightStore(folder, spec) as other:
            assert store.digest() == other.digest() != expected.digest()


@pytest.mark.parametrize("name", ["gptq-4-ordered", "awq", "fp8-blocks"])
def test_matrices_that_are_joined_on_disk_are_cut_where_they_are_packed(name: str, copied_model: CopiedModel) -> None:
    folder, plain = rewritten(copied_model("phi3"), FORMATS[name])
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store, WeightStore(plain, spec) as expected:
        for weight in spec.weights:
            assert torch.equal(store.load(weight, torch.float32), expected.load(weight)), weight
        assert store.size_bytes < expected.size_bytes


@pytest.mark.parametrize("name", ["int8-channel", "gptq-4-ordered"])
def test_a_quantised_model_answers_as_transformers_does_with_its_values(
    name: str, copied_model: CopiedModel, harness: MakeHarness
) -> None:
    from transformers import AutoModelForCausalLM

    folder, plain = rewritten(copied_model("qwen2"), FORMATS[name])
    reference = AutoModelForCausalLM.from_pretrained(str(plain.path), dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for _ in range(8):
            ids = torch.cat([ids, reference(ids[None]).logits[0, -1].argmax()[None]])
        expected = reference(ids[None]).logits[0]
    runner = harness(folder)
    for plan in ("local", "fused"):
        got = runner.logits(plan, ids, *range(12, len(ids)))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
        assert torch.equal(got[11:-1].argmax(-1), ids[12:])


def test_int8_with_a_scale_for_each_row_is_taken_as_it_is(copied_model: CopiedModel) -> None:
    folder, plain = rewritten(
        copied_model("granite", residual_multiplier=0.25, attention_multiplier=0.3), FORMATS["int8-channel"]
    )
    spec = read_spec(folder)
    least = 0
    with WeightStore(folder, spec) as store, WeightStore(plain, spec) as expected:
        for name in ("layers.0.q_proj", "layers.1.o_proj", "layers.1.down_proj"):
            weight, scale = torch.empty(spec.weights[name], dtype=torch.int8), torch.empty(spec.weights[name][0])
            store.load_whole(name, weight, scale)
            assert torch.allclose(weight * scale[:, None], expected.load(name), rtol=1e-6, atol=0)
            least = min(least, int(weight.min()))
            made, _ = ring.quantise(store.load(name))
            assert not torch.equal(made, weight)  # made anew they would be others
    assert least == -128


@pytest.mark.parametrize("name", ["int8-zeros", "packed-8-ordered", "fp8-tensor", "gptq-8-v2"])
def test_whole_numbers_of_other_formats_are_made_as_those_of_any_weight(name: str, copied_model: CopiedModel) -> None:
    folder, plain = rewritten(copied_model("llama"), FORMATS[name])
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store, WeightStore(plain, spec) as expected:
        weight, scale = torch.empty(64, 32, dtype=torch.int8), torch.empty(64)
        store.load_whole("layers.0.up_proj", weight, scale)
        for found, wanted in zip((weight, scale), ring.quantise(expected.load("layers.0.up_proj")), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["int8-channel", "awq"])
def test_runner_and_server_hold_the_same_whole_numbers(name: str, copied_model: CopiedModel) -> None:
    folder, _ = rewritten(copied_model("llama"), FORMATS[name], head=True)
    spec = read_spec(folder)
    with WeightStore(folder, spec) as store:
        held = RingWeights(store.reopen, spec, device=torch.device("cpu"), layers=(0, 1))
        held.make()
        assert held.digest == Measures.of_model(store, spec).server_digest((0, 1))


# ---- what is not whole is refused


def removed(part: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{UP}.{part}"]

    return change


def replaced(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{part}"] = value(tensors[f"{UP}.{part}"]).contiguous()

    return change


def in_full(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.zeros(64, 32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int8-channel", removed("weight_scale"), f"'{UP}.weight_scale' is missing"),
        ("int8-channel", removed("weight"), f"'{UP}.weight' is missing"),
        ("int8-channel", replaced("weight_scale", lambda scale: scale[:-1]), r"has shape \(63, 1\), not \(64, 1\)"),
        ("int8-channel", replaced("weight", lambda codes: codes.to(torch.int32)), "is of dtype I32"),
        ("int8-zeros", removed("weight_zero_point"), f"'{UP}.weight_zero_point' is missing"),
        ("packed-4", replaced("weight_packed", lambda words: words[:, :-1]), r"has shape \(64, 3\), not \(64, 4\)"),
        ("packed-4", replaced("weight_scale", lambda scale: scale.to(torch.float64)), "is of dtype F64"),
        ("packed-8-ordered", removed("weight_g_idx"), f"'{UP}.g_idx' is missing"),
        ("fp8-blocks", replaced("weight_scale_inv", lambda scale: scale[:, :1]), r"has shape \(4, 1\), not \(4, 2\)"),
        ("fp8-blocks", replaced("weight", lambda codes: codes.view(torch.int8)), "is of dtype I8"),
        ("gptq-4", removed("qzeros"), f"'{UP}.qzeros' is missing"),
        ("gptq-4", replaced("scales", lambda scale: scale[:1]), r"has shape \(1, 64\), not \(2, 64\)"),
        ("gptq-4", replaced("qweight", lambda words: words.t()), r"has shape \(64, 4\), not \(4, 64\)"),
        ("gptq-4", in_full, "is there in full, of F32, and quantised as well"),
        ("gptq-4-ordered", removed("g_idx"), f"'{UP}.g_idx' is missing"),
        ("awq", removed("scales"), f"'{UP}.scales' is missing"),
        ("awq", replaced("qzeros", lambda zeros: zeros[:, :-1]), r"has shape \(2, 7\), not \(2, 8\)"),
    ],
)
def test_tensors_that_are_not_what_the_configuration_says_are_named(
    name: str, change: Change, message: str, copied_model: CopiedModel
) -> None:
    folder, _ = rewritten(copied_model("llama"), FORMATS[name], change=change)
    with pytest.raises(ModelError, match=message) as caught:
        WeightStore(folder, read_spec(folder))
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_another_group_size_than_the_files_have_is_refused(copied_model: CopiedModel) -> None:
    folder, _ = rewritten(copied_model("llama"), FORMATS["gptq-4"])
    declare(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match=r"scales' has shape \(2, 32\), not \(1, 32\).*gptq, 4 bits, groups of 32"):
        WeightStore(folder, read_spec(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(32).flip(0) // 16, "in another order, and config.json has desc_act = false"),
        (torch.arange(32) // 8, "in another order"),
    ],
)
def test_an_order_that_was_not_announced_is_refused(
    index: torch.Tensor, message: str, copied_model: CopiedModel
) -> None:
    change = replaced("g_idx", lambda _: index.to(torch.int32))
    folder, _ = rewritten(copied_model("llama"), FORMATS["gptq-4"], change=change)
    with (
        WeightStore(folder, read_spec(folder)) as store,
        pytest.raises(ModelError, match=rf"'{UP}.qweight': its columns are {message}"),
    ):
        store.load("layers.1.up_proj")


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1])
def test_a_group_that_is_not_there_is_refused(group: int, copied_model: CopiedModel) -> None:
    change = replaced("g_idx", lambda index: torch.full_like(index, group))
    folder, _ = rewritten(copied_model("llama"), FORMATS["gptq-4-ordered"], change=change)
    with (
        WeightStore(folder, read_spec(folder)) as store,
        pytest.raises(ModelError, match="groups that there are not: it has 2"),
    ):
        store.load("layers.1.up_proj")


def test_quantised_tensors_that_the_configuration_is_silent_of_are_refused(copied_model: CopiedModel) -> None:
    folder, _ = rewritten(copied_model("llama"), FORMATS["int8-channel"])
    declare(folder, None)
    with pytest.raises(ModelError, match=r"holds quantised weights .*config\.json does not say how"):
        WeightStore(folder, read_spec(folder))


def test_a_file_that_ends_early_is_told(copied_model: CopiedModel) -> None:
    folder, _ = rewritten(copied_model("llama"), FORMATS["awq"])
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="it is truncated"):
        WeightStore(folder, read_spec(folder))


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, whose code books"),
        ({"bits": 4, "group_size": 64}, "mlx, which lays weights out for Apple's GPUs"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq, whose zeros"),
        ({"quant_method": "exl2", "bits": 4.25}, "exl2, which mixes widths"),
        ({"quant_method": "mxfp4"}, "mxfp4, whose blocks"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"quantised \(modelopt\)"),
        ({"load_in_8bit": True}, "unknown method"),
        ("4 bits", "unknown method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptq, 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "packed for marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True}, "packed for marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*up": {"bits": 8}}}, "of their own"),
        ({"quant_method": "gptq", "bits": 4}, "settings that can't be: 'group_size'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "settings that can't be: group_size is 0"),
        ({"quant_method": "gptq", "bits": True, "group_size": 64}, "settings that can't be: bits is True"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "awq, packed for gemv"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "awq, 8 bits"),
        ({"quant_method": "fp8", "fmt": "e8m0"}, "of the format e8m0"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "settings that can't be"),
        ({"quant_method": "fp8", "weight_block_size": [128, "x"]}, "settings that can't be"),
        (compressed("nvfp4-pack-quantized"), "format nvfp4-pack-quantized"),
        (compressed("dense"), "format dense"),
        (compressed("pack-quantized", num_bits=3), "3 bits packed"),
        (compressed("int-quantized", strategy="token"), "strategy token"),
        (compressed("int-quantized", strategy="block"), "settings that can't be: 'block_structure'"),
        (compressed("float-quantized") | {"config_groups": {"group_0": GROUP}}, "4-bit float"),
        (compressed("int-quantized") | {"config_groups": []}, "settings that can't be"),
        (compressed("int-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (compressed("int-quantized") | {"transform_config": {"config_groups": {"u": {}}}}, "with transforms"),
    ],
)
def test_what_is_not_read_is_refused_by_name_with_what_to_do(
    settings: Any, message: str, copied_model: CopiedModel
) -> None:
    folder = copied_model("llama")
    declare(folder, settings)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_spec(folder)
    assert "compressed-tensors, FP8, GPTQ or AWQ" in str(caught.value)
    assert "\n" not in str(caught.value)
