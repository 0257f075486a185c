"""``teegpu run``: what comes out, in text and as a document, and what is counted. See test_run_ends for how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import transports
from teegpu import facts
from teegpu.cli import main as cli
from teegpu.config import PLANS
from teegpu.errors import EXIT_BROKEN_PIPE
from teegpu.model.folder import ModelFolder
from teegpu.model.tokenizer import Tokenizer
from teegpu.text import for_terminal
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, Outcome, ServerFor, Teegpu

REMOTE_PLANS = [plan for plan in PLANS if plan != "local"]


@pytest.fixture
def run(teegpu: Teegpu, model: ModelFolder, server: LocalServer) -> Teegpu:
    """``teegpu run`` with the tiny model and its server."""

    def call(*args: object) -> Outcome:
        options = ["--model", model.path, "--endpoint", server.address, "--max-tokens", 12, "--wire-dtype", "fp32"]
        return teegpu("run", *options, "--threads", 1, *args)

    return call


# Text


def test_a_prompt_is_tokenised_once(run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    encode = Tokenizer.encode_chat

    def counted(self: Tokenizer, prompt: str, system: str | None = None) -> list[int]:
        prompts.append(prompt)
        return encode(self, prompt, system)

    monkeypatch.setattr(Tokenizer, "encode_chat", counted)
    assert run("Hi", "--plan", "auto").code == 0
    assert prompts == ["Hi"]


def test_the_text_goes_to_stdout_and_the_summary_to_stderr(run: Teegpu, model: ModelFolder) -> None:
    done = run("Hi")
    assert done.code == 0
    expected = run("--json", "Hi").document["outputs"][0]["text"]
    assert len(expected) > 12
    assert done.out == expected + "\n"
    privacy, *lines = done.err.splitlines()
    assert privacy.startswith("privacy none: servers see the activations, products are not verified; servers: tcp://")
    assert lines[0] == ""
    assert lines[1].startswith(f"{model.path.name} · fused · pipelined · fp32 · TTFT ")
    assert [line.split()[:2] for line in lines[2:5]] == [["tokens", "seconds"], ["prefill", "6"], ["decode", "11"]]
    assert lines[-1] == "details: teegpu report last"


def test_quiet_prints_the_text_alone(run: Teegpu) -> None:
    done = run("-q", "Hi")
    assert (done.code, done.err) == (0, "")
    assert done.out == run("--json", "Hi").document["outputs"][0]["text"] + "\n"


def test_what_is_not_for_a_terminal_stays_whole(run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    err = run("Hi").err
    assert "…" not in err
    assert "communication" in err.splitlines()[3]


def test_a_narrow_terminal_gets_narrow_lines(run: Teegpu, model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    ours, theirs = os.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:  # how a terminal without anybody at its other end ends
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run("Hi").code == 0
    reader.join()
    os.close(ours)
    summary = re.sub(r"\x1b\[\d*m", "", shown.decode()).partition(f"{model.path.name} · fused")[2].splitlines()
    assert summary[0] == " · pipelined · fp32"
    assert ["prefill", "decode"] in [line.split() for line in summary]
    assert all(len(line) <= 40 for line in summary)
    assert f"loading {model.path.name}" in shown.decode()


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_an_answer_can_not_take_over_the_terminal(
    args: tuple[str, ...], run: Teegpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained model's answer, drawn at random, is full of control characters: piped, it stays as it is."""
    sampled = ("--temperature", 2, "--seed", 7, "--ignore-eos", "--max-tokens", 100, "-q", "Hi")
    piped = run(*sampled).out
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", piped)
    with monkeypatch.context() as patched:
        terminal = io.StringIO()
        patched.setattr(terminal, "isatty", lambda: True)
        patched.setattr(sys, "stdout", terminal)
        assert run(*args, *sampled).code == 0
    shown = terminal.getvalue()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert args or shown == for_terminal(piped)


@pytest.mark.parametrize("stdin", ["piped text\n", ""])
def test_standard_input_is_part_of_the_prompt(stdin: str, run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, stdin.encode())
    os.close(writer)
    with os.fdopen(reader) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        joined = run("--json", "Look:").document["outputs"][0]
    same = "Look:\n\npiped text" if stdin else "Look:"
    assert joined == run("--json", same).document["outputs"][0]


def test_a_system_message_and_raw_text(run: Teegpu, model: ModelFolder) -> None:
    tokenizer = Tokenizer(model)
    chat, system, raw = (
        run("--json", *options, "Hi").document["outputs"][0]["prompt_tokens"]
        for options in ([], ["--system", "Be brief."], ["--raw"])
    )
    assert chat == len(tokenizer.encode_chat("Hi"))
    assert system == len(tokenizer.encode_chat("Hi", "Be brief."))
    assert raw == 2


