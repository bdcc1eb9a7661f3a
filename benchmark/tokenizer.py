"""A tokenizer generated on the spot: no download, every text can be encoded, every emitted token is a word."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPACE = "\u0120"  # how byte-level BPE writes a space


def make_tokenizer(vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocabulary` tokens: 256 bytes, the special tokens, syllables, two-syllable words.

    Any text can be encoded; every token that the models emit is a whole word with its leading space, so decoding
    and re-encoding gives the same tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = [c + v for c, v in itertools.product("bdfghjklmnprstvwyz", "aeiou")]
    words = [first + second for first, second in itertools.product(syllables, syllables) if first != second]
    merges = [(s[0], s[1]) for s in syllables] + [(SPACE, s) for s in syllables]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [first + second for first, second in merges]
    room = vocabulary - len(tokens)
    # A stride coprime to the number of words picks them from all over the alphabet.
    for word in (words[index * 1_237 % len(words)] for index in range(room)):
        merges.append((SPACE + word[:2], word[2:]))
        tokens.append(SPACE + word)
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    begin, end, pad = SPECIAL_TOKENS[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def word_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the whole words: what the models emit, and what prompts are best made of."""
    return sorted(id for token, id in tokenizer.get_vocab().items() if token[0] == "\u0120" and len(token) == 5)
