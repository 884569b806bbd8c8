"""How do arrays travel? Cut as they are sharded, each part as an array of one device; those on devices with memory of their
own by way of arrays of this host's CPU.

The library's transfers are tried on CPUs; so only host memory takes part in them, whatever the platform. Invariant: both
sides compute the same parts, in the same order, from shape and sharding, and whatever memory they have; what is replicated
travels once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

Bounds = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


def has_own_memory(device: jax.Device) -> bool:
    """It does not compute on the host's: what is there is a copy, and nothing on the host must be kept for it."""
    return device.platform != "cpu"


def lowered(array: jax.Array, host: jax.Device | None) -> list[jax.Array]:
    """The parts of `array`, copied to `host`, which waits until it is computed; without one as they lie there."""
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    parts = [shards[devices[0]] for _, devices in _parts(array.sharding, array.shape)]
    return parts if host is None else [jax.device_put(np.asarray(part), host) for part in parts]


def specs(array: jax.ShapeDtypeStruct, host: jax.Device | None) -> list[jax.ShapeDtypeStruct]:
    """Of the parts, on `host`, else each on the first of its devices."""
    if host is None and len(array.sharding.device_set) == 1:
        return [array]
    return [jax.ShapeDtypeStruct(tuple(stop - start for start, stop in bounds), array.dtype,
                                 sharding=SingleDeviceSharding(host or devices[0]))
            for bounds, devices in _parts(array.sharding, array.shape)]


def lifted(array: jax.ShapeDtypeStruct, parts: Iterator[jax.Array]) -> jax.Array:
    """Takes the parts of one array off `parts` and copies them to those of its devices where they are not."""
    placed: list[jax.Array] = []
    for _, devices in _parts(array.sharding, array.shape):
        part = next(parts)
        if part.sharding == array.sharding:
            return part
        placed += [part if part.devices() == {device} else jax.device_put(np.asarray(part), device) for device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)


@functools.lru_cache(maxsize=1024)  # a step asks for every layer, in the same few shapes
def _parts(sharding: Sharding, shape: tuple[int, ...]) -> Sequence[tuple[Bounds, list[jax.Device]]]:
    """Each part's bounds, and the devices that have it."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # it is for other processes' devices only
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return sorted(found.items(), key=lambda part: part[0])
