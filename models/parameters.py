"""What decoder layers are made of: parameters with logical axes.

Invariant: every Param has an axis name, or None, for each of its dimensions; `engine.params` shards by these alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param:
    """A matrix [*out, in] drawn from N(0, 1/in), with one logical axis name per dimension."""
    assert len(shape) == len(axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype), axes=axes)


def norm_scale(dim: int) -> nnx.Param:
    return small((dim,), ("embed",), jnp.ones)


def small(shape: tuple[int, ...], axes: tuple[str | None, ...],
          init: Callable[..., jax.Array] = jnp.zeros) -> nnx.Param:
    """A bias or the like: kept in float32 whatever the dtype of the weights."""
    assert len(shape) == len(axes)
    return nnx.Param(init(shape, jnp.float32), axes=axes)
