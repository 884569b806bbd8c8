"""Which tokens may come next in an answer that has to follow a grammar?

Where an answer is in its grammar follows from the grammar and the answer's tokens, so nothing of that ever travels:
whoever goes on with an answer walks over its tokens again. Invariant: a token that the grammar does not allow is never
said; an answer that has come to a place where none can be found out ends with an error.
"""

from __future__ import annotations

import functools
import threading
import typing
from collections.abc import Callable, Sequence

import numpy as np

from blitzjax.engine.sampling import mask_words
from blitzjax.errors import BlitzError, CheckpointError
from blitzjax.types import ModelSpec, Sampling

if typing.TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars


class Grammars:
    """Of one model. Made by its instance; nothing is read or imported before the first grammar comes."""

    def __init__(self, spec: ModelSpec, tokenizer: Callable[[], str]):
        """`tokenizer()` is what tokenizer.json says; it may raise CheckpointError."""
        self._spec, self._tokenizer = spec, tokenizer
        self._vocabulary = functools.cache(self._read)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)
        self._preparing = threading.Lock()

    def prepare(self, grammar: str) -> None:
        """Compiles what will soon be needed, in any thread but the engine's: that one has others to serve."""
        if grammar:
            with self._preparing:
                self._start(grammar)

    def matcher(self, sampling: Sampling, answer: Sequence[int]) -> Matcher | None:
        """At the end of the `answer` so far; None for a request without a grammar. Called by the engine thread alone."""
        if not sampling.grammar:
            return None
        start = self._start(sampling.grammar)
        matcher = Matcher(start if isinstance(start, str) else start.deep_copy(), sampling, self._spec)
        for token in answer:
            matcher.push(token)
        return matcher

    def _start(self, grammar: str) -> LLMatcher | str:
        """At the beginning of the grammar, or why there is none."""
        try:
            return self._compiled(grammar)
        except BlitzError as e:
            return str(e)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise BlitzError(f"llguidance does not take the grammar: {_first_line(matcher.get_error())}")
        return matcher

    def _read(self) -> LLTokenizer:
        """Takes 10 us a token, in which no other thread of Python runs."""
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(self._tokenizer(), eos_token=list(self._spec.eos_token_ids) or None)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"llguidance cannot read the model's tokenizer: {e}") from e


def no_tokenizer() -> str:
    raise CheckpointError("nobody here knows the model's tokenizer")


class Matcher:
    """One answer's place in its grammar. Owned by the answer's sequence."""

    def __init__(self, place: LLMatcher | str, sampling: Sampling, spec: ModelSpec):
        """`place`: at the beginning, or why that cannot be."""
        self._place: LLMatcher | None = None if isinstance(place, str) else place
        self.error = place if isinstance(place, str) else ""
        self._words, self._sampling = mask_words(spec.vocab), sampling
        self._eos = _bits(spec.eos_token_ids, self._words)
        self._ends = self._eos | _bits(sampling.stop_token_ids, self._words)

    @property
    def over(self) -> bool:
        """The answer is whole, and nothing can follow."""
        return self._place is not None and not self.error and self._place.is_stopped()

    def push(self, token: int) -> None:
        """Sets `error` if the answer must not have it."""
        if self._place is not None and not self.error:
            self._place.consume_token(token)
            self.error = _first_line(self._place.get_error())

    def allowed(self, step: int) -> np.ndarray:
        """u32[words] for token `step` of the answer, see sampling.Edits. What would end the answer too early, or should
        be ignored, is left out unless nothing else can follow. With an `error` all tokens are allowed: none will be said.
        """
        mask = np.zeros(self._words, np.uint32)
        if self._place is not None and not self.error:
            found = np.frombuffer(self._place.compute_bitmask(), np.uint32)[: self._words]
            mask[: len(found)] = found
            self.error = _first_line(self._place.get_error())
        if self.error:
            return ~np.zeros_like(mask)
        early = step < self._sampling.min_tokens
        rest = mask & ~(self._ends if early else self._eos) if early or self._sampling.ignore_eos else mask
        return rest if rest.any() else mask


def _first_line(said: str) -> str:
    """What llguidance says of an error; the rest is its state."""
    return said.partition("\n")[0]


def _bits(tokens: Sequence[int], words: int) -> np.ndarray:
    """u32[words] with the bits of these tokens."""
    out = np.zeros(words * 32, np.uint8)
    out[[token for token in tokens if token < len(out)]] = 1
    return np.packbits(out, bitorder="little").view(np.uint32)
