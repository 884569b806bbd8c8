"""Prompts of the benches: English-like text of a given number of tokens, all different, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from blitzjax.serve.model import load_model

Tokens = tuple[int, ...]

_SUBJECTS = ("The keeper of the lighthouse", "A young engineer", "The old mill by the river", "My neighbour's cat",
             "The night train to the coast", "Every map of the island", "A choir of forty voices", "The last glacier",
             "The museum of clocks", "An honest merchant", "The school on the hill", "A swarm of bees")
_VERBS = ("remembers", "has never seen", "was built beside", "sings about", "slowly replaced", "waits for", "explains",
          "carried", "once belonged to", "measures", "cannot forget", "is named after")
_OBJECTS = ("a storm in the spring of 1784", "the price of bread", "three brothers from Brittany", "a comet", "the sea",
            "two hundred letters", "an unfinished bridge", "the first railway", "a recipe with seven herbs",
            "the language of bees", "a prime number", "the shadow of the tower")
_ENDINGS = (".", ", and nobody asked why.", ", as the records show.", "; the reason is simple.", ", which is strange.",
            ", said the teacher.", " until the winter came.", ", or so the story goes.")


def text(rng: random.Random, sentences: int) -> str:
    pools = (_SUBJECTS, _VERBS, _OBJECTS)
    return " ".join(" ".join(map(rng.choice, pools)) + rng.choice(_ENDINGS) for _ in range(sentences))


def encoder(checkpoint: Path) -> Callable[[str], Sequence[int]]:
    tokenizer = load_model(checkpoint).tokenizer
    assert tokenizer is not None, f"{checkpoint} has no tokenizer"
    return tokenizer.encode


def of_lengths(encode: Callable[[str], Sequence[int]], lengths: Sequence[int], seed: int) -> list[Tokens]:
    """One prompt of exactly `lengths[i]` tokens each; a sentence has at least four tokens."""
    rng = random.Random(seed)
    return [tuple(encode(f"{i}. {text(rng, length // 4 + 1)}")[:length]) for i, length in enumerate(lengths)]


def mixed_lengths(count: int, seed: int) -> list[int]:
    """Mostly short, every sixteenth longer than one prompt chunk of 512 tokens."""
    rng = random.Random(seed)
    return [rng.randint(520, 620) if i % 16 == 15 else rng.randint(6, 120) for i in range(count)]
