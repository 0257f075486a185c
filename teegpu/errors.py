"""What a user can be told, and the exit code that goes with it.

    TeegpuError                    1   anything below that has no code of its own
    ├── UsageError                 2   a flag or argument that can't be
    ├── ConfigError                2   a setting that can't be: unknown key, wrong type, unknown name
    ├── ModelError                 3   a model that can't be found, fetched, read or used
    │   ├── UnsupportedModelError      its architecture is not one of ours
    │   └── PromptError                the prompt is empty, or longer than the model's context
    ├── ConnectionFailedError      4   no server, lost server, reply too late
    │   └── DeadlineError              an answer took longer than it may
    ├── MismatchError              5   the server speaks another protocol version or serves another model
    ├── ServerRefusedError         6   the server understood and said no: its reason is in the message
    ├── BadReplyError              7   the server answered something that can't be right
    ├── WireError                  7   bytes that are not a valid message (ours or theirs)
    ├── BusyError                  6   so many requests wait already that this one is not taken
    ├── UnmetError                 7   an answer that can't be as it was asked to be
    ├── RecordError                8   a run's record that can't be found, read or written
    ├── ThresholdError             9   a comparison above its threshold, an audit that is not as expected
    ├── ShieldError               10   privacy that can't be kept: pads used up, files or servers that must not be used
    ├── VerificationError         11   a server's answer is not the product that it was asked for
    ├── EvidenceError             12   evidence, or collateral, that is not what it should be
    └── AttestationError          12   evidence that a policy refuses: its rule is in the message

Success is 0, an interrupt (Ctrl-C, SIGTERM) 130, a reader that went away (broken pipe) 141, a bug of ours 70.

Each message is one line: what happened, which setting is meant, what to do. ``cli.main`` prints it and exits with
``exit_code``; nothing else in the package catches these to print them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class TeegpuError(Exception):
    exit_code: ClassVar[int] = 1


class UsageError(TeegpuError):
    exit_code = 2


class ConfigError(TeegpuError):
    exit_code = 2


class ModelError(TeegpuError):
    exit_code = 3


class UnsupportedModelError(ModelError):
    pass


class PromptError(ModelError):
    pass


class ConnectionFailedError(TeegpuError):
    exit_code = 4


class DeadlineError(ConnectionFailedError):
    pass


class MismatchError(TeegpuError):
    exit_code = 5


class ServerRefusedError(TeegpuError):
    exit_code = 6


class BusyError(TeegpuError):
    exit_code = 6


class BadReplyError(TeegpuError):
    exit_code = 7


class WireError(TeegpuError):
    exit_code = 7


class UnmetError(TeegpuError):
    exit_code = 7


class RecordError(TeegpuError):
    exit_code = 8


class ThresholdError(TeegpuError):
    exit_code = 9


class ShieldError(TeegpuError):
    exit_code = 10


class VerificationError(TeegpuError):
    exit_code = 11


class EvidenceError(TeegpuError):
    exit_code = 12


class AttestationError(TeegpuError):
    """``rule`` is the policy's that refused, ``reason`` why."""

    exit_code = 12
    rule = ""
    reason = ""


def refusal(rule: str, reason: str) -> AttestationError:
    """The error that names the ``rule`` of a policy by which evidence is refused."""
    error = AttestationError(f"refused by rule '{rule}': {reason}")
    error.rule, error.reason = rule, reason
    return error


def prompt_too_long(tokens: int, positions: int) -> PromptError:
    return PromptError(f"the prompt has {tokens} tokens, the model's context ends at {positions}: shorten it")


def nearest(name: str, known: Sequence[str]) -> str:
    """``", did you mean 'x'?"`` for the name in ``known`` that is closest to ``name``, or an empty string.

    Closest is what the fewest typing mistakes lead to, or else up to three names with the same words and others more:
    ``run.plan`` is ``run.prefill_plan`` or ``run.decode_plan``."""
    mistakes = {other: _mistakes(name, other) for other in known}
    if typed := [other for other in known if mistakes[other] <= _most_mistakes(name, other)]:
        meant = [min(typed, key=mistakes.__getitem__)]
    else:
        key = name.rpartition(".")[2]
        meant = [other for other in known if _has_words(other, name)]
        # A setting of another section.
        meant = meant or [other for other in known if _has_words(other.rpartition(".")[2], key)]
        meant = sorted(meant, key=mistakes.__getitem__)[:3]
    quoted = [f"'{each}'" for each in meant]
    return f", did you mean {' or '.join(quoted)}?" if quoted else ""


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _mistakes(typed: str, meant: str) -> int:
    """Letters typed wrong, too many, too few or in the place of the next one (optimal string alignment)."""
    typed, meant = typed.lower(), meant.lower()
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, letter in enumerate(typed):
        before, last, row = row, before, [i + 1]
        for j, other in enumerate(meant):
            row.append(min(before[j] + (letter != other), before[j + 1] + 1, row[j] + 1))
            if i and j and letter == meant[j - 1] and typed[i - 1] == other:
                row[-1] = min(row[-1], last[j - 1] + 1)
    return row[-1]


def _most_mistakes(typed: str, meant: str) -> int:
    """One in three letters, without the words that both begin or end with: these say nothing of what is meant."""
    one, other = _words(typed), _words(meant)
    for place in (0, -1):
        while one and other and one[place] == other[place]:
            one.pop(place), other.pop(place)
    letters = len("".join(one))
    return min(max(1, letters // 3), max(0, letters - 1))


def _has_words(name: str, words: str) -> bool:
    """Whether ``name`` has all ``words``, or their beginnings."""
    there, wanted = _words(name), _words(words)
    return bool(wanted) and all(
        any(has.startswith(word) or _mistakes(word, has) <= len(word) // 3 for has in there) for word in wanted
    )
