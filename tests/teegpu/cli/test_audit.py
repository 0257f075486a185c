"""``teegpu audit``: its table, its document, and what it exits with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import ServerFor, Teegpu

WORDS = ("xylophone", "marzipan", "quokka", "zeppelin")
PROMPT = " ".join(WORDS)


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture
def command(model: ModelFolder, server_for: ServerFor) -> list[Any]:
    address = server_for(model).address
    return ["audit", PROMPT, "--raw", "--model", model.path, "--endpoint", address, "--training-tokens", "200"]


def test_in_the_clear_the_prompt_is_recovered(teegpu: Teegpu, command: list[Any]) -> None:
    outcome = teegpu(*command, "--no-lies")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    nearest = next(line for line in lines if line.startswith("nearest embedding: layer 0, input of Q, K, V"))
    assert nearest.endswith("recovered")
    assert "(100.0%)" in nearest
    assert any(line.startswith("Not private: the server recovers 100.0% of the tokens") for line in lines)
    assert any(line.startswith("Every server learns the model, the lengths of prompt and answer") for line in lines)
    assert not any(word in outcome.out + outcome.err for word in WORDS)


def test_text_is_shown_to_who_asks_for_it(teegpu: Teegpu, command: list[Any]) -> None:
    outcome = teegpu(*command, "--no-lies", "--show-text", "--quiet")
    assert outcome.err == ""
    assert f"the server, nearest embedding, layer 0, input of Q, K, V:\n  {PROMPT}" in outcome.out


def test_the_document(teegpu: Teegpu, command: list[Any]) -> None:
    outcome = teegpu(*command, "--json", "--max-tokens", "4", "--quiet")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document["schema"] == "teegpu.audit/1"
    assert (document["private"], document["verified"]) == (False, False)
    assert document["settings"]["prompt_tokens"] == len(PROMPT)
    assert document["seen"][0]["prompt_tokens"] == len(PROMPT)
    assert {cheat["kind"] for cheat in document["cheats"]} >= {"flip-bit", "replay", "other-layer"}
    assert not any(word in outcome.out for word in WORDS)


def test_what_is_expected_and_is_not_so_exits_with_9(teegpu: Teegpu, command: list[Any]) -> None:
    outcome = teegpu(*command, "--max-tokens", "2", "--expect-private", "--expect-verified")
    assert outcome.code == 9
    assert outcome.out.startswith("teegpu audit")
    assert "what the servers got is not private (nearest embedding, " in outcome.err
    assert "; lies went unnoticed (" in outcome.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["too short"], 3, "an audit takes a prompt of 16 tokens or more, this one has 9"),
        (["--no-lies", "--expect-verified"], 2, "--expect-verified needs lies to be told"),
        (["Hi", "--prompt-tokens", "20"], 2, "PROMPT and --prompt-tokens exclude each other"),
    ],
)
def test_what_can_not_be(
    teegpu: Teegpu, model: ModelFolder, server_for: ServerFor, options: list[str], code: int, message: str
) -> None:
    outcome = teegpu("audit", "--raw", "--model", model.path, "--endpoint", server_for(model).address, *options)
    assert outcome.code == code
    assert message in outcome.err


def test_an_audit_leaves_no_record(teegpu: Teegpu, command: list[Any]) -> None:
    assert teegpu(*command, "--no-lies", "--max-tokens", "2").code == 0
    assert "no runs" in teegpu("report", "list").out + teegpu("report", "list").err


@pytest.mark.parametrize("how", [("--plan", "local"), ("--plan", "attention", "--privacy", "reference")])
def test_nothing_to_attack_where_all_is_computed_here(teegpu: Teegpu, model: ModelFolder, how: tuple[str, ...]) -> None:
    outcome = teegpu("audit", PROMPT, "--raw", "--model", model.path, *how, "--expect-private", "--expect-verified")
    assert outcome.code == 0
    assert "nobody to lie" in outcome.out
    assert "No server got anything." in outcome.out


@pytest.mark.extra
def test_a_real_prompt_is_read_off_what_a_real_server_got(teegpu: Teegpu, smollm2: ModelFolder) -> None:
    outcome = teegpu("audit", "--model", smollm2.path, "--prompt-tokens", "48", "--no-lies", "--json", "--quiet")
    document = json.loads(outcome.out)
    found = {(entry["attack"], entry["target"]): entry for entry in document["findings"]}
    assert found["nearest embedding", "layer 0, input of Q, K, V"]["recovered_share"] > 0.9
    assert found["likeliest token", "the logits, answered"]["recovered_share"] > 0.9
    assert found["linear map", "layer 1, input"]["recovered_share"] > 0.3
    assert found["linear map", "layer 15, input"]["verdict"] in ("leaks", "recovered")
