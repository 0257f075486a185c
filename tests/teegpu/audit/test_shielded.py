"""Audits of private runs from end to end: no attack on what a server got finds anything, every lie is noticed, and
where it must be so the attacks succeed."""

from __future__ import annotations

from pathlib import Path

from teegpu.audit.cheating import KINDS
from teegpu.audit.examine import Report
from tests.teegpu.audit.conftest import PROMPT_IDS, Audited
from tests.teegpu.cli.conftest import LocalServer


def check_private(report: Report) -> None:
    judged = [finding for finding in report.findings if not finding.control]
    assert {finding.verdict for finding in judged} == {"nothing", "not possible"}
    made = {finding.attack for finding in judged if finding.verdict == "nothing"}
    # All of them but the one that needs ids to be sent.
    assert made >= {"nearest embedding", "linear map", "likeliest token", "the same prompt again", "one token changed"}
    assert made >= {"equal rows", "masks used twice", "uneven values", "correlation of neighbours"}
    assert report.private


def check_verified(report: Report) -> None:
    # What is of another dtype than was asked for is not even read, nor what is no answer.
    assert [(cheat.kind, cheat.told is not None, cheat.verified) for cheat in report.cheats] == [
        (kind, True, kind not in ("dtype", "escapes")) for kind in KINDS
    ]
    assert report.verified


def test_two_servers_see_nothing_each_and_everything_together(audited: Audited, second_server: LocalServer) -> None:
    report = audited(plan="attention", lies=True, second=second_server.address, run__privacy="two-server")
    check_private(report)
    check_verified(report)
    assert [seen.encodings for seen in report.seen] == [("int32",), ("seed",)]
    assert [seen.prompt_tokens for seen in report.seen] == [len(PROMPT_IDS)] * 2
    together = {finding.attack: finding for finding in report.findings if finding.control}
    nearest = together["nearest embedding"]
    assert nearest.guesses[: len(PROMPT_IDS)] == PROMPT_IDS
    assert together["likeliest token"].guesses == report.truth.answer


def test_one_server_sees_nothing(audited: Audited, isolated_user_files: Path) -> None:
    report = audited(plan="attention", lies=True, run__privacy="pads")
    check_private(report)
    check_verified(report)
    # Nothing secret was ever on a disk.
    assert not (isolated_user_files / "data").exists()


def test_every_lie_is_noticed_in_the_clear_and_nothing_is_hidden(audited: Audited) -> None:
    report = audited(plan="attention", lies=True, run__verify="on")
    check_verified(report)
    assert not report.private
    found = {finding.attack: finding for finding in report.findings}
    assert found["nearest embedding"].guesses[: len(PROMPT_IDS)] == PROMPT_IDS
    assert found["likeliest token"].guesses == report.truth.answer
