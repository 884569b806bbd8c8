"""By what name is a KV page known? A digest of all tokens up to its end, chained page by page.

Invariant: equal keys mean equal prefixes (collisions of 128 bits aside), so a page found by its key holds the KV that
the model would compute, whoever computed it and whatever was evicted in between.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeAlias

PageKey: TypeAlias = bytes


def beginnings(tokens: Sequence[int], page_size: int) -> tuple[int, ...]:
    """Names of its first 1, 2, 4, 8, ... full pages, below 2^63: what routing compares prompts by."""
    keys = page_keys(tokens, page_size)
    return tuple(int.from_bytes(keys[(1 << k) - 1][:8]) >> 1 for k in range(len(keys).bit_length()))


def page_keys(tokens: Sequence[int], page_size: int, known: Sequence[PageKey] = ()) -> list[PageKey]:
    """One key for each full page of `tokens`; `known` are those of its first pages."""
    keys = list(known)
    for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        text = array("i", tokens[start : start + page_size]).tobytes()
        keys.append(blake2b((keys[-1] if keys else b"") + text, digest_size=16).digest())
    return keys
