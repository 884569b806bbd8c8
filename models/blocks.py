"""What decoder layers are made of: parameters with logical axes, a matmul that is fast on CPU and GPU, norm, rope.

Invariant: activations enter and leave every function as float32; only the operands of `matmul` take the weights' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

# attend(q [B, T, H, hd], k [B, T, KV, hd], v [B, T, KV, hd]) → f32[B, T, H * hd]; scales scores by hd ** -0.5.
# Query head h reads KV head h // (H // KV).
Attend: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param:
    """A matrix [*out, in] drawn from N(0, 1/in), with one logical axis name per dimension."""
    assert len(shape) == len(axes)
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
    return nnx.Param(values.astype(dtype), axes=axes)


def norm_scale(dim: int) -> nnx.Param:
    return nnx.Param(jnp.ones((dim,), jnp.float32), axes=("embed",))


def matmul(x: jax.Array, w: jax.Array, contract: int = 1) -> jax.Array:
    """x [*rows, c] · w [*out, *c] → f32[*rows, *out], contracting the last `contract` dimensions of `w`.

    XLA:CPU has one fast bfloat16 form: two-dimensional operands of the same type, weights [out, in], float32 result, at
    least two rows. Hence the casts and the flattening; other forms are 2-10x slower. A sharded dimension of `w` must be
    the first of `out` or of `c`, so that flattening keeps it one contiguous slice per device.
    """
    rows, out = x.shape[:-1], w.shape[:w.ndim - contract]
    inner = math.prod(w.shape[w.ndim - contract:])
    precision = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    y = lax.dot_general(x.reshape(-1, inner).astype(w.dtype), w.reshape(-1, inner), (((1,), (1,)), ((), ())),
                        precision=precision, preferred_element_type=jnp.float32)
    return y.reshape(*rows, *out)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


def rope_angles(head_dim: int, theta: float, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions i32[B, T] → cos, sin f32[B, T, hd/2] (RoFormer, arXiv:2104.09864, section 3.4.2)."""
    frequencies = np.asarray(theta ** -(np.arange(0, head_dim, 2) / head_dim), np.float32)  # [hd/2]
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, hd/2]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x f32[B, T, heads, hd] turned by its position; dimension i pairs with i + hd/2 (the published llama layout)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, hd/2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
