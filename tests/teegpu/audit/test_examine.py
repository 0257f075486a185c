"""Audits from end to end: in the clear, attacks read the prompt; and no document says what it was."""

from __future__ import annotations

import json

import pytest

from teegpu.audit.cheating import KINDS
from teegpu.audit.examine import Report
from teegpu.audit.findings import Finding
from teegpu.errors import PromptError
from tests.conftest import TinyModel
from tests.teegpu.audit.conftest import PROMPT_IDS, Audited


def found(report: Report, attack: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.attack == attack]


@pytest.mark.parametrize("plan", ["attention", "fused"])
def test_activations_in_the_clear_are_the_prompt(audited: Audited, plan: str) -> None:
    report = audited(plan=plan)
    (nearest,) = found(report, "nearest embedding")
    assert nearest.share is not None
    assert nearest.share > 0.9
    assert nearest.verdict == "recovered"
    assert nearest.guesses[: len(PROMPT_IDS)] == PROMPT_IDS
    assert {finding.verdict for finding in found(report, "the same prompt again")} == {"leaks"}
    assert all("its place is seen" in finding.detail for finding in found(report, "one token changed"))
    assert found(report, "token ids")[0].verdict == "not possible"
    assert not report.private


@pytest.mark.parametrize("architecture", ["olmo2", pytest.param("gemma3_text", marks=pytest.mark.extra)])
def test_two_products_in_the_place_of_one_tell_as_much(
    audited: Audited, tiny_model: TinyModel, architecture: str
) -> None:
    """Where the TEE joins what the server computed apart, the server can do so as well."""
    model = tiny_model(architecture, num_hidden_layers=4, hidden_size=64, num_attention_heads=8)
    report = audited(plan="fused", model=model, run__transport="zmq", run__wire_dtype="fp32")
    (nearest,), (likeliest,) = found(report, "nearest embedding"), found(report, "likeliest token")
    assert nearest.guesses[: len(PROMPT_IDS)] == PROMPT_IDS
    assert likeliest.guesses == report.truth.answer
    assert not report.private


def test_a_server_that_looks_tokens_up_knows_them(audited: Audited) -> None:
    report = audited(plan="per-op")
    (ids,) = found(report, "token ids")
    assert (ids.verdict, ids.share) == ("recovered", 1.0)


def test_the_logits_are_the_answer(audited: Audited) -> None:
    report = audited(plan="attention", run__transport="zmq", run__wire_dtype="fp32")
    (likeliest,) = found(report, "likeliest token")
    assert likeliest.guesses == report.truth.answer
    assert likeliest.share == 1.0


def test_lengths_are_counted(audited: Audited) -> None:
    (seen,) = audited(plan="fused").seen
    assert (seen.prompt_tokens, seen.answer_tokens, seen.layers) == (len(PROMPT_IDS), 12, 4)
    assert seen.encodings == ("fp16",)


def test_chunks_that_overlap_are_read_in_their_order(audited: Audited) -> None:
    report = audited(plan="attention", run__chunk_tokens=10)
    (nearest,) = found(report, "nearest embedding")
    assert nearest.guesses[: len(PROMPT_IDS)] == PROMPT_IDS


def test_nothing_is_sent_where_all_is_computed_here(audited: Audited) -> None:
    report = audited(plan="local", lies=True)
    assert report.private
    assert (report.seen, report.findings, report.cheats) == ([], [], [])


def test_no_document_says_the_prompt(audited: Audited) -> None:
    report = audited()
    without = json.dumps(report.to_json())
    assert "recovered_text" not in without
    assert json.dumps(PROMPT_IDS)[1:-1] not in without
    asked = report.to_json(lambda ids: " ".join(map(str, ids)))
    nearest = next(entry for entry in asked["findings"] if entry["attack"] == "nearest embedding")
    assert nearest["recovered_text"].startswith(" ".join(map(str, PROMPT_IDS)))


def test_lies_are_not_noticed_without_verification(audited: Audited) -> None:
    report = audited(plan="attention", lies=True, run__wire_dtype="fp32", run__check_finite=False)
    assert [cheat.kind for cheat in report.cheats] == list(KINDS)
    assert all(cheat.told for cheat in report.cheats)
    # The reply to the one can't be right, the other is a refusal: either ends the run.
    assert [cheat.kind for cheat in report.cheats if cheat.noticed] == ["dtype", "escapes"]
    assert not any(cheat.verified for cheat in report.cheats)
    assert any(cheat.answer_changed for cheat in report.cheats)
    assert report.verified is False


def test_messages_beyond_the_bound_are_told_of(audited: Audited) -> None:
    report = audited(most_bytes=50_000)
    assert "messages were not kept, as they were beyond 0 MiB" in report.notes[0]
    assert {finding.verdict for finding in found(report, "linear map")} == {"not possible"}


def test_a_prompt_too_short_to_judge_is_refused(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.audit.examine.LEAST_PROMPT", len(PROMPT_IDS) + 1)
    with pytest.raises(PromptError, match="an audit takes a prompt of 56 tokens or more, this one has 55"):
        audited()
