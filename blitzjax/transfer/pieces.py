"""How a unit's bytes are cut into equal chunks, and what travels behind them.

A unit of one lane is a slab of bytes, cut at multiples of the chunk size; the last 64 bytes of its last chunk are the
trailer, zero or more bytes of padding before it. Every member of a chain computes the same pieces from the same model.

    unit u:   [ chunk ][ chunk ][ rest of slab | padding | trailer ]

A chain that is one of several moves its part of every slab in the same way. Lanes here are an instance's devices.
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
class Part:
    """The `index`-th of `count` equal parts of a slab, which begin at multiples of 64; the last may be smaller."""

    index: int = 0
    count: int = 1

    def share(self, slab_bytes: int) -> int:
        """Bytes of every part but the last."""
        return round_up(-(-slab_bytes // self.count))

    def bounds(self, slab_bytes: int) -> tuple[int, int]:
        """(start, stop) in the slab."""
        share = self.share(slab_bytes)
        return min(self.index * share, slab_bytes), min((self.index + 1) * share, slab_bytes)


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [offset, offset + payload) of every slab of `unit`: the content of one chunk per lane."""

    unit: int
    offset: int
    payload: int
    last: bool  # the chunk ends in the unit's trailer


@dataclass(frozen=True, slots=True)
class Trailer:
    """`checksum` is the `digest` of the whole slab; `end` says that its sender has nothing further."""

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


def chunk_size(layer_bytes: int, target_bytes: int, part: Part = WHOLE) -> int:
    """The chunk nearest below `target_bytes` that cuts a layer's part and its trailer evenly; a multiple of 64."""
    total = part.share(layer_bytes) + TRAILER_BYTES
    chunks = -(-total // max(target_bytes, TRAILER_BYTES))
    return round_up(-(-total // chunks))


def cut(slabs: Slabs, start_unit: int, stop_unit: int, chunk_bytes: int, part: Part = WHOLE) -> list[Piece]:
    """Pieces of units [start_unit, stop_unit) in the order in which they travel; of every part equally many."""
    return [piece for unit in range(start_unit, stop_unit)
            for piece in _cut_unit(unit, slabs.slab_bytes(unit), chunk_bytes, part)]


def _cut_unit(unit: int, slab_bytes: int, chunk_bytes: int, part: Part) -> list[Piece]:
    start, stop = part.bounds(slab_bytes)
    count = -(-(part.share(slab_bytes) + TRAILER_BYTES) // chunk_bytes)
    offsets = [min(start + i * chunk_bytes, stop) for i in range(count)]
    return [Piece(unit, offset, min(chunk_bytes, stop - offset), i == count - 1) for i, offset in enumerate(offsets)]


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_empty(size: int) -> np.ndarray:
    """uint8[size], uninitialised, 64-byte aligned."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + size]
