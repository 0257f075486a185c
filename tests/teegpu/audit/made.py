"""Views that are made up, of what the masks of a shielded run are and of what they must not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from teegpu.audit.known import AGAIN, CHANGED, PROMPT, TRAINING
from teegpu.audit.reading import View, Work
from teegpu.wire.program import Program, Step

LAYERS = 2
COLUMNS = 64
ROWS = 48

Masked = Callable[[torch.Tensor], torch.Tensor]


def uniform(rows: int, columns: int, numbers: torch.Generator) -> torch.Tensor:
    """int32, every value as likely as any other."""
    return torch.randint(-(2**31), 2**31, (rows, columns), generator=numbers).to(torch.int32)


def plain(rows: int, columns: int, numbers: torch.Generator) -> torch.Tensor:
    """Values as fixed-point activations are: about 17 bits, some larger."""
    return (torch.randn(rows, columns, generator=numbers) * 2**14).round_().to(torch.int32)


class MadeView(View):
    """Each scene asks for Q of both layers, with the rows that ``sent`` makes of plain ones."""

    def __init__(self, sent: Masked, *, rows: int = ROWS, columns: int = COLUMNS) -> None:
        super().__init__("made")
        self._sent = sent
        self._size = rows, columns

    def _read(self, scene: str) -> Iterator[Work]:
        numbers = torch.Generator().manual_seed([PROMPT, AGAIN, CHANGED, TRAINING].index(scene))
        for layer in range(LAYERS):
            code = Program(("n",), (Step("linear", "q", ("n",), (f"layers.{layer}.q_proj",)),), ("q",))
            yield Work(code, {"n": self._sent(plain(*self._size, numbers))}, {"n": "int32"}, {})
