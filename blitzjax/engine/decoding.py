"""Who decodes together on one instance, in which row, and who gives way when memory runs out?

Invariant: a sequence is in a row of the cache exactly while the batcher has it as DECODING, and then it has pages for
every token that it has KV of.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blitzjax.control.batching import Batcher
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.prefixes import PrefixCache
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import Drawn, end_tokens
from blitzjax.engine.sequence import Sequence
from blitzjax.engine.stages import KV
from blitzjax.types import RequestId


class DecodeBatch:
    """Owned by the engine thread."""

    def __init__(self, runner: Runner, cache: SlotCache, batcher: Batcher, prefixes: PrefixCache):
        self._runner, self._cache, self._batcher, self._prefixes = runner, cache, batcher, prefixes

    def join(self, sequence: Sequence, kv: list[KV]) -> None:
        """Its prompt is through: the KV of every layer moves into a row."""
        self._cache.place(sequence.id, kv)
        self._batcher.prefilled(sequence.id)

    def leave(self, sequence: Sequence) -> None:
        """Frees its row, if it has one; the prefix cache keeps what is in it. The batcher is told by the caller."""
        cache = self._cache
        if sequence.id in cache.slots:
            self._prefixes.keep(sequence, len(sequence.tokens) - 1, cache.layers, cache.slots.index(sequence.id))
            cache.free(sequence.id)

    def make_room(self, sequences: Mapping[RequestId, Sequence]) -> None:
        """Everybody who decodes gets a page for the next token, if need be from the last in rank, who goes on later."""
        lengths = {i: len(sequences[i].tokens) for i in self._cache.slots if i is not None}
        while (victim := self._batcher.victim(lengths)) is not None:
            sequence = sequences[victim]
            self.leave(sequence)
            sequence.prefill = None
            self._batcher.preempt(victim, len(sequence.tokens), self._prefixes.keys(sequence))

    def step(self, sequences: Mapping[RequestId, Sequence]) -> tuple[list[tuple[int, Sequence]], Drawn]:
        """The next token of everybody. → (row, sequence) of each, and what was drawn for the rows."""
        cache, stages = self._cache, self._runner.stages
        cache.reserve(max(len(sequences[i].tokens) for i in cache.slots if i is not None))
        rows = [(row, sequences[i]) for row, i in enumerate(cache.slots) if i is not None]
        tokens, lengths = np.zeros(cache.batch, np.int32), np.zeros(cache.batch, np.int32)
        draws = stages.draws(cache.batch, any(s.answered < s.edits_until for _, s in rows))
        for row, sequence in rows:
            sampling, answered = sequence.work.sampling, sequence.answered
            tokens[row], lengths[row] = sequence.tokens[-1], len(sequence.tokens) - 1
            draws.set(row, sampling, answered)
            if draws.edits is not None:
                draws.edits.set(row, sampling, answered, sequence.history, end_tokens(sampling, stages.spec))
        return rows, self._runner.decode(cache, tokens, lengths, draws)
