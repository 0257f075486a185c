"""``teegpu run``: answer a prompt."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from teegpu.cli import interrupts
from teegpu.cli.advising import advised
from teegpu.cli.common import ARGUMENTS, ConfigFile, from_transport, message_console, sigterm_as_interrupt
from teegpu.cli.prompts import Prompts
from teegpu.cli.recording import Recording
from teegpu.errors import TeegpuError, UsageError
from teegpu.metrics.start import Start
from teegpu.monitor.feed import FeedWriter

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.config import Config
    from teegpu.model.tokenizer import Tokenizer
    from teegpu.tee.generate import Generation
    from teegpu.tee.runner import Runner

MODEL = "Model and server"
PLACE = "How the work is split"
SAMPLING = "Sampling"
INPUT = "Prompt"
OUTPUT = "Output"


def run(
    context: typer.Context,
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
    server_key: Annotated[
        str | None,
        typer.Option(help="The public key that the server must prove to have: name or file.", rich_help_panel=MODEL),
    ] = None,
    client_key: Annotated[
        str | None, typer.Option(help="The key pair of this side: name or file.", rich_help_panel=MODEL)
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(help="Use of several endpoints: failover or round-robin.", rich_help_panel=MODEL),
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
            help="The plan of both phases: auto, local, per-op, batched, attention or fused.", rich_help_panel=PLACE
        ),
    ] = None,
    prefill_plan: Annotated[str | None, typer.Option(help="The plan of prefill alone.", rich_help_panel=PLACE)] = None,
    decode_plan: Annotated[str | None, typer.Option(help="The plan of decode alone.", rich_help_panel=PLACE)] = None,
    transport: Annotated[
        str | None, typer.Option(help="zmq, zmq+zstd, pipelined or pipelined+zstd.", rich_help_panel=PLACE)
    ] = None,
    wire_dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16, fp16 or int8.", rich_help_panel=PLACE)
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a chunk of the prefill; 0: auto.", rich_help_panel=PLACE)
    ] = None,
    privacy: Annotated[
        str | None,
        typer.Option(help="Hide values from servers: none, two-server, pads, lwe or reference.", rich_help_panel=PLACE),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Check the servers' products.", rich_help_panel=PLACE),
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
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="End with the whole report.", rich_help_panel=OUTPUT)
    ] = False,
    note: Annotated[
        str | None, typer.Option(help="A line to keep with the run's record.", rich_help_panel=OUTPUT)
    ] = None,
    save_text: Annotated[
        bool,
        typer.Option("--save-text", help="Keep prompt, text and token ids in the record too.", rich_help_panel=OUTPUT),
    ] = False,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Keep no record of this run.", rich_help_panel=OUTPUT)
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Watch it as it happens; the text is printed at the end.", rich_help_panel=OUTPUT),
    ] = False,
    feed: Annotated[
        int | None, typer.Option(help="Where a run that is watched tells its text.", hidden=True, show_default=False)
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Answer a prompt; the text goes to stdout, everything else to stderr."""
    from teegpu import config, machine

    flags = {
        "model.name": model,
        "model.offline": offline,
        "run.endpoints": tuple(endpoint) if endpoint else None,
        "link.server_key": server_key,
        "link.client_key": client_key,
        "run.spread": spread,
        "run.prefill_plan": prefill_plan if prefill_plan is not None else plan,
        "run.decode_plan": decode_plan if decode_plan is not None else plan,
        "run.transport": transport,
        "run.wire_dtype": wire_dtype,
        "run.chunk_tokens": chunk_tokens,
        "run.privacy": privacy,
        "run.verify": None if verify is None else "on" if verify else "off",
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
        "run.note": " ".join(note.split()) if note is not None else None,
        "record.save_text": save_text or None,
        "record.keep": False if no_record else None,
    }
    if no_record and save_text:
        raise UsageError("--save-text would keep the text in the record, and --no-record keeps none: leave one out")
    settings = config.load(flags, config_file)
    if not _alone(settings):
        machine.share_cores()
    prompts = Prompts(prompt, system, raw, prompts_file, prompt_tokens, text_file)
    prompts.check()
    _check_embedded(settings, {"--device": device, "--dtype": dtype})
    _prepare_stdout()
    if quiet and verbose:
        raise UsageError("--quiet and --verbose are opposites: give one of them")
    console = message_console()
    if watch and feed is None:
        _watch(settings, context.meta[ARGUMENTS], prompts, quiet, console)
    watched = FeedWriter(feed) if feed is not None else None
    output = _Output(as_json, quiet, ignore_eos, verbose, watched)
    with sigterm_as_interrupt():
        # Before the model is loaded: an empty prompt should not cost that time.
        texts = prompts.read(lambda line: _say(console, line, output))
        if watched is not None:
            watched.begun()
            watched.watch_reader()
        _run(settings, prompts, texts, output, console)


