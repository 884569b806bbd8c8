"""Which tokens may come next in an answer that has to follow a grammar?

Where an answer is in its grammar follows from the grammar and the answer's tokens, so nothing of that ever travels:
whoever goes on with an answer walks over its tokens again. Invariant: a token that the grammar does not allow is never
said; an answer that has come to a place where none can be found out ends with an error.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from blitzjax.engine import llguidance
from blitzjax.engine.sampling import mask_words
from blitzjax.errors import BlitzError, CheckpointError
from blitzjax.types import ModelSpec, Sampling

_KEPT = 64  # compiled grammars


class Grammars:
    """Of one model. Made by its instance; nothing is read or imported before the first grammar comes."""

    def __init__(self, spec: ModelSpec, tokenizer: Callable[[], str]):
        """`tokenizer()` is what tokenizer.json says; it may raise CheckpointError."""
        self._spec, self._tokenizer = spec, tokenizer
        self._vocabulary = functools.cache(self._read)
        self._starts: OrderedDict[str, llguidance.Matcher | str] = OrderedDict()  # beginnings, or why there is none
        self._compiling = threading.Lock()

    def ready(self, sampling: Sampling) -> bool:
        """`matcher` will not take long."""
        return not sampling.grammar or sampling.grammar in self._starts

    def prepare(self, sampling: Sampling) -> None:
        """Compiles what will soon be needed, in any thread but the engine's: that one has others to serve."""
        if sampling.grammar:
            self._start(sampling.grammar)

    def matcher(self, sampling: Sampling, answer: Sequence[int]) -> Matcher | None:
        """At the end of the `answer` so far; None for a request without a grammar. Called by the engine thread alone."""
        if not sampling.grammar:
            return None
        start = self._start(sampling.grammar)
        if isinstance(start, str):
            self._starts.pop(sampling.grammar, None)  # it may be another's turn to have the tokenizer
        matcher = Matcher(start if isinstance(start, str) else start.copy(), sampling, self._spec)
        for token in answer:
            matcher.push(token)
        return matcher

    def _start(self, grammar: str) -> llguidance.Matcher | str:
        start = self._starts.get(grammar)
        if start is not None:
            return start
        with self._compiling:
            start = self._starts.get(grammar)
            if start is None:
                start = self._compile(grammar)
                while len(self._starts) >= _KEPT:
                    self._starts.popitem(last=False)
                self._starts[grammar] = start
            return start

    def _compile(self, grammar: str) -> llguidance.Matcher | str:
        try:
            start = llguidance.Matcher.begin(self._vocabulary(), grammar)
        except BlitzError as e:
            return str(e)
        return f"llguidance does not take the grammar: {_first_line(start.error)}" if start.error else start

    def _read(self) -> llguidance.Tokenizer:
        """Takes 10 us a token, in which other threads run."""
        try:
            return llguidance.Tokenizer(self._tokenizer(), self._spec.eos_token_ids)
        except (OSError, ValueError, AttributeError) as e:  # the last: a wheel without the C interface
            raise CheckpointError(f"llguidance cannot read the model's tokenizer: {e}") from e


def no_tokenizer() -> str:
    raise CheckpointError("nobody here knows the model's tokenizer")


class Matcher:
    """One answer's place in its grammar. Owned by the answer's sequence."""

    def __init__(self, place: llguidance.Matcher | str, sampling: Sampling, spec: ModelSpec):
        """`place`: at the beginning, or why that cannot be."""
        self._place: llguidance.Matcher | None = None if isinstance(place, str) else place
        self.error = place if isinstance(place, str) else ""
        self._words, self._sampling = mask_words(spec.vocab), sampling
        self._eos = _bits(spec.eos_token_ids, self._words)
        self._ends = self._eos | _bits(sampling.stop_token_ids, self._words)

    @property
    def over(self) -> bool:
        """The answer is whole, and nothing can follow."""
        return self._place is not None and not self.error and self._place.stopped

    def push(self, token: int) -> None:
        """Sets `error` if the answer must not have it."""
        if self._place is not None and not self.error:
            self._place.push(token)
            self.error = _first_line(self._place.error)

    def allowed(self, step: int) -> np.ndarray:
        """u32[words] for token `step` of the answer, see sampling.Edits. What would end the answer too early, or should
        be ignored, is left out unless nothing else can follow. With an `error` all tokens are allowed: none will be said.
        """
        mask = np.zeros(self._words, np.uint32)
        if self._place is not None and not self.error:
            found = self._place.allowed()[: self._words]
            mask[: len(found)] = found
            self.error = _first_line(self._place.error)
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
