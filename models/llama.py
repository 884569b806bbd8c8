"""The llama decoder: RMSNorm, rotary GQA attention, SwiGLU. One unit = one module; weights are fused and [out, in].

Sharding is by logical axis only (see `axes`); a KV head and its query heads are one slice of "kv_heads".
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blitzjax.models import blocks
from blitzjax.types import ModelSpec


class Embed(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.table = blocks.weight(rngs, (spec.vocab, spec.dim), ("vocab", "embed"), spec.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens].astype(jnp.float32)  # [B, T, D]


class Layer(nnx.Module):
    def __init__(self, spec: ModelSpec, index: int, rngs: nnx.Rngs) -> None:
        del index  # llama layers are all alike
        self.spec = spec
        group = spec.heads // spec.kv_heads
        self.attn_norm = blocks.norm_scale(spec.dim)
        # Per KV head: its query heads, its key, its value.
        self.qkv = blocks.weight(rngs, (spec.kv_heads, group + 2, spec.head_dim, spec.dim),
                                 ("kv_heads", None, None, "embed"), spec.dtype)
        self.o = blocks.weight(rngs, (spec.dim, spec.kv_heads, group * spec.head_dim),
                               ("embed", "kv_heads", None), spec.dtype)
        self.ffn_norm = blocks.norm_scale(spec.dim)
        self.gate_up = blocks.weight(rngs, (spec.ffn_dim, 2, spec.dim), ("ffn", None, "embed"), spec.dtype)
        self.down = blocks.weight(rngs, (spec.dim, spec.ffn_dim), ("embed", "ffn"), spec.dtype)

    def __call__(self, x: jax.Array, aux: tuple[jax.Array, jax.Array], attend: blocks.Attend) -> jax.Array:
        x = x + self._attention(blocks.rms_norm(x, self.attn_norm[...], self.spec.norm_eps), aux, attend)
        return x + self._ffn(blocks.rms_norm(x, self.ffn_norm[...], self.spec.norm_eps))

    def _attention(self, x: jax.Array, aux: tuple[jax.Array, jax.Array], attend: blocks.Attend) -> jax.Array:
        spec, (batch, length, _) = self.spec, x.shape
        qkv = blocks.matmul(x, self.qkv[...])  # [B, T, KV, G+2, hd]
        q = qkv[:, :, :, :-2].reshape(batch, length, spec.heads, spec.head_dim)
        k, v = qkv[:, :, :, -2], qkv[:, :, :, -1]  # [B, T, KV, hd]
        y = attend(blocks.rotate(q, *aux), blocks.rotate(k, *aux), v)  # [B, T, H*hd]
        return blocks.matmul(y, self.o[...], contract=2)

    def _ffn(self, x: jax.Array) -> jax.Array:
        gate_up = blocks.matmul(x, self.gate_up[...])  # [B, T, F, 2]
        return blocks.matmul(jax.nn.silu(gate_up[..., 0]) * gate_up[..., 1], self.down[...])


class Head(nnx.Module):
    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.norm = blocks.norm_scale(spec.dim)
        if not spec.tied_embeddings:
            self.w = blocks.weight(rngs, (spec.vocab, spec.dim), ("vocab", "embed"), spec.dtype)

    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        w = table if self.spec.tied_embeddings else self.w[...]
        return blocks.matmul(blocks.rms_norm(x, self.norm[...], self.spec.norm_eps), w)  # [N, V]


def rope_angles(spec: ModelSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return blocks.rope_angles(spec.head_dim, spec.rope_theta, positions)


def tensors(spec: ModelSpec, kind: str) -> dict[str, tuple[int, ...]]:
    """Published tensor names (within `model.layers.N.` for a layer) and their shapes."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    match kind:
        case "embed":
            return {"model.embed_tokens.weight": (spec.vocab, spec.dim)}
        case "layer":
            return {
                "input_layernorm.weight": (spec.dim,),
                "self_attn.q_proj.weight": (q, spec.dim),
                "self_attn.k_proj.weight": (kv, spec.dim),
                "self_attn.v_proj.weight": (kv, spec.dim),
                "self_attn.o_proj.weight": (spec.dim, q),
                "post_attention_layernorm.weight": (spec.dim,),
                "mlp.gate_proj.weight": (spec.ffn_dim, spec.dim),
                "mlp.up_proj.weight": (spec.ffn_dim, spec.dim),
                "mlp.down_proj.weight": (spec.dim, spec.ffn_dim),
            }
        case "head":
            untied = {} if spec.tied_embeddings else {"lm_head.weight": (spec.vocab, spec.dim)}
            return {"model.norm.weight": (spec.dim,)} | untied
    raise AssertionError(kind)


def fuse(spec: ModelSpec, kind: str, published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that `tensors` names → the arrays of Embed, Layer or Head."""
    match kind:
        case "embed":
            return {"table": published["model.embed_tokens.weight"]}
        case "layer":
            return _fuse_layer(spec, published)
        case "head":
            untied = {} if spec.tied_embeddings else {"w": published["lm_head.weight"]}
            return {"norm": published["model.norm.weight"]} | untied
    raise AssertionError(kind)


def _fuse_layer(spec: ModelSpec, published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    def heads(name: str) -> np.ndarray:  # [KV, heads per KV head, hd, D]
        return published[f"self_attn.{name}.weight"].reshape(spec.kv_heads, -1, spec.head_dim, spec.dim)

    return {
        "attn_norm": published["input_layernorm.weight"],
        "qkv": np.concatenate([heads("q_proj"), heads("k_proj"), heads("v_proj")], axis=1),
        "o": published["self_attn.o_proj.weight"].reshape(spec.dim, spec.kv_heads, -1),
        "ffn_norm": published["post_attention_layernorm.weight"],
        "gate_up": np.stack([published["mlp.gate_proj.weight"], published["mlp.up_proj.weight"]], axis=1),
        "down": published["mlp.down_proj.weight"],
    }
