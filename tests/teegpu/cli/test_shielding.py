"""Private and verified runs as their user meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teegpu import machine
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import Teegpu


@pytest.fixture
def model(tiny_model: TinyModel) -> str:
    return str(tiny_model("llama").path)


def answer(teegpu: Teegpu, model: str, *more: str) -> Any:
    done = teegpu("run", "a b c", "--model", model, "--max-tokens", "12", "--ignore-eos", "--json", *more)
    assert done.code == 0, done.err
    return done


@pytest.mark.slow
def test_private_and_verified_runs_answer_as_the_reference(
    teegpu: Teegpu, model: str, isolated_user_files: Path
) -> None:
    plans = ("--plan", "attention")
    expected = answer(teegpu, model, *plans, "--privacy", "reference").document["outputs"][0]["token_ids"]
    done = answer(teegpu, model, *plans, "--privacy", "pads")
    assert done.document["outputs"][0]["token_ids"] == expected
    assert "making pads for" in done.err
    assert done.document["settings"]["offline"]["seconds"] > 0
    assert {"FIXED_POINT", "MASK", "VERIFY", "UNMASK"} <= set(done.document["phases"]["decode"]["ops"])
    done = answer(teegpu, model, *plans, "--verify")
    assert done.document["outputs"][0]["token_ids"] == expected
    assert "pads" not in done.err
    assert done.document["settings"]["offline"] is None
    # Neither left anything secret behind.
    kept = [path for path in isolated_user_files.rglob("*") if path.is_file() and "runs" not in path.parts]
    assert not [path for path in kept if "shield" in str(path) or path.suffix in (".pads", ".ledger", ".keys")]


def test_the_report_says_what_was_made_before(teegpu: Teegpu, model: str) -> None:
    done = teegpu("run", "a b", "--model", model, "--plan", "attention", "--privacy", "pads", "--max-tokens", "3", "-v")
    assert done.code == 0, done.err
    assert "Pads, made before the prompt" in done.err
    assert "of memory; no phase has that time" in done.err


def test_pads_that_do_not_fit_into_memory_end_the_run(
    teegpu: Teegpu, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**16)
    done = teegpu("run", "a b", "--model", model, "--plan", "attention", "--privacy", "pads", "--max-tokens", "200")
    assert done.code == 10
    assert "of memory" in done.err
    assert "run.max_tokens" in done.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("pads", "make", "--tokens", "8"), "'teegpu pads' is gone: a run with --privacy pads makes"),
        (("hint", "make"), "'teegpu hint' is gone: so is the mode lwe"),
        (("checks", "show"), "'teegpu checks' is gone: a run draws what it checks"),
        (("run", "a", "--privacy", "lwe"), "lwe"),
    ],
)
def test_what_is_gone_says_so(teegpu: Teegpu, arguments: tuple[str, ...], told: str) -> None:
    done = teegpu(*arguments)
    assert done.code == 2
    assert told in done.err
    assert "gone" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("key", ["dir", "when_exhausted", "refill_tokens"])
def test_settings_that_are_gone_say_so(teegpu: Teegpu, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(f"TEEGPU_SHIELD_{key.upper()}", "1")
    done = teegpu("config", "show")
    assert done.code == 2
    assert "gone" in done.err


def test_less_privacy_than_is_required_ends_the_run(
    teegpu: Teegpu, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEGPU_RUN_REQUIRE_PRIVACY", "pads")
    refused = teegpu("run", "a b", "--model", model, "--plan", "attention", "--privacy", "two-server")
    assert refused.code == 10
    assert "two-server is weaker than run.require_privacy = pads, which TEEGPU_RUN_REQUIRE_PRIVACY asks" in refused.err
    assert refused.out == ""
    done = teegpu("run", "a b", "--model", model, "--plan", "local", "--max-tokens", "1")
    assert done.code == 0
    assert "privacy: nothing leaves this process" in done.err
    done = teegpu("run", "a b", "--model", model, "--plan", "attention", "--privacy", "pads", "--max-tokens", "1")
    assert done.code == 0
    assert "privacy pads: activations are masked, products are verified (2^-40); servers: started" in done.err
