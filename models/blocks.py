"""What decoder layers compute: a matmul that is fast on CPU and GPU, norms, rope, attention weights.

Invariant: activations enter and leave every function as float32; only the operands of `matmul` take the weights' dtype.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True, slots=True)
class Scoring:
    """How products of queries and keys become attention weights. A position is that of a token in its sequence."""

    scale: float | None = None  # of the products; None: hd ** -0.5
    window: int | None = None  # a query at p reads positions (p - window, p]; None: all up to p
    softcap: float | None = None  # scores are squeezed into (-softcap, softcap)
    sinks: jax.Array | None = None  # f32[KV, G]: the score of a key that every query sees and that has no value

    def weights(self, products: jax.Array, head_dim: int, at: jax.Array) -> jax.Array:
        """Products f32[B, KV, G, T, S], query positions `at` broadcasting to i32[B, KV, G, T] → weights of S keys."""
        scores = products * (head_dim ** -0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        scores = jnp.where(self.seen(products.shape[-1], at), scores, -1e30)
        if self.sinks is None:
            return jax.nn.softmax(scores, axis=-1)
        sinks = self.sinks[:, :, None, None]
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - top)
        return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top))

    def seen(self, length: int, at: jax.Array) -> jax.Array:
        """Which of `length` keys a query at position i32[...] reads → bool[..., length]."""
        keys, at = jnp.arange(length), at[..., None]
        return keys <= at if self.window is None else (keys <= at) & (keys > at - self.window)


PLAIN = Scoring()


class Attend(Protocol):
    """What the engine gives a layer: attention over what the sequences have kept so far and over these tokens."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN) -> jax.Array:
        """q [B, T, H, hd], k and v [B, T, KV, hd] → f32[B, T, H * hd]; head h reads KV head h // (H // KV)."""
        ...


BLOCK = 32  # numbers of a matrix of int8 that share a scale, or as many as divide its last dimension; kBlock of matmul.cc


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Int8:
    """A matrix in little more than half the bytes of bfloat16: blocks of numbers along the last dimension share a scale.

    Scales are powers of two, so that bfloat16 has what is meant: products are those of a bfloat16 matrix, bit for bit.
    (MXINT8 of arXiv:2310.10537, but that the scale takes two bytes.)
    """

    values: jax.Array  # i8[*out, *in]
    scales: jax.Array  # bf16[*out, *in], a block to each

    def __getitem__(self, index: jax.Array) -> Int8:
        """The `index`-th of several."""
        return Int8(self.values[index], self.scales[index])

    def flat(self, contract: int) -> Int8:
        """i8[out, in], with the last `contract` dimensions in one."""
        out = math.prod(self.values.shape[:self.values.ndim - contract])
        return Int8(self.values.reshape(out, -1), self.scales.reshape(out, -1))

    def multiplied(self) -> jax.Array:
        """bf16[*out, *in]"""
        blocks = self.values.reshape(*self.scales.shape, -1).astype(jnp.bfloat16)
        return (blocks * self.scales[..., None]).reshape(self.values.shape)


