"""Where do an instance's parameters live? One contiguous slab of bytes per unit and device, and arrays that view it.

Slabs are what disk readers and the multicast write into; `LayerStore.commit` turns a full slab into sharded jax.Arrays
without copying on CPU; a host copy stays bytes until it is used. Where devices have memory of their own, an instance's
slabs are dropped once its arrays are there, and read back for whoever asks. Invariant: units [0, store.units) are
committed, and their slabs are never written again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from blitzjax.engine.modules import ArrayInfo, kind_arrays
from blitzjax.engine.rounding import fitted
from blitzjax.transfer import staging
from blitzjax.transfer.pieces import digest
from blitzjax.types import ModelSpec

_READ_BACK_UNITS = 2  # a multicast source sends one and prepares the next
ALIGNMENT_BYTES = 64  # XLA:CPU aliases host memory only at this alignment
TP_AXIS = "tp"
_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Python's mmap does not name it


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """The one place that maps logical axes to the mesh. An axis that does not divide by `tp` is replicated."""

    tp: int
    sharded: tuple[str, ...] = ("vocab", "kv_heads", "ffn")

    def dimension(self, info: ArrayInfo) -> int | None:
        """The dimension of `info` that is split over the lanes, if any."""
        for dim, (axis, size) in enumerate(zip(info.axes, info.shape, strict=True)):
            if axis in self.sharded and size % self.tp == 0:
                return dim
        return None

    def partition(self, info: ArrayInfo) -> PartitionSpec:
        dim = self.dimension(info)
        return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, TP_AXIS)

    def local_shape(self, info: ArrayInfo) -> tuple[int, ...]:
        dim = self.dimension(info)
        return tuple(size // self.tp if d == dim else size for d, size in enumerate(info.shape))

    def local(self, info: ArrayInfo, array: np.ndarray, lane: int) -> np.ndarray:
        """The part of the unsharded `array` that device `lane` holds, as a view."""
        dim = self.dimension(info)
        if dim is None:
            return array
        size = info.shape[dim] // self.tp
        return array[(slice(None),) * dim + (slice(lane * size, (lane + 1) * size),)]


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """How the arrays of one unit lie in a slab; the same for every lane.

    arrays   a0        a1            a2
    slab     [#######..|############.|####....]   offsets are multiples of 64, so is slab_bytes
    """

    arrays: tuple[ArrayInfo, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    slab_bytes: int

    def views(self, slab: np.ndarray) -> dict[str, np.ndarray]:
        """Name → this lane's array as a view of `slab` uint8[slab_bytes]."""
        views = {}
        for info, shape, offset in zip(self.arrays, self.local_shapes, self.offsets, strict=True):
            nbytes = math.prod(shape) * info.dtype.itemsize
            views[info.name] = slab[offset:offset + nbytes].view(info.dtype).reshape(shape)
        return views


def unit_kind(spec: ModelSpec, unit: int) -> str:
    """Units of one kind have the same arrays and run the same code: "embed", "head", the kind of a layer."""
    assert 0 <= unit < spec.units, unit
    if unit >= spec.layers:
        return "embed" if unit == spec.embed_unit else "head"
    return spec.layer_kinds[unit] if spec.layer_kinds else "layer"


def unit_name(spec: ModelSpec, unit: int) -> str:
    """As error messages say it: "embed", "layer 7" (counted from 0), "head"."""
    return f"layer {unit}" if unit < spec.layers else unit_kind(spec, unit)


def unit_arrays(spec: ModelSpec, unit: int) -> tuple[ArrayInfo, ...]:
    """The arrays of a unit in slab order."""
    return kind_arrays(spec, unit_kind(spec, unit))


def unit_bytes(spec: ModelSpec, unit: int) -> int:
    return sum(info.nbytes for info in unit_arrays(spec, unit))


def model_bytes(spec: ModelSpec) -> int:
    """Bytes of all parameters, unsharded and without padding."""
    return sum(unit_bytes(spec, unit) for unit in range(spec.units))


def layout(spec: ModelSpec, unit: int, tp: int) -> UnitLayout:
    return _kind_layout(spec, unit_kind(spec, unit), tp)


@functools.lru_cache(maxsize=64)
def _kind_layout(spec: ModelSpec, kind: str, tp: int) -> UnitLayout:
    rules, arrays = ShardingRules(tp), kind_arrays(spec, kind)
    shapes = tuple(rules.local_shape(info) for info in arrays)
    offsets, end = [], 0
    for info, shape in zip(arrays, shapes, strict=True):
        offsets.append(end)
        end = align(end + math.prod(shape) * info.dtype.itemsize)
    return UnitLayout(arrays, shapes, tuple(offsets), max(end, ALIGNMENT_BYTES))  # also of a unit without parameters


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _allocate(nbytes: int) -> np.ndarray:
    """uint8[nbytes] of zeros at the start of a page, given back to the system when the last view is gone.

    In huge pages as far as whole ones fit, where there are some: what reads it all, as each step does, is faster. Private
    memory: to fill it for the first time costs an eighth less than the shared kind that is mmap's default; and all pages at
    once, for all are written soon: another eighth.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped = np.frombuffer(memory, np.uint8)
    begin = -mapped.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    with contextlib.suppress(OSError):  # before Linux 5.14: pages come one by one
        memory.madvise(_MADV_POPULATE_WRITE, begin, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    return mapped[begin : begin + nbytes]


class LayerStore:
    """The parameters of one instance on its devices, or a model's copy in host memory. One owner commits, in unit
    order; others may read `params`.
    """

    def __init__(self, spec: ModelSpec, devices: Sequence[jax.Device], own_memory: bool | None = None) -> None:
        """`own_memory`: see `staging.has_own_memory`; None: as that says."""
        assert devices
        self.spec = spec
        self.mesh = Mesh(np.array(devices), (TP_AXIS,), axis_types=(AxisType.Auto,))
        self.rules = ShardingRules(len(devices))
        self.units = 0  # units [0, units) are committed
        self.is_copy = False  # kept in host memory only
        self._devices = tuple(devices)
        self.own_memory = staging.has_own_memory(devices[0]) if own_memory is None else own_memory
        self._read_back: dict[tuple[int, int], np.ndarray] = {}  # slabs of committed units, the latest last
        self._reading = threading.RLock()
        self._slabs: dict[tuple[int, int], np.ndarray] = {}
        self._params: list[dict[str, jax.Array]] = []
        self._checksums: dict[tuple[int, int], int] = {}
        self._early: dict[str, jax.Array] = {}  # the embedding, before its turn

    @property
    def lanes(self) -> int:
        return len(self._devices)

    def layout(self, unit: int) -> UnitLayout:
        return layout(self.spec, unit, self.lanes)

    def slab_bytes(self, unit: int) -> int:
        """Bytes per lane; the same for all lanes."""
        return self.layout(unit).slab_bytes

    def slab(self, unit: int, lane: int) -> np.ndarray:
        """uint8[slab_bytes(unit)], page aligned, allocated on first use. Do not write to it after `commit(unit)`.

        Of an instance whose slabs were dropped, a copy from the device: it takes time, and only the latest stay here.
        """
        assert 0 <= lane < self.lanes, lane
        found = self._slabs.get((unit, lane))
        if found is None and unit < self.units:
            return self._from_device(unit, lane)
        if found is None:
            found = self._slabs[unit, lane] = _allocate(self.slab_bytes(unit))
        return found

    def commit(self, unit: int, checksums: tuple[int, ...] = ()) -> None:
        """All lanes of `unit` are written: afterwards `units == unit + 1` and, but in a copy, `params(unit)` is valid.

        `checksums` are the lanes' digests where they are known already.
        """
        assert unit == self.units, f"unit {unit} committed, unit {self.units} is next"
        self._checksums.update({(unit, lane): value for lane, value in enumerate(checksums)})
        if not self.is_copy:
            self._params.append(self._arrays(unit))
        if unit == self.spec.embed_unit:
            self._early = {}
        self.units = unit + 1
        if not self.is_copy:
            self._drop(unit)

    def keep(self) -> None:
        """What is here, and what will be committed, is a host copy from now on: no array is left."""
        with self._reading:
            for unit in range(self.units):
                for lane in range(self.lanes):
                    self._slabs[unit, lane] = self.slab(unit, lane)
            self.is_copy = True
            self._params.clear()
            self._read_back.clear()
            self._early = {}

    def use(self) -> None:
        """What is here, and what will be committed, is an instance's from now on."""
        if self.is_copy:
            for unit in range(self.units):
                self._params.append(self._arrays(unit))
                self._drop(unit)
            self.is_copy = False

    def _arrays(self, unit: int) -> dict[str, jax.Array]:
        """On CPU they alias the slabs; elsewhere they are copied to the devices."""
        return self._placed(unit, [self.layout(unit).views(self.slab(unit, lane)) for lane in range(self.lanes)])

    def _placed(self, unit: int, lanes: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        alias = False if self.own_memory else None  # None: where that is possible
        return {
            info.name: jax.make_array_from_single_device_arrays(
                info.shape, NamedSharding(self.mesh, self.rules.partition(info)),
                [jax.device_put(views[info.name], device, may_alias=alias)
                 for views, device in zip(lanes, self._devices, strict=True)])
            for info in unit_arrays(self.spec, unit)}

    def preview(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The unsharded arrays of the embedding, from elsewhere, for prompts that begin before its own turn comes."""
        infos = unit_arrays(self.spec, self.spec.embed_unit)
        early = self._placed(self.spec.embed_unit, [
            {i.name: self.rules.local(i, arrays[i.name], lane).astype(i.dtype, copy=False) for i in infos}
            for lane in range(self.lanes)])
        if self.units <= self.spec.embed_unit:
            self._early = early

    @property
    def embedding(self) -> dict[str, jax.Array]:
        """Its arrays, committed or early; empty: prompts cannot be embedded yet."""
        return self._params[self.spec.embed_unit] if self.usable > self.spec.embed_unit else self._early

    @property
    def usable(self) -> int:
        """Units [0, usable) can be computed with; none of a copy."""
        return len(self._params)

    def _drop(self, unit: int) -> None:
        """The arrays of `unit` are on their way to devices with memory of their own; they hold on to what they read."""
        if self.own_memory:
            for lane in range(self.lanes):
                self.checksum(unit, lane)
                del self._slabs[unit, lane]

    def _from_device(self, unit: int, lane: int) -> np.ndarray:
        """Thread-safe, since a multicast source reads in two threads."""
        with self._reading:
            if (unit, lane) in self._slabs:  # kept meanwhile
                return self._slabs[unit, lane]
            if (unit, lane) not in self._read_back:
                slab = _allocate(self.slab_bytes(unit))
                for name, view in self.layout(unit).views(slab).items():
                    view[...] = _read(self._params[unit][name], self._devices[lane])
                self._read_back[unit, lane] = slab
                while len(self._read_back) > _READ_BACK_UNITS * self.lanes:
                    del self._read_back[next(iter(self._read_back))]
            return self._read_back[unit, lane]

    @property
    def held_bytes(self) -> int:
        """Of all slabs in host memory, complete or not."""
        return sum(slab.nbytes for slab in [*list(self._slabs.values()), *list(self._read_back.values())])

    def params(self, unit: int) -> dict[str, jax.Array]:
        assert 0 <= unit < self.units, f"unit {unit} is not loaded; {self.units} are"
        return self._params[unit]

    def checksum(self, unit: int, lane: int) -> int:
        """`digest` of a slab; remembered once the unit is committed."""
        key = (unit, lane)
        if key in self._checksums:
            return self._checksums[key]
        value = digest(self.slab(unit, lane))
        if unit < self.units:
            self._checksums[key] = value
        return value

    def release(self) -> None:
        """Drops every array and slab; memory goes back once the last jax.Array that a caller kept is gone."""
        self.units, self.is_copy, self._early = 0, False, {}
        self._params.clear()
        self._slabs.clear()
        self._read_back.clear()
        self._checksums.clear()


def _read(array: jax.Array, device: jax.Device) -> np.ndarray:
    """The part of `array` on `device`. Through an array of its own: jax keeps with an array what was read from it."""
    (shard,) = (shard.data for shard in array.addressable_shards if shard.device == device)
    return np.asarray(jax.make_array_from_single_device_arrays(shard.shape, SingleDeviceSharding(device), [shard]))


def fill(store: LayerStore, unit: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes unsharded arrays into all slabs of `unit`: cut per lane, in the store's dtypes. Does not commit."""
    infos = unit_arrays(store.spec, unit)
    arrays = fitted(infos, arrays)
    for lane in range(store.lanes):
        views = store.layout(unit).views(store.slab(unit, lane))
        for info in infos:
            array = arrays[info.name]
            assert array.shape == info.shape, (info.name, array.shape, info.shape)
            views[info.name][...] = store.rules.local(info, array, lane)
