"""One multicast chain: the source streams units, every other member stores and forwards them, one tick at a time.

At tick t hop 0 sends chunk t and hop h > 0 sends what it received at tick t - 1, so hop h holds chunk t - (h - 1): a
systolic pipeline, whose time does not grow with the number of receivers (BlitzScale section 5.1).

Chains may be lanes (section 5.1, figure 14): each of k sources sends another k-th of every unit down its own chain,
and targets that are close to each other gather the parts in rings.

All ticks of a process's chains run in ONE dedicated dispatcher thread, one session at a time: a tick blocks its thread,
and two sessions in different order in two processes would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from blitzjax.errors import TransferError
from blitzjax.transfer import compat
from blitzjax.transfer.arrivals import Arrivals
from blitzjax.transfer.departures import Departures
from blitzjax.transfer.gathering import Gathering
from blitzjax.transfer.pieces import TRAILER_BYTES, WHOLE, Part, Piece, Slabs, Trailer, aligned_empty, chunk_size, cut
from blitzjax.transfer.program import Tick, chunks_of
from blitzjax.transfer.world import World

__all__ = ["Part", "Session", "Share", "Slabs", "chunk_size", "prepare"]

_CANCEL_UNITS = 2  # a cancelled receiver gives the source this many units to end the stream in step


@dataclass(frozen=True, slots=True)
class Share:
    """What a member moves of every unit, and with whom it gathers the rest.

    At a target, `ring` holds the ranks of its ring and `parts` the index of the part that each of them brings.
    """

    part: Part = WHOLE
    ring: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    generation: int = 0  # of the ring's clique


def prepare(world: World, ranks: Sequence[int], generation: int, lanes: int, chunk_bytes: int,
            share: Share = Share()) -> Session:
    """Compiles the chain's program, and the ring's, without running it; members may do this in any order, at any time.

    `ranks` is the chain from the source on and includes this process; `chunk_bytes` comes from `chunk_size` and is the
    same on all members of all lanes. Raises TransferError if a clique cannot be used (see `World.mesh`).
    """
    assert lanes == world.lanes and chunk_bytes % 64 == 0 and len(ranks) >= 2
    assert not share.ring or set(share.parts) == set(range(share.part.count)), "a ring has a member of every lane"
    tick = world.tick(ranks, generation, chunk_bytes)
    ring = world.tick(share.ring, share.generation, chunk_bytes + TRAILER_BYTES, ring=True) if share.ring else None
    return Session(world, tuple(ranks), generation, tick, chunk_bytes, share, ring)


class Session:
    """A prepared chain of one process. `run` may be called again, by all members alike, until it raises."""

    def __init__(self, world: World, ranks: tuple[int, ...], generation: int, tick: Tick, chunk_bytes: int,
                 share: Share, ring: Tick | None) -> None:
        self._world = world
        self._share = share
        self._ring = ring
        self._ranks = ranks
        self._generation = generation
        self._hop = ranks.index(world.rank)
        self._tick = tick
        self._chunk_bytes = chunk_bytes

    def run(self, slabs: Slabs, start_unit: int, stop_unit: int, on_unit: Callable[[int], None],
            cancelled: Callable[[], bool]) -> int:
        """Moves units [start_unit, stop_unit) down the chain; blocks. Returns where the stream ended.

        Receivers commit each verified unit to `slabs`, then call `on_unit`, both from another thread; units they hold
        already are forwarded only. Less than `stop_unit` is returned after a cancellation: when `cancelled()` turns
        true at the source, the stream ends in step after the unit at hand; a receiver that is cancelled alone leaves
        two units later, which its neighbours see as a failure.

        Raises TransferError naming the unit when a member died (at once) or hangs (after the collective timeout), and,
        after the whole stream was forwarded, when a checksum was wrong or the ring did not gather all of it: a ring
        that fails never disturbs the chain. Complete units stay valid.
        """
        if slabs.units < (stop_unit if self._hop == 0 else start_unit):
            raise TransferError(f"rank {self._world.rank} holds {slabs.units} units, too few for hop {self._hop} of a "
                                f"chain of units {start_unit} to {stop_unit}")
        if start_unit >= stop_unit:
            return start_unit
        self._world.meet(self._ranks, self._generation)
        pieces = cut(slabs, start_unit, stop_unit, self._chunk_bytes, self._share.part)
        if self._hop == 0:
            return pieces[self._send(slabs, pieces, cancelled) - 1].unit + 1
        if self._ring is None:
            return self._receive(slabs, pieces, on_unit, cancelled, None)
        return self._gather(slabs, pieces, on_unit, cancelled, self._ring)

    def _send(self, slabs: Slabs, pieces: list[Piece], cancelled: Callable[[], bool]) -> int:
        """Hop 0. Returns how many pieces went out: up to the end of a unit."""
        departures = Departures(slabs, pieces, self._chunk_bytes)
        try:
            for sent, piece in enumerate(pieces, start=1):
                end = piece.last and cancelled()
                x = self._tick.put(departures.chunks(piece, end))
                self._step(x, piece)
                if end:
                    break
            for _ in range(len(self._ranks) - 2):  # until the last hop has the last chunk
                self._step(x, piece)
            return sent
        finally:
            departures.close()

    def _gather(self, slabs: Slabs, pieces: list[Piece], on_unit: Callable[[int], None],
                cancelled: Callable[[], bool], tick: Tick) -> int:
        """Receives a part and gathers the others. Returns the unit at which the first lane of the ring ended."""
        share, stop_unit = self._share, pieces[-1].unit + 1
        self._world.meet(share.ring, share.generation)
        brought = [cut(slabs, pieces[0].unit, stop_unit, self._chunk_bytes, Part(index, share.part.count))
                   for index in share.parts]
        gathering = Gathering(slabs, tick, self._chunk_bytes + TRAILER_BYTES, share.ring.index(self._world.rank),
                              share.parts, brought, on_unit)
        try:
            reached = self._receive(slabs, pieces, on_unit, cancelled, gathering)
        finally:
            gathering.close()
            if gathering.broken:
                self._world.retire(share.ring, share.generation)
        gathering.check()
        if gathering.units < reached == stop_unit:
            raise TransferError(f"rank {self._world.rank} received its part of all units, but another lane ended "
                                f"before unit {gathering.units}")
        return gathering.units

    def _receive(self, slabs: Slabs, pieces: list[Piece], on_unit: Callable[[int], None],
                 cancelled: Callable[[], bool], gathering: Gathering | None) -> int:
        """Hops 1 and on. Returns the unit at which the stream ended."""
        arrivals = Arrivals(slabs, on_unit, gathering)
        idle = self._tick.put([aligned_empty(self._chunk_bytes) for _ in range(slabs.lanes)])
        last_hop = self._hop == len(self._ranks) - 1
        patience = _CANCEL_UNITS
        try:
            x = idle
            for _ in range(self._hop - 1):  # the first chunk is still on its way through earlier hops
                self._step(idle, pieces[0])
            for received, piece in enumerate(pieces, start=1):
                y = self._step(x, piece)
                x = idle if last_hop else y
                arrivals.put(piece, y)
                if piece.last and _ends(y):
                    break
                if piece.last and cancelled():
                    patience -= 1
                    if patience == 0:
                        self._world.retire(self._ranks, self._generation)
                        return piece.unit + 1
            for _ in range(len(self._ranks) - 1 - self._hop):
                self._step(x, piece)
                x = idle
        finally:
            arrivals.close()
        arrivals.check()
        return pieces[received - 1].unit + 1

    def _step(self, x: jax.Array, piece: Piece) -> jax.Array:
        try:
            return self._tick(x)
        except compat.ERRORS as e:
            self._world.retire(self._ranks, self._generation)
            raise TransferError(f"chain of ranks {list(self._ranks)}, generation {self._generation}, broke in unit "
                                f"{piece.unit} at byte {piece.offset}: {e}") from e


def _ends(y: jax.Array) -> bool:
    trailer = Trailer.read(chunks_of(y)[0])
    return trailer is not None and trailer.end
