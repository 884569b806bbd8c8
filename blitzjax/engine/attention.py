"""Which attention does a model get on its devices, and how do its keys and values lie there? Decided here and nowhere else.

    devices        keys, values of one layer                   attention
    CPUs, bf16     bf16 [B, KV, hd, S], bf16 [B, KV, S, hd]    in C++ where it can be built and fits, else two products
    NVIDIA GPUs    bf16 [B, S, KV, hd] twice                   `jax.nn.dot_product_attention` by cuDNN; the products for
                                                               layers with soft caps or sinks, which it does not know
    all others     f32 [B, KV, hd, S], f32 [B, KV, S, hd]      two matrix products

Invariant: keys and values are rounded to the layout's type before anything reads them, so a prompt's first chunk and
whatever comes later see the same numbers. On CPUs the layout follows from the model alone, whatever a host can build:
instances pass keys and values on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec as P

from blitzjax.config import EngineConfig
from blitzjax.engine import native
from blitzjax.engine.executables import Fetch, cpu_features
from blitzjax.models import blocks
from blitzjax.types import ModelSpec

Fused = Literal["cudnn", "xla"]  # `implementation` of jax.nn.dot_product_attention


@dataclass(frozen=True, slots=True)
class Layout:
    """Axes of KV heads and of tokens in a layer's keys and values [B, ...], and their type: float32, bfloat16, or uint16,
    the bits of bfloat16. XLA:CPU moves those as they are, where it makes float32 of every bfloat16 that it touches.
    """

    heads: int
    keys: int
    values: int
    dtype: np.dtype

    def shapes(self, spec: ModelSpec, rows: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shapes = []
        for axis in (self.keys, self.values):
            sizes = {0: rows, self.heads: spec.kv_heads, axis: tokens}
            shapes.append(tuple(sizes.get(i, spec.head_dim) for i in range(4)))
        return shapes[0], shapes[1]

    def tokens(self, kv: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
        return kv[0].shape[self.keys]

    @property
    def name(self) -> str:
        return f"{self.dtype} with heads, keys and values at {self.heads}, {self.keys}, {self.values}"

    def kept(self, k: Array, v: Array) -> tuple[Array, Array]:
        """[B, T, KV, hd] as the model made them → as they lie here."""
        k, v = (self._rounded(jnp.transpose(a, self._order(axis))) for a, axis in ((k, self.keys), (v, self.values)))
        return k, v

    def plain(self, k: Array, v: Array) -> tuple[Array, Array]:
        """→ f32[B, KV, hd, S], f32[B, KV, S, hd]"""
        k, v = (jnp.transpose(self._numbers(a), [self._order(own).index(i) for i in _PLAIN._order(axis)]).astype(jnp.float32)
                for a, own, axis in ((k, self.keys, _PLAIN.keys), (v, self.values, _PLAIN.values)))
        return k, v

    def written(self, kv: tuple[Array, Array], new: tuple[Array, Array], start: Array) -> tuple[Array, Array]:
        """`new` [B, T, KV, hd] become tokens [start, start + T) of every row."""
        k, v = (lax.dynamic_update_slice_in_dim(a, b, start, axis)
                for a, b, axis in zip(kv, self.kept(*new), (self.keys, self.values), strict=True))
        return k, v

    def appended(self, kv: tuple[Array, Array], new: tuple[Array, Array], at: Array) -> tuple[Array, Array]:
        """`new` [B, 1, KV, hd] become token at[b] of row b."""
        out = []
        for a, b, axis in zip(kv, new, (self.keys, self.values), strict=True):
            index = tuple({0: jnp.arange(a.shape[0]), axis: at}.get(i, slice(None)) for i in range(4))
            out.append(a.at[index].set(self._rounded(b[:, 0])))
        return out[0], out[1]

    def fitted(self, kv: tuple[Array, Array], tokens: int) -> tuple[Array, Array]:
        """Cut or padded to `tokens` tokens."""
        out = []
        for a, axis in zip(kv, (self.keys, self.values), strict=True):
            a = lax.slice_in_dim(a, 0, min(tokens, a.shape[axis]), axis=axis)
            out.append(jnp.pad(a, [(0, tokens - size if i == axis else 0) for i, size in enumerate(a.shape)]))
        return out[0], out[1]

    def _rounded(self, x: Array) -> Array:
        """As `dtype`. Of a conversion to bfloat16 and back XLA may leave nothing, and compute with what was not rounded."""
        if self.dtype == jnp.float32:
            return x.astype(jnp.float32)
        x = lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), self.dtype)

    def _numbers(self, x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.bfloat16) if self.dtype == jnp.uint16 else x

    def _order(self, axis: int) -> list[int]:
        """Of the dimensions B, T, KV, hd: which one lies where, tokens being at `axis`."""
        return [{0: 0, axis: 1, self.heads: 2}.get(i, 3) for i in range(4)]


_PLAIN = Layout(heads=1, keys=3, values=2, dtype=np.dtype(np.float32))
_SHORT = replace(_PLAIN, dtype=np.dtype(np.uint16))


@dataclass(frozen=True, slots=True)
class Attention:
    """How one model's layers attend. Heads are as in `blocks.Attend`; everything returns f32[B, T, H * hd]."""

    layout: Layout = _PLAIN
    kernels: native.Kernels | None = None
    fused: Fused | None = None
    split: NamedSharding | None = None  # of heads over several devices: each computes those that it has

    def first(self, q: Array, k: Array, v: Array, scoring: blocks.Scoring) -> Array:
        """The first tokens of a sequence, among themselves. q [B, T, H, hd]; k and v as kept, of T tokens."""
        if not self._fuses(scoring):
            return self._products(q, k, v, jnp.arange(q.shape[1])[None], scoring)
        window = None if scoring.window is None else (scoring.window - 1, 0)
        return self._dot_product(q, k, v, scoring, {}, is_causal=True, local_window_size=window)

    def later(self, q: Array, k: Array, v: Array, start: Array, scoring: blocks.Scoring) -> Array:
        """Tokens from `start` on, which k and v hold already, and all before them."""
        at = start + jnp.arange(q.shape[1])
        if not self._fuses(scoring):
            return self._products(q, k, v, at[None], scoring)
        return self._dot_product(q, k, v, scoring, {"mask": scoring.seen(k.shape[1], at)[None, None]})

    def step(self, q: Array, k: Array, v: Array, last: Array, scoring: blocks.Scoring) -> Array:
        """One token per row, at position last[b], which k and v hold already."""
        if self._fuses(scoring):
            seen = ({"key_value_seq_lengths": last + 1} if scoring.window is None
                    else {"mask": scoring.seen(k.shape[1], last[:, None])[:, None]})
            return self._dot_product(q, k, v, scoring, seen)
        return self._products(q, k, v, last[:, None], scoring)

    def source(self) -> str:
        """What decides the numbers, for whoever keeps programs that contain it."""
        return "\n".join([Path(__file__).read_text("utf-8"), str(self.layout), str(self.fused),
                          self.kernels.source() if self.kernels else ""])

    def _fuses(self, scoring: blocks.Scoring) -> bool:
        return self.fused is not None and scoring.softcap is None and scoring.sinks is None

    def _products(self, q: Array, k: Array, v: Array, at: Array, scoring: blocks.Scoring) -> Array:
        """`at`: the queries' positions, i32[B or 1, T]."""
        if self.kernels is None or not self.kernels.attends(k):
            return attention(q, *self.layout.plain(k, v), at[:, None, None], scoring)
        rows = q.astype(jnp.float32).reshape(-1, *q.shape[2:])
        last = jnp.broadcast_to(at, q.shape[:2]).reshape(-1)
        return self.kernels.attend(rows, k, v, last, scoring).reshape(*q.shape[:2], -1)

    def _dot_product(self, q: Array, k: Array, v: Array, scoring: blocks.Scoring, seen: dict[str, Any],
                     **rules: Any) -> Array:
        """`seen` and `rules`: the arguments of jax.nn.dot_product_attention that say who sees whom. Its causal mask
        counts from the first key, so it is right for the first chunk only, and so are its windows.
        """
        def attend(q: Array, k: Array, v: Array, seen: dict[str, Any]) -> Array:
            return jax.nn.dot_product_attention(q, k, v, scale=scoring.scale, implementation=self.fused, **seen, **rules)

        if self.split is not None:
            heads = self.split.spec
            attend = jax.shard_map(attend, mesh=self.split.mesh, in_specs=(heads, heads, heads, P()), out_specs=heads,
                                   check_vma=False)
        out = attend(q.astype(self.layout.dtype), k, v, seen)
        return out.reshape(*q.shape[:2], -1).astype(jnp.float32)


