"""How the next token is drawn from logits, on the device, inside the head stage.

Invariant: a row's token depends only on its own logits, parameters, seed and step; never on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from blitzjax.types import Sampling


class Draws(NamedTuple):
    """One row per sequence; NumPy on the way in."""

    temperature: np.ndarray  # f32[rows]; 0 is greedy
    top_k: np.ndarray  # i32[rows]; 0 is off
    top_p: np.ndarray  # f32[rows]; 1 is off
    seed: np.ndarray  # u32[rows, 2]
    step: np.ndarray  # i32[rows], index of the token in the answer

    @property
    def greedy(self) -> bool:
        return not self.temperature.any()

    def set(self, row: int, sampling: Sampling, step: int) -> None:
        """Row `row` draws token `step` of an answer."""
        self.temperature[row], self.top_k[row], self.top_p[row] = sampling.temperature, sampling.top_k, sampling.top_p
        self.seed[row] = (sampling.seed >> 32 & 0xFFFFFFFF, sampling.seed & 0xFFFFFFFF)
        self.step[row] = step


def greedy_draws(rows: int) -> Draws:
    return Draws(np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.ones(rows, np.float32),
                 np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32))


def greedy(logits: Array) -> Array:
    """Index of the largest logit, lowest index first; several times faster than argmax on XLA:CPU. [rows]"""
    vocab = logits.shape[-1]
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = logits == logits.max(-1, keepdims=True)
    return jnp.minimum(jnp.where(best, ids, vocab).min(-1), vocab - 1)


def sample(logits: Array, draws: Draws) -> Array:
    """Temperature, then top-k, then top-p over what is left, then Gumbel-max with the row's own key. i32[rows]

    Both filters are exact thresholds over the whole vocabulary, found by bisection instead of a sort.
    """
    scaled = logits / jnp.maximum(draws.temperature, 1e-6)[:, None]
    filtered = jnp.any((draws.top_k > 0) | (draws.top_p < 1))
    kept = lax.cond(filtered, _filter, lambda x, *_: x, scaled, draws.top_k, draws.top_p)
    noise = jax.vmap(lambda s, t: jax.random.gumbel(jax.random.fold_in(_key(s), t), logits.shape[1:]))(
        draws.seed, draws.step)  # [rows, vocab]
    return jnp.where(draws.temperature > 0, greedy(kept + noise), greedy(logits))


def _key(seed: Array) -> Array:
    return jax.random.wrap_key_data(seed, impl="threefry2x32")


def _filter(x: Array, top_k: Array, top_p: Array) -> Array:
    """Sets to -inf what is outside the top k, then what is outside the smallest set of mass top_p."""
    order = _ordered_bits(x)  # [rows, vocab]
    k = jnp.where(top_k > 0, top_k, x.shape[1])
    in_k = order >= _largest(lambda t: (order >= t[:, None]).sum(-1) >= k, x.shape[0])[:, None]
    x = jnp.where(in_k, x, -jnp.inf)
    p = jax.nn.softmax(x, axis=-1)
    mass = jnp.where(top_p < 1, top_p, 2.0)  # 2: unreachable, keeps everything
    enough = _largest(lambda t: jnp.where(order >= t[:, None], p, 0).sum(-1) >= mass, x.shape[0])
    return jnp.where(order >= enough[:, None], x, -jnp.inf)


def _ordered_bits(x: Array) -> Array:
    """uint32 that sorts like the float32 it came from."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, rows: int) -> Array:
    """Largest uint32 threshold per row for which the monotone predicate holds; 0 when it never does."""

    def step(i, low):
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 32, step, jnp.zeros(rows, jnp.uint32))
