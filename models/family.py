"""What a family of models is to the engine: the functions that build it and read its published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import jax
import numpy as np

from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec

if TYPE_CHECKING:
    from flax import nnx


def unpublished(*asked: object) -> NoReturn:
    raise CheckpointError("nobody publishes checkpoints of such a model")


@dataclass(frozen=True, slots=True)
class Family:
    """The free functions of one architecture. B sequences, T tokens each, N = rows that need logits.

    A kind is "embed", "head" or, of a layer, "layer" or what `ModelSpec.layer_kinds` calls it. Modules hold nothing but
    nnx.Param and run the same whatever B and T are, padding included; positions are below `ModelSpec.max_len`. A layer
    calls `attend` (see blocks.Attend) once or never, outside of jit, jax.checkpoint, scan and the like.

    embed   (spec, rngs)        → module(tokens, positions i32[B, T]) → f32[B, T, D]; its `table` Param is [V, D]
    layer   (spec, kind, rngs)  → module(x f32[B, T, D], aux, attend) → f32[B, T, D]
    head    (spec, rngs)        → module(x f32[N, D], table [V, D] or None) → f32[N, V]
    aux     (spec, positions i32[B, T]) → pytree shared by all layers of a step; holds no parameters
    tensors (spec, kind)        → published tensor name → shape; names of a layer are behind its prefix
    fuse    (spec, kind, published tensors) → the arrays of our modules
    spec    (config.json's values, name, dtype) → ModelSpec

    `tensors`, `fuse` and `spec` raise CheckpointError where nobody publishes checkpoints.
    """

    embed: Callable[[ModelSpec, nnx.Rngs], nnx.Module]
    layer: Callable[[ModelSpec, str, nnx.Rngs], nnx.Module]
    head: Callable[[ModelSpec, nnx.Rngs], nnx.Module]
    aux: Callable[[ModelSpec, jax.Array], tuple[object, ...]] = lambda spec, positions: ()
    tensors: Callable[[ModelSpec, str], dict[str, tuple[int, ...]]] = unpublished
    fuse: Callable[[ModelSpec, str, Mapping[str, np.ndarray]], dict[str, np.ndarray]] = unpublished
    spec: Callable[[Mapping[str, object], str, str], ModelSpec] = unpublished
    layer_prefix: str = "model.layers.{}."
