from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model.byte_tokenizer import SMALLEST_VOCABULARY, SPECIAL, byte_tokenizer
from teegpu.model.folder import ModelFolder
from teegpu.model.tokenizer import TextStream, Tokenizer

TEXTS = [
    "plain",
    "naïve café",
    "😀👩‍👩‍👧 family",
    "日本語のテキスト",
    "mixed 日本 😀 ok",
    "\ufffd",
    " leading",
    "tabs\tand\nlines\n",
]

_BYTES = byte_tokenizer(SMALLEST_VOCABULARY).backend_tokenizer


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


def sentencepiece_like() -> Backend:
    """Words with ▁ for a space, and bytes for what is not in the vocabulary, as llama's tokenizer has them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "he", "llo"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tiny_model, text) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    ids = tokenizer.encode_raw(text)

    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer.stream(), ids)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_streams_characters_whole(smollm2, text) -> None:
    tokenizer = Tokenizer(smollm2)
    pieces = streamed(tokenizer.stream(), tokenizer.encode_raw(text))

    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_sentencepiece_tokenizer_streams_the_same(text) -> None:
    backend = sentencepiece_like()
    ids = backend.encode(text).ids
    pieces = streamed(TextStream(backend), ids)

    assert "".join(pieces) == backend.decode(ids) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.text().filter(lambda text: not any(special in text for special in SPECIAL)))
def test_any_text_streams_to_itself(text) -> None:
    assert "".join(streamed(TextStream(_BYTES), _BYTES.encode(text).ids)) == text


@given(st.lists(st.integers(0, 300)))
def test_any_tokens_stream_to_what_they_decode_to(ids) -> None:
    assert "".join(streamed(TextStream(_BYTES), ids)) == _BYTES.decode(ids, skip_special_tokens=True)


def test_text_comes_with_the_token_that_completes_it() -> None:
    pieces = streamed(TextStream(_BYTES), _BYTES.encode("aé😀b").ids)

    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_flushed_once() -> None:
    stream = TextStream(_BYTES)
    for token in _BYTES.encode("é").ids[:1]:
        assert stream.push(token) == ""

    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_not_written() -> None:
    special = _BYTES.token_to_id("</s>")

    assert streamed(TextStream(_BYTES), [special, 65, special, 66]) == [
        "",
        _BYTES.decode([65]),
        "",
        _BYTES.decode([66]),
        "",
    ]


def test_what_went_before_decides_about_a_leading_space() -> None:
    backend = sentencepiece_like()
    word = [backend.token_to_id("▁he")]

    assert streamed(TextStream(backend), word) == ["he", ""]
    assert streamed(TextStream(backend, after=word * 20), word) == [" he", ""]


def test_the_chat_template_is_applied_as_transformers_does(smollm2) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(smollm2.path))
    tokenizer = Tokenizer(smollm2)
    for system in (None, "Be brief."):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "What is a TEE?"})
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat("What is a TEE?", system) == expected
    assert tokenizer.encode_raw("What is a TEE?") == reference("What is a TEE?")["input_ids"]
    assert tokenizer.eos_token_ids == (2,)


def test_a_chat_begins_with_bos_once_and_ends_where_the_answer_begins(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    user, assistant = tokenizer.encode_plain("<|user|>"), tokenizer.encode_plain("<|assistant|>")

    assert tokenizer.encode_chat("a") == [256, *user, *tokenizer.encode_plain("a"), 257, *assistant]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(tiny_model, prompt) -> None:
    with pytest.raises(PromptError, match="empty"):
        Tokenizer(tiny_model("llama")).encode_chat(prompt)
    with pytest.raises(PromptError, match="empty"):
        Tokenizer(tiny_model("llama")).encode_raw("")


def test_a_model_without_a_chat_template_suggests_raw(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer(folder)

    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="--raw"):
        tokenizer.encode_chat("hello")
    assert tokenizer.encode_raw("hello")


def test_a_template_that_refuses_says_why(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")

    with pytest.raises(PromptError, match=r"System role not supported.*--system"):
        Tokenizer(folder).encode_chat("hello", "Be brief.")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_corrupt_tokenizer_is_one_clear_line(copied_model, text) -> None:
    folder = copied_model("llama")
    (folder.path / "tokenizer.json").write_text(text)

    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_one_clear_line(copied_model) -> None:
    folder = copied_model("llama")
    (folder.path / "tokenizer.json").unlink()
    (folder.path / "tokenizer_config.json").unlink()

    with pytest.raises(ModelError, match="no usable tokenizer"):
        Tokenizer(folder)


def test_the_tokenizers_own_eos_counts_too(copied_model) -> None:
    folder = copied_model("llama")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder.path / file).read_text())
        (folder.path / file).write_text(json.dumps(values | {"eos_token_id": 7}))

    assert Tokenizer(folder).eos_token_ids == (7, 257)


# ---- loading


@pytest.mark.parametrize("name", ["smollm2", "llama", "qwen3"])
def test_a_plain_tokenizer_is_the_one_that_transformers_chooses(request, tiny_model, monkeypatch, name) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue("smollm2") if name == "smollm2" else tiny_model(name)
    chosen = AutoTokenizer.from_pretrained(str(folder.path), local_files_only=True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)  # it would be called in vain
    ours = Tokenizer(folder)

    assert ours._backend.to_str() == chosen.backend_tokenizer.to_str()
    assert chosen.eos_token_id in ours.eos_token_ids
    messages = [{"role": "user", "content": "hello"}]
    text = chosen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode_chat("hello") == chosen(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("architecture", "declared"), [("qwen2", "TokenizersBackend"), ("llama", "Qwen2Tokenizer")])
def test_other_tokenizers_are_left_to_transformers(tiny_model, tmp_path, architecture, declared) -> None:
    from transformers import AutoTokenizer

    path = shutil.copytree(tiny_model(architecture).path, tmp_path / "model")
    described = path / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"tokenizer_class": declared}))
    chosen = AutoTokenizer.from_pretrained(str(path), local_files_only=True)

    assert type(chosen).__name__ == "Qwen2Tokenizer"
    assert Tokenizer(ModelFolder("copy", path))._backend.to_str() == chosen.backend_tokenizer.to_str()
