"""A tokenizer for models whose weights are random: every byte is a token, so every text can be encoded and decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SPECIAL = (BOS, EOS, "<|user|>", "<|system|>", "<|assistant|>")
BOS_ID, EOS_ID = 256, 257
SMALLEST_VOCABULARY = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvwz" for vowel in "aeiou"]


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of exactly ``vocab_size`` tokens: the 256 bytes, ``SPECIAL``, then words that no text is
    encoded to, but that a random model may say."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a byte-level tokenizer has {SMALLEST_VOCABULARY} tokens or more, not {vocab_size}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    names += [_word(index) for index in range(vocab_size - len(names))]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _word(index: int) -> str:
    """The word number ``index``, with a space before it (which byte-level tokenizers write as Ġ)."""
    base = len(_SYLLABLES)
    letters = ""
    while True:
        index, digit = divmod(index, base)
        letters = _SYLLABLES[digit] + letters
        if index == 0:
            return "Ġ" + letters
        index -= 1  # so that no two numbers share a word: 'ba' is 0, 'baba' is 80
