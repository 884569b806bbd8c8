"""The decode batch's KV memory: dense slots, one row per sequence, sized in buckets.

Invariant: `slots[i]` is the sequence whose keys and values are in row i of every layer's arrays; no sequence has two.
The length is the physical one: slicing a longer cache would copy it on every step. So the ledger's pages, which say who
is admitted and who gives way, bound these arrays only loosely: every row is as long as the longest sequence needs.
"""

from __future__ import annotations

import numpy as np
from jax import Array

from blitzjax.engine.stages import Stages
from blitzjax.types import RequestId


class SlotCache:
    """Owned and mutated by the engine thread. Arrays are donated to each step and replaced by its results."""

    def __init__(self, stages: Stages):
        self._stages = stages
        self.slots: list[RequestId | None] = []
        self.context = stages.shapes.contexts[0]
        self.layers: list[tuple[Array, Array]] = []

    @property
    def batch(self) -> int:
        return len(self.slots)

    def place(self, sequence: RequestId, staged: list[tuple[Array, Array]]) -> int:
        """Copies a prefilled prompt's per-layer KV into a free row, growing the cache if needed. Returns the row."""
        assert sequence not in self.slots
        needed = max(self.context, self._stages.layout.tokens(staged[0]))
        if None not in self.slots:
            self._resize(self._stages.shapes.batch(self.batch + 1), needed)
        elif needed > self.context:
            self._resize(self.batch, needed)
        slot = self.slots.index(None)
        self.slots[slot] = sequence
        self.layers = [self._stages.insert(k, v, k_new, v_new, slot)
                       for (k, v), (k_new, v_new) in zip(self.layers, staged, strict=True)]
        return slot

    def reserve(self, tokens: int) -> None:
        """Makes rows long enough for `tokens` tokens."""
        if tokens > self.context:
            self._resize(self.batch, self._stages.shapes.context(tokens))

    def lift(self, sequence: RequestId) -> list[tuple[Array, Array]]:
        """Takes a sequence out: copies of its keys and values, [1, ..., context], per layer."""
        row = np.array([self.slots.index(sequence)], np.int32)
        self.free(sequence)
        return [self._stages.resize(k, v, row, self.context) for k, v in self.layers]

    def free(self, sequence: RequestId) -> None:
        self.slots[self.slots.index(sequence)] = None

    def shrink(self, longest: int) -> None:
        """Gives rows and length back once they are at most a quarter used, so that a calm batch stays cheap."""
        used = sum(s is not None for s in self.slots)
        if used == 0:
            self.slots, self.layers, self.context = [], [], self._stages.shapes.contexts[0]
            return
        batch, context = self._stages.shapes.batch(used), self._stages.shapes.context(longest)
        batch = batch if batch * 4 <= self.batch else self.batch
        context = context if context * 4 <= self.context else self.context
        if (batch, context) != (self.batch, self.context):
            self._resize(batch, context)

    def _resize(self, batch: int, context: int) -> None:
        """Moves every sequence into arrays of [batch, ..., context]; occupied rows are packed to the front."""
        rows = [i for i, s in enumerate(self.slots) if s is not None]
        if not rows:
            self.layers = [self._stages.blank(batch, context) for _ in range(self._stages.spec.layers)]
        moves, packed = [], rows
        for size, length in self._stages.shapes.steps(self.batch, self.context, batch, context) if rows else ():
            order = np.zeros(size, np.int32)  # rows beyond the occupied ones repeat row 0: nobody reads them
            order[: len(rows)], packed = packed, list(range(len(rows)))
            moves.append((order, length))
        for layer in range(len(self.layers)):  # frees the old arrays one by one
            for order, length in moves:
                self.layers[layer] = self._stages.resize(*self.layers[layer], order, length)
        self.slots = [self.slots[i] for i in rows] + [None] * (batch - len(rows))
        self.context = context
