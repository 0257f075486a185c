"""What runs in the child process that a model's tokenizer and chat template are confined to:
``python -m teegpu.model.foreign FOLDER ARCHITECTURE``.

Both are foreign: a tokenizer's patterns and a template's loops may take any time and memory, and end in any error. So
they run here, under limits, and the runner's own process parses neither. FOLDER is a private copy, which is read once.
A line of JSON comes in for each request, and one goes out: first what the tokenizer is, then the answers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from teegpu import machine
from teegpu.children import address_space, limit

if TYPE_CHECKING:
    import tokenizers

MIB: Final = 1 << 20
LOAD_BYTES, TEMPLATE_BYTES, TEXT_BYTES = 4096 * MIB, 256 * MIB, 1024 * MIB
"""Memory beyond that of the process before: for loading a tokenizer, for a template, and for what the tokenizer does
with a text, which is more for longer ones."""
TEXT_BYTES_FOR_EACH = 256
MOST_CHARACTERS = 32 * MIB
"""Of what a template may make: far more than any context."""

_CPU_SECONDS = 120  # of one request: a backstop, the parent's own limits are narrower
_OUTPUT_BYTES = MIB

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class, by its older and its newer name
_PLAIN_KEYS = frozenset(NAMED) | {
    *("added_tokens_decoder", "add_bos_token", "add_eos_token", "additional_special_tokens", "backend"),
    *("chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_input_names"),
    *("model_max_length", "padding_side", "tokenizer_class", "truncation_side"),
}
_TRUSTED = ("granite", "llama", "phi3", "qwen3", "seed_oss", "smollm3")
"""Of these transformers takes the class that they name; of some others it knows that it is the wrong one."""

Loaded = tuple[Any, dict[str, str], Any]
"""The tokenizer, its named special tokens, and its chat template or templates."""


def main(folder: Path, architecture: str) -> int:
    machine.keep_to_itself()  # it gets prompts
    limit(resource.RLIMIT_FSIZE, _OUTPUT_BYTES)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # nothing but answers goes there
    texts: Texts | None = None

    def load() -> dict[str, Any]:
        nonlocal texts
        texts = Texts(*_load(folder, architecture))
        return texts.described()

    _reply(answers, load)
    while texts is not None and (line := sys.stdin.buffer.readline()):
        jobs: dict[str, Callable[[Any], Any]] = {
            "chat": texts.chat,
            "text": texts.text,
            "decode": texts.decode,
            "bytes": texts.token_bytes,
            "spelled": texts.spelled,
            "json": texts.to_json,
            "tokens": texts.tokens,
        }
        _reply(answers, functools.partial(_done, jobs, line))
    return 0


def _done(jobs: Mapping[str, Callable[[Any], Any]], line: bytes) -> Any:
    request = json.loads(line)
    return jobs[request["job"]](request)


def _reply(answers: IO[str], job: Callable[[], Any]) -> None:
    """The answer of ``job``, or what it failed with: foreign code may raise anything."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _CPU_SECONDS)
    try:
        answer: dict[str, Any] = {"answer": job()}
    except BaseException as error:  # noqa: BLE001 (a panic of the tokenizers library is no Exception)
        kind = type(error).__name__
        reason = " ".join(str(error)[:2000].split())[:200]
        answer = {"error": kind, "reason": reason, "refused": kind in ("RefusedError", "TemplateError")}
    allow(None)
    answers.write(json.dumps(answer, separators=(",", ":")) + "\n")
    answers.flush()


class RefusedError(Exception):
    """What foreign code made can't be taken. The message says why."""


def allow(more_bytes: int | None) -> None:
    """From now on the process may take ``more_bytes`` more than it has; None: as much as there is."""
    limit(resource.RLIMIT_AS, resource.RLIM_INFINITY if more_bytes is None else address_space() + more_bytes)


def _load(folder: Path, architecture: str) -> Loaded:
    described = _described(folder)
    if architecture in _TRUSTED and (plain := _plain(folder, described)) is not None:
        return plain
    # Most of the time would go to loading torch, which no tokenizer needs: transformers finds that there is none.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # and is not to say so
    from transformers import AutoConfig, AutoTokenizer

    allow(LOAD_BYTES)
    # The pattern that Mistral's tokenizers were saved with by older versions splits otherwise than its own library.
    fixed = {"fix_mistral_regex": True} if architecture.startswith("mini") or architecture == "mistral" else {}
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder),
        config=AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
        local_files_only=True,
        trust_remote_code=False,
        **fixed,
    )
    return tokenizer.backend_tokenizer, dict(tokenizer.special_tokens_map), tokenizer.chat_template


