"""The linear map finds what a layer made of embeddings, and nothing in masked values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from teegpu.audit import inversion
from teegpu.audit.known import PROMPT, Known, Truth
from teegpu.audit.reading import View, Work
from teegpu.wire.program import Program, Step
from tests.teegpu.audit.made import uniform

VOCAB, HIDDEN = 500, 48
PROMPT_IDS = [(17 * place) % VOCAB for place in range(60)]
TRAINING_IDS = [(23 * place + 5) % VOCAB for place in range(400)]
TRUTH = Truth(PROMPT_IDS, [3, 8, 15], TRAINING_IDS, 30)


def made_known() -> Known:
    """A model that is nothing but an embedding."""
    known: Any = object.__new__(Known)
    known.spec = SimpleNamespace(layers=2, rms_eps=1e-5)
    known.embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    known.norm = lambda _: torch.ones(HIDDEN)
    made: Known = known
    return made


class LayerView(View):
    """Each scene's embeddings, put through ``layer`` and then through ``sent``."""

    def __init__(self, known: Known, sent: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__("made")
        self._known, self._sent = known, sent

    def _read(self, scene: str) -> Iterator[Work]:
        ids = TRUTH.computed if scene == PROMPT else TRUTH.training
        code = Program(("n",), (Step("linear", "q", ("n",), ("layers.1.q_proj",)),), ("q",))
        mixed = self._known.embedded(ids) @ torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))
        noise = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(len(ids)))
        yield Work(code, {"n": self._sent(mixed + noise)}, {"n": "fp32"}, {})


def test_what_a_layer_made_of_embeddings_is_turned_back() -> None:
    known = made_known()
    finding = inversion.linear_map(LayerView(known, lambda rows: rows), known, TRUTH, 1)
    assert finding.share is not None
    assert finding.share > 0.9
    assert finding.verdict == "recovered"


def test_masked_rows_teach_nothing() -> None:
    known, numbers = made_known(), torch.Generator().manual_seed(3)

    def masked(rows: torch.Tensor) -> torch.Tensor:
        return (rows * 2**12).to(torch.int32) + uniform(*rows.shape, numbers)

    finding = inversion.linear_map(LayerView(known, masked), known, TRUTH, 1)
    assert finding.verdict == "nothing"


def test_rows_of_other_tokens_than_the_prompts_are_not_judged() -> None:
    known = made_known()
    finding = inversion.linear_map(LayerView(known, lambda rows: rows[1:]), known, TRUTH, 1)
    assert finding.verdict == "not possible"
    assert finding.detail == "61 rows are sent, for 62 tokens"


def test_the_layers_that_are_attacked_are_near_both_ends_and_in_the_middle() -> None:
    assert inversion.layers_attacked(30) == [1, 15, 28]
    assert inversion.layers_attacked(3) == [1]
    assert inversion.layers_attacked(1) == []