def chosen(spec: ModelSpec, config: EngineConfig, devices: Sequence[jax.Device], directory: Path,
           fetch: Fetch = lambda name: None) -> Attention:
    """The fastest that is known to fit `devices`; what is in C++ is fetched or built into `directory`, which exists."""
    platform = devices[0].platform
    if platform == "cpu":
        if spec.compute_dtype != "bfloat16":
            return Attention()
        fits = config.native_kernels and len(devices) == 1
        return Attention(_SHORT, native.kernels(directory, cpu_features(), fetch) if fits else None)
    capability = str(devices[0].compute_capability) if platform == "gpu" else ""
    options = dict(spec.options)
    if config.cudnn_attention and cudnn_fits(spec, capability) and not (options.get("softcap") or options.get("sinks")):
        return fused("cudnn", spec.compute_dtype)
    return Attention(replace(_PLAIN, dtype=np.dtype(spec.compute_dtype)))


def fused(implementation: Fused, dtype: str) -> Attention:
    """`jax.nn.dot_product_attention` on keys and values of `dtype`. "xla" runs everywhere, also in float32."""
    return Attention(Layout(heads=2, keys=1, values=1, dtype=np.dtype(dtype)), fused=implementation)


def cudnn_fits(spec: ModelSpec, capability: str) -> bool:
    """As jax checks it (jax/_src/cudnn/fused_attention_stablehlo.py, 0.10.2): 16-bit floats, heads of a multiple of 8 and
    at most 128, from Hopper on 256. `capability` is CUDA's, such as "9.0"; AMD's look otherwise. Flash attention needs
    Ampere.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if found is None or spec.compute_dtype != "bfloat16":
        return False
    version = (int(found[1]), int(found[2]))
    widest = 256 if version >= (9, 0) else 128
    return version >= (8, 0) and spec.head_dim % 8 == 0 and spec.head_dim <= widest


def attention(q: Array, k: Array, v: Array, at: Array, scoring: blocks.Scoring) -> Array:
    """Grouped-query attention as two batched matrix products on layouts that XLA:CPU takes without a copy.

    q [B, T, H, hd] with H = KV * G, k [B, KV, hd, S], v [B, KV, S, hd]; `at`, the positions of the queries, broadcasts
    to [B, KV, G, T]. → [B, T, H * hd], float32 throughout.
    """
    b, t, h, hd = q.shape
    kv, length = k.shape[1], k.shape[3]
    g = h // kv
    q = q.reshape(b, t, kv, g, hd).transpose(0, 2, 3, 1, 4).reshape(b, kv, g * t, hd)
    products = _batched_dot(q, k).reshape(b, kv, g, t, length)
    weights = scoring.weights(products, hd, at).reshape(b, kv, g * t, length)
    out = _batched_dot(weights, v).reshape(b, kv, g, t, hd)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h * hd)


def _batched_dot(a: Array, b: Array) -> Array:
    """[B, KV, m, c] x [B, KV, c, n] → f32[B, KV, m, n]"""
    return lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))), precision=lax.Precision.HIGHEST)
