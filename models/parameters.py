"""What decoder layers are made of: parameters with logical axes.

Invariant: every Param has an axis name, or None, for each of its dimensions; `engine.params` shards by these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import EllipsisType

import jax
import jax.numpy as jnp
from flax import nnx

from blitzjax.models.blocks import BLOCK, Int8


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param:
    """A matrix [*out, in] drawn from N(0, 1/in), with one logical axis name per dimension."""
    assert len(shape) == len(axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype), axes=axes)


class Int8Weight(nnx.Module):
    """A matrix [*out, in] in blocks of int8, zeros until a checkpoint's are loaded; read like a Param."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
        *out, last = shape
        self.values = nnx.Param(jnp.zeros(shape, jnp.int8), axes=axes)
        self.scales = nnx.Param(jnp.ones((*out, last // math.gcd(BLOCK, last)), jnp.bfloat16), axes=axes)

    def __getitem__(self, whole: EllipsisType) -> Int8:
        return Int8(self.values[...], self.scales[...])


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param | Int8Weight:
    """A `weight` that only `blocks.matmul` reads, so that it may be in int8."""
    return Int8Weight(shape, axes) if dtype == "int8" else weight(rngs, shape, axes, dtype)


def norm_scale(dim: int) -> nnx.Param:
    return small((dim,), ("embed",), jnp.ones)


def small(shape: tuple[int, ...], axes: tuple[str | None, ...],
          init: Callable[..., jax.Array] = jnp.zeros) -> nnx.Param:
    """A bias or the like: kept in float32 whatever the dtype of the weights."""
    assert len(shape) == len(axes)
    return nnx.Param(init(shape, jnp.float32), axes=axes)
