"""Decoders of one's own without the engine, models/examples/alternating.py for one: its modules in a row, plain attention,
greedy text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from blitzjax.models import Family
from blitzjax.models.blocks import PLAIN, Scoring
from blitzjax.models.examples import alternating
from blitzjax.types import ModelSpec


class Model(nnx.Module):
    def __init__(self, spec: ModelSpec, family: Family) -> None:
        self.tied = spec.tied_embeddings
        self.embed, self.head = family.embed(spec, nnx.Rngs(0)), family.head(spec, nnx.Rngs(0))
        self.layers = nnx.List([family.layer(spec, kind, nnx.Rngs(0)) for kind in spec.layer_kinds])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """i32[1, T] → f32[T, V]"""
        x = self.embed(tokens, jnp.arange(tokens.shape[1])[None])
        for layer in self.layers:
            x = layer(x, (), attend)
        return self.head(x[0], self.embed.table[...] if self.tied else None)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN) -> jax.Array:
    """q, k, v [1, T, H, hd] → [1, T, H * hd]"""
    at = jnp.arange(q.shape[1])
    seen = at[None, :] <= at[:, None]
    if scoring.window is not None:
        seen &= at[None, :] > at[:, None] - scoring.window
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def filled(seed: int, build: Callable[[], tuple[ModelSpec, Family]] = alternating.build) -> Model:
    """Random parameters under which greedy text wanders; norms are not 1 and biases are not 0."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(*build())))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            return jnp.asarray(0.2 * values + ("scale" in jax.tree_util.keystr(path)))
        return jnp.asarray(values * (1 if "embed" in jax.tree_util.keystr(path) else 2 * leaf.shape[0] ** -0.5))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def greedy(model: Model, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Every step runs everything again, padded to one length."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = np.zeros((1, len(prompt) + new_tokens), np.int32)
    tokens[0, :len(prompt)] = prompt
    for at in range(len(prompt), tokens.shape[1]):
        tokens[0, at] = np.asarray(run(state, tokens))[at - 1].argmax()
    return tokens[0, len(prompt):].tolist()


def save(model: Model, path: Path) -> None:
    """As a user's training loop would."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nnx.state(model))
