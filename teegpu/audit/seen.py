"""What a server learns without attacking anything: how many messages, how long, how many tokens, of which model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teegpu.audit.known import PROMPT
from teegpu.audit.reading import ServerView, Work


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the prompt and its answer, as the server itself can tell. ``seconds`` are from the first request to the last
    reply; ``prompt_tokens`` and ``answer_tokens`` are None where it can't tell. ``products`` is how many different
    products it was asked for, and so which layers; ``encodings`` are the wire dtypes of what it got."""

    server: str
    label: str
    requests: int
    bytes_up: int
    bytes_down: int
    seconds: float
    prompt_tokens: int | None
    answer_tokens: int | None
    layers: int
    products: int
    encodings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"encodings": list(self.encodings)}


def seen(view: ServerView) -> Seen:
    exchanges = view.exchanges(PROMPT)
    works = view.works(PROMPT)
    first = min((exchange.sent_ns for exchange in exchanges), default=0)
    last = max((exchange.received_ns for exchange in exchanges), default=0)
    products = {name for work in works for name in work.program.weights}
    prompt_tokens, answer_tokens = _lengths(works)
    return Seen(
        server=view.server,
        label=view.label,
        requests=len(exchanges),
        bytes_up=sum(exchange.bytes_up for exchange in exchanges),
        bytes_down=sum(exchange.bytes_down for exchange in exchanges),
        seconds=(last - first) / 1e9,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        layers=len({name.split(".")[1] for name in products if name.startswith("layers.")}),
        products=len(products),
        encodings=tuple(sorted({encoding for work in works for encoding in work.encodings.values()})),
    )


def _lengths(works: Sequence[Work]) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the answer: lm_head is asked for once for each token of the answer, and the rows that
    come before the first time are those of the prompt."""
    logits = [place for place, work in enumerate(works) if work.asks_for("lm_head")]
    if not logits:
        return None, None
    before = works[: logits[0] + 1]
    weights = [name for work in before for name in work.program.weights if name.endswith("q_proj")]
    if not weights:
        return None, len(logits)
    rows = sum(work.rows for work in before if work.asks_for(weights[0]))
    return rows, len(logits)
