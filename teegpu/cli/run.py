"""``teegpu run``: answer a prompt."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu.cli import interrupts
from teegpu.cli.common import ConfigFile, from_transport, message_console, sigterm_as_interrupt
from teegpu.cli.prompts import Prompts
from teegpu.errors import TeegpuError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.config import Config
    from teegpu.tee.generate import Generation
    from teegpu.tee.runner import Runner

MODEL = "Model and server"
PLACE = "How the work is split"
SAMPLING = "Sampling"
INPUT = "Prompt"
OUTPUT = "Output"


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads standard input. A pipe is joined to it.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.", rich_help_panel=INPUT)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the text.", rich_help_panel=INPUT)
    ] = False,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt a line; a common beginning is computed once.", rich_help_panel=INPUT)
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="A prompt of exactly N tokens, cut from --text-file or a built-in text.", rich_help_panel=INPUT
        ),
    ] = None,
    text_file: Annotated[Path | None, typer.Option(help="Text for --prompt-tokens.", rich_help_panel=INPUT)] = None,
    model: Annotated[
        str | None, typer.Option(help="Catalogue name, Hugging Face id, folder or .gguf file.", rich_help_panel=MODEL)
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU server; may be given several times. Without one an embedded server is started.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device of the embedded server.", rich_help_panel=MODEL)] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the embedded server.", rich_help_panel=MODEL)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runner; 0: auto.", rich_help_panel=MODEL)] = None,
    offline: Annotated[
        bool | None, typer.Option("--offline", help="Never use the network to find the model.", rich_help_panel=MODEL)
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="The plan of both phases: local, per-op, batched, attention or fused.", rich_help_panel=PLACE
        ),
    ] = None,
    prefill_plan: Annotated[str | None, typer.Option(help="The plan of prefill alone.", rich_help_panel=PLACE)] = None,
    decode_plan: Annotated[str | None, typer.Option(help="The plan of decode alone.", rich_help_panel=PLACE)] = None,
    transport: Annotated[
        str | None, typer.Option(help="zmq, zmq+zstd, pipelined or pipelined+zstd.", rich_help_panel=PLACE)
    ] = None,
    wire_dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8.", rich_help_panel=PLACE)] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a chunk of the prefill; 0: auto.", rich_help_panel=PLACE)
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(help="Guess up to N tokens a step from the context.", rich_help_panel=PLACE)
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Emulate a link: rtt=5ms,bandwidth=1gbit.", rich_help_panel=PLACE)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "--max-new-tokens", help="Tokens to generate at most.", rich_help_panel=SAMPLING),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.", rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(help="Among the k likeliest.", rich_help_panel=SAMPLING)] = None,
    min_p: Annotated[
        float | None, typer.Option(help="At least this share of the likeliest.", rich_help_panel=SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeat less.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=SAMPLING)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the text before this string; may be given several times.", rich_help_panel=SAMPLING),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end token (for benchmarks).", rich_help_panel=SAMPLING)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run as one JSON document.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="The text and errors only.", rich_help_panel=OUTPUT)
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Answer a prompt; the text goes to stdout, everything else to stderr."""
    from teegpu import config

    flags = {
        "model.name": model,
        "model.offline": offline,
        "run.endpoints": tuple(endpoint) if endpoint else None,
        "run.prefill_plan": prefill_plan if prefill_plan is not None else plan,
        "run.decode_plan": decode_plan if decode_plan is not None else plan,
        "run.transport": transport,
        "run.wire_dtype": wire_dtype,
        "run.chunk_tokens": chunk_tokens,
        "run.speculate": speculate,
        "run.link": link,
        "run.threads": threads,
        "run.max_tokens": max_tokens,
        "server.device": device,
        "server.dtype": dtype,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.top_k": top_k,
        "sampling.min_p": min_p,
        "sampling.repetition_penalty": repetition_penalty,
        "sampling.seed": seed,
        "sampling.stop": tuple(stop) if stop else None,
    }
    settings = config.load(flags, config_file)
    prompts = Prompts(prompt, system, raw, prompts_file, prompt_tokens, text_file)
    prompts.check()
    _check_embedded(settings, {"--device": device, "--dtype": dtype})
    _prepare_stdout()
    output = _Output(as_json, quiet, ignore_eos)
    console = message_console()
    with sigterm_as_interrupt():
        # Before the model is loaded: an empty prompt should not cost that time.
        texts = prompts.read(lambda line: _say(console, line, output))
        _run(settings, prompts, texts, output, console)


@dataclass(frozen=True)
class _Output:
    as_json: bool
    quiet: bool
    ignore_eos: bool


@dataclass
class _Outcome:
    """How the run went so far. ``answers`` are as the document has them, an interrupted one included; ``unread`` says
    that the reader of stdout went away, so that nothing is left to be said there."""

    status: str = "failed"
    error: str | None = None
    unread: bool = False
    runner: Runner | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


def _check_embedded(settings: Config, flags: dict[str, str | None]) -> None:
    """Raises ``UsageError`` for flags of the embedded server in a run that has none: they would do nothing."""
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        return
    run = settings.run
    told = f"{' and '.join(given)} would be for the embedded server, and this run starts none"
    if run.endpoint:
        raise UsageError(f"{told}: run.endpoints names {run.endpoint}, so give it to 'teegpu serve' there")
    if run.prefill_plan == run.decode_plan == "local":
        raise UsageError(f"{told}: the plan 'local' computes in the runner, in fp32")


