"""A run of ``teegpu run``, in this order: read the prompts, load the model, answer, conclude."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teegpu import facts, torchload
from teegpu.cli import interrupts
from teegpu.cli.advising import advised
from teegpu.cli.common import from_transport, message_console
from teegpu.cli.models import shown
from teegpu.cli.prompts import Prompts
from teegpu.cli.recording import Recording, without_runner
from teegpu.errors import TeegpuError, prompt_too_long
from teegpu.monitor.feed import FeedWriter
from teegpu.stats.environment import Start
from teegpu.text import Streamer, for_terminal

if TYPE_CHECKING:
    from teegpu.config import Config
    from teegpu.model.tokenizer import Tokenizer
    from teegpu.runner import Runner
    from teegpu.tee.sequence import Generation


@dataclass(frozen=True)
class Output:
    """What is printed. ``feed``: where a run that is watched reports its text."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    ignore_eos: bool = False
    feed: FeedWriter | None = None


class Answering:
    """Answers ``prompts``; the text goes to stdout, the summary to stderr. ``go`` is called once.

    A run that fails, or is interrupted, has a record and a summary of what it did until then.
    """

    def __init__(self, settings: Config, prompts: Prompts, output: Output) -> None:
        self._settings = settings
        self._prompts = prompts
        self._output = output
        self._console = message_console()
        self._texts: list[str] = []
        self._ids: list[list[int]] | None = None
        self._runner: Runner | None = None
        self._answers: list[dict[str, Any]] = []
        """As the document has them, an interrupted one included."""
        self._status = "failed"
        self._error: str | None = None
        self._in_a_line = False
        """What stdout shows has no line break at its end."""
        self._unread = False
        """The reader of stdout went away, so nothing is left to be said there."""
        self._bug = False
        """``_error`` is none that we know, so anything may stand in it."""

    def go(self) -> None:
        feed = self._output.feed
        # Before the model is loaded: an empty prompt should not cost that time.
        self._texts = self._prompts.read(self._say)
        if feed is not None:
            feed.begun()
            feed.watch_reader()
        self._start = Start.now()
        with contextlib.ExitStack() as stack:
            # The outermost, and before anything that can fail: a run that failed has a record too.
            text = self._texts if self._prompts.several else "".join(self._texts)
            prompt = {"text": text, "system": self._prompts.system}
            self._recording = stack.enter_context(
                Recording(self._settings, self._start, self._document(), prompt=prompt, say=self._warn)
            )
            if feed is not None and self._recording.folder is not None:
                feed.run(self._recording.folder.path)
            try:
                self._runner = runner = self._open(stack)
                self._answer_all(runner)
                self._status = "complete"
            except KeyboardInterrupt:
                interrupts.handled()
                self._status = "interrupted"
                raise
            except BrokenPipeError:
                self._unread = True
                self._status, self._error = "interrupted", "the reader of the output went away"
                raise
            except Exception as error:
                if interrupts.hidden(error):
                    self._unread, self._status = True, "interrupted"
                    raise
                told = error if isinstance(error, TeegpuError) else from_transport(error)
                self._error = str(told) if told is not None else f"{type(error).__name__}: {error}"
                self._bug = told is None
                raise
            finally:
                self._conclude()

    def _say(self, line: str) -> None:
        if not self._output.quiet:
            self._warn(line)

    def _warn(self, line: str) -> None:
        """Says also who wants to be told nothing but what is wrong."""
        if self._in_a_line and self._console.is_terminal and sys.stdout.isatty():
            self._console.print()
        self._in_a_line = False
        self._console.print(line)

    def _show(self, text: str) -> None:
        _write(text)
        self._in_a_line = not text.endswith("\n")

    def _encoded(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The token ids of each prompt, made once."""
        if self._ids is None:
            self._ids = self._prompts.encode(tokenizer, self._texts)
        return self._ids

    def _open(self, stack: contextlib.ExitStack) -> Runner:
        """The runner, ready for prompts; ``stack`` closes it. Loading takes seconds, so it is shown."""
        from teegpu.cli.models import find_draft, find_model

        folder = find_model(self._settings, quiet=self._output.quiet).pinned()
        draft = find_draft(self._settings, quiet=self._output.quiet)
        with self._waiting(f"loading {folder.name}"), interrupts.kept():
            from teegpu.model.reader import read_spec
            from teegpu.model.tokenizer import Confined
            from teegpu.remote.servers import Servers
            from teegpu.shield import modes

            def notify(line: str) -> None:
                self._say(line)
                self._recording.note(line)

            def longest(tokenizer: Tokenizer) -> int:
                lengths = [len(ids) for ids in self._encoded(tokenizer)]
                positions = read_spec(folder).max_positions
                if lengths and min(lengths) > positions:
                    raise prompt_too_long(min(lengths), positions)
                return max(lengths, default=0)

            servers = None
            if modes.needs_servers(self._settings):
                servers = stack.enter_context(contextlib.closing(Servers(self._settings, folder, notify)))
            confined = stack.enter_context(contextlib.closing(Confined(folder)))
            confined.start()
            # This takes the larger part of a start: a server of ours and the tokenizer's process load meanwhile.
            with torchload.importing():
                from teegpu.runner import Runner

            runner = Runner(
                self._settings,
                folder,
                notify=notify,
                log=self._recording.log,
                start=self._start,
                prompt_tokens=longest,
                draft=draft,
                servers=servers,
                confined=confined,
            )
            return stack.enter_context(runner)

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """A sign of life on a terminal, nothing elsewhere."""
        if self._output.quiet or not self._console.is_terminal:
            yield
            return
        with self._console.status(what, spinner="line"):
            yield

    def _answer_all(self, runner: Runner) -> None:
        """Answers one prompt after the other."""
        from teegpu.tee.sequence import Generation

        output = self._output
        prompts = self._encoded(runner.tokenizer)
        sampler = runner.sampler()
        self._recording.describe(runner)
        # With --json the text stands in the document.
        write = self._recording.text_to(runner.recorder, _nowhere if output.as_json else self._show)
        if output.feed is not None and not self._recording.save_text:
            write = _both(output.feed.text, write)
        for number, prompt in enumerate(prompts):
            if facts.privacy(runner.config.run.privacy).pads:
                with shown(quiet=output.quiet) as show:
                    runner.prepare(prompt, show)
            if number and not output.as_json:
                self._show("\n")
            if len(prompts) > 1:
                self._say(f"prompt {number + 1} of {len(prompts)}")
            if number and output.feed is not None:
                output.feed.text("\n\n")
            streamer = Streamer(runner.tokenizer.stream(prompt), runner.config.sampling.stop, write)
            done = Generation()
            try:
                runner.generate(
                    prompt, sampler=sampler, on_token=streamer.push, result=done, ignore_end=output.ignore_eos
                )
            except BrokenPipeError:
                raise
            except BaseException:
                self._answers.append(self._answer(done, streamer, runner))
                raise
            self._answers.append(self._answer(done, streamer, runner))

    def _answer(self, done: Generation, streamer: Streamer, runner: Runner) -> dict[str, Any]:
        """Ends the answer's text on stdout, and gives it as the document has it."""
        streamer.finish()
        if not self._output.as_json and done.token_ids:
            self._show("\n")
        ids = done.token_ids
        if ids and ids[-1] in runner.end_ids(ignore_end=self._output.ignore_eos):
            ids = ids[:-1]
        return {
            "text": streamer.text,
            "token_ids": list(ids),
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt_tokens,
            "reused_tokens": done.reused_tokens,
        }

    def _conclude(self) -> None:
        """The record, and the document or the summary, however the run ended."""
        recording, output = self._recording, self._output
        document = self._document()
        # What a run failed of is told, whatever is wrong with the advice on it.
        with contextlib.suppress(Exception) if self._status != "complete" else contextlib.nullcontext():
            document = advised(document, recording.store)
        document = recording.finish(document, keep_error=not self._bug)
        if self._unread:
            return
        if output.as_json:
            ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
            _write(json.dumps(document, indent=2, ensure_ascii=ascii_only) + "\n")
        elif output.quiet:
            return
        elif self._runner is not None and self._runner.summary.phases:
            self._console.print()
            self._print_report(document)
        elif self._status == "interrupted":
            self._say("interrupted before the prompt was computed")

    def _print_report(self, document: dict[str, Any]) -> None:
        """The end of a run: a few lines, or with --verbose all of it."""
        console = self._console
        if self._output.verbose:
            from teegpu.report.exports import PLAIN_WIDTH, as_plain
            from teegpu.report.tables import tables

            if console.is_terminal:
                for block in tables(document):
                    console.print(block)
            else:
                console.print(as_plain(tables(document), PLAIN_WIDTH), end="", soft_wrap=True)
            return
        from teegpu.report.brief import brief

        details = "teegpu report last" if self._recording.folder is not None else ""
        console.print(brief(document, console.width if console.is_terminal else None, details), soft_wrap=True)

    def _document(self) -> dict[str, Any]:
        """The run as it is now. Without a runner it has the same keys, and what is known."""
        if self._runner is not None:
            return self._runner.report(self._status, outputs=self._answers, error=self._error)
        return without_runner(self._settings, self._start, self._status, self._error)


def _write(text: str) -> None:
    """Raises ``BrokenPipeError`` where the reader went away, and where the terminal did."""
    try:
        sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EIO:
            raise BrokenPipeError(errno.EPIPE, "the terminal is gone") from None
        raise


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def write(text: str) -> None:
        first(text)
        second(text)

    return write


def _nowhere(_: str) -> None:
    pass