def test_a_stdout_that_is_not_utf_8(teegpu: Teegpu, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that it lacks are replaced in text, and escaped in a document."""
    command = ["run", "--model", tiny_model("llama").path, "--plan", "local", "--max-tokens", 12, "Hi"]
    text = teegpu(*command, "--json").document["outputs"][0]["text"]
    assert not text.isascii()
    printed = []
    for option in ("-q", "--json"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert teegpu(*command, option).code == 0
        printed.append(stdout.buffer.getvalue())  # type: ignore[attr-defined]
    assert printed[0] == text.encode("ascii", "replace") + b"\n"
    assert json.loads(printed[1])["outputs"][0]["text"] == text


# The document


def test_the_document(run: Teegpu, server: LocalServer) -> None:
    document = run("--json", "Hi").document
    assert document["status"] == "complete"
    assert "error" not in document
    assert set(document["outputs"][0]) == {"text", "token_ids", "finish_reason", "prompt_tokens", "reused_tokens"}
    assert len(document["outputs"][0]["token_ids"]) == 12
    assert document["outputs"][0]["finish_reason"] == "length"
    assert document["model"]["layers"] == 2
    assert document["settings"]["endpoints"] == [server.address]
    assert document["server"]["embedded"] is False
    assert document["latency"]["ttft_seconds"] > 0
    assert document["phases"]["decode"]["tokens"] == 11


def test_nothing_but_the_document_is_on_stdout_and_notes_are_still_told(run: Teegpu) -> None:
    done = run("--json", "--threads", 64, "Hi")
    assert done.out.startswith("{")
    assert "threads" in done.err
    assert run("--json", "-q", "--threads", 64, "Hi").err == ""


@pytest.mark.parametrize("option", ["--max-tokens", "--max-new-tokens"])
def test_both_names_of_max_tokens(option: str, run: Teegpu) -> None:
    assert len(run("--json", option, 3, "Hi").document["outputs"][0]["token_ids"]) == 3


def test_one_token_needs_no_decode(run: Teegpu) -> None:
    done = run("--json", "--max-tokens", 1, "Hi")
    assert done.document["phases"]["decode"]["passes"] == 0
    assert done.document["outputs"][0]["finish_reason"] == "length"
    assert "decode" not in run("--max-tokens", 1, "Hi").err


def test_plan_local_needs_no_server(teegpu: Teegpu, run: Teegpu, model: ModelFolder) -> None:
    options = ["--model", model.path, "--max-tokens", 12, "--plan", "local", "--local-dtype", "fp32"]
    document = teegpu("run", "--json", *options, "Hi").document
    assert document["server"] == {}
    assert document["outputs"][0]["token_ids"] == run("--json", "Hi").document["outputs"][0]["token_ids"]
    assert "embedded" not in teegpu("run", *options, "Hi").err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_local_computes_in_is_chosen_and_said(teegpu: Teegpu, model: ModelFolder, dtype: str) -> None:
    done = teegpu("run", "--model", model.path, "--plan", "local", "--local-dtype", dtype, "--max-tokens", 3, "Hi")
    assert done.code == 0
    assert f" · local · local in {dtype} · " in done.err


def test_a_plan_for_each_phase(run: Teegpu) -> None:
    document = run("--json", "--plan", "attention", "--decode-plan", "local", "Hi").document
    assert document["settings"]["prefill_plan"] == "attention"
    assert document["settings"]["decode_plan"] == "local"
    assert document["phases"]["prefill"]["rpc_calls"] == 9
    assert document["phases"]["decode"]["rpc_calls"] == 0


# Sampling and ends


def test_a_seed_repeats_itself_and_another_does_not(run: Teegpu) -> None:
    def ids(seed: int) -> list[int]:
        options = ["--temperature", 1, "--top-p", "0.95", "--top-k", 50, "--min-p", "0.01", "--seed", seed]
        found: list[int] = run("--json", *options, "Hi").document["outputs"][0]["token_ids"]
        return found

    first = ids(7)
    assert ids(7) == first
    assert ids(8) != first


@pytest.mark.parametrize("plan", ["local", "attention", "per-op"])
def test_greedy_is_the_same_for_every_plan(plan: str, run: Teegpu) -> None:
    assert run("--json", "--plan", plan, "Hi").document["outputs"][0] == run("--json", "Hi").document["outputs"][0]


def test_a_stop_string_that_is_a_special_token_ends_the_text(
    teegpu: Teegpu, model: ModelFolder, tmp_path: Path
) -> None:
    """No decoded text shows one, so it is known by its id, whatever else ends an answer."""
    path = shutil.copytree(model.path, tmp_path / "model")
    options = ["run", "--model", path, "--plan", "local", "--max-tokens", "6", "--ignore-eos", "--json", "Hi"]
    ids = teegpu(*options).document["outputs"][0]["token_ids"]
    content = json.loads((path / "tokenizer.json").read_text())
    word = next(word for word, index in content["model"]["vocab"].items() if index == ids[2])
    content["added_tokens"].append(content["added_tokens"][0] | {"id": ids[2], "content": word})
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert ids[2] not in ids[:2]
    assert teegpu(*options).document["outputs"][0]["token_ids"] == ids
    output = teegpu(*options, "--stop", word).document["outputs"][0]
    assert (output["token_ids"], output["finish_reason"]) == (ids[:2], "stop")


def test_a_stop_string_ends_the_text_before_it(run: Teegpu) -> None:
    text = run("--json", "Hi").document["outputs"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    output = run("--json", "--stop", "never said", "--stop", stop, "Hi").document["outputs"][0]
    assert output["text"] == text[: text.index(stop)]
    assert output["finish_reason"] == "stop"
    assert len(output["token_ids"]) < 12
    assert run("-q", "--stop", stop, "Hi").out == output["text"] + "\n"


def test_the_end_token_ends_the_text_unless_it_is_ignored(
    teegpu: Teegpu, run: Teegpu, tiny_model: TinyModel, server_for: ServerFor
) -> None:
    ids = run("--json", "Hi").document["outputs"][0]["token_ids"]
    end = ids[5]
    model = tiny_model("llama", vocab_size=1000, eos_token_id=end)  # the same weights
    options = ["--model", model.path, "--plan", "local", "--max-tokens", 12, "--json"]
    output = teegpu("run", *options, "Hi").document["outputs"][0]
    assert output["token_ids"] == ids[: ids.index(end)]
    assert output["finish_reason"] == "stop"
    ignored = teegpu("run", *options, "--ignore-eos", "Hi").document["outputs"][0]
    assert ignored["token_ids"] == ids
    assert ignored["finish_reason"] == "length"


# Several prompts, and prompts of a given length


def test_several_prompts_reuse_what_they_share(run: Teegpu, tmp_path: Path) -> None:
    beginning = "A common beginning of some length. "
    (tmp_path / "prompts").write_text(f"{beginning}One?\n{beginning}Two?\nNo\n")
    options = ["--prompts-file", tmp_path / "prompts", "--max-tokens", 4]
    outputs = run("--json", *options).document["outputs"]
    assert [output["reused_tokens"] > len(beginning) for output in outputs] == [False, True, False]
    for prompt, output in zip((beginning + "One?", beginning + "Two?", "No"), outputs, strict=True):
        alone = run("--json", "--max-tokens", 4, prompt).document["outputs"][0]
        assert output["token_ids"] == alone["token_ids"]
    done = run(*options)
    assert done.out == "\n\n".join(output["text"] for output in outputs) + "\n"
    assert "prompt tokens reused from the prompt before" in done.err


def test_one_prompt_in_a_file_still_gives_a_list(run: Teegpu, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Hi\n")
    outputs = run("--json", "--prompts-file", tmp_path / "prompts").document["outputs"]
    assert [output["text"] for output in outputs] == [run("--json", "Hi").document["outputs"][0]["text"]]


def test_a_prompt_of_exactly_so_many_tokens(run: Teegpu, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A text, over and over. ")
    for options in (["--text-file", tmp_path / "text"], []):
        document = run("--json", "--prompt-tokens", 100, *options).document
        assert document["outputs"][0]["prompt_tokens"] == document["phases"]["prefill"]["tokens"] == 100


# What is counted


def sums(document: dict[str, Any]) -> None:
    """The exclusive parts of each phase are its wall time, and those of the wait are the wait."""
    for name in ("prefill", "decode"):
        phase = document["phases"][name]
        parts = ("tee", "serialization", "wait", "other")
        assert sum(phase[f"{part}_seconds"] for part in parts) == pytest.approx(phase["seconds"], rel=0.01)
        waited = sum(phase[f"{part}_seconds"] for part in ("network", "server", "gpu"))
        assert waited == pytest.approx(phase["wait_seconds"], rel=0.01)
        assert all(phase[f"{part}_seconds"] >= 0 for part in (*parts, "network", "server", "gpu"))


@pytest.mark.parametrize(
    ("plan", "calls"), [("per-op", 200), ("batched", 134), ("attention", 89), ("fused", 45), ("local", 0)]
)
@pytest.mark.parametrize("transport", ["zmq", "pipelined"])
def test_rpc_calls_of_22_layers(
    plan: str, calls: int, transport: str, teegpu: Teegpu, tiny_model: TinyModel, server_for: ServerFor
) -> None:
    model = tiny_model("llama", num_hidden_layers=22)
    options = ["--model", model.path, "--plan", plan, "--transport", transport, "--ignore-eos", "--max-tokens", 4]
    if calls:
        options += ["--endpoint", server_for(model).address]
    document = teegpu("run", "--json", *options, "Count them.").document
    prefill, decode = document["phases"]["prefill"], document["phases"]["decode"]
    assert (prefill["rpc_calls"], decode["rpc_calls"]) == (calls, 3 * calls)
    assert facts.plan(plan).rpc_calls(22) == calls
    assert (prefill["bytes_up"] > 0, decode["bytes_down"] > 0) == (calls > 0, calls > 0)
    sums(document)


@pytest.mark.parametrize("plan", REMOTE_PLANS)
@pytest.mark.parametrize("transport", ["zmq", "pipelined"])
def test_times_add_up_in_a_prefill_of_chunks(plan: str, transport: str, run: Teegpu) -> None:
    options = ["--plan", plan, "--transport", transport, "--chunk-tokens", 16]
    document = run("--json", *options, "--prompt-tokens", 120, "--max-tokens", 4).document
    assert document["settings"]["chunk_tokens"] == 16
    assert document["phases"]["prefill"]["rpc_calls"] > 7 * facts.plan(plan).rpc_calls(1)
    sums(document)
    whole = run("--json", "--plan", plan, "--prompt-tokens", 120, "--max-tokens", 4).document
    assert document["outputs"][0]["token_ids"] == whole["outputs"][0]["token_ids"]


@pytest.mark.parametrize("transport", [name for name in transports.names() if name != "inprocess"])
def test_every_transport(transport: str, run: Teegpu) -> None:
    document = run("--json", "--transport", transport, "Hi").document
    assert document["settings"]["transport"] == transport
    assert document["outputs"][0] == run("--json", "Hi").document["outputs"][0]


def test_an_emulated_link_is_felt_and_told_of(run: Teegpu) -> None:
    done = run("--json", "--link", "rtt=20ms", "--transport", "zmq", "--max-tokens", 2, "Hi")
    assert done.document["settings"]["link"].startswith("rtt=20ms")
    assert done.document["phases"]["prefill"]["network_seconds"] >= 5 * 0.02
    assert "no server" not in done.err


def test_two_runners_at_once_on_one_server(model: ModelFolder, server: LocalServer, run: Teegpu) -> None:
    """Each in a thread of its own, without the command around it: signals belong to the main thread."""
    from teegpu import config
    from teegpu.runner import Runner
    from teegpu.tee.sequence import Generation

    together = threading.Barrier(2)
    answers: dict[str, list[int]] = {}

    def answer(prompt: str) -> None:
        settings = config.load({
            "run.endpoints": (server.address,), "run.wire_dtype": "fp32", "run.max_tokens": 12, "run.chunk_tokens": 16
        })  # fmt: skip
        with Runner(settings, model) as runner:
            ids = runner.tokenizer.encode_chat(prompt)
            together.wait(30)
            for _ in range(5):
                done = runner.generate(ids, sampler=runner.sampler(), on_token=lambda _: False, result=Generation())
            answers[prompt] = done.token_ids

    prompts = ["The first of the two", "And here is the second one, which is a little longer"]
    threads = [threading.Thread(target=answer, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {prompt: run("--json", prompt).document["outputs"][0]["token_ids"] for prompt in prompts}


# Nowhere to write to


def test_a_closed_stdout(run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        code = cli.run(["run", "--plan", "local", "Hi"])
    assert code == 2


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_went_away(options: list[str], run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as nobody:
        patched.setattr(sys, "stdout", nobody)
        done = run(*options, "Hi")
    assert done.code == EXIT_BROKEN_PIPE
    assert done.err.startswith("privacy ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk(options: list[str], run: Teegpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, open("/dev/full", "w") as full:
        patched.setattr(sys, "stdout", full)
        done = run(*options, "Hi")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "teegpu: No space left on device"


def test_a_draft_model_that_would_have_nothing_to_do_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", "--draft-model", "smollm2-135m", "Hi"]) == 2
    assert "give --speculate N" in capsys.readouterr().err
