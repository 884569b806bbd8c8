"""The decoder that most families share: norms, rotary GQA attention, a feed-forward or experts, as `Design` says.

One unit = one module; weights are fused and [out, in]. Sharding is by logical axis only (see `axes`); a KV head and its
query heads are one slice of "kv_heads". Invariant: what a design does not have costs nothing, in bytes or operations.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from blitzjax.models import blocks, config, names
from blitzjax.models.design import DENSE, SLIDING, design
from blitzjax.models.experts import Experts
from blitzjax.models.family import Family
from blitzjax.models.names import Names
from blitzjax.models.parameters import matrix, norm_scale, small, weight
from blitzjax.types import ModelSpec

_LLAMA = Names()
Rope = tuple[jax.Array, jax.Array]  # cos, sin f32[B, T, rope_dims / 2]


class Embed(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.design = design(spec)
        self.table = weight(rngs, (spec.vocab, spec.dim), ("vocab", "embed"), spec.compute_dtype)
        if self.design.learned_positions:
            self.positions = weight(rngs, (spec.max_len, spec.dim), (None, "embed"), spec.compute_dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.table[...][tokens].astype(jnp.float32)  # [B, T, D]
        if self.design.embed_scale != 1.0:
            x = x * self.design.embed_scale
        if self.design.learned_positions:
            x = x + self.positions[...][positions].astype(jnp.float32)
        return x


class Layer(nnx.Module):
    def __init__(self, spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> None:
        self.spec, self.design, self.sliding = spec, design(spec), SLIDING in kind
        group = spec.heads // spec.kv_heads
        self._add_norms("attn")
        # Per KV head: its query heads, its key, its value.
        self.qkv = matrix(rngs, (spec.kv_heads, group + 2, spec.head_dim, spec.dim),
                          ("kv_heads", None, None, "embed"), spec.dtype)
        self.o = matrix(rngs, (spec.dim, spec.kv_heads, group * spec.head_dim),
                        ("embed", "kv_heads", None), spec.dtype)
        if self.design.qkv_bias:
            self.qkv_bias = small((spec.kv_heads, group + 2, spec.head_dim), ("kv_heads", None, None))
        if self.design.o_bias:
            self.o_bias = small((spec.dim,), ("embed",))
        if self.design.sinks:
            self.sinks = small((spec.kv_heads, group), ("kv_heads", None))
        self._add_qk_norm(group)
        self._add_norms("ffn")
        self.sparse = self.design.experts > 0 and DENSE not in kind
        if self.sparse:
            self.experts = Experts(spec, rngs)
        else:
            self._add_feed_forward(rngs)

    def _add_norms(self, place: str) -> None:
        for name in [f"{place}_norm"] * self.design.pre_norm + [f"{place}_post_norm"] * self.design.post_norm:
            setattr(self, name, norm_scale(self.spec.dim))
            if self.design.layer_norm:
                setattr(self, f"{name}_bias", small((self.spec.dim,), ("embed",)))

    def _add_qk_norm(self, group: int) -> None:
        spec = self.spec
        if self.design.qk_norm == "head":
            self.q_norm = small((spec.head_dim,), (None,), jnp.ones)
            self.k_norm = small((spec.head_dim,), (None,), jnp.ones)
        elif self.design.qk_norm == "all":
            self.q_norm = small((spec.kv_heads, group, spec.head_dim), ("kv_heads", None, None), jnp.ones)
            self.k_norm = small((spec.kv_heads, spec.head_dim), ("kv_heads", None), jnp.ones)

    def _add_feed_forward(self, rngs: nnx.Rngs) -> None:
        spec, ways = self.spec, 1 + self.design.gated  # gate and up of a unit, or its up alone
        self.gate_up = matrix(rngs, (spec.ffn_dim, ways, spec.dim), ("ffn", None, "embed"), spec.dtype)
        self.down = matrix(rngs, (spec.dim, spec.ffn_dim), ("embed", "ffn"), spec.dtype)
        if self.design.mlp_bias:
            self.gate_up_bias = small((spec.ffn_dim, ways), ("ffn", None))
            self.down_bias = small((spec.dim,), ("embed",))

    def __call__(self, x: jax.Array, aux: tuple[Rope, ...], attend: blocks.Attend) -> jax.Array:
        x = self._add(x, "attn", self._attention(self._enter(x, "attn"), aux, attend))
        return self._add(x, "ffn", self._feed_forward(self._enter(x, "ffn")))

    def _enter(self, x: jax.Array, place: str) -> jax.Array:
        return self._norm(f"{place}_norm", x) if self.design.pre_norm else x

    def _add(self, x: jax.Array, place: str, y: jax.Array) -> jax.Array:
        if self.design.post_norm:
            y = self._norm(f"{place}_post_norm", y)
        return x + (y if self.design.residual_scale == 1.0 else y * self.design.residual_scale)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        scale = getattr(self, name)[...]
        if self.design.layer_norm:
            return blocks.layer_norm(x, scale, getattr(self, f"{name}_bias")[...], self.spec.norm_eps)
        return blocks.rms_norm(x, scale, self.spec.norm_eps)

    def _attention(self, x: jax.Array, aux: tuple[Rope, ...], attend: blocks.Attend) -> jax.Array:
        spec, (batch, length, _) = self.spec, x.shape
        qkv = blocks.matmul(x, self.qkv[...])  # [B, T, KV, G+2, hd]
        if self.design.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]  # [B, T, KV, G, hd], twice [B, T, KV, hd]
        if self.design.qk_norm:
            q, k = self._qk_norm(q, self.q_norm[...]), self._qk_norm(k, self.k_norm[...])
        q = q.reshape(batch, length, spec.heads, spec.head_dim)
        if aux:
            rope = aux[-1] if self.sliding else aux[0]
            q, k = blocks.rotate(q, *rope), blocks.rotate(k, *rope)
        y = blocks.matmul(attend(q, k, v, self._scoring()), self.o[...], contract=2)
        return y + self.o_bias[...] if self.design.o_bias else y

    def _qk_norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """x [B, T, KV, hd] or [B, T, KV, G, hd]"""
        axes = -1 if self.design.qk_norm == "head" else tuple(range(2, x.ndim))
        return blocks.rms_norm(x, scale, self.spec.norm_eps, axes)

    def _scoring(self) -> blocks.Scoring:
        return blocks.Scoring(scale=self.design.scale or None, window=self.design.window if self.sliding else None,
                              softcap=self.design.softcap or None, sinks=self.sinks[...] if self.design.sinks else None)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        if self.sparse:
            return self.experts(x)
        activation, gate_up, down = self.design.activation, self.gate_up[...], self.down[...]
        if not self.design.mlp_bias:
            return blocks.matmul(blocks.gated(activation, x, gate_up), down)
        made = blocks.matmul(x, gate_up) + self.gate_up_bias[...]  # [B, T, F, 2] or [B, T, F, 1]
        return blocks.matmul(blocks.activate(activation, made), down) + self.down_bias[...]


class Head(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.spec, self.design = spec, design(spec)
        self.norm = norm_scale(spec.dim)
        if self.design.layer_norm:
            self.norm_bias = small((spec.dim,), ("embed",))
        if not spec.tied_embeddings:
            self.w = weight(rngs, (spec.vocab, spec.dim), ("vocab", "embed"), spec.compute_dtype)

    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        logits = blocks.matmul(self._norm(x), self.w[...] if table is None else table)  # [N, V]
        if self.design.logit_scale != 1.0:
            logits = logits * self.design.logit_scale
        if self.design.logit_softcap:
            logits = self.design.logit_softcap * jnp.tanh(logits / self.design.logit_softcap)
        return logits

    def _norm(self, x: jax.Array) -> jax.Array:
        if self.design.layer_norm:
            return blocks.layer_norm(x, self.norm[...], self.norm_bias[...], self.spec.norm_eps)
        return blocks.rms_norm(x, self.norm[...], self.spec.norm_eps)


def ropes(spec: ModelSpec, positions: jax.Array) -> tuple[Rope, ...]:
    """The model's rope; behind it that of sliding layers if they have one of their own; none with learned positions."""
    traits = design(spec)
    if traits.learned_positions:
        return ()
    dims = traits.rope_dims or spec.head_dim
    rope = blocks.rope_angles(dims, spec.rope_theta, positions, traits.rope_factors, traits.rope_scale)
    if not traits.sliding_rope_theta:
        return (rope,)
    return rope, blocks.rope_angles(dims, traits.sliding_rope_theta, positions)


def decoder_family(name: str, options: config.Options, *, layer_kinds: config.LayerKinds = config.plain,
                   defaults: Mapping[str, object] | None = None, names_table: Names = _LLAMA) -> Family:
    """A family of the shared decoder.

    `options`: config → what its Design has other than llama's; `defaults`: settings that its configs may leave out.
    """
    return Family(
        Embed, Layer, Head, ropes, functools.partial(names.tensors, names_table),
        functools.partial(names.fuse, names_table),
        functools.partial(config.read_spec, options, layer_kinds, defaults or {}, name), names_table.layer_prefix)
