"""The decoder of alternating.py in Linen; the two take each other's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from blitzjax.models import Family, linen
from blitzjax.models.blocks import Attend, Scoring
from blitzjax.models.examples import alternating
from blitzjax.types import ModelSpec


class Embed(nn.Module):
    spec: ModelSpec

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        spec = self.spec
        x = nn.Embed(spec.vocab, spec.dim, name="tokens", param_dtype=spec.dtype)(tokens)
        x = x + nn.Embed(spec.max_len, spec.dim, name="positions", param_dtype=spec.dtype)(positions)
        return x.astype(jnp.float32)  # [B, T, D]


class Layer(nn.Module):
    spec: ModelSpec
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, aux: tuple[()], attend: Attend) -> jax.Array:
        spec = self.spec
        qkv = nn.Dense(3 * spec.dim, name="qkv", param_dtype=spec.dtype)(nn.LayerNorm(name="attn_norm")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, spec.heads, -1), 2, 0)  # [B, T, H, hd]
        y = attend(q, k, v, Scoring(window=alternating.WINDOW if self.kind == "local" else None))
        x = x + nn.Dense(spec.dim, name="out", param_dtype=spec.dtype)(y)
        up = nn.Dense(spec.ffn_dim, name="up", param_dtype=spec.dtype)(nn.LayerNorm(name="ffn_norm")(x))
        return x + nn.Dense(spec.dim, name="down", param_dtype=spec.dtype)(jax.nn.gelu(up))


class Head(nn.Module):
    spec: ModelSpec

    @nn.compact
    def __call__(self, x: jax.Array, table: None) -> jax.Array:
        return nn.Dense(self.spec.vocab, use_bias=False, name="logits", param_dtype=self.spec.dtype)(
            nn.LayerNorm(name="norm")(x))  # [N, V]


def build() -> tuple[ModelSpec, Family]:
    spec, _ = alternating.build()
    return spec, Family(linen.embed(Embed), linen.layer(Layer), linen.head(Head))
