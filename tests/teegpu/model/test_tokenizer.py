from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from teegpu.children import Child
from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model import foreign
from teegpu.model import tokenizer as tokenizer_module
from teegpu.model.byte_tokenizer import SMALLEST_VOCABULARY, SPECIAL, byte_tokenizer
from teegpu.model.folder import ModelFolder
from teegpu.model.tokenizer import ByteStream, Confined, TextStream, Tokenizer
from tests.conftest import TinyModel

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


def stream_of(backend: Backend, after: Sequence[int] = ()) -> TextStream:
    return TextStream(lambda lists: [backend.decode(ids, skip_special_tokens=True) for ids in lists], after)


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
    pieces = streamed(stream_of(backend), ids)

    assert "".join(pieces) == backend.decode(ids) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.text().filter(lambda text: not any(special in text for special in SPECIAL)))
def test_any_text_streams_to_itself(text) -> None:
    assert "".join(streamed(stream_of(_BYTES), _BYTES.encode(text).ids)) == text


@given(st.lists(st.integers(0, 300)))
def test_any_tokens_stream_to_what_they_decode_to(ids) -> None:
    assert "".join(streamed(stream_of(_BYTES), ids)) == _BYTES.decode(ids, skip_special_tokens=True)


def test_text_comes_with_the_token_that_completes_it() -> None:
    pieces = streamed(stream_of(_BYTES), _BYTES.encode("aé😀b").ids)

    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_flushed_once() -> None:
    stream = stream_of(_BYTES)
    for token in _BYTES.encode("é").ids[:1]:
        assert stream.push(token) == ""

    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_not_written() -> None:
    special = _BYTES.token_to_id("</s>")

    assert streamed(stream_of(_BYTES), [special, 65, special, 66]) == [
        "",
        _BYTES.decode([65]),
        "",
        _BYTES.decode([66]),
        "",
    ]


def test_what_went_before_decides_about_a_leading_space() -> None:
    backend = sentencepiece_like()
    word = [backend.token_to_id("▁he")]

    assert streamed(stream_of(backend), word) == ["he", ""]
    assert streamed(stream_of(backend, after=word * 20), word) == [" he", ""]


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


@pytest.mark.parametrize(
    ("file", "text"),
    [
        pytest.param("special_tokens_map.json", "[]", marks=pytest.mark.extra),
        pytest.param("added_tokens.json", "null", marks=pytest.mark.extra),
        ("tokenizer_config.json", "[" * 100_000),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_a_corrupt_file_beside_the_tokenizer_is_one_clear_line(copied_model, file, text) -> None:
    folder = copied_model("llama")
    (folder.path / file).write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(ModelError, match="has no usable tokenizer") as caught:
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


@pytest.mark.parametrize("name", ["smollm2", *foreign._TRUSTED])
def test_a_plain_tokenizer_is_the_one_that_transformers_chooses(request, tiny_model, monkeypatch, name) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue("smollm2") if name == "smollm2" else tiny_model(name)
    monkeypatch.setattr(foreign, "allow", lambda _: None)
    chosen = AutoTokenizer.from_pretrained(str(folder.path), local_files_only=True)
    plain = foreign._plain(folder.path, foreign._described(folder.path))
    assert plain is not None
    ours = Tokenizer(folder)

    backend, named, _ = plain
    assert backend.to_str() == chosen.backend_tokenizer.to_str()
    assert named == chosen.special_tokens_map
    assert chosen.eos_token_id in ours.eos_token_ids
    messages = [{"role": "user", "content": "hello"}]
    text = chosen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode_chat("hello") == chosen(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("architecture", "declared"), [("qwen2", "TokenizersBackend"), ("llama", "Qwen2Tokenizer")])
def test_other_tokenizers_are_left_to_transformers(tiny_model, tmp_path, monkeypatch, architecture, declared) -> None:
    from transformers import AutoTokenizer

    path = shutil.copytree(tiny_model(architecture).path, tmp_path / "model")
    monkeypatch.setattr(foreign, "allow", lambda _: None)
    described = path / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"tokenizer_class": declared}))
    chosen = AutoTokenizer.from_pretrained(str(path), local_files_only=True)

    assert type(chosen).__name__ == "Qwen2Tokenizer"
    assert foreign._load(path, architecture)[0].to_str() == chosen.backend_tokenizer.to_str()


