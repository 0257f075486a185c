"""What an attack found. Pure data, as the document and the tables have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from teegpu.audit.chance import FALSE_ALARM

Verdict = Literal["recovered", "leaks", "undecided", "nothing", "not possible"]

RECOVERED_SHARE = 0.5
"""From this share of the tokens on, text counts as recovered."""


@dataclass(slots=True)
class Finding:
    """``attack`` was made on ``target``, from what ``view`` had. ``probability`` is that of finding as much in numbers
    that tell nothing; None where the attack could not be made at all, and ``detail`` says why.

    ``right`` of ``total`` tokens were recovered, ``chance`` would be by chance; None for attacks that look for patterns
    rather than tokens. ``control``: not what one server can do, but proof that the attack works where it should.
    ``guesses`` are the recovered tokens, and stay out of every document unless they are asked for.
    """

    attack: str
    target: str
    view: str
    probability: float | None
    detail: str = ""
    right: int | None = None
    total: int | None = None
    chance: float | None = None
    control: bool = False
    guesses: list[int] = field(default_factory=list, repr=False)

    @property
    def found(self) -> bool:
        """Whether it is too much for chance."""
        return self.probability is not None and self.probability < FALSE_ALARM

    @property
    def share(self) -> float | None:
        return None if self.right is None or not self.total else self.right / self.total

    @property
    def verdict(self) -> Verdict:
        if self.probability is None:
            return "not possible"
        many = (self.share or 0.0) >= RECOVERED_SHARE
        if not self.found:
            # A text of few different tokens is guessed right by chance.
            return "undecided" if many else "nothing"
        return "recovered" if many else "leaks"

    @property
    def alarming(self) -> bool:
        """Whether it speaks against privacy: it was found, or it can't be told from what was."""
        return self.verdict in ("recovered", "leaks", "undecided")

    def to_json(self) -> dict[str, Any]:
        return {
            "attack": self.attack,
            "target": self.target,
            "view": self.view,
            "control": self.control,
            "verdict": self.verdict,
            "recovered_tokens": self.right,
            "tokens": self.total,
            "recovered_share": self.share,
            "tokens_by_chance": self.chance,
            "probability_by_chance": self.probability,
            "detail": self.detail,
        }