class Kernels(Protocol):
    """What may be faster than XLA: products of rows f32[rows, c] with weights [out, c], and what stands beside them."""

    def takes(self, w: jax.Array | Int8) -> bool: ...

    def multiply(self, x: jax.Array, w: jax.Array | Int8) -> jax.Array: ...

    def gates(self, activation: str, w: jax.Array | Int8) -> bool: ...

    def gated(self, activation: str, x: jax.Array, w: jax.Array | Int8) -> jax.Array: ...

    def weighted(self, weights: jax.Array, x: jax.Array) -> jax.Array: ...

    def softmax(self, x: jax.Array) -> jax.Array: ...

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array: ...

    def layer_norm(self, x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array: ...


_kernels: contextvars.ContextVar[Kernels | None] = contextvars.ContextVar("kernels", default=None)


@contextlib.contextmanager
def using(kernels: Kernels | None) -> Iterator[None]:
    """What is traced inside leaves to `kernels` what they take."""
    token = _kernels.set(kernels)
    try:
        yield
    finally:
        _kernels.reset(token)


def matmul(x: jax.Array, w: jax.Array | Int8, contract: int = 1) -> jax.Array:
    """x [*rows, c] · w [*out, *c] → f32[*rows, *out], contracting the last `contract` dimensions of `w`.

    XLA:CPU has one fast bfloat16 form: two-dimensional operands of the same type, weights [out, in], float32 result, at
    least two rows. Hence the casts and the flattening; other forms are 2-10x slower. A sharded dimension of `w` must be
    the first of `out` or of `c`, so that flattening keeps it one contiguous slice per device.
    """
    shape = _shape(w)
    rows, out, inner = x.shape[:-1], shape[:len(shape) - contract], math.prod(shape[len(shape) - contract:])
    x, w = x.reshape(-1, inner), _flat(w, contract)
    kernels = _kernels.get()
    if kernels is not None and kernels.takes(w):
        return kernels.multiply(x.astype(jnp.float32), w).reshape(*rows, *out)
    w = w.multiplied() if isinstance(w, Int8) else w
    precision = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    y = lax.dot_general(x.astype(w.dtype), w, (((1,), (1,)), ((), ())), precision=precision,
                        preferred_element_type=jnp.float32)
    return y.reshape(*rows, *out)


def gated(activation: str, x: jax.Array, w: jax.Array | Int8) -> jax.Array:
    """x [*rows, c] · w [F, 1 or 2, c], then `activate` → f32[*rows, F]"""
    kernels = _kernels.get()
    if kernels is not None and _shape(w)[1] == 2 and kernels.gates(activation, flat := _flat(w, 1)):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return kernels.gated(activation, rows, flat).reshape(*x.shape[:-1], -1)
    return activate(activation, matmul(x, w))


def _shape(w: jax.Array | Int8) -> tuple[int, ...]:
    return w.values.shape if isinstance(w, Int8) else w.shape


def _flat(w: jax.Array | Int8, contract: int) -> jax.Array | Int8:
    """[out, in], with the last `contract` dimensions in one."""
    return w.flat(contract) if isinstance(w, Int8) else w.reshape(-1, math.prod(w.shape[w.ndim - contract:]))


def weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of K vectors each, f32[N, K], f32[N, K, D] → f32[N, D]"""
    kernels = _kernels.get()
    return jnp.sum(weights[..., None] * x, axis=1) if kernels is None else kernels.weighted(weights, x)


def softmax(x: jax.Array) -> jax.Array:
    """Of rows, f32[N, E]"""
    kernels = _kernels.get()
    return jax.nn.softmax(x) if kernels is None else kernels.softmax(x)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """arXiv:1910.07467"""
    kernels = _kernels.get()
    if kernels is not None:
        return kernels.rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), eps)
    return x * lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps) * scale.astype(jnp.float32)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """arXiv:1607.06450"""
    kernels = _kernels.get()
    if kernels is not None:
        return kernels.layer_norm(x.astype(jnp.float32), scale.astype(jnp.float32), bias.astype(jnp.float32), eps)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps) * scale + bias


def activate(name: str, gate_up: jax.Array) -> jax.Array:
    """f32[..., F, 2], each unit's gate and up, or f32[..., F, 1], its up alone → f32[..., F]."""
    first, up = gate_up[..., 0], gate_up[..., -1]
    if name == "clamped_swiglu":  # gpt_oss model card: gates of at most 7, linear parts in [-7, 7] and shifted by 1
        first = jnp.minimum(first, 7.0)
        return first * jax.nn.sigmoid(1.702 * first) * (jnp.clip(up, -7.0, 7.0) + 1.0)
    activated = _ACTIVATIONS[name](first)
    return activated if gate_up.shape[-1] == 1 else activated * up


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def rope_angles(dims: int, theta: float, positions: jax.Array, factors: tuple[float, ...] = (),
                scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """positions i32[B, T] → cos, sin f32[B, T, dims/2] (RoFormer, arXiv:2104.09864, section 3.4.2).

    `factors` divide the dims/2 frequencies, `scale` multiplies the results (see rope.py).
    """
    frequencies = theta ** -(np.arange(0, dims, 2) / dims)  # [dims/2]
    frequencies = np.asarray(frequencies / np.asarray(factors) if factors else frequencies, np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, dims/2]
    if scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x f32[B, T, heads, hd]: its first dims dimensions turned by position, i with i + dims/2 (the llama layout)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, dims/2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
