"""What does a model's code say to the engine: which modules it is made of, and which arrays each of them holds.

Flax, which takes half a second to import, is needed to trace a module, and to list its arrays for the first time: the
list is kept on disk. Invariant: a kept list's name is a digest of all that it follows from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from blitzjax import models
from blitzjax.engine.executables import checked, keep
from blitzjax.engine.locations import arrays_in, default_cache, mark_used
from blitzjax.errors import CheckpointError
from blitzjax.models import family, own
from blitzjax.types import ModelSpec

if TYPE_CHECKING:
    from flax import nnx

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One parameter array of a unit, unsharded. `axes` has a logical axis name (or None) per dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@functools.lru_cache(maxsize=64)
def bind(spec: ModelSpec, kind: str) -> Callable[[Mapping[str, jax.Array]], nnx.Module]:
    """A function that rebuilds the module of `kind` (see `params.unit_kind`) from its arrays, inside a jit."""
    from flax import nnx

    graph, state = _abstract(spec, kind)

    def rebuild(arrays: Mapping[str, jax.Array]) -> nnx.Module:
        flat = [(path, variable.replace(arrays[_name(path)])) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    return rebuild


@functools.lru_cache(maxsize=64)
def _abstract(spec: ModelSpec, kind: str) -> tuple[nnx.GraphDef, nnx.State]:
    from flax import nnx

    model = family(spec.family)
    build = {"embed": lambda: model.embed(spec, nnx.Rngs(0)),
             "head": lambda: model.head(spec, nnx.Rngs(0))}.get(kind, lambda: model.layer(spec, kind, nnx.Rngs(0)))
    module = nnx.eval_shape(build)
    graph, state = nnx.split(module)
    others = [_name(path) for path, variable in nnx.to_flat_state(state) if not isinstance(variable, nnx.Param)]
    others += [_name(path) for path, value in nnx.iter_graph(module) if isinstance(value, jax.core.Tracer)]  # flax hides them
    if others:
        raise CheckpointError(f"{spec.family}: {kind} holds more than nnx.Param: {', '.join(others)}; make constants in "
                              "__call__, and leave out dropout and what only training needs")
    return graph, state


@functools.lru_cache(maxsize=64)
def kind_arrays(spec: ModelSpec, kind: str) -> tuple[ArrayInfo, ...]:
    """The arrays of every unit of `kind`; derived from the model code without allocating anything.

    Those of somebody's own model, whose code may be anywhere, are not kept.
    """
    path = None if own.is_reference(spec.family) else arrays_in(default_cache()) / f"{_digest(spec, kind)}.json"
    found = None if path is None else _kept(path)
    if found is None:
        found = _listed(spec, kind)
        if path is not None:
            _keep(path, found)
    return found


def _listed(spec: ModelSpec, kind: str) -> tuple[ArrayInfo, ...]:
    from flax import nnx

    _, state = _abstract(spec, kind)
    return tuple(
        ArrayInfo(_name(path), tuple(variable.get_value().shape), np.dtype(variable.get_value().dtype),
                  tuple(variable.get_metadata().get("axes") or (None,) * variable.get_value().ndim))
        for path, variable in nnx.to_flat_state(state))


def _name(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))


def _kept(path: Path) -> tuple[ArrayInfo, ...] | None:
    try:
        rows = json.loads(checked(path.read_bytes()))
        mark_used(path)
    except (OSError, ValueError):
        return None
    return tuple(ArrayInfo(name, tuple(shape), np.dtype(dtype), tuple(axes)) for name, shape, dtype, axes in rows)


def _keep(path: Path, arrays: tuple[ArrayInfo, ...]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, json.dumps([(a.name, a.shape, a.dtype.name, a.axes) for a in arrays]).encode())
    except OSError as e:
        log.warning("%s cannot be kept, so the next start lists these arrays again: %s", path, e)


def _digest(spec: ModelSpec, kind: str) -> str:
    return hashlib.sha256("\n".join([_code(), repr(replace(spec, name="")), kind]).encode()).hexdigest()[:24]


@functools.cache
def _code() -> str:
    """Of every family, and of what lists its arrays."""
    files = [*sorted(Path(models.__file__).parent.glob("*.py")), Path(__file__)]
    return "\n".join([jax.__version__, metadata.version("flax"), *(file.read_text("utf-8") for file in files)])
