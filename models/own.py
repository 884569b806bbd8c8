"""Your own decoder: what `blitzjax serve my_package.my_model:build --checkpoint DIR` imports, in every process.

`build()` returns a ModelSpec and a Family: `embed`, `layer` and `head` make NNX modules, as in examples/alternating.py
(linen.py adapts Linen ones); `aux` is needed by rotary models only. Parameters come from an Orbax checkpoint whose tree
is {"embed": ..., "layers": [...], "head": ...} with each module's own names (see engine/orbax_reader.py). A Param may
say which logical axis each dimension is, `nnx.Param(values, axes=("ffn", None))` or nnx.Linear's `kernel_metadata`:
"vocab", "kv_heads" and "ffn" are divided over an instance's devices, everything else is on all of them.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec

if TYPE_CHECKING:
    from blitzjax.models import Family


def is_reference(model: str) -> bool:
    """Whether `model` reads `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) is not None


@functools.cache
def load(reference: str) -> tuple[ModelSpec, Family]:
    """Calls what `reference` names; the spec's family is `reference`. Raises CheckpointError if that does not work."""
    module, _, function = reference.partition(":")
    try:
        spec, family = getattr(importlib.import_module(module), function)()
    except Exception as e:  # the user's code may raise anything
        raise CheckpointError(f"cannot build the model {reference}: {type(e).__name__}: {e}") from e
    return replace(spec, family=reference), family


def package(reference: str) -> str:
    """The package that holds the model's code, or its one module."""
    module = reference.partition(":")[0]
    return module.rpartition(".")[0] or module
