"""Fixtures that every test shares: isolation from the user's files, the default model, and tiny random models."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teegpu.files import user_folder
from teegpu.model.folder import ModelFolder

# Before any test isolates itself: the one place where a model of 98 MB is worth keeping from run to run.
_USER_CACHE = user_folder("cache")

TinyModel = Callable[..., ModelFolder]

if not Path("/proc/driver/nvidia").exists():
    # Triton, where there is one, looks at it when whatever imports it: its kernels can then be tried without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and every process below inherits that: tests
    that interrupt a process would wait for nothing."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated_user_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache, state, config or data, or sees a TEEGPU_* setting but the plan, which
    is fused. → the new root."""
    # Not numbered: for that, all those that there are would be looked at, thousands of times.
    root = Path(tempfile.mkdtemp(prefix="home-", dir=tmp_path_factory.getbasetemp()))
    for kind in ("cache", "state", "config", "data"):
        monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", str(root / kind))
    monkeypatch.setenv("HF_HOME", str(root / "huggingface"))
    # What transformers makes of a config is kept by content, so it may be kept for all tests: it takes seconds.
    configs = tmp_path_factory.getbasetemp() / "configs"
    configs.mkdir(exist_ok=True)
    (root / "cache" / "teegpu").mkdir(parents=True)
    (root / "cache" / "teegpu" / "configs").symlink_to(configs)
    for name in [name for name in os.environ if name.startswith("TEEGPU_")]:
        monkeypatch.delenv(name)
    for name in ("OMP_WAIT_POLICY", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    # What auto would choose depends on the machine and its load, and tiny models belong in the TEE: tests name the plan
    # that they mean, and this one stands for them where it does not matter. Those of auto say so.
    for phase in ("PREFILL", "DECODE"):
        monkeypatch.setenv(f"TEEGPU_RUN_{phase}_PLAN", "fused")
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products in the test's process use one thread, unless it sets another number, which is gone after it: several
    processes with tests run side by side, and threads that spin for each other's sake made them take four times as
    long."""
    _set_one_thread()
    yield
    _set_one_thread()


def _set_one_thread() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> ModelFolder:
    """SmolLM2-135M-Instruct, from the user's real cache; pulled into it when it is not there."""
    from teegpu.model import catalog

    return catalog.resolve("smollm2-135m", cache_dir=_USER_CACHE, offline=False, progress=None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """``tiny_model(architecture, **overrides)`` → a folder with a random fp32 model and a byte-level tokenizer
    (ids 0 to 255 are bytes, 256 BOS, 257 EOS, 258 to 260 the chat roles).

    ``overrides`` are arguments of transformers' config class, for example ``sliding_window=16``,
    ``rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}``, ``attention_bias=True``,
    ``tie_word_embeddings=True``, ``num_hidden_layers=3``; ``seed=1`` gives other weights of the same shape. Equal
    arguments give the same folder, so tests must not change it (copy it first).
    """
    made: dict[str, ModelFolder] = {}

    def make(architecture: str, **overrides: Any) -> ModelFolder:
        key = json.dumps([architecture, overrides], sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp(f"tiny-{architecture}")
            _write_tiny_model(path, architecture, overrides)
            made[key] = ModelFolder(f"tiny-{architecture}", path)
        return made[key]

    return make


def _write_tiny_model(path: Path, architecture: str, overrides: dict[str, Any]) -> None:
    import torch
    import transformers

    from teegpu.model.byte_tokenizer import byte_tokenizer

    seed = overrides.get("seed", 0)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 272,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    if architecture in ("mistral", "phi3"):
        settings["sliding_window"] = None
    settings |= {name: value for name, value in overrides.items() if name != "seed"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(architecture, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        # transformers starts with norms of one and biases of zero, which would hide a forgotten norm or bias.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
                elif "embed" in name or "lm_head" in name:
                    parameter.normal_(0.0, 1.0)
                else:
                    parameter.normal_(0.0, 0.25)
    model.save_pretrained(path)
    byte_tokenizer(settings["vocab_size"]).save_pretrained(path)
