"""An audit: a prompt is run as it always is, and what its servers got is attacked.

The parts of a run are those of ``teegpu run``; nothing is written to disk. After the prompt come the scenes that the
attacks compare it with, and then answers that lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from teegpu import __version__, facts, machine
from teegpu.audit.capture import Capture
from teegpu.audit.cheating import KINDS, LyingServer
from teegpu.audit.findings import Finding
from teegpu.audit.inversion import layers_attacked, read_everything
from teegpu.audit.known import AGAIN, CHANGED, PROMPT, TRAINING, Known, Truth
from teegpu.audit.linking import changed_token, equal_rows, masks_used_twice, same_prompt
from teegpu.audit.middle import Middle, Switch
from teegpu.audit.randomness import correlation_with_plain, distribution, neighbours
from teegpu.audit.reading import ServerView, Together, View
from teegpu.audit.seen import Seen, seen
from teegpu.config import Config
from teegpu.errors import PromptError, TeegpuError, VerificationError
from teegpu.model import texts
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import verified, wire_limits
from teegpu.runner import Runner
from teegpu.tee.sequence import Generation

SCHEMA = "teegpu.audit/1"

LEAST_PROMPT = 16
"""Tokens of a prompt. Of a shorter one, all could be guessed right by chance."""
_TRAINING_TEXTS = ("pride", "speeches")
_LIE_PROMPT = 12
_LIE_ANSWER = 2

Notify = Callable[[str], None]
Prompt = Callable[[Tokenizer], list[int]]


@dataclass(slots=True)
class Cheat:
    """A lie, and what came of it. ``told`` names the weights whose product was changed, and is None where nothing could
    be changed so. ``noticed`` is the error with which the run ended, empty where it went on, or where that error would
    not be fit for a terminal. ``verified`` says that it was verification that found it; ``answer_changed`` that the run
    went on and gave another answer."""

    kind: str
    told: str | None = None
    noticed: str = ""
    verified: bool = False
    answer_changed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "what": KINDS[self.kind],
            "told": self.told,
            "noticed": bool(self.noticed),
            "by_verification": self.verified,
            "error": self.noticed or None,
            "answer_changed": self.answer_changed,
        }


@dataclass(slots=True)
class Report:
    """What an audit found. ``truth`` is the prompt and its answer, and is in no document."""

    model: dict[str, Any]
    settings: dict[str, Any]
    started_at: str
    truth: Truth = field(repr=False)
    seen: list[Seen] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    cheats: list[Cheat] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def private(self) -> bool:
        """Whether no attack on what one server got found anything that could not be chance."""
        return not any(finding.alarming for finding in self.findings if not finding.control)

    @property
    def verified(self) -> bool | None:
        """Whether every lie was noticed; None where none was told. Where no server took part there is nobody to lie."""
        told = [cheat for cheat in self.cheats if cheat.told is not None]
        return all(cheat.noticed for cheat in told) if told or not self.seen else None

    def to_json(self, text_of: Callable[[Sequence[int]], str] | None = None) -> dict[str, Any]:
        """The document ``teegpu.audit/1``. With ``text_of`` it holds what was recovered, as text."""
        findings = [finding.to_json() for finding in self.findings]
        if text_of is not None:
            for entry, finding in zip(findings, self.findings, strict=True):
                entry["recovered_text"] = text_of(finding.guesses) if finding.guesses else None
        return {
            "schema": SCHEMA,
            "started_at": self.started_at,
            "version": __version__,
            "machine": machine.describe(),
            "tee": {"kind": machine.tee_kind(), "attested": False},
            "model": self.model,
            "settings": self.settings,
            "seen": [entry.to_json() for entry in self.seen],
            "findings": findings,
            "cheats": [cheat.to_json() for cheat in self.cheats],
            "private": self.private,
            "verified": self.verified,
            "notes": self.notes,
        }


class Audit:
    """Runs ``prompt`` on ``folder`` as ``config`` says and attacks what came of it.

    ``training_tokens`` of another text are sent for the linear map to learn from. ``most_bytes`` bounds what is kept of
    the messages; ``lies`` says whether lying servers are tried. ``notify`` is told in one line what goes on.
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: Config,
        prompt: Prompt,
        *,
        training_tokens: int,
        most_bytes: int,
        lies: bool = True,
        notify: Notify = lambda _: None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._prompt = prompt
        self._training_tokens = training_tokens
        self._most_bytes = most_bytes
        self._lies = lies
        self._notify = notify
        self.text_of: Callable[[Sequence[int]], str] = lambda _: ""

    def run(self) -> Report:
        """Raises what a run does, and ``PromptError`` for a prompt that is too short to tell anything from chance."""
        with contextlib.ExitStack() as stack:
            switch = Switch()
            tokenizer = Tokenizer(self._folder)
            prompt = self._checked(self._prompt(tokenizer))
            training = _training(tokenizer, min(self._training_tokens, read_spec(self._folder).max_positions - 1))
            runner = stack.enter_context(Runner(self._config, self._folder, notify=self._notify, wrap=switch))
            store = stack.enter_context(WeightStore(self._folder, runner.spec))
            self.text_of = runner.tokenizer.decode
            known = Known(store, runner.spec)
            capture = Capture(self._most_bytes)
            switch.middle = capture
            started_at = datetime.now(UTC).isoformat(timespec="seconds")
            truth = self._scenes(runner, capture, prompt, training)
            report = self._report(runner, truth, started_at)
            if capture.left_out:
                report.notes.append(
                    f"{capture.left_out:,} messages were not kept, as they were beyond "
                    f"{self._most_bytes / 2**20:,.0f} MiB: what they would have told is not in here"
                )
            self._attack(report, capture, known)
            if self._lies and capture.servers:
                report.cheats = self._cheats(runner, switch, truth.prompt[:_LIE_PROMPT])
            return report

    # What is captured

    @staticmethod
    def _checked(prompt: list[int]) -> list[int]:
        if len(prompt) < LEAST_PROMPT:
            raise PromptError(
                f"an audit takes a prompt of {LEAST_PROMPT} tokens or more, this one has {len(prompt)}: "
                "what is recovered of less could be chance"
            )
        return prompt

    def _scenes(self, runner: Runner, capture: Capture, prompt: list[int], training: list[int]) -> Truth:
        place = len(prompt) // 2
        other = next((token for token in training if token != prompt[place]), prompt[place] ^ 1)
        changed = [*prompt[:place], other, *prompt[place + 1 :]]
        self._notify(f"running the prompt: {len(prompt):,} tokens")
        capture.scene = PROMPT
        answer = _generate(runner, prompt, self._config.run.max_tokens)
        self._notify("running it again, and once more with one token changed")
        for capture.scene, ids in ((AGAIN, prompt), (CHANGED, changed)):
            _generate(runner, ids, 1)
        self._notify(f"running another text, which the attacker knows: {len(training):,} tokens")
        capture.scene = TRAINING
        _generate(runner, training, 1)
        return Truth(prompt, answer, training, place)

    def _report(self, runner: Runner, truth: Truth, started_at: str) -> Report:
        document = runner.report("complete")
        kept = ("prefill_plan", "decode_plan", "transport", "wire_dtype", "encrypted", "link")
        settings = {key: document["settings"][key] for key in kept}
        settings["privacy"] = self._config.run.privacy
        settings["verify"] = verified(self._config)
        settings["prompt_tokens"] = len(truth.prompt)
        settings["answer_tokens"] = len(truth.answer)
        settings["training_tokens"] = len(truth.training)
        return Report(document["model"], settings, started_at, truth)

    # What is made of it

    def _attack(self, report: Report, capture: Capture, known: Known) -> None:
        limits = wire_limits(self._config)
        servers = capture.servers
        labels = ["the server"] if len(servers) == 1 else [f"server {number}" for number in range(1, len(servers) + 1)]
        views = [ServerView(label, capture, server, limits) for label, server in zip(labels, servers, strict=True)]
        report.seen = [seen(view) for view in views]
        for view in views:
            self._notify(f"attacking what {view.label} got")
            report.findings += self._findings(view, known, report.truth)
        if self._config.run.privacy == facts.TWO_SERVER.name and len(views) == 2:
            # What must not happen, to show that the attacks would see it.
            together = Together("both servers together", *views)
            self._notify(f"attacking what {together.label} got")
            report.findings += read_everything(together, known, report.truth)

    def _findings(self, view: View, known: Known, truth: Truth) -> list[Finding]:
        found = list(read_everything(view, known, truth))
        for layer in (0, layers_attacked(known.spec.layers)[-1]) if known.spec.layers > 1 else (0,):
            found += [same_prompt(view, truth, layer), changed_token(view, truth, layer)]
        scenes = (PROMPT, AGAIN, CHANGED, TRAINING)
        found += [equal_rows(view, scenes), masks_used_twice(view, scenes)]
        found += [distribution(view), neighbours(view), correlation_with_plain(view, known, truth)]
        return found

    def _cheats(self, runner: Runner, switch: Switch, prompt: list[int]) -> list[Cheat]:
        """What comes of each lie, in a short run of its own."""
        switch.middle = Middle()
        honest = _generate(runner, prompt, _LIE_ANSWER)
        cheats = []
        for number, kind in enumerate(KINDS):
            self._notify(f"a server that lies: {KINDS[kind]}")
            cheat = Cheat(kind)
            switch.middle = liar = LyingServer(kind, layers=runner.spec.layers, at=runner.spec.layers, seed=number)
            try:
                cheat.answer_changed = _generate(runner, prompt, _LIE_ANSWER) != honest
            except TeegpuError as error:
                told = str(error)
                cheat.noticed, cheat.verified = told if told.isprintable() else "", isinstance(error, VerificationError)
            if liar.lie is not None:
                cheat.told = ", ".join(liar.lie.weights)
            cheats.append(cheat)
        switch.middle = Middle()
        return cheats


def _training(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """A text that is not the one that prompts are cut from."""
    return texts.prompt_of(tokenizer, tokens, "\n".join(texts.evaluation_texts()[name] for name in _TRAINING_TEXTS))


def _generate(runner: Runner, prompt: list[int], tokens: int) -> list[int]:
    made: list[int] = []

    def on_token(token: int) -> bool:
        made.append(token)
        return len(made) >= tokens

    runner.generate(prompt, sampler=runner.sampler(), on_token=on_token, result=Generation(), ignore_end=True)
    return made
