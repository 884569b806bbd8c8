"""Who decodes together on one instance, in which row, and who gives way when memory runs out?

Invariant: a sequence is in a row of the cache exactly while the batcher has it as DECODING, and then it has pages for
every token that it has KV of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blitzjax.control.batching import Batcher, State
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.prefixes import PrefixCache
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import Drawn, Draws
from blitzjax.engine.sequence import Sequence
from blitzjax.engine.stages import KV
from blitzjax.types import RequestId


@dataclass(slots=True)
class _Rows:
    """What a step takes of every row of the cache. From one to the next little changes, unless somebody comes or goes.
    """

    sequences: list[tuple[int, Sequence]]  # by row
    taken: np.ndarray  # i32[B]; 1: a sequence is in the row
    tokens: np.ndarray  # i32[B], its last one
    lengths: np.ndarray  # i32[B], how many came before that
    paged: np.ndarray  # i32[B], how many its pages hold
    draws: Draws
    longest: int  # with the last token

    def advance(self, tokens: np.ndarray) -> None:
        """Each sequence has one token more."""
        self.tokens, self.lengths, self.longest = tokens, self.lengths + self.taken, self.longest + 1
        self.draws = self.draws._replace(step=self.draws.step + self.taken)


class DecodeBatch:
    """Owned by the engine thread."""

    def __init__(self, runner: Runner, cache: SlotCache, batcher: Batcher, prefixes: PrefixCache):
        self._runner, self._cache, self._batcher, self._prefixes = runner, cache, batcher, prefixes
        self._rows: _Rows | None = None  # for the next step, unless the rows are others by then

    def check(self, sequences: Mapping[RequestId, Sequence]) -> None:
        """Asserts the invariant, and that what is carried on is what the sequences say. Between steps."""
        placed = [i for i in self._cache.slots if i is not None]
        assert all(self._batcher.state(i) is State.DECODING for i in placed)
        assert all(self._batcher.held_tokens(i) >= len(sequences[i].tokens) - 1 for i in placed)
        if self._rows is not None:
            kept, new = self._rows, self._described(self._rows.sequences, self._rows.longest)
            assert [s.id for _, s in kept.sequences] == placed and (kept.taken == new.taken).all()
            for name in ("tokens", "lengths", "paged"):
                assert (getattr(kept, name) == getattr(new, name))[new.taken == 1].all(), name
            assert (kept.draws.step == new.draws.step)[new.draws.temperature > 0].all()
            assert kept.longest == max((len(s.tokens) for _, s in kept.sequences), default=0)

    def join(self, sequence: Sequence, kv: list[KV]) -> None:
        """Its prompt is through: the KV of every layer moves into a row."""
        self._rows = None
        self._cache.place(sequence.id, kv)
        self._batcher.prefilled(sequence.id)

    def lift(self, sequence: Sequence) -> list[KV] | None:
        """Takes it out of its row with its KV, and keeps its seat. None: it is in no row."""
        if sequence.id not in self._cache.slots:
            return None
        self._rows = None
        self._batcher.pause(sequence.id)
        return self._cache.lift(sequence.id)

    def leave(self, sequence: Sequence) -> None:
        """Frees its row, if it has one; the prefix cache keeps what is in it. The batcher is told by the caller."""
        cache = self._cache
        if sequence.id in cache.slots:
            self._rows = None
            self._prefixes.keep(sequence, len(sequence.tokens) - 1, cache.layers, cache.slots.index(sequence.id))
            cache.free(sequence.id)

    def make_room(self, sequences: Mapping[RequestId, Sequence]) -> None:
        """Everybody who decodes gets a page for the next token, if need be from the last in rank, who goes on later."""
        rows = self._gathered(sequences)
        short = (rows.lengths >= rows.paged).nonzero()[0].tolist()
        if not short:
            return
        lengths = {i: len(sequences[i].tokens) for i in [self._cache.slots[row] for row in short] if i is not None}
        while (victim := self._batcher.victim(lengths)) is not None:
            sequence = sequences[victim]
            self.leave(sequence)
            sequence.prefill = None
            self._batcher.preempt(victim, len(sequence.tokens), self._prefixes.keys(sequence))
        if self._rows is rows:
            rows.paged[short] = [self._batcher.held_tokens(i) for i in lengths]

    def step(self, sequences: Mapping[RequestId, Sequence]) -> tuple[list[tuple[int, Sequence]], Drawn]:
        """The next token of everybody. → (row, sequence) of each, and what was drawn for the rows."""
        rows = self._gathered(sequences)
        drawn = self._runner.decode(self._cache, rows.tokens, rows.lengths, rows.draws)
        rows.advance(drawn.tokens)
        if rows.draws.edits is not None or rows.longest > self._cache.context:
            self._rows = None
        return rows.sequences, drawn

    def _gathered(self, sequences: Mapping[RequestId, Sequence]) -> _Rows:
        if self._rows is None:
            longest = max((len(sequences[i].tokens) for i in self._cache.slots if i is not None), default=0)
            self._cache.reserve(longest)
            self._cache.shrink(longest)
            taken = [(row, sequences[i]) for row, i in enumerate(self._cache.slots) if i is not None]
            self._rows = self._described(taken, longest)
        return self._rows

    def _described(self, taken: list[tuple[int, Sequence]], longest: int) -> _Rows:
        size = self._cache.batch
        draws = self._runner.stages.draws(size, any(s.answered < s.edits_until for _, s in taken))
        here, tokens, lengths = np.zeros((3, size), np.int32)
        rows = _Rows(taken, here, tokens, lengths, np.ones(size, np.int32), draws, longest)
        for row, sequence in taken:
            sampling, answered = sequence.work.sampling, sequence.answered
            rows.taken[row], rows.tokens[row], rows.lengths[row] = 1, sequence.tokens[-1], len(sequence.tokens) - 1
            rows.paged[row] = self._batcher.held_tokens(sequence.id)
            draws.set(row, sampling, answered)
            if draws.edits is not None:
                draws.edits.set(row, sampling, answered, sequence.history, self._runner.spec.eos_token_ids,
                                sequence.allowed)
        return rows