# ---- what the model's files can't do


TEMPLATES = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
    ("{{ 'x' * 2000000000 }}", "takes more memory than it may"),
    ("{{ 'x' * 40000000 }}", "40000000 characters"),
    ("{% set ns = namespace(s='x'*999) %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "memory"),
    ("{{ 10 ** (10 ** 9) > 1 }}", "takes"),  # more memory or longer
    ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(200000) %}x{% endfor %}", "OverflowError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ nothing.at.all }}", "UndefinedError"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{% include 'other' %}", "TypeError"),
    ("{{ raise_exception('never') }}", "refuses this prompt (never)"),
]


@pytest.fixture(scope="module")
def templated(tiny_model, tmp_path_factory) -> ModelFolder:
    """A model whose template the test may change."""
    return ModelFolder("m", shutil.copytree(tiny_model("llama").path, tmp_path_factory.mktemp("templated") / "m"))


@pytest.mark.parametrize(("template", "reason"), TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_template_that_fails_in_any_way_is_ended_and_told_in_a_line(templated, template, reason) -> None:
    (templated.path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(templated)
    began = time.monotonic()
    with pytest.raises(PromptError, match="the chat template of model 'm'") as caught:
        tokenizer.encode_chat("hello")
    assert time.monotonic() - began < 10
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tokenizer.encode_raw("hello")  # it is fit for more, in a new process where the old one had to be ended
    tokenizer.close()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content|trim }}\n  {% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
        "{%- for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m|tojson }}{% endfor %}{{ bos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n, tools }}",
        "{{ strftime_now('%Y') }}{{ {'a': 'é'}|tojson(indent=1) }}{{ add_generation_prompt }}{{ unk_token }}",
        "   {% if true %}\n  x\n   {% endif %}\n y {{ messages[0]['role'] }}{{ documents is none }}",
    ],
)
@pytest.mark.parametrize("system", [None, "", "Be <b>brief</b>."])
def test_a_template_renders_as_in_transformers(tiny_model, template, system) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(str(tiny_model("llama").path))
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": " a\n"})
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    texts = foreign.Texts(reference.backend_tokenizer, reference.special_tokens_map, template)
    limits = pytest.MonkeyPatch()
    limits.setattr(foreign, "allow", lambda _: None)
    try:
        assert texts.chat({"template": template, "messages": messages, "tools": []}) == expected
    finally:
        limits.undo()


def edited(folder: ModelFolder, **changes: object) -> None:
    path = folder.path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["a" * 26 + "b", "a" * 40 + "b"])
def test_a_pattern_that_never_ends_is_ended(copied_model, text) -> None:
    folder = copied_model("llama")
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edited(folder, pre_tokenizer=pattern)
    tokenizer = Tokenizer(folder)
    told = ""
    try:
        tokenizer.encode_raw(text)
    except ModelError as error:
        told = str(error)
    assert "\n" not in told


def test_a_normalizer_that_grows_text_without_end_is_ended(copied_model) -> None:
    folder = copied_model("llama")
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    edited(folder, normalizer={"type": "Sequence", "normalizers": [grow] * 5})
    with pytest.raises(ModelError, match=r"the tokenizer in .* can't encode this text \(it ended by signal"):
        Tokenizer(folder).encode_raw("a")


def test_a_process_that_is_killed_is_begun_again(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    ids = tokenizer.encode_raw("hello")
    child = tokenizer._confined._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match="ended by signal SIGKILL"):
        tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "hello"


def test_a_conversation_that_is_nested_too_deep_costs_no_process(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    child = tokenizer._confined._child
    deep: dict[str, object] = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"a": deep}
    with pytest.raises(PromptError, match="nested too deep"):
        tokenizer.encode_messages([{"role": "user", "content": "hello"}], [deep])
    assert tokenizer._confined._child is child


