"""What is fuzzed of what strangers write: a model's files, what its tokenizer's process answers, bodies of requests
to the endpoint, and what lies on a disk that is the host's: records, keys."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import zstandard

from teegpu import endpoints
from teegpu.api import asked
from teegpu.api.errors import ApiError
from teegpu.errors import ConfigError, ModelError, RecordError
from teegpu.model import answers, gguf_file
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.safetensors_file import DamagedFileError, SafetensorsFile
from teegpu.record import database
from teegpu.record.events import Noted
from teegpu.record.run import RunFolder
from teegpu.tee.sampling import SamplingOptions
from transports import security
from transports.errors import BadKeyError

SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}
"""Of GGUF's kinds of values some: values of a block, and its bytes."""


@cache
def _place() -> Path:
    """A file of this process, in memory where there is such a place."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="teegpu-fuzz-", dir=folder)) / "model"


def _written(data: bytes) -> Path:
    path = _place()
    path.write_bytes(data)
    return path


def safetensors(data: bytes) -> str:
    """A header, and that every tensor that it names lies in the file."""
    try:
        with SafetensorsFile(_written(data)) as file:
            for entry in file.tensors.values():
                assert 0 <= entry.offset <= entry.offset + entry.size_bytes <= len(data)
            return "taken"
    except DamagedFileError as error:
        return _one_line(error)


def gguf(data: bytes) -> str:
    """A header, whether it can be converted, and what its angles are."""
    path = _written(data)
    try:
        header = gguf_file.read_header(path, SIZES)
    except gguf_file.GgufError as error:
        return _one_line(error)
    assert all(0 <= offset <= len(data) for offset, _ in header.offsets.values())
    try:
        gguf_file.check(header, gguf_file.GPT2_SPLITS)
        gguf_file.rope_parameters(header, path)
    except gguf_file.GgufError as error:
        _one_line(error)
        return "unfit"
    return "taken"


def body(data: bytes) -> str:
    """A request for the endpoint, as a chat and as a completion."""
    found = []
    for read in (asked.chat, asked.completion):
        try:
            wanted = read(asked.parse(data), SamplingOptions(), padded=True)
        except ApiError as error:
            found.append("refused" if 400 <= error.status < 500 and json.dumps(error.body) else "wrong")
        else:
            found.append("taken" if wanted.choices > 0 else "wrong")
    assert "wrong" not in found
    return " ".join(found)


def config(data: bytes) -> str:
    """A model's config.json."""
    try:
        spec = read_spec(ModelFolder("fuzz", _place().parent, files={"config.json": data}))
    except ModelError as error:
        return _one_line(error)
    assert spec.layers > 0
    assert spec.hidden_size > 0
    return "taken"


def record(data: bytes) -> str:
    """The database of a run, by whom it may have been written."""
    path = _place().parent / database.FILE
    path.write_bytes(data)
    run = RunFolder(path.parent)
    try:
        run.meta()
        with contextlib.suppress(ValueError):
            run.document()
        with contextlib.closing(run.events()) as reader:
            reader.read()
    except RecordError as error:
        return _one_line(error)
    assert all(map(str.isprintable, reader.damage))
    return "damaged" if reader.damage else "taken"


def block(data: bytes) -> str:
    """A block of a record's events, which need not have been compressed by us."""
    try:
        database.unpacked(data)
    except ValueError as error:
        _one_line(error)
        damaged = True
    else:
        damaged = False
    try:
        database.unpacked(zstandard.compress(data))
    except ValueError as error:
        _one_line(error)
        return "refused" if damaged else "taken"
    return "taken"


ASKED: tuple[dict[str, Any] | None, ...] = (
    None,
    {"job": "text", "text": "hello", "special": False},
    {"job": "decode", "ids": [[1], [2, 3]]},
    {"job": "chat"},
    {"job": "bytes", "token": 1},
)


