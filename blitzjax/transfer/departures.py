"""The source's side of a chain: slabs to chunks, without copying but for each unit's last chunk.

Last chunks (rest of the slab, padding, trailer) are built one unit ahead in a second thread, which also asks for the
checksums, so that the dispatcher thread never touches bytes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from blitzjax.transfer.pieces import Piece, Slabs, Trailer, aligned_empty


class Departures:
    """Chunks of `pieces` in order. A returned chunk may be reused two units later: its tick must be over by then."""

    def __init__(self, slabs: Slabs, pieces: list[Piece], chunk_bytes: int) -> None:
        self._slabs = slabs
        self._chunk_bytes = chunk_bytes
        self._ends = {p.unit: p for p in pieces if p.last}
        self._buffers = [[aligned_empty(chunk_bytes) for _ in range(slabs.lanes)] for _ in range(2)]
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="multicast-departures")
        self._built: dict[int, Future[list[np.ndarray]]] = {}
        if pieces:
            self._build_ahead(pieces[0].unit)

    def chunks(self, piece: Piece, end: bool) -> list[np.ndarray]:
        """uint8[chunk] per lane. `end` goes into a last piece's trailer: no further unit will follow."""
        if piece.last:
            chunks = self._built.pop(piece.unit).result()
            for lane, chunk in enumerate(chunks):
                trailer = Trailer.read(chunk)
                assert trailer is not None
                Trailer(piece.unit, trailer.checksum, end).write(chunk)
            self._build_ahead(piece.unit + 1)
            return chunks
        return [self._chunk(piece, lane) for lane in range(self._slabs.lanes)]

    def close(self) -> None:
        self._builder.shutdown(cancel_futures=True)

    def _build_ahead(self, unit: int) -> None:
        if unit in self._ends:
            self._built[unit] = self._builder.submit(self._build, self._ends[unit])

    def _chunk(self, piece: Piece, lane: int) -> np.ndarray:
        view = self._slabs.slab(piece.unit, lane)[piece.offset:piece.offset + piece.payload]
        if piece.payload == self._chunk_bytes:
            return view
        padded = aligned_empty(self._chunk_bytes)  # the trailer alone did not fit behind the slab: rare, and small
        padded[:piece.payload] = view
        return padded

    def _build(self, piece: Piece) -> list[np.ndarray]:
        buffers = self._buffers[piece.unit % 2]
        for lane, buffer in enumerate(buffers):
            slab = self._slabs.slab(piece.unit, lane)
            buffer[:piece.payload] = slab[piece.offset:piece.offset + piece.payload]
            Trailer(piece.unit, self._slabs.checksum(piece.unit, lane), False).write(buffer)
        return buffers