def test_half_of_a_character_is_refused(tiny_model) -> None:
    with pytest.raises(PromptError, match="half of a character"):
        Tokenizer(tiny_model("llama")).encode_chat("\ud800")


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("sys.stdin.readline(); print('[]', flush=True); time.sleep(60)", "another answer than it was asked for"),
        (
            "sys.stdin.readline(); print('x' * 2**22, flush=True); time.sleep(60)",
            "another answer than it was asked for",
        ),
        ("sys.stdin.readline(); time.sleep(60)", "it takes longer than 0 s"),
        ("time.sleep(60)", "it takes longer than 0 s"),
        ("sys.stdin.close()", "it ended with exit code 0"),
    ],
    ids=["no-answer", "too-long", "silent", "does-not-read", "gone"],
)
def test_a_process_that_was_taken_over_is_ended(tiny_model, monkeypatch, then, told) -> None:
    described = '{"answer":{"vocab_size":9,"eos_token_id":null,"chat_template":"","special":{},"spells":false}}'
    code = f"import sys, time\nprint({described!r}, flush=True)\n{then}"
    monkeypatch.setattr(tokenizer_module, "Child", lambda arguments, **given: Child(["-c", code], **given))
    tokenizer = Tokenizer(tiny_model("llama"))
    monkeypatch.setattr(tokenizer_module, "_ENDING_SECONDS", 0.05 if "sleep" in then else 10.0)
    if "longer" in told:
        monkeypatch.setattr(tokenizer_module, "TEXT_SECONDS", 0.2)
        monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_SECOND", 10**9)
    with pytest.raises(ModelError, match=told):
        tokenizer.encode_plain("a" * 2**20)  # more than a pipe holds
    assert tokenizer._confined._child is None


def test_a_limit_that_was_set_from_outside_stays(tiny_model) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from teegpu.model.folder import ModelFolder; "
        "from teegpu.model.tokenizer import Tokenizer; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        "print(len(Tokenizer(ModelFolder('m', Path(sys.argv[1]))).encode_chat('hello')))"
    )
    path = str(tiny_model("llama").path)
    assert int(subprocess.check_output([sys.executable, "-c", code, path], text=True)) > 5


def test_dropping_a_tokenizer_ends_its_process(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    child = tokenizer._confined._child
    assert child is not None
    process = child.process
    del child, tokenizer
    assert process.returncode is not None


def test_code_in_the_folder_is_not_run(copied_model, tmp_path) -> None:
    folder = copied_model("llama")
    (folder.path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    path = folder.path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    assert Tokenizer(folder).encode_raw("hello")
    assert not (tmp_path / "ran").exists()


# ---- as transformers takes it


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 257,
                "pad_type_id": 0,
                "pad_token": "</s>",
            }
        },
    ],
)
def test_truncation_and_padding_of_the_file_are_not_for_prompts(copied_model, change) -> None:
    """As in transformers, which takes both away for each call that does not ask for them."""
    folder = copied_model("llama")
    text = "a text that is longer than eight tokens"
    before = Tokenizer(folder).encode_raw(text)
    edited(folder, **change)
    assert Tokenizer(folder).encode_raw(text) == before


@pytest.mark.parametrize(
    ("index", "changes"),
    [(272, {}), (272, {"special": False, "normalized": True}), (273, {"lstrip": True}), (1_000_000, {})],
    ids=str,
)
def test_a_token_beyond_the_embedding_is_named(copied_model, index, changes) -> None:
    folder = copied_model("llama")
    path = folder.path / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {**content["added_tokens"][0], "id": index, "content": "[PAD]", **changes}
    content["added_tokens"].append(added)
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    for encode in (tokenizer.encode_raw, tokenizer.encode_chat):
        with pytest.raises(PromptError, match=r"has token \d+( \('\[PAD\]'\))?, and model .* has 272 tokens"):
            encode("a[PAD]b")
    assert tokenizer.encode_raw("ab")
    assert tokenizer.special_id("a") is None


def test_what_no_context_holds_is_refused_before_it_is_encoded(tiny_model) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    child = tokenizer._confined._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(PromptError, match="has 70000 characters, and the model's context ends at 256 tokens"):
        tokenizer.encode_raw("a" * 70_000)


def test_to_leave_the_template_out_is_no_advice_where_the_prompt_is_too_long(tiny_model) -> None:
    with pytest.raises(PromptError, match="context ends at 256 tokens") as raised:
        Tokenizer(tiny_model("llama")).encode_chat("a" * 70_000)
    assert "--raw" not in str(raised.value)