def answer(data: bytes) -> str:
    """The first byte says what was asked; the line of a tokenizer's process follows."""
    asked = ASKED[data[0] % len(ASKED)] if data else None
    try:
        found = answers.read(data[1:], asked)
    except answers.FailedError as error:
        _one_line(error)
        return "failed"
    except ValueError:
        return "refused"
    if asked is None:
        assert 0 <= found["vocab_size"] < 2**22
        assert all(0 <= token < 2**22 for token in found["special"].values())
    elif asked["job"] == "decode":
        assert len("".join(found).encode()) <= len(data)
    elif asked["job"] == "chat":
        assert len(found) <= len(data)
    else:
        assert all(0 <= token < (2**22 if asked["job"] == "text" else 256) for token in found)
    return "taken"


def key(data: bytes) -> str:
    """A key's file. No message has anything of it."""
    text = data.decode("utf-8", "replace")
    for parse in (security.parse_public, security.parse_secret):
        try:
            parse(text, "key.pub")
        except BadKeyError as error:
            _one_line(error)
        else:
            return "taken"
    return "refused"


def endpoint(data: bytes) -> str:
    """An address with its options, as somebody else may have told it."""
    try:
        found = endpoints.parse(data.decode("utf-8", "replace"))
    except ConfigError:
        return "refused"
    assert endpoints.parse(str(found)) == found
    return "taken"


def _one_line(error: Exception) -> str:
    assert str(error).isprintable()
    return "refused"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "body": body,
    "config": config,
    "record": record,
    "block": block,
    "answer": answer,
    "key": key,
    "endpoint": endpoint,
}


def seeds() -> dict[str, list[bytes]]:
    """For each target, what is right."""
    pair = security.pair_of(bytes(range(32)))
    return {
        "safetensors": [_safetensors()],
        "gguf": [_gguf()],
        "body": _bodies(),
        "config": [_config()],
        "record": [_record()],
        "block": [msgpack.packb((False, b"\x0a", [(5, "text")])), database.Packer().block([Noted(5, "text")])],
        "answer": _answers(),
        "key": [_key_text(pair.public.text), _key_text(pair.public.text, "# a key")],
        "endpoint": [b"tcp://10.0.0.1:5555#layers=0-3,key=name,share=1", b"ipc:///run/s", b"tcp://[::1]:5555#share=2"],
    }


def _answers() -> list[bytes]:
    described = {"vocab_size": 9, "eos_token_id": 2, "chat_template": "{{ x }}", "special": {"<s>": 1}, "spells": True}
    right: tuple[object, ...] = (described, [1, 300], ["a", "\u00e9"], "a \U0001f600\n", [0, 255])
    said = [{"answer": each} for each in right] + [{"error": "TemplateError", "reason": "why", "refused": True}]
    lines = [json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in said]
    return [bytes([number % len(ASKED)]) + line for number, line in enumerate(lines)]


def _key_text(*lines: str) -> bytes:
    return "\n".join(reversed(lines)).encode()


def _config() -> bytes:
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    return json.dumps(values).encode()


def _record() -> bytes:
    folder = Path(tempfile.mkdtemp(prefix="record-", dir=_place().parent))
    database.create(folder, {"model": {"name": "m"}})
    with contextlib.closing(sqlite3.connect(folder / database.FILE, isolation_level=None)) as connection:
        block = database.Packer().block([Noted(5, "text")])
        connection.execute("INSERT INTO events (block) VALUES (?)", (block,))
        connection.execute("UPDATE run SET status = 'complete', blocks = 1, document = '{}'")
    return (folder / database.FILE).read_bytes()


def _safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(32)


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("llama.rope.freq_base") + struct.pack("<If", 6, 10000.0),
        text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("gpt2"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    ]
    tensors = [text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(32)


def _bodies() -> list[bytes]:
    chat = {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "n": 2, "stop": ["a", "b"], "seed": 1,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "y"},
        ],
        "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -100}, "temperature": 0.5,
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    completion = {"prompt": ["a", [1, 2]], "max_tokens": 3, "logprobs": 2, "top_p": 0.9, "presence_penalty": 1}
    return [json.dumps(each).encode() for each in (chat, completion, {"prompt": "a"})]
