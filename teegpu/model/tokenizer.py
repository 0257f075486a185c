"""Text ⇄ token ids. The only place that knows the model's chat template.

Tokenizer and template are the model's, and so they are foreign: they run in a child process (``model.foreign``) with
limits on time and memory, and this process parses neither.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import select
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from teegpu.children import Child, how_it_ended
from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model import answers
from teegpu.model.answers import FailedError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import known_config, read_spec

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no complete character (yet)

_LONGEST_CHARACTER: Final = 4  # bytes of UTF-8

LOAD_SECONDS: Final = 120.0
TEMPLATE_SECONDS: Final = 2.0
TEXT_SECONDS, CHARACTERS_PER_SECOND = 10.0, 50_000
"""What encoding or decoding may take, and what is added for a longer text: a hundredth of a usual tokenizer's pace."""
_CHARACTERS_FOR_EACH: Final = 256
"""Of a token, at most: the longest ones are runs of spaces."""
_ENDING_SECONDS: Final = 1.0  # between its last words and its end

Decode = Callable[[list[list[int]]], list[str]]
"""Lists of token ids → their texts, special tokens left out."""


class Confined:
    """The child process, begun when it is needed: also anew, after it had to be ended. Threads take turns.

    ``start`` begins it ahead of that, without waiting for it, for a ``Tokenizer`` to come. ``close`` ends it.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._architecture: str = known_config(folder).model_type  # what read_spec needs torch for is not asked here
        self._copy = contextlib.ExitStack()
        """What the child reads while it loads."""
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._end: Callable[[], Any] = lambda: None

    def ask(self, job: str, *, seconds: float, **request: Any) -> Any:
        """The answer to ``request``. Raises ``FailedError``."""
        asked = {"job": job, **request}
        try:
            line = json.dumps(asked, separators=(",", ":")).encode() + b"\n"
        except RecursionError:  # before the child has begun with it
            raise FailedError("it is nested too deep") from None
        with self._lock:
            if self._child is None:
                self._begin()
            return self._asked(asked, line, seconds)

    def begin(self) -> Mapping[str, Any]:
        """What the tokenizer is. Raises ``FailedError``."""
        with self._lock:
            return self._begin()

    def start(self) -> None:
        """Raises ``ModelError`` where there is no room for it."""
        given = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "0"}
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(self._folder.copied())
            self._child = child = Child(["-m", "teegpu.model.foreign", str(path), self._architecture], given=given)
            self._end = weakref.finalize(self, child.close, politely=False)  # it has nothing to lose
            self._copy = stack.pop_all()

    def close(self) -> None:
        self._end()
        self._copy.close()
        self._child = None

    def _begin(self) -> Mapping[str, Any]:
        if self._child is None:
            self.start()
        try:
            described: Mapping[str, Any] = self._asked(None, b"", LOAD_SECONDS)
        except BaseException:
            self.close()
            raise
        self._copy.close()
        return described

    def _asked(self, request: Mapping[str, Any] | None, line: bytes, seconds: float) -> Any:
        assert self._child is not None
        process = self._child.process
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        try:
            _send(process.stdin.fileno(), line, until)
            return answers.read(_line(process.stdout.fileno(), until, answers.most_bytes(request)), request)
        except FailedError:
            raise
        except TimeoutError:
            self.close()
            raise FailedError(f"it takes longer than {seconds:.0f} s") from None
        except (OSError, ValueError):  # it ended, or wrote what is no answer
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_SECONDS)
            ended = process.returncode
            self.close()
            how = (
                "it gives another answer than it was asked for" if ended is None else f"it ended {how_it_ended(ended)}"
            )
            raise FailedError(how) from None
        except BaseException:
            self.close()
            raise


def _send(descriptor: int, data: bytes, until: float) -> None:
    """Raises ``TimeoutError`` where the other end does not read: a pipe has room for some, and then waits."""
    for at in range(0, len(data), select.PIPE_BUF):  # a write of no more never waits once there is room
        _wait(descriptor, select.POLLOUT, until)
        os.write(descriptor, data[at : at + select.PIPE_BUF])


def _line(descriptor: int, until: float, most_bytes: int) -> bytes:
    """Raises ``TimeoutError``, or ``ValueError`` where it ends before its line or is longer than ``most_bytes``."""
    answer = bytearray()
    while not answer.endswith(b"\n"):
        _wait(descriptor, select.POLLIN, until)
        part = os.read(descriptor, 1 << 20)
        answer += part
        if not part or len(answer) > most_bytes:
            raise ValueError("no whole answer")
    return bytes(answer)


def _wait(descriptor: int, event: int, until: float) -> None:
    waiting = select.poll()  # not select, which knows no descriptor from 1,024 on
    waiting.register(descriptor, event)
    left = until - time.monotonic()
    if left <= 0 or not waiting.poll(math.ceil(left * 1000)):
        raise TimeoutError


class _TemplateError(PromptError):
    """The model's chat template takes no such conversation; its text may be taken all the same."""


