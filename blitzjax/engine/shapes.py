"""Which shapes exist: every bucket that is compiled ahead, listed in one place. No array is ever made here.

Invariant: a prompt is always cut at the same places behind what the prefix cache has of it, and padded to the same
buckets, whatever else runs beside it, so its numbers do not depend on load.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.config import EngineConfig
from blitzjax.types import ModelSpec

_MIN_CHUNK = 32  # tokens; shorter prompts are padded to it
_MIN_CONTEXT = 256  # tokens of KV; caches are not smaller
_MIN_BATCH = 2  # XLA:CPU is an order of magnitude slower with one bfloat16 row than with two


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, stop), padded to `width` rows."""

    start: int
    stop: int
    width: int


@dataclass(frozen=True, slots=True)
class Shapes:
    batches: tuple[int, ...]  # decode rows
    contexts: tuple[int, ...]  # KV lengths
    widths: tuple[int, ...]  # prefill rows; the last one is the chunk size
    hits: bool  # also short prompts may begin behind a prefix-cache hit

    @property
    def chunk_tokens(self) -> int:
        return self.widths[-1]

    def batch(self, rows: int) -> int:
        return _first_at_least(self.batches, rows)

    def context(self, tokens: int) -> int:
        return _first_at_least(self.contexts, tokens)

    def steps(self, batch: int, context: int, to_batch: int, to_context: int) -> list[tuple[int, int]]:
        """The sizes that a cache of [batch, context] has on its way to others: next buckets only, first the fewer rows."""
        rows, lengths = _between(self.batches, batch, to_batch), _between(self.contexts, context, to_context)
        if to_batch <= batch:
            return [(b, context) for b in rows] + [(to_batch, c) for c in lengths]
        return [(batch, c) for c in lengths] + [(b, to_context) for b in rows]

    @property
    def hit_tokens(self) -> int:
        """What the prefix cache has of a prompt is used in multiples of this."""
        return self.tail_widths[0]

    def chunks(self, tokens: int, start: int = 0) -> tuple[Chunk, ...]:
        """Cuts prompt tokens [start, tokens): full chunks, then a tail, in pieces of widths that are compiled for it."""
        assert start < tokens and start % self.hit_tokens == 0
        if start == 0 and tokens <= self.chunk_tokens:
            return (Chunk(0, tokens, _first_at_least(self.widths, tokens)),)
        cut, end = [], self.staging(tokens)
        while start < tokens:
            width = self._width(tokens - start, end - start)
            cut.append(Chunk(start, min(start + width, tokens), width))
            start += width
        return tuple(cut)

    def _width(self, rest: int, room: int) -> int:
        """The next chunk's: the widest that `rest` fills by more than half, and the context has `room` for."""
        return max(w for w in self.tail_widths if w == self.tail_widths[0] or (w < 2 * rest and w <= room))

    @property
    def tail_widths(self) -> tuple[int, ...]:
        """Widths of chunks that do not start the prompt: the shortest, a short one and the full one."""
        return tuple(sorted({self.widths[0], self.widths[min(2, len(self.widths) - 1)], self.chunk_tokens}))

    def staging(self, tokens: int) -> int:
        """KV length that a prompt of `tokens` tokens is prefilled into: it holds every chunk with its padding."""
        if tokens <= self.chunk_tokens:
            return self.context(_first_at_least(self.widths, tokens))
        return self.context(-(-tokens // self.widths[0]) * self.widths[0])

    @property
    def moves(self) -> tuple[int, ...]:
        """KV lengths that travel between instances: shorter ones than a cache has, too."""
        return (*_powers(_MIN_CHUNK, self.contexts[0])[:-1], *self.contexts)

    def moved(self, tokens: int) -> int:
        return _first_at_least(self.moves, tokens)

    def first_chunks(self) -> tuple[tuple[int, int], ...]:
        """(width, staging length) of every first chunk."""
        single = {(w, self.context(w)) for w in self.widths}
        return tuple(sorted(single | {(self.chunk_tokens, s) for s in self._long_contexts()}))

    def next_chunks(self) -> tuple[tuple[int, int], ...]:
        contexts = self.contexts if self.hits else self._long_contexts()
        return tuple((w, s) for s in contexts for w in self.tail_widths if w < s)

    def _long_contexts(self) -> tuple[int, ...]:
        return tuple(s for s in self.contexts if s > self.chunk_tokens)


def shapes_for(spec: ModelSpec, config: EngineConfig) -> Shapes:
    """Powers of two between a minimum and the configured limits."""
    limit = min(spec.max_len, config.max_model_len)
    chunk = _round_up_power(min(config.max_num_batched_tokens, limit))
    contexts = _powers(min(_MIN_CONTEXT, _round_up_power(limit)), limit)
    if limit > chunk:  # a tail's padding may reach past the limit
        contexts = _powers(min(_MIN_CONTEXT, chunk), -(-limit // chunk) * chunk)
    return Shapes(
        batches=_powers(_MIN_BATCH, max(_MIN_BATCH, config.max_num_seqs)),
        contexts=contexts,
        widths=_powers(min(_MIN_CHUNK, chunk), chunk),
        hits=config.prefix_caching,
    )


def _between(options: tuple[int, ...], start: int, stop: int) -> list[int]:
    """Those behind `start`, up to `stop` or down to it."""
    a, b = options.index(start), options.index(stop)
    return [options[i] for i in (range(a + 1, b + 1) if b >= a else range(a - 1, b - 1, -1))]


def _powers(start: int, limit: int) -> tuple[int, ...]:
    out = [start]
    while out[-1] < limit:
        out.append(out[-1] * 2)
    return tuple(out)


def _round_up_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _first_at_least(options: tuple[int, ...], n: int) -> int:
    for option in options:
        if option >= n:
            return option
    raise AssertionError(f"{n} is beyond the largest bucket {options[-1]}")
