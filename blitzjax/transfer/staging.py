"""How do arrays on devices with memory of their own travel? As arrays of this host's CPU, cut as they are sharded.

The library's transfers are tried on CPUs; so only host memory takes part in them, whatever the platform. Invariant: both
sides compute the same parts, in the same order, from shape and sharding; what is replicated travels once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

Bounds = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


def has_own_memory(device: jax.Device) -> bool:
    """It does not compute on the host's: what is there is a copy, and nothing on the host must be kept for it."""
    return device.platform != "cpu"


def lowered(array: jax.Array, host: jax.Device) -> list[jax.Array]:
    """The parts of `array`, copied to `host`; waits until it is computed."""
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    return [jax.device_put(np.asarray(shards[devices[0]]), host) for _, devices in _parts(array)]


def specs(array: jax.ShapeDtypeStruct, host: jax.Device) -> list[jax.ShapeDtypeStruct]:
    """Of the parts, on `host`."""
    here = SingleDeviceSharding(host)
    return [jax.ShapeDtypeStruct(tuple(stop - start for start, stop in bounds), array.dtype, sharding=here)
            for bounds, _ in _parts(array)]


def lifted(array: jax.ShapeDtypeStruct, parts: Iterator[jax.Array]) -> jax.Array:
    """Takes the parts of one array off `parts` and copies them to its devices."""
    placed: dict[jax.Device, jax.Array] = {}
    for _, devices in _parts(array):
        values = np.asarray(next(parts))
        placed |= {device: jax.device_put(values, device) for device in devices}
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, list(placed.values()))


def _parts(array: jax.Array | jax.ShapeDtypeStruct) -> Sequence[tuple[Bounds, list[jax.Device]]]:
    """Each part's bounds, and the devices that have it."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in array.sharding.addressable_devices_indices_map(array.shape).items():
        assert index is not None  # it is for other processes' devices only
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, array.shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return sorted(found.items(), key=lambda part: part[0])