def _watch(settings: Config, arguments: list[str], prompts: Prompts, quiet: bool, console: Console) -> NoReturn:
    """The run as a process of its own, and the monitor here."""
    from teegpu.cli.monitoring import check_theme
    from teegpu.cli.watching import watch_run

    check_theme(settings)
    typed = None
    if prompts.prompt == "-" and sys.stdin is not None and sys.stdin.isatty():
        console.print("type the prompt, and end it with Ctrl-D on a line of its own")
        typed = sys.stdin.buffer.read()
    raise typer.Exit(watch_run(settings, arguments, typed=typed, quiet=quiet))


@dataclass(frozen=True)
class _Output:
    as_json: bool
    quiet: bool
    ignore_eos: bool
    verbose: bool = False
    feed: FeedWriter | None = None


@dataclass
class _Outcome:
    """How the run went so far. ``answers`` are as the document has them, an interrupted one included; ``unread`` says
    that the reader of stdout went away, so that nothing is left to be said there; ``bug`` that ``error`` is none that
    we know, so that anything may stand in it."""

    start: Start = field(default_factory=Start.now)
    status: str = "failed"
    error: str | None = None
    unread: bool = False
    bug: bool = False
    runner: Runner | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


def _alone(settings: Config) -> bool:
    """Whether the run asks no server for anything."""
    run = settings.run
    return run.prefill_plan == run.decode_plan == "local" or run.privacy == "reference"


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
    if run.privacy == "reference":
        raise UsageError(f"{told}: privacy 'reference' computes in the runner, in whole numbers")


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
        # The outermost, and before anything that can fail: a run that failed has a record too.
        recording = stack.enter_context(
            Recording(
                settings,
                outcome.start,
                _document_of_nothing(settings, outcome),
                prompt={"text": texts if prompts.several else "".join(texts), "system": prompts.system},
                say=lambda line: _say(console, line, output),
            )
        )
        if output.feed is not None and recording.folder is not None:
            output.feed.run(recording.folder.path)
        try:
            outcome.runner = runner = _open(settings, outcome.start, prompts, texts, recording, output, console, stack)
            _answer_all(runner, prompts.encode(runner.tokenizer, texts), recording, output, outcome.answers)
            outcome.status = "complete"
        except KeyboardInterrupt:
            interrupts.handled()
            outcome.status = "interrupted"
            raise
        except BrokenPipeError:
            outcome.unread = True
            outcome.status, outcome.error = "interrupted", "the reader of the output went away"
            raise
        except Exception as error:
            told = error if isinstance(error, TeegpuError) else from_transport(error)
            outcome.error = str(told) if told is not None else f"{type(error).__name__}: {error}"
            outcome.bug = told is None
            raise
        finally:
            _conclude(settings, outcome, prompts.several, recording, output, console)


def _open(
    settings: Config,
    start: Start,
    prompts: Prompts,
    texts: list[str],
    recording: Recording,
    output: _Output,
    console: Console,
    stack: contextlib.ExitStack,
) -> Runner:
    """The runner, ready for prompts; ``stack`` closes it. Loading takes seconds, so it is shown."""
    from teegpu.cli.models import find_model

    folder = find_model(settings, quiet=output.quiet)
    with _waiting(console, f"loading {folder.name}", output), interrupts.kept():
        from teegpu.tee.runner import Runner

        def notify(line: str) -> None:
            _say(console, line, output)
            recording.note(line)

        def longest(tokenizer: Tokenizer) -> int:
            return max(map(len, prompts.encode(tokenizer, texts)), default=0)

        return stack.enter_context(
            Runner(settings, folder, notify=notify, log=recording.log, start=start, prompt_tokens=longest)
        )