class Tokenizer:
    """A model's tokenizer. Reads the folder only; raises ``ModelError`` when there is no usable tokenizer in it.

    ``eos_token_ids`` are the config's, generation config's and the tokenizer's own. ``close`` ends its process, as does
    dropping it. ``confined``: that process, where it was started ahead for this folder.
    """

    def __init__(self, folder: ModelFolder, confined: Confined | None = None) -> None:
        self._folder = folder = folder.pinned()
        self._spec = spec = read_spec(folder)
        self._confined = confined or Confined(folder)
        try:
            described = self._confined.begin()
        except FailedError as error:
            raise ModelError(f"{folder.path} has no usable tokenizer ({error}){self._why()}: {folder.repair}") from None
        own = described["eos_token_id"]
        ids = spec.eos_token_ids
        self.eos_token_ids: tuple[int, ...] = ids if own is None or own in ids else (*ids, own)
        self.vocab_size: int = described["vocab_size"]
        """Number of token ids that the tokenizer knows; the model's table may have more rows."""
        self.chat_template: str = described["chat_template"]
        """Empty where the model has none."""
        self._special: dict[str, int] = described["special"]
        self._bytes: dict[int, bytes] = {}
        self._spells: bool = described["spells"]
        self._spelled: dict[int, bytes] = {}

    def close(self) -> None:
        self._confined.close()

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    def to_json(self) -> str:
        """What a tokenizer.json has."""
        return self._text("json")

    def agrees_with(self, other: Tokenizer) -> bool:
        """Whether both have the same tokens under the same ids. Raises ``ModelError``."""
        return self.vocab_size == other.vocab_size and self._text("tokens") == other._text("tokens")

    def _text(self, what: str) -> str:
        try:
            return str(self._confined.ask(what, seconds=TEXT_SECONDS))
        except FailedError as error:
            raise self._fails("be written", error) from None

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written as ``text``, which no decoded text shows; None: there is none."""
        return self._special.get(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for, which need not be whole characters; none for an unknown id."""
        return self._asked("bytes", self._bytes, token)

    def encode_chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn in the model's chat template, up to where the answer begins.

        Raises ``PromptError`` for an empty prompt or where the template refuses it, ``UsageError`` where the model
        has no template.
        """
        if not prompt.strip():
            raise PromptError("the prompt is empty: give a text as argument or on standard input")
        messages = [{"role": "system", "content": system}] if system is not None else []
        try:
            return self.encode_messages([*messages, {"role": "user", "content": prompt}])
        except _TemplateError as error:
            hint = "leave --system out, or use" if system is not None else "use"
            raise PromptError(f"{error}: {hint} --raw to give the plain text") from None

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where the next answer begins.

        Raises ``PromptError`` where the template refuses it, takes too long or too much memory, ``UsageError`` where
        the model has no template.
        """
        name = self._folder.name
        if not self.has_chat_template:
            raise UsageError(f"model '{name}' has no chat template: use --raw to give it the plain text")
        try:
            given = {"template": self.chat_template, "messages": messages, "tools": tools}
            text = self._confined.ask("chat", seconds=TEMPLATE_SECONDS, **given)
        except FailedError as error:
            what = "refuses" if error.refused else "fails on"
            raise _TemplateError(f"the chat template of model '{name}' {what} this prompt ({error})") from None
        self._check_length(text)
        return self._checked(self.encode_plain(text))  # the template writes the special tokens itself, BOS included

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of ``text`` itself, with the special tokens (such as BOS) that the tokenizer puts around a text.

        Raises ``PromptError`` where nothing is left to compute.
        """
        if not text:
            raise PromptError("the prompt is empty: give a text as argument or on standard input")
        self._check_length(text)
        return self._checked(self._encode(text, special=True))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of ``text`` without any special token around it; empty for an empty text."""
        return self._encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return self._decode([list(ids)])[0]

    def stream(self, after: Sequence[int] = ()) -> TextStream | ByteStream:
        """What makes text of the tokens that come after those of ``after``."""
        return ByteStream(self._spell, after) if self._spells else TextStream(self._decode, after)

    def _spell(self, token: int) -> bytes:
        """The bytes that ``token`` adds to a text. Kept: to ask for them costs more than all else of a token."""
        return self._asked("spelled", self._spelled, token)

    def _asked(self, what: str, known: dict[int, bytes], token: int) -> bytes:
        """What the child says of ``token``, asked for where it is not ``known`` yet."""
        if token not in known:
            try:
                known[token] = bytes(self._confined.ask(what, token=token, seconds=TEXT_SECONDS))
            except FailedError as error:
                raise self._fails("decode these tokens", error) from None
        return known[token]

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if not answers.is_whole(text):
            raise PromptError("the prompt has half of a character (of a surrogate pair, or bytes that are no UTF-8)")
        seconds = TEXT_SECONDS + len(text) / CHARACTERS_PER_SECOND
        try:
            return list(self._confined.ask("text", text=text, special=special, seconds=seconds))
        except FailedError as error:
            raise self._fails("encode this text", error) from None

    def _decode(self, lists: list[list[int]]) -> list[str]:
        seconds = TEXT_SECONDS + sum(map(len, lists)) / CHARACTERS_PER_SECOND
        try:
            return list(self._confined.ask("decode", ids=lists, seconds=seconds))
        except FailedError as error:
            raise self._fails("decode these tokens", error) from None

    def _fails(self, what: str, error: FailedError) -> ModelError:
        return ModelError(f"the tokenizer in {self._folder.path} can't {what} ({error}): {self._folder.repair}")

    def _checked(self, ids: list[int]) -> list[int]:
        """``ids``, which a model can take: some, and each a row of its embedding."""
        if not ids:
            raise ModelError(f"the tokenizer in {self._folder.path} makes no token of this text: {self._folder.repair}")
        if (worst := max(ids)) >= self._spec.vocab_size:
            token = next((text for text, index in self._special.items() if index == worst), "")
            raise PromptError(
                f"the prompt has token {worst}{f' ({token!r})' if token else ''}, and model '{self._folder.name}' has "
                f"{self._spec.vocab_size} tokens: leave it out of the prompt, or choose another model with --model"
            )
        return ids

    def _check_length(self, text: str) -> None:
        """Refuses what no context holds before its tokens take memory."""
        if len(text) > _CHARACTERS_FOR_EACH * self._spec.max_positions:
            raise PromptError(
                f"the prompt has {len(text)} characters, and the model's context ends at {self._spec.max_positions} "
                "tokens: shorten the prompt, or choose a model with a longer context"
            )

    def _why(self) -> str:
        """What is known of a tokenizer that can't be loaded."""
        files = self._folder.pinned().files or {}
        if "tokenizer.json" not in files and "tokenizer.model" in files:
            return "; a tokenizer.model needs the package sentencepiece, which 'pip install sentencepiece' adds"
        return ""


