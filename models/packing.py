"""How do the tensors of a published checkpoint hold quantised matrices? As its config.json says; each format has a file.

A packing names the type and the suffix of a matrix's values, and those of its scales; `shape` is the matrix's, None if
such values are none, `scales_shapes` are those that its scales may have. `dequantize` gives exact products, rounded once.
Weights only: a model computes what its dequantised weights give, whatever a checkpoint says of activations and KV, whose
scales are `unused`. Invariant: a packing that is not understood raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from blitzjax.models import fp8
from blitzjax.models.config import Config
from blitzjax.models.fp8 import FP8
from blitzjax.models.mxfp4 import MXFP4

Packing: TypeAlias = FP8 | MXFP4

_METHODS: Mapping[str, Callable[[Config], Packing]] = {
    "mxfp4": lambda settings: MXFP4(), "fp8": fp8.read, "compressed-tensors": fp8.read_groups}


def read(config: Config) -> Packing | None:
    """None: nothing is quantised. Raises CheckpointError naming what is not supported."""
    for key in ("quantization_config", "compression_config"):
        if given := config.get(key):
            settings = Config(given, f"{config.where}: {key}")
            settings.only("quant_method", *_METHODS, instead=f"{', '.join(_METHODS)} with float8 weights, "
                                                             "a copy of the model in bfloat16, float16 or float32")
            return _METHODS[settings.need("quant_method")](settings)
    return None