@contextlib.contextmanager
def _waiting(console: Console, what: str, output: _Output) -> Iterator[None]:
    """A sign of life on a terminal, nothing elsewhere."""
    if output.quiet or not console.is_terminal:
        yield
        return
    with console.status(what, spinner="line"):
        yield


def _answer_all(
    runner: Runner, prompts: list[list[int]], recording: Recording, output: _Output, answers: list[dict[str, Any]]
) -> None:
    """Answers one prompt after the other. ``answers`` gets each, an interrupted one included."""
    from teegpu.cli.streaming import Streamer
    from teegpu.tee.generate import Generation

    sampler = runner.sampler()
    recording.describe(runner)
    write = recording.text_to(runner.recorder, _nowhere if output.as_json else _write)
    if output.feed is not None and not recording.save_text:
        write = _both(output.feed.text, write)
    for number, prompt in enumerate(prompts):
        if number and not output.as_json:
            _write("\n")
        if number and output.feed is not None:
            output.feed.text("\n\n")
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


def _conclude(
    settings: Config, outcome: _Outcome, several: bool, recording: Recording, output: _Output, console: Console
) -> None:
    """The record, and the document or the summary, however the run ended."""
    answers: Any = outcome.answers
    if not several:
        answers = answers[0] if answers else None
    if outcome.runner is not None:
        document = outcome.runner.report(outcome.status, output=answers, error=outcome.error)
    else:
        document = _document_of_nothing(settings, outcome)
    document = recording.finish(advised(document, recording.store), keep_error=not outcome.bug)
    if outcome.unread:
        return
    if output.as_json:
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        _write(json.dumps(document, indent=2, ensure_ascii=ascii_only) + "\n")
    elif output.quiet:
        return
    elif outcome.runner is not None and outcome.runner.summary.phases:
        console.print()
        _print_report(document, output, console, recorded=recording.folder is not None)
    elif outcome.status == "interrupted":
        _say(console, "interrupted before the prompt was computed", output)


def _print_report(document: dict[str, Any], output: _Output, console: Console, *, recorded: bool) -> None:
    """The end of a run: a few lines, or with --verbose all of it."""
    if output.verbose:
        from teegpu.report.exports import PLAIN_WIDTH, as_plain
        from teegpu.report.tables import tables

        if console.is_terminal:
            for block in tables(document):
                console.print(block)
        else:
            console.print(as_plain(tables(document), PLAIN_WIDTH), end="", soft_wrap=True)
        return
    from teegpu.report.brief import brief

    details = "teegpu report last" if recorded else ""
    console.print(brief(document, console.width if console.is_terminal else None, details), soft_wrap=True)


def _document_of_nothing(settings: Config, outcome: _Outcome) -> dict[str, Any]:
    """The document of a run that ended before there was a runner: the same keys, and what is known without one."""
    from teegpu import machine
    from teegpu.metrics import environment
    from teegpu.metrics.document import document
    from teegpu.metrics.summary import Summary

    run = settings.run
    names = ("prefill_plan", "decode_plan", "privacy", "transport", "wire_dtype", "chunk_tokens", "link", "max_tokens")
    return document(
        run_id=outcome.start.id,
        status=outcome.status,
        started_at=outcome.start.at,
        model={"name": settings.model.name},
        settings={name: vars(run)[name] for name in (*names, "speculate")} | {"endpoints": list(run.endpoints)},
        tee={"kind": machine.tee_kind(), "attested": False},
        server={},
        summary=Summary(),
        output=None,
        error=outcome.error,
        note=run.note,
        environment=environment.describe(),
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def write(text: str) -> None:
        first(text)
        second(text)

    return write


def _nowhere(_: str) -> None:
    """The text of a run with --json stands in the document."""
