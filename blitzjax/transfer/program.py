"""The one program of a multicast: every member passes a chunk per lane to the next one of its chain or ring.

It moves bytes, whatever the parameters are: bfloat16 would travel as float32 on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blitzjax.transfer import compat


class Tick:
    """A compiled `y = ppermute(x, hops)` over uint8[member, lane, chunk] for one clique.

    Called by all members the same number of times, each from one thread. Whom no hop leads to receives zeros.
    """

    def __init__(self, mesh: Mesh, member: int, chunk_bytes: int, hops: list[tuple[int, int]]) -> None:
        """Traces and compiles (about 20 ms); runs nothing, so the other members need not be there.

        `hops` are pairs of places in the mesh, from whom to whom; `member` is this process's place.
        """
        members, lanes = mesh.devices.shape
        spec = PartitionSpec(*mesh.axis_names)
        self._sharding = NamedSharding(mesh, spec)
        self._shape = (members, lanes, chunk_bytes)
        self._devices = list(mesh.devices[member])
        x = jax.ShapeDtypeStruct(self._shape, jnp.uint8, sharding=self._sharding)
        self._executable = _compile(mesh, spec, x, hops)

    def put(self, chunks: Sequence[np.ndarray]) -> jax.Array:
        """One uint8[chunk] per lane → the input of a tick; zero-copy: `chunks` must not change before it is over."""
        shards = [jax.device_put(c.reshape(1, 1, -1), d) for c, d in zip(chunks, self._devices, strict=True)]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Blocks until this member has sent and received. Raises one of compat.ERRORS if a neighbour died or hangs."""
        return self._executable(x).block_until_ready()


def chunks_of(y: jax.Array) -> list[np.ndarray]:
    """This process's uint8[chunk] per lane, zero-copy."""
    return [np.asarray(shard.data).reshape(-1) for shard in y.addressable_shards]


def _compile(mesh: Mesh, spec: PartitionSpec, x: jax.ShapeDtypeStruct, hops: list[tuple[int, int]]
             ) -> jax.stages.Compiled:
    member_axis = mesh.axis_names[0]

    def forward(chunk: jax.Array) -> jax.Array:  # [1, 1, chunk]
        return jax.lax.ppermute(chunk, member_axis, hops)

    with compat.without_persistent_cache():
        return jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=spec, out_specs=spec)).lower(x).compile()
