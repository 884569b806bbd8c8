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

from blitzjax.models.blocks import Int8

BLOCK = 32  # numbers that share a scale, or as many as divide a matrix's last dimension


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param:
    """A matrix [*out, in] drawn from N(0, 1/in), with one logical axis name per dimension."""
    assert len(shape) == len(axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype), axes=axes)


class Int8Weight(nnx.Module):
    """A weight in blocks of int8; read like a Param."""

    def __init__(self, matrix: jax.Array, axes: tuple[str | None, ...]) -> None:
        *rows, last = matrix.shape
        blocks = matrix.reshape(*rows, -1, math.gcd(BLOCK, last))
        scales = jnp.exp2(jnp.ceil(jnp.log2(jnp.max(jnp.abs(blocks), axis=-1) / 127)))
        self.values = nnx.Param(jnp.round(blocks / scales[..., None]).reshape(matrix.shape).astype(jnp.int8), axes=axes)
        self.scales = nnx.Param(scales.astype(jnp.bfloat16), axes=axes)

    def __getitem__(self, whole: EllipsisType) -> Int8:
        return Int8(self.values[...], self.scales[...])


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param | Int8Weight:
    """A `weight` that only `blocks.matmul` reads, so that it may be in int8."""
    if dtype != "int8":
        return weight(rngs, shape, axes, dtype)
    return Int8Weight(weight(rngs, shape, axes, "float32")[...], axes)


def norm_scale(dim: int) -> nnx.Param:
    return small((dim,), ("embed",), jnp.ones)


def small(shape: tuple[int, ...], axes: tuple[str | None, ...],
          init: Callable[..., jax.Array] = jnp.zeros) -> nnx.Param:
    """A bias or the like: kept in float32 whatever the dtype of the weights."""
    assert len(shape) == len(axes)
    return nnx.Param(init(shape, jnp.float32), axes=axes)
