"""Runs prompts and decode batches through the stages, over any range of layers.

Invariant: `Prefill.next_layer` layers have been run over every chunk of the prompt; whoever holds the object can run
the rest, here or on another instance, and gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jax import Array

from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, unit_kind
from blitzjax.engine.sampling import Drawn, Draws, edits_until, token_logprob
from blitzjax.engine.shapes import Chunk
from blitzjax.engine.stages import KV, Params, Stages
from blitzjax.types import Sampling, Span, TokenLogprob


@dataclass(slots=True)
class Prefill:
    """One prompt on its way through the layers. `x[c]` is the residual of chunk c, `kv[l]` the keys, values of layer l.
    Chunks have `x` and `aux` once they are embedded.

    The first chunk starts where the prefix-cache hit ends, of which only the KV is there.
    """

    tokens: np.ndarray  # i32[prompt]
    chunks: tuple[Chunk, ...]
    context: int  # KV length of the staging arrays
    kv: list[KV | None]
    next_layer: int = 0
    x: list[Array] = field(default_factory=list)
    aux: list[object] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)  # of the first chunks, see `Runner.score_chunk`

    @property
    def whole_kv(self) -> list[KV]:
        """Of every layer: they all were run, and what a partner ran is here."""
        found = [pair for pair in self.kv if pair is not None]
        assert len(found) == len(self.kv)
        return found


class Runner:
    """Stateless but for the compiled stages and the parameters it reads; one thread calls it."""

    def __init__(self, stages: Stages, store: LayerStore):
        self.stages, self.store, self.spec = stages, store, stages.spec

    def begin(self, tokens: list[int], hit: int = 0, kv: list[KV] | None = None) -> Prefill:
        """`kv`: the staging arrays of every layer, whose first `hit` tokens are known."""
        shapes = self.stages.shapes
        chunks = shapes.chunks(len(tokens), hit)
        return Prefill(np.asarray(tokens, np.int32), chunks, shapes.staging(len(tokens)),
                       [*kv] if kv else [None] * self.spec.layers)

    def run_span(self, prefill: Prefill, span: Span) -> None:
        """Runs layers [span.start, span.stop) over the whole prompt, layer by layer. Needs units of the span loaded."""
        assert prefill.next_layer == span.start <= span.stop
        for layer in range(span.start, span.stop):
            for index in range(len(prefill.chunks)):
                self._run_layer(prefill, layer, index)
            prefill.next_layer = layer + 1

    def layers_of_chunk(self, prefill: Prefill, index: int) -> Iterator[int]:
        """Runs every layer over one chunk, and yields after each; the prompt is complete after its last chunk."""
        for layer in range(self.spec.layers):
            self._run_layer(prefill, layer, index)
            if index == len(prefill.chunks) - 1:
                prefill.next_layer = layer + 1
            yield layer

    def embedded(self, tokens: list[int]) -> np.ndarray:
        """f32[tokens, D]: what the first layer of a prompt works on."""
        prefill = self.begin(tokens)
        rows = []
        for index, chunk in enumerate(prefill.chunks):
            self._embed(prefill, index)
            rows.append(np.asarray(prefill.x[index])[0, : chunk.stop - chunk.start])
        return np.concatenate(rows)

    def enter(self, prefill: Prefill, rows: np.ndarray) -> None:
        """Starts a prompt with rows [tokens, D] that another instance has embedded."""
        for chunk in prefill.chunks:
            x = np.zeros((1, chunk.width, self.spec.dim), np.float32)
            x[0, : chunk.stop - chunk.start] = rows[chunk.start : chunk.stop]
            prefill.x.append(jax.device_put(x, self.stages.replicated))

    def first_token(self, prefill: Prefill, sampling: Sampling, step: int, allowed: np.ndarray | None = None) -> Drawn:
        """Head over the prompt's last row; the token is in row 0. `step` tokens of the answer are in the prompt, `allowed`
        is what a grammar leaves for the next one.
        """
        assert prefill.next_layer == self.spec.layers
        last = prefill.chunks[-1]
        row = self.stages.last_row(prefill.x[-1], last.stop - last.start - 1)
        draws = self.stages.draws(row.shape[0], step < edits_until(sampling))
        draws.set(0, sampling, step)
        if draws.edits is not None:
            draws.edits.set(0, sampling, step, prefill.tokens, self.spec.eos_token_ids, allowed)
        return self._head(row, draws)

    def score_chunk(self, prefill: Prefill) -> None:
        """Head over every row of the first chunk that has no scores yet; all its layers must have been run."""
        index = len(prefill.scores)
        chunk = prefill.chunks[index]
        following = prefill.tokens[chunk.start + 1 : chunk.stop + 1]
        tokens = np.zeros(chunk.width, np.int32)
        tokens[: len(following)] = following
        described = self.stages.score(*self._head_weights(), prefill.x[index], tokens)
        prefill.scores.append(np.asarray(described)[: len(following)])

    def prompt_logprobs(self, prefill: Prefill, top: int) -> tuple[TokenLogprob, ...]:
        """Of every token of the prompt but the first, with the `top` likeliest in its place."""
        while len(prefill.scores) < len(prefill.chunks):
            self.score_chunk(prefill)
        return tuple(token_logprob(row, top) for rows in prefill.scores for row in rows)

    def decode(self, cache: SlotCache, tokens: np.ndarray, lengths: np.ndarray, draws: Draws) -> Drawn:
        """One step for every row: tokens i32[B] enter at positions lengths i32[B]."""
        x, aux = self.stages.embed(self.store.embedding, tokens[:, None], lengths[:, None])
        # one copy for all layers; on CPUs that costs more than it saves
        at = jax.device_put(lengths, self.stages.replicated) if self.store.own_memory else lengths
        for group in self.stages.groups:
            weights = [self.store.params(layer) for layer in range(group.start, group.stop)]
            kv = cache.layers[group.start : group.stop]
            x, cache.layers[group.start : group.stop] = self.stages.decode(group, weights, x, aux, kv, at)
        return self._head(x, draws)

    def _run_layer(self, prefill: Prefill, layer: int, index: int) -> None:
        chunk, kind, weights = prefill.chunks[index], unit_kind(self.spec, layer), self.store.params(layer)
        if index == len(prefill.aux):
            self._embed(prefill, index)
        x, aux, kv = prefill.x[index], prefill.aux[index], prefill.kv[layer]
        if kv is None:  # nothing is known in front of the chunk
            x, k, v = self.stages.first(kind, weights, x, aux, prefill.context)
        else:
            x, k, v = self.stages.next(kind, weights, x, aux, kv, chunk.start)
        prefill.x[index], prefill.kv[layer] = x, (k, v)

    def _embed(self, prefill: Prefill, index: int) -> None:
        """Fills the per-step constants of a chunk, and x unless it came from a partner."""
        chunk = prefill.chunks[index]
        positions = np.arange(chunk.start, chunk.start + chunk.width, dtype=np.int32)[None]
        positions = np.minimum(positions, self.spec.max_len - 1)  # of padding, too: Flax's tables give NaN beyond their end
        if index < len(prefill.x):
            prefill.aux.append(self.stages.aux(positions))
            return
        tokens = np.zeros((1, chunk.width), np.int32)
        tokens[0, : chunk.stop - chunk.start] = prefill.tokens[chunk.start : chunk.stop]
        x, aux = self.stages.embed(self.store.embedding, tokens, positions)
        prefill.x.append(x)
        prefill.aux.append(aux)

    def _head(self, x: Array, draws: Draws) -> Drawn:
        out = np.asarray(self.stages.head(*self._head_weights(), x, draws))
        return Drawn(out, None) if draws.edits is None else Drawn(out[:, 0], out)

    def _head_weights(self) -> tuple[Params, Array | None]:
        table = self.store.embedding["table"] if self.spec.tied_embeddings else None
        return self.store.params(self.spec.head_unit), table