def _prepare_stdout() -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed: there is nowhere to write the answer")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may answer with any character, and a terminal's encoding may lack it.
        sys.stdout.reconfigure(errors="replace")


def _say(console: Console, line: str, output: _Output) -> None:
    if not output.quiet:
        console.print(line)


def _run(settings: Config, prompts: Prompts, texts: list[str], output: _Output, console: Console) -> None:
    outcome = _Outcome()
    with contextlib.ExitStack() as stack:
        try:
            outcome.runner = runner = _open(settings, output, console, stack)
            _answer_all(runner, prompts.encode(runner.tokenizer, texts), output, outcome.answers)
            outcome.status = "complete"
        except KeyboardInterrupt:
            interrupts.handled()
            outcome.status = "interrupted"
            raise
        except BrokenPipeError:
            outcome.unread = True
            raise
        except Exception as error:
            told = error if isinstance(error, TeegpuError) else from_transport(error)
            outcome.error = str(told) if told is not None else f"{type(error).__name__}: {error}"
            raise
        finally:
            if not outcome.unread:
                _conclude(settings, outcome, prompts.several, output, console)


def _open(settings: Config, output: _Output, console: Console, stack: contextlib.ExitStack) -> Runner:
    """The runner, ready for prompts; ``stack`` closes it. Loading takes seconds, so it is shown."""
    from teegpu.cli.models import find_model

    folder = find_model(settings, quiet=output.quiet)
    with _waiting(console, f"loading {folder.name}", output):
        from teegpu.tee.runner import Runner

        return stack.enter_context(Runner(settings, folder, notify=lambda line: _say(console, line, output)))


@contextlib.contextmanager
def _waiting(console: Console, what: str, output: _Output) -> Iterator[None]:
    """A sign of life on a terminal, nothing elsewhere."""
    if output.quiet or not console.is_terminal:
        yield
        return
    with console.status(what, spinner="line"):
        yield


def _answer_all(runner: Runner, prompts: list[list[int]], output: _Output, answers: list[dict[str, Any]]) -> None:
    """Answers one prompt after the other. ``answers`` gets each, an interrupted one included."""
    from teegpu.cli.streaming import Streamer
    from teegpu.tee.generate import Generation

    sampler = runner.sampler()
    for number, prompt in enumerate(prompts):
        if number and not output.as_json:
            _write("\n")
        write = _nowhere if output.as_json else _write
        streamer = Streamer(runner.tokenizer.stream(prompt), runner.config.sampling.stop, write)
        done = Generation()
        try:
            runner.generate(prompt, sampler=sampler, on_token=streamer.push, result=done, ignore_end=output.ignore_eos)
        except BrokenPipeError:
            raise
        except BaseException:
            answers.append(_answer(done, streamer, runner, output))
            raise
        answers.append(_answer(done, streamer, runner, output))


def _answer(done: Generation, streamer: Any, runner: Runner, output: _Output) -> dict[str, Any]:
    """Ends the answer's text on stdout, and gives it as the document has it."""
    streamer.finish()
    if not output.as_json and done.token_ids:
        _write("\n")
    ids = done.token_ids
    if ids and ids[-1] in runner.tokenizer.eos_token_ids and not output.ignore_eos:
        ids = ids[:-1]
    return {
        "text": streamer.text,
        "token_ids": list(ids),
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "reused_tokens": done.reused_tokens,
    }


def _conclude(settings: Config, outcome: _Outcome, several: bool, output: _Output, console: Console) -> None:
    """The document or the summary, however the run ended."""
    from teegpu.report.brief import brief

    answers: Any = outcome.answers
    if not several:
        answers = answers[0] if answers else None
    if output.as_json:
        if outcome.runner is not None:
            document = outcome.runner.report(outcome.status, output=answers, error=outcome.error)
        else:
            document = _document_of_nothing(settings, outcome)
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        _write(json.dumps(document, indent=2, ensure_ascii=ascii_only) + "\n")
    elif output.quiet:
        return
    elif outcome.runner is not None and outcome.runner.summary.phases:
        document = outcome.runner.report(outcome.status, output=answers, error=outcome.error)
        console.print()
        console.print(brief(document, console.width if console.is_terminal else None), soft_wrap=True)
    elif outcome.status == "interrupted":
        _say(console, "interrupted before the prompt was computed", output)


def _document_of_nothing(settings: Config, outcome: _Outcome) -> dict[str, Any]:
    """The document of a run that ended before there was a runner: the same keys, and what is known without one."""
    import secrets
    from datetime import UTC, datetime

    from teegpu import machine
    from teegpu.metrics.document import document
    from teegpu.metrics.summary import Summary

    now, run = datetime.now(UTC), settings.run
    names = "prefill_plan", "decode_plan", "transport", "wire_dtype", "chunk_tokens", "link", "max_tokens", "speculate"
    return document(
        run_id=now.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3),
        status=outcome.status,
        started_at=now.isoformat(timespec="milliseconds"),
        model={"name": settings.model.name},
        settings={name: vars(run)[name] for name in names} | {"endpoints": list(run.endpoints)},
        tee={"kind": machine.tee_kind(), "attested": False},
        server={},
        summary=Summary(),
        output=None,
        error=outcome.error,
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _nowhere(_: str) -> None:
    """The text of a run with --json stands in the document."""
