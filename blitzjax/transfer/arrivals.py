"""A receiver's second thread: copies chunks out of the collective's buffers into slabs while the next tick runs.

A unit is committed only when all its lanes match their checksums; units complete in order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
import xxhash

from blitzjax.errors import TransferError
from blitzjax.transfer.pieces import Piece, Slabs, Trailer
from blitzjax.transfer.program import chunks_of

_DEPTH = 3  # chunks waiting to be copied; more only hides a copy that is slower than the network


class Arrivals:
    """Takes pieces from the dispatcher thread; calls `slabs.commit` and `on_unit` from its own thread.

    After the first failure it goes on taking pieces and drops them, so that the chain behind it is not disturbed.
    """

    def __init__(self, slabs: Slabs, on_unit: Callable[[int], None]) -> None:
        self._slabs = slabs
        self._held = slabs.units  # live arrays alias these units: forward, never write
        self._on_unit = on_unit
        self._error: BaseException | None = None
        self._digests = [xxhash.xxh3_64() for _ in range(slabs.lanes)]  # of the unit at hand, as `pieces.digest`
        self._queue: queue.Queue[tuple[Piece, jax.Array] | None] = queue.Queue(_DEPTH)
        self._thread = threading.Thread(target=self._run, name="multicast-arrivals", daemon=True)
        self._thread.start()

    def put(self, piece: Piece, y: jax.Array) -> None:
        """Blocks while the copies lag behind."""
        if piece.unit >= self._held:
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
        for lane, chunk in enumerate(chunks):
            payload = chunk[:piece.payload]
            slab = self._slabs.slab(piece.unit, lane)
            np.copyto(slab[piece.offset:piece.offset + piece.payload], payload)
            self._digests[lane].update(payload)
        if piece.last:
            checksums = tuple(found.intdigest() for found in self._digests)
            for lane, chunk in enumerate(chunks):
                self._digests[lane].reset()
                _verify(piece.unit, lane, checksums[lane], Trailer.read(chunk))
            self._slabs.commit(piece.unit, checksums)
            self._on_unit(piece.unit)


def _verify(unit: int, lane: int, checksum: int, trailer: Trailer | None) -> None:
    if trailer is None:
        raise TransferError(f"unit {unit}, lane {lane}: no trailer where one is due; the chain is out of step")
    if trailer.unit != unit:
        raise TransferError(f"unit {unit}, lane {lane}: received unit {trailer.unit} instead")
    if trailer.checksum != checksum:
        raise TransferError(f"unit {unit}, lane {lane}: checksum {checksum:016x}, the source has {trailer.checksum:016x}")
