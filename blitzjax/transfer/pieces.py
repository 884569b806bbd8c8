"""How a unit's bytes are cut into equal chunks, and what travels behind them.

A unit of one lane is a slab of bytes, cut at multiples of the chunk size; the last 64 bytes of its last chunk are the
trailer, zero or more bytes of padding before it. Every member of a chain computes the same pieces from the same model.

    unit u:   [ chunk ][ chunk ][ rest of slab | padding | trailer ]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

ALIGNMENT = 64  # bytes; jax.device_put of a host array is zero-copy at this alignment
TRAILER_BYTES = 64

_TRAILER = struct.Struct("<8sIQB")
_MAGIC = b"blitzjax"


class Slabs(Protocol):
    """The parameters of one instance as bytes: per unit and lane (tensor-parallel shard) one 64-byte aligned slab."""

    @property
    def units(self) -> int:
        """Watermark: units [0, units) are complete and must not be written to."""
        ...

    @property
    def lanes(self) -> int: ...

    def slab(self, unit: int, lane: int) -> np.ndarray:
        """uint8[slab_bytes(unit)], 64-byte aligned; allocated on demand on a receiver."""
        ...

    def slab_bytes(self, unit: int) -> int:
        """Size of each of the unit's slabs; equal on all members, and equal for all decoder layers."""
        ...

    def checksum(self, unit: int, lane: int) -> int:
        """`digest` of a complete unit's slab; asked of the source only, in a background thread."""
        ...

    def commit(self, unit: int, checksums: tuple[int, ...] = ()) -> None:
        """Unit `unit` == `units` is received and verified: raise the watermark. Called in unit order.

        `checksums` per lane spare a later source from computing them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [offset, offset + payload) of every slab of `unit`: the content of one chunk per lane."""

    unit: int
    offset: int
    payload: int
    last: bool  # the chunk ends in the unit's trailer


@dataclass(frozen=True, slots=True)
class Trailer:
    """`checksum` is the `digest` of the slab; `end` says that the source sends no further unit."""

    unit: int
    checksum: int
    end: bool

    def write(self, chunk: np.ndarray) -> None:
        _TRAILER.pack_into(chunk[-TRAILER_BYTES:], 0, _MAGIC, self.unit, self.checksum, self.end)

    @staticmethod
    def read(chunk: np.ndarray) -> Trailer | None:
        """None if the chunk does not end in a trailer: the members are out of step."""
        magic, unit, checksum, end = _TRAILER.unpack_from(chunk[-TRAILER_BYTES:], 0)
        return Trailer(unit, checksum, bool(end)) if magic == _MAGIC else None


def digest(data: np.ndarray) -> int:
    """XXH3, 64 bits, of uint8[n]: six times as fast as zlib's CRC-32, which would be what a fast link waits for."""
    return xxhash.xxh3_64_intdigest(data)


def chunk_size(layer_bytes: int, target_bytes: int) -> int:
    """The chunk nearest below `target_bytes` that cuts a layer's slab and its trailer evenly; a multiple of 64."""
    total = layer_bytes + TRAILER_BYTES
    chunks = -(-total // max(target_bytes, TRAILER_BYTES))
    return round_up(-(-total // chunks))


def cut(slabs: Slabs, start_unit: int, stop_unit: int, chunk_bytes: int) -> list[Piece]:
    """Pieces of units [start_unit, stop_unit) in the order in which they travel."""
    return [piece for unit in range(start_unit, stop_unit)
            for piece in _cut_unit(unit, slabs.slab_bytes(unit), chunk_bytes)]


def _cut_unit(unit: int, slab_bytes: int, chunk_bytes: int) -> list[Piece]:
    count = -(-(slab_bytes + TRAILER_BYTES) // chunk_bytes)
    offsets = [min(i * chunk_bytes, slab_bytes) for i in range(count)]
    return [Piece(unit, offset, min(chunk_bytes, slab_bytes - offset), i == count - 1)
            for i, offset in enumerate(offsets)]


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_empty(size: int) -> np.ndarray:
    """uint8[size], uninitialised, 64-byte aligned."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + size]
