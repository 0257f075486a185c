"""Where and in what dtype a server computes, and how it gets its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teegpu.errors import ConfigError
from teegpu.gpu import server as serving
from teegpu.gpu.server import load, pick_device, pick_dtype
from teegpu.kernels import dtype_name
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.wire.limits import Limits
from teegpu.wire.program import Step, single

EMBED = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_auto_is_the_cpu() -> None:
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_cuda_devices")
def test_with_cuda_auto_is_the_first_device() -> None:
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"server.device: '{name}' is not here, torch sees 0 CUDA"):
        pick_device(name)


@pytest.mark.usefixtures("two_cuda_devices")
@pytest.mark.parametrize("name", ["cuda:2", "cuda:256", "cuda:65536", "cuda:999999999"])
def test_a_device_number_that_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match="torch sees 2 CUDA"):
        pick_device(name)


@pytest.mark.usefixtures("two_cuda_devices")
@pytest.mark.parametrize("name", ["", "gpu", "meta", "mps", "CPU", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "cuda:1\n"])
def test_what_is_no_device_names_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.device: .*use auto, cpu, cuda or cuda:0"):
        pick_device(name)


def test_dtypes_by_name() -> None:
    for name, dtype in serving.DTYPES.items():
        assert pick_dtype(name, torch.device("cpu")) == dtype
        assert dtype_name(dtype) == name


@pytest.mark.parametrize("name", ["int8", "float32", "", "fp61"])
def test_an_unknown_dtype_names_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.dtype: .*fp32, bf16, fp16"):
        pick_dtype(name, torch.device("cpu"))


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_cpu_computes_in_bf16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_computes_in_bf16_where_it_can(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert pick_dtype("auto", torch.device("cuda")) == expected


# Loading


def test_a_model_is_loaded_and_identified(tiny_model: Callable[..., ModelFolder]) -> None:
    folder = tiny_model("llama", tie_word_embeddings=True)
    spec, seen = read_spec(folder), []
    with WeightStore(folder, spec) as store:
        executor, identity = load(store, spec, device="cpu", dtype="bf16", limits=Limits(), progress=seen.append)
        assert identity.digest == store.digest()
    assert (identity.spec, identity.device, identity.dtype) == (spec, "cpu", "bf16")
    assert identity.threads == torch.get_num_threads()
    assert identity.memory_bytes == executor.weights.nbytes
    assert seen[-1] == 1.0
    done = executor.run(EMBED, {"ids": torch.tensor([1, 2, 3])}, {"x": "fp32"})
    assert done.frames[0].shape == (3, spec.hidden_size)


@pytest.mark.usefixtures("no_cuda")
def test_a_missing_device_is_noticed_before_anything_is_read(store: Any, spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="is not here"):
        load(store, spec, device="cuda", dtype="auto", limits=Limits())
