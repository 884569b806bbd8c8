"""Our checkpoint on disk: parameters in unit order, so that loading layer by layer is one sequential read.

    DIR/manifest.json           format version, ModelSpec, where each array lies and its CRC-32
    DIR/weights.bin             unit 0 | unit 1 | ... each array 64-byte aligned
    DIR/tokenizer.json          as the `tokenizers` package reads it
    DIR/tokenizer_config.json   chat_template, bos_token, eos_token

A model without a tokenizer has neither of the last two, and its manifest says so. Invariant: a directory of this name
is complete; writers rename a finished temporary directory into place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blitzjax.engine.locations import FORMAT_VERSION, MANIFEST
from blitzjax.engine.params import LayerStore, align, fill, unit_arrays, unit_name
from blitzjax.engine.rounding import fitted
from blitzjax.errors import CheckpointError
from blitzjax.models import own
from blitzjax.types import ModelSpec, spec_from

WEIGHTS = "weights.bin"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_REPAIR = "restore the file, or delete the directory and convert the model again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One array in weights.bin; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The texts of tokenizer.json and tokenizer_config.json, as they are stored."""

    tokenizer: str
    config: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint. Holds no file open; each `load_unit` maps only its unit."""

    path: Path
    spec: ModelSpec
    entries: tuple[tuple[Entry, ...], ...]  # per unit

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads the manifest and compares sizes. Raises CheckpointError that names the first incomplete tensor."""
        manifest = _read_manifest(path)
        checkpoint = cls(path, *_parse_manifest(path, manifest))
        checkpoint._check_arrays()
        checkpoint._check_size()
        for name in (TOKENIZER, TOKENIZER_CONFIG) if manifest.get("tokenizer", True) else ():
            if not (path / name).is_file():
                raise CheckpointError(f"{path}: {name} is missing; {_REPAIR}")
        return checkpoint

    def load_unit(self, unit: int, store: LayerStore) -> None:
        """Reads unit `unit` into the store's slabs and commits it; casts if the store wants another dtype.

        Raises CheckpointError naming the first tensor whose bytes are gone or do not match their checksum; then nothing
        was committed.
        """
        assert unit_arrays(with_dtype(self.spec, store.spec.dtype), unit) == unit_arrays(store.spec, unit)
        fill(store, unit, self.read_unit(unit))
        store.commit(unit)

    def read_unit(self, unit: int) -> dict[str, np.ndarray]:
        """Name → read-only unsharded array, a view of the mapped file."""
        self._check_size()  # reading a mapping beyond a file's end would kill the process
        return {entry.name: self._read(unit, entry) for entry in self.entries[unit]}

    def _read(self, unit: int, entry: Entry) -> np.ndarray:
        data = np.memmap(self.path / WEIGHTS, np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,))
        if zlib.crc32(data) != entry.crc32:
            raise CheckpointError(f"{self.path}: {unit_name(self.spec, unit)}: {entry.name} is corrupt (checksum "
                                  f"mismatch in {WEIGHTS}); {_REPAIR}")
        return data.view(np.dtype(entry.dtype)).reshape(entry.shape)

    def _check_size(self) -> None:
        weights = self.path / WEIGHTS
        size = weights.stat().st_size if weights.is_file() else 0
        for unit, entries in enumerate(self.entries):
            for entry in entries:
                if entry.offset + entry.nbytes > size:
                    state = f"is truncated at {size} bytes" if weights.is_file() else "is missing"
                    raise CheckpointError(f"{self.path}: {WEIGHTS} {state}; {unit_name(self.spec, unit)}: {entry.name} "
                                          f"is incomplete; {_REPAIR}")

    def _check_arrays(self) -> None:
        if len(self.entries) != self.spec.units:
            raise CheckpointError(f"{self.path}: {len(self.entries)} units, the model has {self.spec.units}; {_REPAIR}")
        problems = []
        for unit, entries in enumerate(self.entries):
            found = {e.name: (e.shape, e.dtype, e.nbytes) for e in entries}
            wanted = {i.name: (i.shape, i.dtype.name, i.nbytes) for i in unit_arrays(self.spec, unit)}
            problems += [f"{unit_name(self.spec, unit)}: {name} is {found.get(name)}, should be {wanted.get(name)}"
                         for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        if problems:
            raise CheckpointError(f"{self.path}: arrays do not fit the model: {'; '.join(problems)}; {_REPAIR}")


def with_dtype(spec: ModelSpec, dtype: str) -> ModelSpec:
    """Raises CheckpointError where the model's code does not know `dtype`."""
    if dtype == "int8" and own.is_reference(spec.family):
        raise CheckpointError(f"int8 is for the built-in families; {spec.family} takes bfloat16 or float32 (engine.dtype)")
    return replace(spec, dtype=dtype)


def write(path: Path, spec: ModelSpec, units: Iterator[Mapping[str, np.ndarray]],
          tokenizer: Tokenizer | None) -> None:
    """Writes a checkpoint in the spec's dtype; `units` yields each unit's unsharded arrays in order, and is consumed one
    at a time.

    Raises CheckpointError if something is already at `path`. After a crash nothing is at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with (temporary / WEIGHTS).open("wb") as file:
            entries = [_write_unit(file, spec, unit, next(units)) for unit in range(spec.units)]
        assert next(units, None) is None, f"the model has only {spec.units} units"
        manifest = {"version": FORMAT_VERSION, "tokenizer": tokenizer is not None, "spec": asdict(spec), "units": [
            {"bytes": unit[-1].offset + unit[-1].nbytes - unit[0].offset if unit else 0,
             "arrays": [asdict(entry) for entry in unit]} for unit in entries]}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        if tokenizer is not None:
            (temporary / TOKENIZER).write_text(tokenizer.tokenizer, "utf-8")
            (temporary / TOKENIZER_CONFIG).write_text(tokenizer.config, "utf-8")
        _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_unit(file: BinaryIO, spec: ModelSpec, unit: int, arrays: Mapping[str, np.ndarray]) -> tuple[Entry, ...]:
    entries, infos = [], unit_arrays(spec, unit)
    arrays = fitted(infos, arrays)
    for info in infos:
        assert arrays[info.name].shape == info.shape, (info.name, arrays[info.name].shape, info.shape)
        data = np.ascontiguousarray(arrays[info.name], info.dtype).reshape(-1).view(np.uint8)
        start = align(file.tell())
        file.write(bytes(start - file.tell()))
        file.write(data)
        entries.append(Entry(info.name, info.shape, info.dtype.name, start, info.nbytes, zlib.crc32(data)))
    return tuple(entries)


def _publish(temporary: Path, path: Path) -> None:
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened)
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        temporary.rename(path)
    except OSError as e:
        raise CheckpointError(f"cannot write checkpoint {path}: {e.strerror}; is it there already?") from e


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint directory")
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so this is not a blitzjax checkpoint") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot read {MANIFEST}: {e}; {_REPAIR}") from e
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; "
                              "convert the model again")
    return manifest


def _parse_manifest(path: Path, manifest: Mapping[str, Any]) -> tuple[ModelSpec, tuple[tuple[Entry, ...], ...]]:
    try:
        spec = spec_from(dict(manifest["spec"]))
        entries = tuple(
            tuple(Entry(**{f.name: array[f.name] for f in fields(Entry)} | {"shape": tuple(array["shape"])})
                  for array in unit["arrays"])
            for unit in manifest["units"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: {MANIFEST} is malformed ({type(e).__name__}: {e}); {_REPAIR}") from e
    return spec, entries
