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
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec, spec_from

if TYPE_CHECKING:
    from blitzjax.models import Family


def is_reference(model: str) -> bool:
    """Whether `model` reads `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) is not None


def load(reference: str) -> tuple[ModelSpec, Family]:
    """Calls what `reference` names; the spec's family is `reference`. Raises CheckpointError if that does not work."""
    spec, family, _ = _imported(reference)
    return spec, family


def check_unchanged(reference: str) -> None:
    """Raises CheckpointError if a file beside or below the model's has changed since this process imported it."""
    before = _imported(reference)[2]
    changed = sorted(file for file, stamp in before.items() if _stamp(file) != stamp)
    if changed:
        raise CheckpointError(f"{', '.join(changed)} has changed since {reference} was imported here; start the cluster again")


@functools.cache
def _imported(reference: str) -> tuple[ModelSpec, Family, Mapping[str, object]]:
    """Spec, family, and the files with the code of both."""
    module, _, function = reference.partition(":")
    try:
        imported = importlib.import_module(module)
        built = getattr(imported, function)()
        if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], ModelSpec)):
            raise TypeError(f"{function}() must return a ModelSpec and a Family, got {built!r:.200}")
        spec, family = built
        spec = spec_from(json.loads(json.dumps(asdict(replace(spec, family=reference)))))  # lists become tuples
        hash(spec)
    except Exception as e:  # the user's code may raise anything
        raise CheckpointError(f"cannot build the model {reference}: {type(e).__name__}: {e}") from e
    folder = os.path.dirname(imported.__file__ or "")
    files = {file for each in [*sys.modules.values()] if (file := getattr(each, "__file__", None)) and file.startswith(folder)}
    return spec, family, {file: _stamp(file) for file in files}


def _stamp(file: str) -> object:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
