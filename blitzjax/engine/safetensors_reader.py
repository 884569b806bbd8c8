"""Reads a Hugging Face directory as a ModelSpec and units of arrays: config.json and one or more .safetensors files.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). Quantised matrices are dequantised to the dtype that they will have.
Invariant: tensors are mapped one at a time, never read ahead.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import ml_dtypes
import numpy as np

from blitzjax.engine import published
from blitzjax.engine.hf_config import read_packing, read_spec
from blitzjax.errors import CheckpointError
from blitzjax.models.packing import Packing
from blitzjax.types import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_STORED = _DTYPES | {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}  # by quantised matrices
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_BEHIND_IMAGES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
                  "model.language_model.": "model."}  # since 2025
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library bounds it
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies; `offset` counts from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        return np.memmap(self.file, _STORED[self.dtype], "r", self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix of `shape` that is stored as values and scales, and will be `dtype`; without scales no directory opens."""

    packing: Packing
    values: Stored
    scales: Stored | None
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        assert self.scales is not None
        return self.packing.dequantize(self.values.read(), self.scales.read(), np.dtype(self.dtype))


Tensors: TypeAlias = Mapping[str, Stored | Quantised]


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """An opened directory whose tensors are known to fit `spec`."""

    path: Path
    spec: ModelSpec
    tensors: Tensors

    @classmethod
    def open(cls, path: Path, name: str, dtype: str) -> HuggingFace:
        """Raises CheckpointError listing every missing, unexpected or misshapen tensor and every missing file."""
        spec = read_spec(path, name, dtype)
        found, problems = _read_headers(path)
        stored = _with_prefix(spec, _of_text(found))
        packing = read_packing(path)
        tensors, unmatched = _unpacked(packing, stored, dtype) if packing else (stored, [])
        spec = replace(spec, tied_embeddings=spec.tied_embeddings and not _has_own_head(spec, tensors))
        problems += unmatched + [
            f"{name} has dtype {t.dtype}, supported are {', '.join(_DTYPES)}" for name, t in tensors.items()
            if isinstance(t, Stored) and t.dtype not in _DTYPES and not published.harmless(spec, name)]
        wanted = published.wanted(spec, partial(published.names, spec))
        published.check(path, spec, wanted, {name: t.shape for name, t in tensors.items()}, problems)
        return cls(path, spec, tensors)

    @staticmethod
    def present(path: Path) -> bool:
        return any(path.glob("*.safetensors")) or (path / INDEX).is_file()

    def units(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each unit, in order: bfloat16, float16 or float32, as stored, or dequantised to the spec's."""
        return published.units(self.spec, partial(published.names, self.spec), lambda name: self.tensors[name].read())


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises CheckpointError when it is not one, or is cut off."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length, = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors = {name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                   for name, entry in header.items()}
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise CheckpointError(f"{file} is not a readable safetensors file ({e}); {_AGAIN}") from e
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        stored = tensors[name]
        if end > size:
            raise CheckpointError(f"{file} is truncated at {size} bytes: {name} is incomplete; {_AGAIN}")
        if stored.dtype in _STORED and end - stored.offset != _nbytes(stored):
            raise CheckpointError(f"{file}: {name} has {end - stored.offset} bytes for shape {stored.shape}; {_AGAIN}")
    return tensors


def _with_prefix(spec: ModelSpec, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """The names of the whole model where those of its trunk were published alone: `h.0...` for `transformer.h.0...`."""
    embedding = next(iter(published.names(spec, spec.embed_unit).values()))
    prefix, _, bare = embedding.partition(".")
    if embedding in tensors or bare not in tensors:
        return tensors
    return {name if name == published.HEAD else f"{prefix}.{name}": stored for name, stored in tensors.items()}


def _of_text(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """What is behind a vision tower, if there is one, under the names of a model without one."""
    def plain(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in _BEHIND_IMAGES.items() if name.startswith(old)), name)

    return {plain(name): stored for name, stored in tensors.items() if not name.startswith(_IMAGES)}


def _unpacked(packing: Packing, tensors: Mapping[str, Stored], dtype: str) -> tuple[Tensors, list[str]]:
    """With every quantised matrix instead of its values and scales; and what is wrong with scales."""
    found: dict[str, Stored | Quantised] = {n: t for n, t in tensors.items() if not n.endswith(packing.unused)}
    problems = []
    for values_name, values in tensors.items():
        shape = packing.shape(values.shape)
        if values.dtype != packing.values_type or not values_name.endswith(packing.values_suffix) or shape is None:
            continue
        name = values_name.removesuffix(packing.values_suffix)
        named = [name + suffix for suffix in packing.scale_suffixes]
        scales_name = next((one for one in named if one in tensors), named[0])
        scales = tensors.get(scales_name)
        if scales is None:
            problems.append(f"{scales_name} is missing (of {values_name})")
        elif scales.dtype not in packing.scale_types:
            problems.append(f"{scales_name} has dtype {scales.dtype}, supported are {', '.join(packing.scale_types)}")
        elif scales.shape not in (fitting := packing.scales_shapes(values.shape)):
            problems.append(f"{scales_name} has shape {scales.shape}, should be {fitting[0]} (of {values_name})")
        for used in (values_name, scales_name):
            found.pop(used, None)
        found[name] = Quantised(packing, values, scales, shape, dtype)
    return found, problems


def _has_own_head(spec: ModelSpec, tensors: Tensors) -> bool:
    """Whether there is a head that is not the embedding, whatever config.json says; transformers believes it, too."""
    head, table = tensors.get(published.HEAD), tensors.get(next(iter(published.names(spec, spec.embed_unit).values())))
    if head is None or table is None:
        return False
    if isinstance(head, Quantised) or isinstance(table, Quantised):
        return type(head) is not type(table)
    if head.dtype not in _DTYPES:
        return False
    if (head.shape, head.dtype) != (table.shape, table.dtype):
        return True
    own, shared = (np.memmap(t.file, np.uint8, "r", t.offset, (_nbytes(t),)) for t in (head, table))
    return not np.array_equal(own, shared)


def _nbytes(stored: Stored) -> int:
    return int(np.prod(stored.shape, dtype=np.int64)) * _STORED[stored.dtype].itemsize


def _read_headers(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Tensors of all shards, and what is wrong with the set of shards. As in transformers a file of all goes before an
    index, which may be left from an earlier save.
    """
    if (path / SINGLE).is_file() or not (path / INDEX).is_file():
        files = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
        return {name: t for file in files for name, t in read_header(file).items()}, []
    try:
        placed = dict(json.loads((path / INDEX).read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path / INDEX} is not readable ({e!r}); {_AGAIN}") from e
    tensors: dict[str, Stored] = {}
    problems = []
    for shard in sorted(set(placed.values())):
        if (path / shard).is_file():
            tensors |= read_header(path / shard)
        else:
            problems.append(f"the file {shard} is missing")
    return tensors, problems
