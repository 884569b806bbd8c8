"""Linen modules as units of a decoder: `Family(linen.embed(MyEmbed), linen.layer(MyLayer), linen.head(MyHead))`.

Each argument makes a Linen module from what the NNX one would get (spec; spec and kind); it is called with the same
arguments as an NNX module and gives the same result. Parameters keep their Linen names, so that a checkpoint is the
tree {"params": {"embed": ..., "layers_0": ..., "head": ...}} that these modules were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from blitzjax.types import ModelSpec


class Unit(nnx.Module):
    """One Linen module and its parameters. nn.Partitioned names become logical axes."""

    def __init__(self, module: nn.Module, rngs: nnx.Rngs, *inputs: object) -> None:
        variables = module.init(rngs.params(), *inputs)
        if variables.keys() - {"params"}:
            raise TypeError(f"{type(module).__name__} has collections {sorted(variables)}; only 'params' can be served")
        params = variables.get("params", {})
        self._module, self._names = module, tuple(params)
        for name, value in params.items():
            setattr(self, name, _as_nnx(value))

    def __call__(self, *args: object) -> jax.Array:
        params = {name: _as_linen(getattr(self, name)) for name in self._names}
        out = self._module.apply({"params": params}, *args)
        assert not isinstance(out, tuple)  # no collection is mutable
        return out


def embed(make: Callable[[ModelSpec], nn.Module]) -> Callable[[ModelSpec, nnx.Rngs], nnx.Module]:
    def build(spec: ModelSpec, rngs: nnx.Rngs) -> nnx.Module:
        ids = jnp.zeros((1, 1), jnp.int32)
        return Unit(make(spec), rngs, ids, ids)

    return build


def layer(make: Callable[[ModelSpec, str], nn.Module],
          aux: Callable[[ModelSpec, jax.Array], tuple[jax.Array, ...]] = lambda spec, positions: ()
          ) -> Callable[[ModelSpec, str, nnx.Rngs], nnx.Module]:
    """`aux` is the family's."""
    def build(spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> nnx.Module:
        x = jnp.zeros((1, 1, spec.dim), jnp.float32)
        return Unit(make(spec, kind), rngs, x, aux(spec, jnp.zeros((1, 1), jnp.int32)), _attend_nothing)

    return build


def head(make: Callable[[ModelSpec], nn.Module]) -> Callable[[ModelSpec, nnx.Rngs], nnx.Module]:
    def build(spec: ModelSpec, rngs: nnx.Rngs) -> nnx.Module:
        table = jnp.zeros((spec.vocab, spec.dim), spec.dtype) if spec.tied_embeddings else None
        return Unit(make(spec), rngs, jnp.zeros((1, spec.dim), jnp.float32), table)

    return build


def _attend_nothing(q: jax.Array, k: jax.Array, v: jax.Array, *scoring: object) -> jax.Array:
    del k, v, scoring
    return jnp.zeros((*q.shape[:2], q.shape[2] * q.shape[3]), jnp.float32)


def _as_nnx(value: object) -> nnx.Param | nnx.Dict:
    if isinstance(value, Mapping):
        return nnx.Dict({name: _as_nnx(child) for name, child in value.items()})
    if isinstance(value, nn.Partitioned):
        return nnx.Param(value.value, axes=value.names)
    return nnx.Param(value)


def _as_linen(value: nnx.Param | nnx.Dict) -> object:
    return value[...] if isinstance(value, nnx.Param) else {name: _as_linen(child) for name, child in value.items()}
