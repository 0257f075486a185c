"""What private runs need made ahead, as its user meets it: ``teegpu pads``, ``teegpu checks``."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from teegpu.tee.shield import padmaker, sealed
from teegpu.tee.shield.padledger import path_of
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import Teegpu


@pytest.fixture
def model(tiny_model: TinyModel) -> str:
    return str(tiny_model("llama").path)


def test_pads_are_made_shown_and_removed(teegpu: Teegpu, model: str) -> None:
    assert "no pads" in teegpu("pads", "show").err
    done = teegpu("pads", "make", "--tokens", "20", "--model", model)
    assert (done.code, done.out) == (0, "")
    assert "KiB for the layers" in done.err  # before the work
    assert "made pads of the layers for 24 tokens" in done.err
    assert "a token" in done.err.splitlines()[-1]
    [pool] = json.loads(teegpu("pads", "show", "--json").out)
    assert pool["tokens_left"] == {"body": 24, "head": 8}
    assert pool["size_bytes"] > 0
    assert pool["seconds_per_token"].keys() == {"body", "head"}
    assert "24 tokens" in teegpu("pads", "show").out
    again = teegpu("pads", "make", "--tokens", "30", "--heads", "8", "--up-to", "--model", model)
    assert "made pads of the layers for 8 tokens" in again.err
    removed = teegpu("pads", "rm", "--model", model)
    assert removed.code == 0
    assert "removed the pads" in removed.err
    assert "no pads" in teegpu("pads", "show").err
    assert "there are no pads" in teegpu("pads", "rm", "--model", model).err


def test_an_interrupt_says_what_there_is(teegpu: Teegpu, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = padmaker.SegmentWriter.finish

    def interrupted(writer: Any) -> None:
        if writer.layout.leaves < 16:
            raise KeyboardInterrupt
        finish(writer)

    monkeypatch.setattr(padmaker.SegmentWriter, "finish", interrupted)
    done = teegpu("pads", "make", "--tokens", "150", "--model", model)
    assert done.code == 130
    assert "made pads of the layers for 128 tokens" in done.err
    assert json.loads(teegpu("pads", "show", "--json").out)[0]["tokens_left"] == {"body": 128, "head": 0}


def test_what_is_wrong_with_a_pool_is_told(teegpu: Teegpu, model: str) -> None:
    teegpu("pads", "make", "--tokens", "8", "--model", model, "--quiet")
    [pool] = json.loads(teegpu("pads", "show", "--json").out)
    identity = json.loads((Path(pool["folder"]) / "pool.json").read_text())["pool"]
    path_of(identity).unlink()
    shown = teegpu("pads", "show")
    assert shown.code == 0
    assert "unknown" in shown.out
    assert "no ledger here" in shown.err
    done = teegpu("pads", "make", "--tokens", "8", "--model", model)
    assert done.code == 10
    assert "'teegpu pads rm'" in done.err
    assert teegpu("pads", "rm", "--model", model).code == 0
    assert teegpu("pads", "make", "--tokens", "8", "--model", model).code == 0


def test_a_disk_without_room_is_told_at_once(teegpu: Teegpu, model: str) -> None:
    done = teegpu("pads", "make", "--tokens", "100000000000", "--model", model)
    assert done.code == 10
    assert "shield.dir" in done.err
    assert "no pads were made" in done.err


def test_the_place_can_be_chosen(teegpu: Teegpu, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "elsewhere"
    monkeypatch.setenv("TEEGPU_SHIELD_DIR", str(place))
    assert teegpu("pads", "make", "--tokens", "8", "--model", model).code == 0
    assert list(place.rglob("*.pads"))
    assert not list(sealed.state_folder().rglob("*.pads"))
    place.chmod(0o755)
    done = teegpu("pads", "show")
    assert done.code == 10
    assert "chmod 700" in done.err


def test_checks_are_made_shown_and_removed(teegpu: Teegpu, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEGPU_SHIELD_CHECKS", "16")
    assert "not made yet" in teegpu("checks", "show", "--model", model).out
    done = teegpu("checks", "make", "--model", model)
    assert (done.code, done.out) == (0, "")
    assert "16 bits of vectors" in done.err
    before = json.loads(teegpu("checks", "show", "--model", model, "--json").out)
    assert before["checks"] == 16
    assert before["soundness"] == 2.0**-16
    assert before["files"]["whole"]["size_bytes"] == os.path.getsize(before["files"]["whole"]["path"])
    assert before["files"]["plain"]["size_bytes"] is None
    for kind in ("plain", "masked"):
        assert teegpu("checks", "make", "--for", kind, "--model", model).code == 0
    content = Path(before["files"]["whole"]["path"]).read_bytes()
    assert teegpu("checks", "make", "--model", model).code == 0
    assert Path(before["files"]["whole"]["path"]).read_bytes() == content
    assert teegpu("checks", "make", "--anew", "--model", model).code == 0
    assert Path(before["files"]["whole"]["path"]).read_bytes() != content
    assert "2^-16" in teegpu("checks", "show", "--model", model).out
    assert "removed 3 files" in teegpu("checks", "rm", "--model", model).err


def test_hints_are_made_shown_and_removed(teegpu: Teegpu, model: str) -> None:
    assert "not made yet" in teegpu("hint", "show", "--model", model).out
    done = teegpu("hint", "make", "--model", model)
    assert (done.code, done.out) == (0, "")
    assert "MiB, on the disk" in done.err
    assert "made " in done.err
    shown = json.loads(teegpu("hint", "show", "--model", model, "--json").out)
    assert shown["there"]
    assert (shown["dimension"], shown["sigma"]) == (1408, 6.4)
    assert abs(Path(shown["path"]).stat().st_size - shown["size_bytes"]) < 20_000
    assert "experimental" in teegpu("hint", "show", "--model", model).out
    assert "removed" in teegpu("hint", "rm", "--model", model).err
    assert "no hints" in teegpu("hint", "rm", "--model", model).err


# In a run


@pytest.fixture
def four_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for phase in ("PREFILL", "DECODE"):
        monkeypatch.setenv(f"TEEGPU_RUN_{phase}_PLAN", "attention")


def answer(teegpu: Teegpu, model: str, privacy: str, *more: str) -> Any:
    arguments = ["run", "a b c", "--model", model, "--privacy", privacy, "--max-tokens", "12", "--ignore-eos", "--json"]
    done = teegpu(*arguments, *more)
    assert done.code == 0, done.err
    return done.document


@pytest.mark.slow
def test_runs_with_pads_and_hints_answer_as_the_reference(teegpu: Teegpu, model: str, four_rounds: None) -> None:
    teegpu("pads", "make", "--tokens", "48", "--heads", "16", "--model", model, "-q")
    teegpu("hint", "make", "--model", model, "-q")
    expected = answer(teegpu, model, "reference")["output"]["token_ids"]
    private = answer(teegpu, model, "pads", "--verify")
    assert private["output"]["token_ids"] == expected
    assert {"FIXED_POINT", "MASK", "PADS", "VERIFY", "UNMASK"} <= set(private["phases"]["decode"]["ops"])
    by_lwe = answer(teegpu, model, "lwe")
    assert len(by_lwe["output"]["token_ids"]) == 12
    assert "HINT" in by_lwe["phases"]["prefill"]["ops"]
    # A pool that is too small for another prompt ends the run, with its own exit code and what to do.
    done = teegpu("run", "a " * 40, "--model", model, "--privacy", "pads", "--max-tokens", "8")
    assert done.code == 10
    assert "'teegpu pads make'" in done.err


def test_pads_beside_a_run_are_made_by_who_stands_back(
    teegpu: Teegpu, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _: policies.append((pid, policy)))
    made = threading.Event()
    run = padmaker.PadMaker.run

    def and_tell(maker: padmaker.PadMaker, *args: Any, **options: Any) -> Any:
        done = run(maker, *args, **options)
        made.set()
        return done

    monkeypatch.setattr(padmaker.PadMaker, "run", and_tell)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=made.wait)))
    done = teegpu("pads", "make", "--tokens", "16", "--up-to", "--beside", "--model", model)
    assert done.code == 130  # standard input has ended
    assert policies == [(0, os.SCHED_IDLE)]
    assert json.loads(teegpu("pads", "show", "--json").out)[0]["tokens_left"]["body"] == 16
