"""A device with memory of its own loads a program, and plans what it calls, when it first runs: no request waits for that."""

from __future__ import annotations

import jax
import numpy as np

from blitzjax.engine.stages import Stages


def run_each(stages: Stages) -> None:
    """Runs every compiled stage once, on zeros. Needs memory for one layer: its weights, and its KV in the largest batch.

    Raises jax.errors.JaxRuntimeError where that is not free.
    """
    zeros = _Zeros(stages)
    for compiled, args in stages.compiled():
        jax.block_until_ready(compiled(*jax.tree.map(zeros, args)))


class _Zeros:
    """Arrays of zeros. Those of a decode batch's size are made on the device and not kept, all others made once."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._batches = {spec: (rows, context, which) for rows in stages.shapes.batches for context in stages.shapes.contexts
                         for which, spec in enumerate(stages.kv_specs(rows, context))}
        self._kept: dict[jax.ShapeDtypeStruct, jax.Array] = {}

    def __call__(self, spec: jax.ShapeDtypeStruct) -> jax.Array:
        if spec in self._batches:
            rows, context, which = self._batches[spec]
            return self._stages.blank(rows, context)[which]
        if spec not in self._kept or self._kept[spec].is_deleted():  # it was donated
            self._kept[spec] = jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
        return self._kept[spec]
