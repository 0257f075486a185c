from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from teegpu.tee.speculation import LONGEST, PromptLookup

tokens = st.lists(st.integers(0, 4), max_size=60)


def by_search(context: list[int], most: int) -> list[int]:
    """What the index must find, by looking everywhere."""
    for length in range(min(LONGEST, len(context)), 0, -1):
        gram = context[-length:]
        for end in range(len(context) - 1, length - 1, -1):
            if context[end - length : end] == gram:
                return context[end : end + most]
    return []


@given(tokens, st.integers(1, 6))
def test_guesses_are_what_followed_the_latest_longest_match(context: list[int], most: int) -> None:
    assert PromptLookup(context).guess(most) == by_search(context, most)


def test_the_longest_match_wins() -> None:
    assert PromptLookup([1, 2, 3, 9, 3, 8, 1, 2, 3]).guess(2) == [9, 3]


def test_nothing_to_guess_from() -> None:
    assert PromptLookup([]).guess(3) == []
    assert PromptLookup([1, 2, 3]).guess(3) == []
