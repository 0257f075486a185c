"""Decoding without what is kept between steps: slower, and the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from teegpu.bench.cases import from_values
from teegpu.bench.uncached import AnglesAnew, WholeContextSession
from teegpu.model.reader import read_config
from teegpu.tee.decoder import Decoder, Pass
from teegpu.tee.generate import Generation
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.runner import PARTS, Parts, Runner
from tests.conftest import TinyModel

PROMPT = list(range(40, 60))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rope", [None, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}])  # fmt: skip
def test_angles_are_the_same_as_from_the_table(tiny_model: TinyModel, rope: dict[str, object] | None) -> None:
    config = read_config(tiny_model("llama", **({} if rope is None else {"rope_parameters": rope})))
    table, anew = RotaryTable(config), AnglesAnew(config)
    for each in (table, anew):
        each.prepare(100)
    for ours, theirs in zip(anew.at(7, 90), table.at(7, 90), strict=True):
        assert torch.equal(ours, theirs)


def tokens(tiny_model: TinyModel, parts: Parts, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    forward = Decoder.forward

    async def counted(self: Decoder, work: Pass) -> torch.Tensor | None:
        widths.append(work.ids.shape[0])
        return await forward(self, work)

    monkeypatch.setattr(Decoder, "forward", counted)
    plan = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.threads": 1, "run.max_tokens": 5}
    with Runner(from_values(plan), tiny_model("llama"), parts=parts) as runner:
        made = runner.generate(
            PROMPT, sampler=runner.sampler(), on_token=lambda _: False, result=Generation(), ignore_end=True
        )
    return made.token_ids


def test_each_step_computes_the_whole_context(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: list[int] = []
    whole: list[int] = []
    expected = tokens(tiny_model, PARTS, cached, monkeypatch)
    monkeypatch.undo()
    made = tokens(tiny_model, Parts(rotary=AnglesAnew, session=WholeContextSession), whole, monkeypatch)
    assert made == expected
    assert cached == [20, 1, 1, 1, 1]
    assert whole == [20, 21, 22, 23, 24]
