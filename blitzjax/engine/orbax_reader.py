"""Reads what Orbax wrote - an NNX state or a Linen params tree - as a ModelSpec and units of arrays.

A tree may use the names of our modules (`embed`, `layers`, `head` at its top; leaves as in the module) or the
published names with Flax's leaves (`kernel` is [in, out]). Layers are `layers/7/...`, `layers_7/...`, or scanned:
`layers/...` with a leading layer axis. Invariant: every leaf is used exactly once, or opening fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from blitzjax.engine import published
from blitzjax.engine.params import unit_arrays, unit_kind
from blitzjax.errors import CheckpointError
from blitzjax.models import family
from blitzjax.models.family import unpublished
from blitzjax.types import ModelSpec

Path_: TypeAlias = tuple[str, ...]
MARK = "_METADATA"  # every tree that Orbax wrote has this file
_ITEMS = ("default", "params", "model", "state")  # what CheckpointManager's users name the parameters
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Flax → published


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a layer or of the model: leaf `number` of the tree, or slice `layer` of it when it is scanned."""

    number: int
    shape: tuple[int, ...]
    layer: int | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class Orbax:
    """An opened checkpoint whose leaves are known to fit `spec`. `scratch` is where scanned arrays are unpacked."""

    path: Path
    spec: ModelSpec
    structure: jax.tree_util.PyTreeDef
    leaves: Mapping[str, Leaf]
    own_names: bool
    scratch: Path
    together: Mapping[str, Sequence[int]]  # name → leaves of its unit that are not scanned
    _unpacked: dict[int, np.ndarray] = field(default_factory=dict)
    _unit: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, spec: ModelSpec, scratch: Path) -> Orbax:
        """`path` holds a tree, or steps of one (the last counts). Raises CheckpointError listing every mismatch."""
        tree = find(path.absolute())  # Orbax finds nothing under another
        assert tree is not None, f"{path} was not written by Orbax"
        flat, structure = _flatten(tree)
        own = [{name: shape for name, (_, shape) in _own(spec, unit).items()} for unit in range(spec.units)]
        leaves, own_names = _read_names(flat, family(spec.family).tensors is unpublished, set().union(*own))
        wanted = own if own_names else published.wanted(spec, partial(published.names, spec))
        published.check(tree, spec, wanted, {name: leaf.shape for name, leaf in leaves.items()})
        together: dict[str, list[int]] = {}
        for names in wanted:
            numbers = [leaves[name].number for name in names if leaves[name].layer is None]
            together |= dict.fromkeys(names, numbers)
        return cls(tree, spec, structure, leaves, own_names, scratch, together)

    def units(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each unit, in order, as stored."""
        if not self.own_names:
            yield from published.units(self.spec, partial(published.names, self.spec), self._read)
            return
        for unit in range(self.spec.units):
            yield {name: self._read(stored) for stored, (name, _) in _own(self.spec, unit).items()}

    def _read(self, name: str) -> np.ndarray:
        leaf = self.leaves[name]
        if leaf.layer is not None:
            array = self._scanned(leaf.number)[leaf.layer]
        else:
            if leaf.number not in self._unit:
                self._unit.clear()
                self._unit.update(self._restore(self.together[name]))
            array = self._unit[leaf.number]
        return array.T if leaf.transposed else array

    def _restore(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """These leaves; the others are not read. Orbax goes through the whole tree each time."""
        wanted = set(numbers)
        tree = jax.tree.unflatten(
            self.structure, [0 if i in wanted else ocp.PLACEHOLDER for i in range(self.structure.num_leaves)])
        asked = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                restored = checkpointer.restore(self.path, args=ocp.args.PyTreeRestore(item=tree, restore_args=asked))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.path} cannot be read: {e}") from e
        found = jax.tree.leaves(restored)
        return {number: np.asarray(found[number]) for number in numbers}

    def _scanned(self, number: int) -> np.ndarray:
        """The stack, in a file: Orbax has it as one compressed piece, which is unpacked once and not kept in memory."""
        if number not in self._unpacked:
            stack = self._restore([number])[number]
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                np.ascontiguousarray(stack).tofile(file)
                self._unpacked[number] = np.memmap(file, stack.dtype, "r", shape=stack.shape)
        return self._unpacked[number]


def find(path: Path) -> Path | None:
    """The tree in `path`: itself, the parameters' item of a step, or those of its last step."""
    if (path / MARK).is_file():
        return path
    for item in _ITEMS:
        if (path / item / MARK).is_file():
            return path / item
    steps = sorted((int(child.name), child) for child in path.iterdir() if child.name.isdecimal() and child.is_dir())
    return find(steps[-1][1]) if steps else None


def _own(spec: ModelSpec, unit: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored name → name in the module, shape."""
    prefix = f"layers.{unit}." if unit < spec.layers else f"{unit_kind(spec, unit)}."
    return {prefix + info.name: (info.name, info.shape) for info in unit_arrays(spec, unit)}


def _flatten(path: Path):
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError(f"its {MARK} is damaged")
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is not a readable Orbax checkpoint: {e}") from e
    return jax.tree_util.tree_flatten_with_path(metadata.tree, is_leaf=lambda node: not isinstance(node, dict | list | tuple))


def _read_names(tree: Sequence[tuple[tuple[object, ...], object]], own_names: bool,
                own: Set[str]) -> tuple[dict[str, Leaf], bool]:
    """Every array by its full name, scanned ones once per layer; and whether the names are those of our modules, as
    they must be if `own_names`. `own` are those that our modules have.
    """
    flat = [(tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys), number, tuple(leaf.shape))
            for number, (keys, leaf) in enumerate(tree)
            if isinstance(leaf, ocp.metadata.ArrayMetadata)]  # optimizers have empty states besides
    if any(names[0] == "params" for names, *_ in flat):  # beside an optimizer's state, say
        flat = [(names, number, shape) for names, number, shape in flat if names[0] == "params"]
    while all(names[0] == "params" for names, *_ in flat):
        flat = [(names[1:], number, shape) for names, number, shape in flat]
    flat = [(_numbered(names), number, shape) for names, number, shape in flat]
    own_names = own_names or {names[0] for names, *_ in flat} <= {"embed", "layers", "head"}
    leaves: dict[str, Leaf] = {}
    for names, number, shape in flat:
        for full, leaf in _named(names, Leaf(number, shape, None, False)):
            full = full if full in own else full.removesuffix(".value")  # NNX before 0.12, nn.Partitioned
            leaves |= dict([(full, leaf) if own_names else _as_published(full, leaf)])
    return leaves, own_names


def _numbered(names: Path_) -> Path_:
    """The model's `layers_7` is `layers`, `7`; a module's own are left alone."""
    for at, word in enumerate(names):
        if word in ("embed", "layers", "head"):
            break
        if word.startswith("layers_") and word.removeprefix("layers_").isdecimal():
            return (*names[:at], *word.split("_"), *names[at + 1:])
    return names


def _named(names: Path_, leaf: Leaf) -> Iterator[tuple[str, Leaf]]:
    at = names.index("layers") + 1 if "layers" in names and names[0] not in ("embed", "head") else 0
    if at == 0 or names[at].isdecimal() or not leaf.shape:
        yield ".".join(names), leaf
        return
    for layer in range(leaf.shape[0]):
        yield ".".join((*names[:at], str(layer), *names[at:])), replace(leaf, shape=leaf.shape[1:], layer=layer)


def _as_published(name: str, leaf: Leaf) -> tuple[str, Leaf]:
    head, _, last = name.rpartition(".")
    if last == "kernel" and len(leaf.shape) == 2:
        leaf = replace(leaf, shape=leaf.shape[::-1], transposed=True)
    return f"{head}.{_LEAVES.get(last, last)}", leaf
