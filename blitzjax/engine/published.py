"""Which tensors a published checkpoint must have, whatever file format it is in, and how they become our arrays.

Readers of a format list what they found and read one tensor at a time; names and shapes are compared here, in one
place, so that everything wrong with a checkpoint is said in one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from blitzjax.engine.params import unit_kind, unit_name
from blitzjax.errors import CheckpointError
from blitzjax.models import family
from blitzjax.types import ModelSpec

Shape: TypeAlias = tuple[int, ...]

HEAD = "lm_head.weight"
# Buffers that older versions of transformers saved beside the parameters.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def names(spec: ModelSpec, unit: int) -> dict[str, str]:
    """Name within the unit, as `Family.tensors` has it → name in the whole checkpoint."""
    found = family(spec.family)
    prefix = found.layer_prefix.format(unit) if unit < spec.layers else ""
    return {name: prefix + name for name in found.tensors(spec, unit_kind(spec, unit))}


def wanted(spec: ModelSpec, stored: Callable[[int], Mapping[str, str]]) -> list[dict[str, Shape]]:
    """Per unit: stored name → shape. `stored` is `names`, or the same table in another format's words."""
    shapes = (family(spec.family).tensors(spec, unit_kind(spec, unit)) for unit in range(spec.units))
    return [{stored(unit)[name]: shape for name, shape in tensors.items()} for unit, tensors in enumerate(shapes)]


def units(spec: ModelSpec, stored: Callable[[int], Mapping[str, str]],
          read: Callable[[str], np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each unit, in order; no reference to a unit is kept while the next one is read."""
    for unit in range(spec.units):
        yield family(spec.family).fuse(spec, unit_kind(spec, unit),
                                       {name: read(stored_name) for name, stored_name in stored(unit).items()})


def check(path: Path, spec: ModelSpec, wanted: Sequence[Mapping[str, Shape]], found: Mapping[str, Shape],
          problems: Sequence[str] = ()) -> None:
    """Raises one CheckpointError listing every missing, misshapen or unexpected tensor, and the reader's `problems`."""
    said, known = list(problems), set[str]()
    for unit, tensors in enumerate(wanted):
        known |= tensors.keys()
        for name, shape in tensors.items():
            if name not in found:
                said.append(f"{name} is missing ({unit_name(spec, unit)})")
            elif found[name] != shape:
                said.append(f"{name} has shape {found[name]}, should be {shape} ({unit_name(spec, unit)})")
    said += [f"{name} is unexpected" for name in sorted(found.keys() - known) if not harmless(spec, name)]
    if said:
        raise CheckpointError(f"{path} does not fit a {spec.family} model of {spec.layers} layers, "
                              f"{len(said)} problems: {'; '.join(said)}")


def harmless(spec: ModelSpec, name: str) -> bool:
    """A buffer, or the copy of a tied embedding."""
    return name.endswith(_BUFFERS) or (spec.tied_embeddings and name == HEAD)
