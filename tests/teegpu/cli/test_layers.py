"""A model that is cut over two ``teegpu serve --layers``, as its user meets it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from teegpu import facts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import Outcome, Process, ServerFor, Start, Teegpu

LAYERS = 4
CUT = {"0-1": 0, "2-3": 1}


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", num_hidden_layers=LAYERS, vocab_size=1000)


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder) -> Callable[..., Outcome]:
    def call(*args: object) -> Outcome:
        common = ("--model", model.path, "--raw", "--ignore-eos", "--max-tokens", 6, "--threads", 1)
        return teegpu("run", *common, "--wire-dtype", "fp32", *args, "To be cut over two servers")

    return call


def banner(process: Process) -> tuple[str, str]:
    """The address of a server that has loaded, and its line of facts."""
    while not (line := process.line()).startswith("teegpu GPU server ready at "):
        pass
    return line.split()[-1], process.line()


def test_two_servers_with_half_the_model_each_do_what_one_does_with_all(
    start: Start, run: Callable[..., Outcome], model: ModelFolder, server_for: ServerFor
) -> None:
    common = ("--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "fp32", "--threads", 1)
    processes = [start("serve", *common, "--layers", layers) for layers in CUT]
    banners = [banner(process) for process in processes]
    for (_, said), layers in zip(banners, CUT, strict=True):
        assert f" · layers {layers} of {LAYERS} · " in said
    held = [float(re.findall(r"([\d.]+) KiB of weights", said)[0]) for _, said in banners]
    cut: list[Any] = []
    for (address, _), layers in zip(banners, CUT, strict=True):
        cut += ["--endpoint", f"{address}#layers={layers}"]
    whole = ["--endpoint", server_for(model).address]

    # All servers of a model have one digest, also the ones that hold a part of it.
    for plan in ("fused", "per-op"):
        parted, together = (run("--plan", plan, "--json", *where) for where in (cut, whole))
        assert parted.code == 0, parted.err
        assert parted.document["outputs"][0]["token_ids"] == together.document["outputs"][0]["token_ids"]
        calls = parted.document["phases"]["decode"]["rpc_calls"]
        assert calls == 5 * facts.plan(plan).rpc_calls(LAYERS, 2)
        assert calls - together.document["phases"]["decode"]["rpc_calls"] == (5 if plan == "fused" else 0)
    chunked = run("--chunk-tokens", 8, "--transport", "pipelined", "--json", *cut)
    assert chunked.document["outputs"] == run("--json", *whole).document["outputs"]

    alone = run(*cut[:2])
    assert alone.code == 2
    assert "no server for layers 2 to 3" in alone.err
    swapped = run("--endpoint", f"{banners[0][0]}#layers=2-3", "--endpoint", f"{banners[1][0]}#layers=0-1")
    assert swapped.code == 5
    assert re.search("holds layers (0-1, and is to compute 2-3|2-3, and is to compute 0-1)", swapped.err)
    unsaid = run("--endpoint", banners[1][0])
    assert unsaid.code == 5
    assert "holds layers 2-3, and is to compute 0-3" in unsaid.err

    # What both hold together is the model, once: its first half has the embedding, its second lm_head.
    every = 4 * read_spec(model).parameters / 1024
    assert sum(held) == pytest.approx(every, abs=0.2)
    assert max(held) < 0.6 * every


@pytest.mark.parametrize(
    ("layers", "message"),
    [("2-9", "server.layers: 2-9 is no range of this model's layers, which are 0-3"), ("3", "not a range of layers")],
)
def test_layers_that_can_not_be(layers: str, message: str, teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--layers", layers)
    assert done.code == 2
    assert message in done.err


def test_an_embedded_server_holds_all_layers_in_one_process(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, model: ModelFolder
) -> None:
    monkeypatch.setenv("TEEGPU_SERVER_LAYERS", "0-1")
    monkeypatch.setenv("TEEGPU_SERVER_RANKS", "17")  # more than a matrix has rows
    done = run("--json")
    assert done.code == 0, done.err
    assert len(done.document["outputs"][0]["token_ids"]) == 6
