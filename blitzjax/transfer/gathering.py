"""A target's third thread, when its chain is one of several lanes: the members of a ring give each other their parts.

An all-gather around the ring, piece by piece, as fast as the slowest lane brings them. Two orders, and no third, say
who waits for whom: chains never wait for a ring, and all members of a ring exchange the same pieces in the same order.
Hence nothing can wait in a circle, whatever the hops at which members of a ring are in their chains.

A piece's own trailer says whether its sender has it. A member whose chain ended, by order or by failure, says so once,
in place of the next piece, and the ring ends for everybody at that piece.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np

from blitzjax.errors import TransferError
from blitzjax.transfer import compat
from blitzjax.transfer.pieces import Piece, Slabs, Trailer, aligned_empty, digest
from blitzjax.transfer.program import Tick, chunks_of


class Gathering:
    """Takes news of its own part from the arrivals thread; calls `slabs.commit` and `on_unit` from its own thread.

    `pieces[k]` are those of the part that member k brings, this process being member `position`; `parts[k]` its index.
    `tick` is the ring's, of one lane, with room for a piece and a trailer. After a wrong checksum it goes on
    exchanging, so that the others are not disturbed, and commits nothing more.
    """

    def __init__(self, slabs: Slabs, tick: Tick, chunk_bytes: int, position: int, parts: Sequence[int],
                 pieces: Sequence[list[Piece]], on_unit: Callable[[int], None]) -> None:
        self._slabs = slabs
        self._held = slabs.units  # live arrays alias these units: send, never write
        self._tick = tick
        self._position = position
        self._parts = parts
        self._pieces = pieces
        self._on_unit = on_unit
        self.units = pieces[0][0].unit  # units below are gathered
        self.broken = False  # the ring's clique cannot be used again
        self._error: BaseException | None = None
        self._buffer = aligned_empty(chunk_bytes)
        self._queue: queue.SimpleQueue[tuple[int, ...] | None] = queue.SimpleQueue()  # never full: see above
        self._thread = threading.Thread(target=self._run, name="multicast-gathering", daemon=True)
        self._thread.start()

    def put(self, checksums: tuple[int, ...]) -> None:
        """The next piece of the own part is in its slab; with a unit's last piece come the checksums of its slabs."""
        self._queue.put(checksums)

    def close(self) -> None:
        """No more pieces come. Waits for what the others still bring, each time for the collective timeout at most."""
        self._queue.put(None)
        self._thread.join()

    def check(self) -> None:
        """Raises TransferError for a bad checksum or when a member of the ring died (at once) or hangs."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for pieces in zip(*self._pieces, strict=True):
                checksums = self._queue.get()
                whole = [self._exchange(pieces, lane, checksums) for lane in range(self._slabs.lanes)]
                if not all(whole):
                    return
                if pieces[0].last:
                    assert checksums is not None
                    self._complete(pieces[0].unit, checksums)
        except compat.ERRORS as e:
            self.broken = True
            self._error = TransferError(f"a ring of {len(self._parts)} targets broke in unit {self.units}: {e}")
        except BaseException as e:  # handed to the dispatcher thread by check()
            self.broken = True
            self._error = e

    def _exchange(self, pieces: Sequence[Piece], lane: int, checksums: tuple[int, ...] | None) -> bool:
        """One piece of every part, around the ring; false if a member has none."""
        mine, whole = pieces[self._position], checksums is not None
        if whole:
            self._buffer[:mine.payload] = self._bytes(mine, lane)
        Trailer(mine.unit, 0, not whole).write(self._buffer)
        x = self._tick.put([self._buffer])
        for step in range(1, len(pieces)):
            x = self._tick(x)
            (chunk,) = chunks_of(x)
            trailer = Trailer.read(chunk)
            if trailer is None or trailer.unit != mine.unit:
                raise TransferError(f"unit {mine.unit}, lane {lane}: a ring of {len(pieces)} targets is out of step")
            sender = (self._position - step) % len(pieces)
            whole = whole and not trailer.end
            if whole and mine.unit >= self._held and self._parts[sender] != self._parts[self._position]:
                self._bytes(pieces[sender], lane)[:] = chunk[:pieces[sender].payload]
        return whole

    def _bytes(self, piece: Piece, lane: int) -> np.ndarray:
        return self._slabs.slab(piece.unit, lane)[piece.offset:piece.offset + piece.payload]

    def _complete(self, unit: int, checksums: tuple[int, ...]) -> None:
        """Every part of `unit` is here, or was before."""
        if unit >= self._held and self._error is None:
            found = tuple(digest(self._slabs.slab(unit, lane)) for lane in range(self._slabs.lanes))
            if found != checksums:
                self._error = TransferError(f"unit {unit}: the gathered parts have checksums {_hex(found)}, the source "
                                            f"has {_hex(checksums)}")
                return
            self._slabs.commit(unit, checksums)
            self._on_unit(unit)
        if self._error is None:
            self.units = unit + 1


def _hex(checksums: tuple[int, ...]) -> str:
    return " ".join(f"{checksum:016x}" for checksum in checksums)
