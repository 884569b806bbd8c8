"""A receiver's second thread: copies chunks out of the collective's buffers into slabs while the next tick runs.

A unit is committed only when all its lanes match their checksums; units complete in order. Where a chain brings only a
part of every unit, the ring that gathers the parts commits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
import xxhash

from blitzjax.errors import TransferError
from blitzjax.transfer.gathering import Gathering
from blitzjax.transfer.pieces import Piece, Slabs, Trailer
from blitzjax.transfer.program import chunks_of

_BLOCK_BYTES = 256 << 10  # an eighth or less of the second-level cache of today's cores
_DEPTH = 3  # chunks waiting to be copied; more only hides a copy that is slower than the network


class Arrivals:
    """Takes pieces from the dispatcher thread; calls `slabs.commit` and `on_unit` from its own thread.

    After the first failure it goes on taking pieces and drops them, so that the chain behind it is not disturbed.
    """

    def __init__(self, slabs: Slabs, on_unit: Callable[[int], None], gathering: Gathering | None) -> None:
        self._slabs = slabs
        self._gathering = gathering
        self._held = slabs.units  # live arrays alias these units: forward, never write
        self._on_unit = on_unit
        self._error: BaseException | None = None
        self._digests = [xxhash.xxh3_64() for _ in range(slabs.lanes)]  # of the unit at hand, as `pieces.digest`
        self._queue: queue.Queue[tuple[Piece, jax.Array] | None] = queue.Queue(_DEPTH)
        self._thread = threading.Thread(target=self._run, name="multicast-arrivals", daemon=True)
        self._thread.start()

    def put(self, piece: Piece, y: jax.Array) -> None:
        """Blocks while the copies lag behind."""
        if piece.unit >= self._held or self._gathering is not None:
            self._queue.put((piece, y))

    def close(self) -> None:
        """Waits for the copies; everything that arrived completely is committed afterwards."""
        self._queue.put(None)
        self._thread.join()

    def check(self) -> None:
        """Raises what went wrong, a TransferError for a bad checksum."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._take(*item)
                except BaseException as e:  # handed to the dispatcher thread by check()
                    self._error = e

    def _take(self, piece: Piece, y: jax.Array) -> None:
        chunks = chunks_of(y)
        if piece.unit >= self._held:
            for lane, chunk in enumerate(chunks):
                self._copy(piece, lane, chunk)
        wanted = tuple(_checksum(piece.unit, lane, chunk) for lane, chunk in enumerate(chunks)) if piece.last else ()
        if self._gathering is not None:
            self._gathering.put(wanted)
        elif piece.last:
            self._complete(piece.unit, wanted)

    def _copy(self, piece: Piece, lane: int, chunk: np.ndarray) -> None:
        """In blocks, so that the digest finds in a core's cache what was just copied."""
        slab = self._slabs.slab(piece.unit, lane)[piece.offset:piece.offset + piece.payload]
        for start in range(0, piece.payload, _BLOCK_BYTES):
            block = slab[start:start + _BLOCK_BYTES]
            np.copyto(block, chunk[start:start + len(block)])
            if self._gathering is None:
                self._digests[lane].update(block)

    def _complete(self, unit: int, wanted: tuple[int, ...]) -> None:
        for lane, (digest, checksum) in enumerate(zip(self._digests, wanted, strict=True)):
            if digest.intdigest() != checksum:
                raise TransferError(f"unit {unit}, lane {lane}: checksum {digest.intdigest():016x}, the source has "
                                    f"{checksum:016x}")
            digest.reset()
        self._slabs.commit(unit, wanted)
        self._on_unit(unit)


def _checksum(unit: int, lane: int, chunk: np.ndarray) -> int:
    """What the source says that the slab's is."""
    trailer = Trailer.read(chunk)
    if trailer is None:
        raise TransferError(f"unit {unit}, lane {lane}: no trailer where one is due; the chain is out of step")
    if trailer.unit != unit:
        raise TransferError(f"unit {unit}, lane {lane}: received unit {trailer.unit} instead")
    return trailer.checksum
