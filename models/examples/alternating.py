"""A decoder of one's own: LayerNorm, learned positions, GELU, and every other layer sees only the last tokens.

    blitzjax serve blitzjax.models.examples.alternating:build --checkpoint DIR
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from blitzjax.models import Family
from blitzjax.models.blocks import Attend, Scoring
from blitzjax.types import ModelSpec

WINDOW = 24  # tokens that a "local" layer sees


class Embed(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(spec.vocab, spec.dim, rngs=rngs, param_dtype=spec.dtype)
        self.positions = nnx.Embed(spec.max_len, spec.dim, rngs=rngs, param_dtype=spec.dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return (self.tokens(tokens) + self.positions(positions)).astype(jnp.float32)  # [B, T, D]


class Layer(nnx.Module):
    def __init__(self, spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> None:
        self.heads, self.scoring = spec.heads, Scoring(window=WINDOW if kind == "local" else None)
        self.attn_norm, self.ffn_norm = nnx.LayerNorm(spec.dim, rngs=rngs), nnx.LayerNorm(spec.dim, rngs=rngs)
        self.qkv = nnx.Linear(spec.dim, 3 * spec.dim, rngs=rngs, param_dtype=spec.dtype)
        self.out = nnx.Linear(spec.dim, spec.dim, rngs=rngs, param_dtype=spec.dtype)
        self.up = nnx.Linear(spec.dim, spec.ffn_dim, rngs=rngs, param_dtype=spec.dtype,
                             kernel_metadata={"axes": (None, "ffn")}, bias_metadata={"axes": ("ffn",)})
        self.down = nnx.Linear(spec.ffn_dim, spec.dim, rngs=rngs, param_dtype=spec.dtype,
                               kernel_metadata={"axes": ("ffn", None)})

    def __call__(self, x: jax.Array, aux: tuple[()], attend: Attend) -> jax.Array:
        qkv = self.qkv(self.attn_norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)  # [B, T, 3, H, hd]
        x = x + self.out(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.scoring))
        return x + self.down(jax.nn.gelu(self.up(self.ffn_norm(x))))


class Head(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(spec.dim, rngs=rngs)
        self.logits = nnx.Linear(spec.dim, spec.vocab, use_bias=False, rngs=rngs, param_dtype=spec.dtype)

    def __call__(self, x: jax.Array, table: None) -> jax.Array:
        return self.logits(self.norm(x))  # [N, V]


def build() -> tuple[ModelSpec, Family]:
    spec = ModelSpec(name="alternating", family="own", layers=4, dim=64, heads=4, kv_heads=4, head_dim=16, ffn_dim=128,
                     vocab=272, max_len=256, rope_theta=0.0, norm_eps=1e-6, tied_embeddings=False, dtype="float32",
                     eos_token_ids=(257,), layer_kinds=("global", "local") * 2)
    return spec, Family(Embed, Layer, Head)
