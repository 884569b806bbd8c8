"""Decoders of one's own, each examples/alternating.py but for one thing. `fitting` is served, the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from blitzjax.models import Family, linen
from blitzjax.models.blocks import PLAIN, Attend, Scoring
from blitzjax.models.examples import alternating_linen
from blitzjax.models.examples.alternating import Embed, Head, Layer, build
from blitzjax.types import ModelSpec

SPEC, _ = build()
Built = tuple[ModelSpec, Family]


class Table(nnx.Module):
    """Positions need no parameters, and the table is the head's, too."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jnp.zeros((spec.vocab, spec.dim), spec.dtype))

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.table[...][tokens].astype(jnp.float32) + jnp.sin(positions[..., None] / 7)


class Bare(nnx.Module):
    """A head without parameters."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        return 30 * jnp.tanh(x @ table.T.astype(jnp.float32) / 30)


class Sometimes(Layer):
    """Layers of the kind "mlp" do not attend; the queries of others are bfloat16."""

    def __init__(self, spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> None:
        super().__init__(spec, kind, rngs)
        self.kind, self.value = kind, nnx.Param(jnp.ones(spec.dim))
        if kind == "mlp":
            del self.qkv, self.out, self.attn_norm

    def __call__(self, x: jax.Array, aux: tuple[()], attend: Attend) -> jax.Array:
        if self.kind == "mlp":
            return x + self.down(jax.nn.gelu(self.up(self.ffn_norm(x) * (1 + self.value[...]))))
        return super().__call__(x, aux, lambda q, k, v, s: attend(q.astype(jnp.bfloat16), k, v, s)) * (1 + self.value[...])


def fitting() -> Built:
    """Lists are as good as tuples."""
    kinds: list[str] = ["global", "mlp", "local", "mlp", "global"]
    spec = replace(SPEC, name="fitting", layers=5, layer_kinds=kinds, tied_embeddings=True)  # type: ignore[arg-type]
    return spec, Family(Table, Sometimes, Bare)


class Stack(nn.Module):
    """A Linen list, whose members are called `layers_0`, `layers_1`."""

    sizes: tuple[int, ...]

    def setup(self) -> None:
        self.layers = [nn.Dense(size) for size in self.sizes]

    def __call__(self, x: jax.Array, *rest: object) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def nested() -> Built:
    spec, _ = alternating_linen.build()
    return replace(spec, name="nested", layer_kinds=()), Family(
        linen.embed(alternating_linen.Embed), linen.layer(lambda spec, kind: Stack((spec.ffn_dim, spec.dim))),
        linen.head(lambda spec: Stack((spec.dim, spec.vocab))))


def _layers(call: Callable[..., object] = Layer.__call__, **parts: Callable[[ModelSpec], object]) -> type[Layer]:
    """Alternating's with another `__call__`, or with attributes besides."""
    def init(self: Layer, spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> None:
        Layer.__init__(self, spec, kind, rngs)
        for name, make in parts.items():
            setattr(self, name, make(spec))

    return type("Layer", (Layer,), {"__init__": init, "__call__": call})


def _of(layer: Callable[..., nnx.Module] = Layer, embed: Callable[..., nnx.Module] = Embed, **changed: object) -> Built:
    return replace(SPEC, **changed), Family(embed, layer, Head)  # type: ignore[arg-type]


def short() -> Built:
    return _of(layer_kinds=("global", "local"))


def called_head() -> Built:
    return _of(layer_kinds=("global", "head") * 2)


def one_eos() -> Built:
    return _of(eos_token_ids=257)


def unnamed() -> Built:
    return _of(name="", vocab="272")


def spec_alone() -> ModelSpec:
    return fitting()[0]


def other_heads() -> Built:
    return _of(kv_heads=3)


def no_table() -> Built:
    return _of(tied_embeddings=True)


def of_numpy() -> Built:
    return _of(options=(("a", jnp.float32(1)),))


def rounded() -> Built:
    return _of(_layers(lambda self, x, aux, attend: Layer.__call__(self, x, aux, attend).astype(jnp.bfloat16)))


def tuples() -> Built:
    return _of(_layers(lambda self, x, aux, attend: (x, None)))


def twice() -> Built:
    return _of(_layers(lambda self, x, aux, attend: Layer.__call__(self, Layer.__call__(self, x, aux, attend), aux, attend)))


def rematerialised() -> Built:
    return _of(_layers(lambda self, x, aux, attend: jax.checkpoint(lambda x: Layer.__call__(self, x, aux, attend))(x)))


def prompts_only() -> Built:
    return _of(_layers(lambda self, x, aux, attend: x if x.shape[1] > 1 else 1 / 0))


def learned_scale() -> Built:
    def call(self: Layer, x: jax.Array, aux: tuple[()], attend: Attend) -> jax.Array:
        return Layer.__call__(self, x, aux, lambda q, k, v, s=PLAIN: attend(q, k, v, Scoring(scale=self.up.bias[0])))

    return _of(_layers(call))


def misnamed() -> Built:
    return _of(_layers(extra=lambda spec: nnx.Param(jnp.ones((2, 2)), axes=("ffn",))))


def constant() -> Built:
    return _of(_layers(mask=lambda spec: jnp.tril(jnp.ones((4, 4)))))
