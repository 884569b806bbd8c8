"""A tokenizer whose tokens are bytes: token b is byte b, unless a special token has that id."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def byte_tokenizer(specials: dict[str, int]) -> tokenizers.Tokenizer:
    """With special tokens of these ids. A byte whose id is taken gets the next free one behind all bytes."""
    taken, free = set(specials.values()), (i for i in range(256, 1024) if i not in specials.values())
    ids = {name: next(free) if b in taken else b for b, name in enumerate(_byte_names())}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids | specials, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def _byte_names() -> list[str]:
    """The character by which byte-level tokenizers write each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]