class TextStream:
    """Tokens in, text out, as soon as it is certain. A character whose bytes span tokens comes whole.

    All pieces joined, that of ``finish`` included, are what decoding all ids at once gives.
    """

    def __init__(self, decode: Decode, after: Sequence[int] = ()) -> None:
        self._decode = decode
        # A token's text may depend on the tokens before it, so text is decoded from ``_context`` on, and what the
        # tokens up to ``_written`` give by themselves is cut off. ``_out`` characters of the rest are out already.
        self._ids: list[int] = list(after)
        self._context = 0
        self._written = len(self._ids)
        self._out = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._rest()
        certain = text.rstrip(_REPLACEMENT)  # bytes to come may turn replacements at the end into a character
        piece = certain[self._out :]
        if text and certain == text:
            self._context, self._written, self._out = self._written, len(self._ids), 0
        else:
            self._out = max(self._out, len(certain))
        return piece

    def finish(self) -> str:
        """What is left: incomplete bytes, as replacement characters."""
        piece = self._rest()[self._out :]
        self._context, self._written, self._out = self._written, len(self._ids), 0
        return piece

    def _rest(self) -> str:
        before, whole = self._decode([self._ids[self._context : self._written], self._ids[self._context :]])
        return whole[len(before) :]


class ByteStream:
    """As ``TextStream``, where each token adds the bytes that ``spell`` says, whatever stands before it."""

    def __init__(self, spell: Callable[[int], bytes], after: Sequence[int] = ()) -> None:
        self._spell = spell
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in after[-_LONGEST_CHARACTER:]:  # it may end with half a character
            self._decoder.decode(spell(token))

    def push(self, token: int) -> str:
        return self._decoder.decode(self._spell(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
