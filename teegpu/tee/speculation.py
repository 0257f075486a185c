"""Guesses the next tokens from the context itself: what followed the last time these tokens stood in a row.

Prompt lookup (Saxena 2023) after Leviathan et al. 2023: the guess costs nothing, and one pass checks all of it. Since
the sampler draws each token from the model's own distribution and a guess is kept only when it is the token drawn,
output is unchanged: the same tokens in greedy decoding, the same distribution when sampling."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3


class PromptLookup:
    """Indexes the n-grams (1 to ``LONGEST`` tokens) of a growing context."""

    def __init__(self, context: Sequence[int]) -> None:
        self._context: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        self._latest: list[tuple[tuple[int, ...], int]] = []
        for token in context:
            self.append(token)

    def append(self, token: int) -> None:
        # The n-grams that end at the last token enter the index one token late: a lookup must not find itself.
        for gram, follows in self._latest:
            self._follows[gram] = follows
        self._context.append(token)
        end = len(self._context)
        self._latest = [(tuple(self._context[end - length : end]), end) for length in range(1, min(LONGEST, end) + 1)]

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that followed the longest n-gram that ends the context when it came before, or []."""
        for gram, _ in reversed(self._latest):
            follows = self._follows.get(gram)
            if follows is not None:
                return self._context[follows : follows + most]
        return []