@pytest.mark.parametrize("cut", range(1, 7))
def test_an_answer_goes_on_in_the_middle_of_a_character(cut) -> None:
    """With byte fallback a run of byte tokens is decoded as a whole, and the prompt may end inside of one."""
    backend = sentencepiece_like()
    ids = backend.encode("日本語で a").ids
    for text in ("日本語", "日" * 30):
        prompt = backend.encode(text).ids
        whole = prompt + ids[1:cut]
        rest = ids[cut:]
        joined = "".join(streamed(stream_of(backend, after=whole), rest))
        assert backend.decode(whole + rest).endswith(joined)
        assert "\ufffd" not in joined


@pytest.mark.parametrize("form", ["last of a list", "first of a list", "one in a list", "one", "dict in files"])
def test_the_default_of_several_templates_is_taken(copied_model, form) -> None:
    folder = copied_model("llama")
    (folder.path / "chat_template.jinja").unlink()
    if form != "dict in files":
        path = folder.path / "tokenizer_config.json"
        default, other = {"name": "default", "template": "yes"}, {"name": "tool_use", "template": "no"}
        lists = {"last of a list": [other, default], "first of a list": [default, other], "one in a list": [default]}
        given = lists.get(form, "yes")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": given}))
    else:
        (folder.path / "chat_template.jinja").write_text("yes")
        (folder.path / "additional_chat_templates").mkdir()
        (folder.path / "additional_chat_templates" / "tool_use.jinja").write_text("no")
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode_chat("hello")) == "yes"


def test_a_tokenizer_that_knows_nothing_is_at_fault_and_not_the_prompt(copied_model) -> None:
    folder = copied_model("llama")
    edited(folder, model={"type": "WordLevel", "vocab": {}, "unk_token": "?"}, added_tokens=[], pre_tokenizer=None)
    path = folder.path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ModelError, match=r"(makes no token of|can't encode) this text"):
        Tokenizer(folder).encode_raw("hello")


@pytest.mark.parametrize(("text", "expected"), [("é", "é".encode()), ("<|user|>", b"<|user|>")])
def test_the_bytes_of_tokens(tiny_model, text, expected) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_plain(text))) == expected
    assert tokenizer.token_bytes(10**6) == b""


def test_the_process_that_gets_prompts_keeps_them_to_itself() -> None:
    code = (
        "import sys; from teegpu import machine; machine.keep_to_itself = lambda: sys.exit(91)\n"
        "from pathlib import Path; from teegpu.model import foreign; foreign.main(Path('.'), 'llama')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 91


@given(st.lists(st.integers(0, 260), max_size=40), st.integers(0, 40))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_joined_are_what_decoding_all_gives(spelling: Tokenizer, ids: list[int], border: int) -> None:
    """Any bytes in any division, special tokens among them, without asking for more than each token once."""
    assert spelling._spells
    stream = spelling.stream()
    assert isinstance(stream, ByteStream)
    assert "".join([*map(stream.push, ids), stream.finish()]) == spelling.decode(ids)
    before, after = ids[:border], ids[border:]
    rest = spelling.stream(before)
    text = "".join([*map(rest.push, after), rest.finish()])
    assert spelling.decode(ids).endswith(text)
    assert len(spelling._spelled) <= 261


@pytest.fixture(scope="module")
def spelling(tiny_model: TinyModel) -> Iterator[Tokenizer]:
    with contextlib.closing(Tokenizer(tiny_model("llama"))) as tokenizer:
        yield tokenizer


def test_a_process_that_was_started_ahead_is_the_one_that_is_used(tiny_model: TinyModel) -> None:
    confined = Confined(tiny_model("llama").pinned())
    confined.start()
    child = confined._child
    with contextlib.closing(Tokenizer(tiny_model("llama"), confined)) as tokenizer:
        assert tokenizer.encode_raw("hello")
        assert confined._child is child


def test_a_process_that_was_started_in_vain_is_ended_and_leaves_no_copy(tiny_model: TinyModel) -> None:
    confined = Confined(tiny_model("llama").pinned())
    confined.start()
    child = confined._child
    assert child is not None
    copy = Path(child.process.args[-2])
    assert copy.is_dir()
    confined.close()
    assert child.gone
    assert not copy.exists()
