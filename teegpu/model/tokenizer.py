"""Text ⇄ token ids. The only place that knows the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import eos_token_ids, known_config, read_config

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no complete character (yet)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class, by its older and its newer name
_TRUSTED = ("llama", "qwen3")
_CONTEXT_TOKENS = 8  # of a prompt, enough to know what its end looks like


class Tokenizer:
    """A model's tokenizer. Reads the folder only; raises ``ModelError`` when there is no usable tokenizer in it.

    ``eos_token_ids`` are the config's, generation config's and the tokenizer's own.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        config = known_config(folder)
        try:
            self._tokenizer = _load(folder, config.model_type)
            self._backend: tokenizers.Tokenizer = self._tokenizer.backend_tokenizer
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"{folder.path} has no usable tokenizer ({reason}): {folder.repair}") from error
        own = self._tokenizer.eos_token_id
        ids = eos_token_ids(folder, config)
        self.eos_token_ids: tuple[int, ...] = ids if own is None or own in ids else (*ids, own)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the tokenizer knows; the model's table may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode_chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn in the model's chat template, up to where the answer begins.

        Raises ``PromptError`` for an empty prompt or where the template refuses it, ``UsageError`` where the model
        has no template.
        """
        if not prompt.strip():
            raise PromptError("the prompt is empty: give a text as argument or on standard input")
        if not self.has_chat_template:
            raise UsageError(f"model '{self._folder.name}' has no chat template: use --raw to give it the plain text")
        from jinja2 import TemplateError

        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PromptError(
                f"the chat template of model '{self._folder.name}' refuses this prompt ({reason}): "
                "leave --system out, or use --raw to give the plain text"
            ) from error
        return self.encode_plain(str(text))  # the template writes the special tokens itself, BOS included

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of ``text`` itself, with the special tokens (such as BOS) that the tokenizer puts around a text.

        Raises ``PromptError`` where nothing is left to compute.
        """
        ids = self.encode_plain(text) if not text else list(self._backend.encode(text, add_special_tokens=True).ids)
        if not ids:
            raise PromptError("the prompt is empty: give a text as argument or on standard input")
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of ``text`` without any special token around it; empty for an empty text."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that come one by one. ``after`` are ids that precede them and are not written: with a
        SentencePiece tokenizer they decide whether the text begins with a space."""
        return TextStream(self._backend, after)


def _load(folder: ModelFolder, architecture: str) -> Any:
    """The tokenizer as transformers loads it.

    Where the model says that its tokenizer.json is all there is to it, the class is known, and is asked for by itself:
    looking for the class imports PyTorch's compiler among much else, which takes seconds. Not so for the architectures
    of which transformers knows that their models say it wrongly.
    """
    if architecture in _TRUSTED and _is_plain(folder):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder.path), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder.path), config=read_config(folder), local_files_only=True, trust_remote_code=False
    )


def _is_plain(folder: ModelFolder) -> bool:
    try:
        described = json.loads((folder.path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False  # transformers says what is wrong
    return (
        isinstance(described, dict)
        and described.get("tokenizer_class") in _PLAIN_CLASSES
        and "auto_map" not in described
        and (folder.path / "tokenizer.json").is_file()
    )


class TextStream:
    """Tokens in, text out, as soon as it is certain. A character whose bytes span tokens comes whole.

    All pieces joined, that of ``finish`` included, are what decoding all ids at once gives.
    """

    def __init__(self, backend: tokenizers.Tokenizer, after: Sequence[int] = ()) -> None:
        self._backend = backend
        # A token's text may depend on the tokens before it, so text is decoded from ``_context`` on, and what the
        # tokens up to ``_written`` give by themselves is cut off. ``_out`` characters of the rest are out already.
        self._ids: list[int] = list(after)[-_CONTEXT_TOKENS:]
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
        before = self._decode(self._ids[self._context : self._written])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)
