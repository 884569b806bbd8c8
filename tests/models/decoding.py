"""The smallest decoder around the model code: plain causal attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blitzjax.engine.modules import bind
from blitzjax.engine.params import LayerStore
from blitzjax.models import family
from blitzjax.models.blocks import PLAIN, Scoring
from blitzjax.types import ModelSpec

HIGHEST = jax.lax.Precision.HIGHEST


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scoring: Scoring) -> jax.Array:
    """q [B, T, H, hd], k and v [B, S, KV, hd], visible bool[B, T, S] → f32[B, T, H * hd]; llama's scores only."""
    assert scoring == PLAIN
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=HIGHEST) * size ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=HIGHEST).reshape(batch, length, heads * size)


def causal(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN) -> jax.Array:
    visible = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    return attention(q, k, v, jnp.broadcast_to(visible, (q.shape[0], *visible.shape)), scoring)


def positions(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def embed(store: LayerStore, tokens: jax.Array) -> jax.Array:
    return jax.jit(lambda p, t: bind(store.spec, "embed")(p)(t, positions(*t.shape)))(store.params(store.spec.embed_unit),
                                                                                      tokens)


def layers(store: LayerStore, x: jax.Array, stop: int) -> jax.Array:
    """Runs decoder layers [0, stop) on x f32[B, T, D]; one compiled function serves all of them."""
    aux = family(store.spec.family).aux(store.spec, positions(*x.shape[:2]))
    run = jax.jit(lambda p, x: bind(store.spec, "layer")(p)(x, aux, causal))
    for layer in range(stop):
        x = run(store.params(layer), x)
    return x


def head(store: LayerStore, x: jax.Array) -> jax.Array:
    table = store.params(store.spec.embed_unit)["table"] if store.spec.tied_embeddings else None
    return jax.jit(lambda p, x, t: bind(store.spec, "head")(p)(x, t))(store.params(store.spec.units - 1), x, table)


class Greedy:
    """Several prompts decoded together; row b of the cache holds prompt b, then its answer."""

    def __init__(self, store: LayerStore, size: int) -> None:
        self.store, self.size = store, size
        self._embed, self._layer, self._head = (jax.jit(f) for f in _stages(store.spec))

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[B, V] at each prompt's end and the greedy continuations i32[B, new_tokens]."""
        spec, batch = self.store.spec, len(prompts)
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.zeros((batch, lengths.max()), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)] = prompt
        empty = jnp.zeros((2, batch, self.size, spec.kv_heads, spec.head_dim))  # k and v
        caches = [empty] * spec.layers
        x = self._step(tokens, np.array(positions(*tokens.shape)), caches)
        first = logits = np.asarray(self._logits(x[np.arange(batch), lengths - 1]))
        answers = []
        for step in range(new_tokens):
            answers.append(logits.argmax(-1).astype(np.int32))
            x = self._step(answers[-1][:, None], (lengths + step)[:, None], caches)
            logits = np.asarray(self._logits(x[:, 0]))
        return first, np.stack(answers, axis=1)

    def _step(self, tokens: np.ndarray, at: np.ndarray, caches: list[jax.Array]) -> jax.Array:
        x = self._embed(self.store.params(self.store.spec.embed_unit), tokens)
        for layer in range(self.store.spec.layers):
            x, caches[layer] = self._layer(self.store.params(layer), x, at, caches[layer])
        return x

    def _logits(self, x: jax.Array) -> jax.Array:
        table = self.store.params(self.store.spec.embed_unit)["table"] if self.store.spec.tied_embeddings else None
        return self._head(self.store.params(self.store.spec.units - 1), x, table)


def _stages(spec: ModelSpec) -> tuple[Callable[..., object], ...]:
    def layer(params, x, at, cache):
        rows = jnp.arange(x.shape[0])[:, None]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN) -> jax.Array:
            nonlocal cache
            cache = cache.at[0, rows, at].set(k).at[1, rows, at].set(v)
            return attention(q, cache[0], cache[1], jnp.arange(cache.shape[2]) <= at[..., None], scoring)

        x = bind(spec, "layer")(params)(x, family(spec.family).aux(spec, at), attend)
        return x, cache

    return (lambda params, tokens: bind(spec, "embed")(params)(tokens, positions(*tokens.shape)), layer,
            lambda params, x, table: bind(spec, "head")(params)(x, table))
