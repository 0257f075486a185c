"""``teegpu api``: the endpoint that applications use."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teegpu import torchload
from teegpu.cli import logs
from teegpu.cli.advising import advised
from teegpu.cli.common import ConfigFile, from_transport, message_console
from teegpu.cli.flags import Flags, takes_settings
from teegpu.cli.recording import Recording, Say, without_runner
from teegpu.errors import TeegpuError

if TYPE_CHECKING:
    from rich.console import Console

    from teegpu.api.serving import Ready
    from teegpu.config import Config
    from teegpu.model.folder import ModelFolder
    from teegpu.runner import Runner

log = logging.getLogger("teegpu.api")


@takes_settings(
    "run", "api", without=("record.save_text", "link.insecure", "run.note", "run.max_tokens", "sampling.stop")
)
def api(
    flags: Flags,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow an address that others can reach without TLS or API keys."),
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Answer OpenAI's HTTP interface, for many at once, until Ctrl-C or SIGTERM.

    It runs in the TEE: prompts and answers are here in the clear. Without --endpoint it starts a GPU server of its own.
    When it is told to end, it takes nothing new, answers what it has within api.drain_seconds, and exits with 0; a
    second signal ends it at once. It keeps a record, which says nothing of what was asked: teegpu watch, and teegpu
    report.
    """
    from teegpu import config, facts, machine

    settings = config.load(flags, config_file)
    machine.share_cores(alone=facts.all_local(settings.run.prefill_plan, settings.run.decode_plan))
    from teegpu.api import serving
    from teegpu.cli.models import check_draft, find_model
    from teegpu.shield import modes

    modes.check(settings)
    check_draft(settings)
    risk = serving.check_access(settings, insecure=insecure)
    console = message_console()
    with logs.shown("rich", "info", console):
        if risk:
            console.print(f"warning: --insecure: {risk}")
        folder = find_model(settings)
        with Recorded(settings, folder, console.print) as recorded:

            def ready(found: Ready) -> None:
                _ready(found, settings, console)
                recorded.attests(found)

            count = serving.Serving(settings, recorded.runner, ready).run()
            recorded.status = "complete"
        console.print(f"stopped after {count:,} request{'s' * (count != 1)}")


def _ready(found: Ready, settings: Config, console: Console) -> None:
    runner, engine = found.runner, found.runner.engine
    console.print(f"teegpu api ready at {found.url}")
    facts = [
        f"model {runner.folder.name}",
        f"{engine.capacity.sequences} sequences at once",
        f"{engine.most_positions:,} positions at most",
        f"plans {runner.prefill_plan.name} and {runner.decode_plan.name}",
        f"privacy {settings.run.privacy}",
        "API keys" if found.keys else "no API keys",
        *([f"metrics at {found.metrics_url}"] if found.metrics_url else []),
    ]
    console.print(" · ".join(facts))
    console.print(f"attested: {found.attested}")


class Recorded:
    """The record of an endpoint, from before its runner is opened to after its end. Use it with ``with``.

    ``status`` is how it ended, as far as no error says otherwise."""

    def __init__(self, settings: Config, folder: ModelFolder, say: Say) -> None:
        from teegpu.stats.environment import Start

        self._settings = settings
        self._folder = folder
        self._say = say
        self._start = Start.now()
        self._document: dict[str, Any] = without_runner(settings, self._start, "failed")
        self._recording = Recording(settings, self._start, self._document, prompt=None, say=say)
        self._tee: dict[str, Any] = self._document["tee"]
        self._under_way = False
        self.status = "interrupted"

    def attests(self, found: Ready) -> None:
        """The endpoint is there: what it proves to who asks is in the record as well."""
        self._tee = self._tee | {"attested": found.genuine}
        self._recording.attested(self._tee)
        self._recording.note(f"attested: {found.attested}")

    def __enter__(self) -> Recorded:
        self._recording.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._under_way:  # the thread that computes was left behind: the record ends as that of a killed process
            self._recording.__exit__()
            return
        status, told, known = self.status, {}, True
        if isinstance(error, Exception):
            ours = error if isinstance(error, TeegpuError) else from_transport(error)
            status, known = "failed", ours is not None
            told = {"error": str(ours) if known else f"{type(error).__name__}: {error}"}
        document = self._document | {"status": status, "tee": self._tee} | told
        self._recording.finish(advised(document, self._recording.store), keep_error=known)
        self._recording.__exit__()

    @contextlib.contextmanager
    def runner(self) -> Iterator[Runner]:
        """The runner, whose figures go into the record as long as this is open. For the thread that computes."""
        from teegpu.api.serving import capacity
        from teegpu.cli.models import find_draft

        with torchload.importing():
            from teegpu.runner import Runner

        def notify(line: str) -> None:
            self._say(line)
            self._recording.note(line)

        with Runner(
            self._settings,
            self._folder,
            notify=notify,
            log=self._recording.log,
            start=self._start,
            capacity=capacity(self._settings),
            draft=find_draft(self._settings),
        ) as runner:
            self._recording.describe(runner)
            self._under_way = True
            try:
                yield runner
            finally:
                self._document = runner.report("interrupted")
                self._under_way = False
