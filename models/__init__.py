"""Flax NNX decoders. Knows nothing of serving; `FAMILIES` maps a ModelSpec's family to the functions that build it.

A new architecture is one file here plus one line below; the engine only ever calls the functions of `Family`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from blitzjax.errors import CheckpointError
from blitzjax.models import llama
from blitzjax.types import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """The free functions of one architecture. B sequences, T tokens each, N = rows that need logits.

    embed   (spec, rngs)        → module(tokens i32[B, T]) → f32[B, T, D]; its `table` Param is [V, D]
    layer   (spec, index, rngs) → module(x f32[B, T, D], aux, attend) → f32[B, T, D]
    head    (spec, rngs)        → module(x f32[N, D], table [V, D] or None) → f32[N, V]
    aux     (spec, positions i32[B, T]) → pytree shared by all layers of a step; holds no parameters
    tensors (spec, kind)        → published tensor name → shape, for kind "embed" | "layer" | "head"
    fuse    (spec, kind, published tensors) → the arrays of our modules
    """

    embed: Callable[[ModelSpec, nnx.Rngs], nnx.Module]
    layer: Callable[[ModelSpec, int, nnx.Rngs], nnx.Module]
    head: Callable[[ModelSpec, nnx.Rngs], nnx.Module]
    aux: Callable[[ModelSpec, jax.Array], tuple[jax.Array, ...]]
    tensors: Callable[[ModelSpec, str], dict[str, tuple[int, ...]]]
    fuse: Callable[[ModelSpec, str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.Embed, llama.Layer, llama.Head, llama.rope_angles, llama.tensors, llama.fuse),
}


def family(name: str) -> Family:
    """Raises CheckpointError for a family that no file here builds."""
    if name not in FAMILIES:
        raise CheckpointError(f"model family {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