def _described(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json; None where transformers has to say what is wrong."""
    try:
        described = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return described if isinstance(described, dict) else None


def _plain(folder: Path, described: dict[str, Any] | None) -> Loaded | None:
    """The tokenizer where tokenizer.json is all there is to it: it has the class that does nothing of its own, and
    every special token. Importing transformers takes a second, and its classes of tokenizers several more."""
    if described is None or described.get("tokenizer_class") not in _PLAIN_CLASSES or described.keys() - _PLAIN_KEYS:
        return None
    path = folder / "tokenizer.json"
    if not path.is_file() or any((folder / name).exists() for name in ("added_tokens.json", "special_tokens_map.json")):
        return None
    import tokenizers

    allow(LOAD_BYTES)
    backend = tokenizers.Tokenizer.from_file(str(path))
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = {name: _content(described[name]) for name in NAMED if described.get(name)}
    known = (*named.values(), *map(_content, described.get("additional_special_tokens") or ()))
    for index, token in (described.get("added_tokens_decoder") or {}).items():
        own = backend.get_added_tokens_decoder().get(int(index))
        if own is None or repr(own) != repr(tokenizers.AddedToken(**token)):
            return None
    if not all(isinstance(text, str) and text in added and added[text].special for text in known):
        return None
    template: Any = described.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    files = {"default": folder / "chat_template.jinja"} | {
        each.stem: each for each in (folder / "additional_chat_templates").glob("*.jinja")
    }
    found = {name: each.read_text(encoding="utf-8") for name, each in files.items() if each.is_file()}
    if found:
        template = found["default"] if list(found) == ["default"] else found
    return backend, named, template


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


class Texts:
    """One tokenizer and its chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, named: dict[str, str], template: Any) -> None:
        # transformers takes both away for each call that does not ask for them.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._named = named
        self._template = template.get("default") if isinstance(template, dict) else template
        self._compiled: tuple[str, Any] = "", None

    def described(self) -> dict[str, Any]:
        """What the parent keeps of it."""
        end = self._named.get("eos_token")
        added = self._backend.get_added_tokens_decoder()
        return {
            "vocab_size": self._backend.get_vocab_size(with_added_tokens=True),
            "eos_token_id": None if end is None else self._backend.token_to_id(end),
            "chat_template": self._template or "",
            "special": {token.content: index for index, token in added.items() if token.special},
            "spells": str(self._backend.decoder).startswith("ByteLevel("),
        }

    def chat(self, request: Mapping[str, Any]) -> str:
        """The text that the chat template makes of messages."""
        template = request["template"]
        made = environment() if template != self._compiled[0] else None  # what that imports is no template's memory
        allow(TEMPLATE_BYTES)
        if made is not None:
            self._compiled = template, made.from_string(template)
        given = {"messages": list(map(_message, request["messages"])), "tools": request["tools"] or None}
        text = self._compiled[1].render(**{**self._named, **given, "documents": None, "add_generation_prompt": True})
        if len(text) > MOST_CHARACTERS:
            raise RefusedError(f"it makes {len(text)} characters, more than {MOST_CHARACTERS}")
        return str(text)

    def text(self, request: Mapping[str, Any]) -> list[int]:
        """Token ids of a text, with or without the special tokens around it."""
        text = request["text"]
        allow(TEXT_BYTES + TEXT_BYTES_FOR_EACH * len(text))
        return list(self._backend.encode(text, add_special_tokens=request["special"]).ids)

    def decode(self, request: Mapping[str, Any]) -> list[str]:
        """The text of each list of ids, special tokens left out."""
        allow(TEXT_BYTES + TEXT_BYTES_FOR_EACH * sum(map(len, request["ids"])))
        return [self._backend.decode(ids, skip_special_tokens=True) for ids in request["ids"]]

    def to_json(self, _: Mapping[str, Any]) -> str:
        """What a tokenizer.json has."""
        return str(self._backend.to_str())

    def tokens(self, _: Mapping[str, Any]) -> str:
        """A digest of all tokens and their ids."""
        found = json.loads(self._backend.to_str())
        added = [(entry.get("id"), entry.get("content")) for entry in found.get("added_tokens", ())]
        tokens = found.get("model", {}).get("vocab"), sorted(added, key=str)
        return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()

    def token_bytes(self, request: Mapping[str, Any]) -> list[int]:
        """The bytes that a token stands for, which need not be whole characters; none for an unknown id."""
        token = request["token"]
        piece = self._backend.id_to_token(token)
        if piece is None:
            return []
        if token not in self._backend.get_added_tokens_decoder():
            if "ByteLevel" in str(self._backend.decoder) and all(letter in _LETTERS for letter in piece):
                return [_LETTERS[letter] for letter in piece]
            if len(piece) == 6 and piece.startswith("<0x"):
                return [int(piece[3:5], 16)]
            piece = piece.replace("\u2581", " ")
        return list(piece.encode("utf-8", "replace"))

    def spelled(self, request: Mapping[str, Any]) -> list[int]:
        """The bytes that a token adds to a text, where the decoder does nothing but join them: those of its letters
        where it has no others. None for a special token."""
        token = request["token"]
        piece = self._backend.id_to_token(token)
        added = self._backend.get_added_tokens_decoder().get(token)
        if piece is None or (added is not None and added.special):
            return []
        if all(letter in _LETTERS for letter in piece):
            return [_LETTERS[letter] for letter in piece]
        return list(piece.encode("utf-8", "replace"))


def _letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers (GPT-2's) write bytes: printable ones as they are, the others as those
    from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_LETTERS = _letters()


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to templates: without empty keys, and with its reasoning under each name that
    templates know."""
    message = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def environment() -> Any:
    """What chat templates are rendered in: as transformers does it, whose own takes a second to import."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}`` marks an answer, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 (as the library has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: Any = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions: list[Any] = [Generation, ext.loopcontrols]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
