"""Who can take part in collectives: one rank per worker, and a mesh for any set of ranks.

Collectives run on a second CPU client of many virtual devices, beside the process's default client that serves.
A clique is a set of ranks plus a generation; gloo keeps its sockets, so chains of the same ranks in any order share it.
**A clique is never used again after it failed, nor after one of its members restarted**: gloo would hang or refuse it.
The planner, which sees all members, picks the generation, for the same ranks never a lower one than before: only the
latest of each is remembered here.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from itertools import pairwise

import jax
import numpy as np
from jax.sharding import Mesh

from blitzjax.errors import TransferError
from blitzjax.transfer import compat
from blitzjax.transfer.pieces import ALIGNMENT, aligned_empty
from blitzjax.transfer.program import Tick

MEMBER, LANE = "member", "lane"  # mesh axes: a rank, a shard of the parameters

_MAX_TICKS = 64  # compiled programs that are kept
_MAX_SETS = 4096  # of ranks, whose generations are told apart: not fewer than the planner's, which then forgets first

_CONNECT_TIMEOUT_S = 7 * 24 * 3600  # the library aborts the process when it gives up, so it must not


class World:
    """This process's place among `size` ranks. `join` once, from a thread; the rest from the dispatcher thread.

    Generation g of a rank owns the devices [g * lanes, (g + 1) * lanes), so `max_generations` bounds how often one
    set of members can fail before its processes must restart.
    """

    def __init__(self, coordinator: str, rank: int, size: int, host_ip: str, lanes: int, max_generations: int,
                 collective_timeout_s: float, heartbeat_s: float) -> None:
        assert 0 <= rank < size and lanes >= 1 and max_generations >= 1
        self.rank = rank
        self.lanes = lanes
        self.collective_timeout_s = collective_timeout_s
        self._coordinator = coordinator
        self._size = size
        self._host_ip = host_ip
        self._max_generations = max_generations
        self._heartbeat_s = heartbeat_s
        self._distributed: compat.Distributed | None = None
        self._devices: dict[int, list[jax.Device]] = {}  # rank → its devices by ordinal
        self._ticks: dict[tuple[tuple[int, ...], int, int, bool], Tick] = {}  # by `tick`'s arguments; used last, last
        self._latest: dict[frozenset[int], tuple[int, bool]] = {}  # ranks → generation in use, and whether it has met
        self._least = 0  # generation in use of all other ranks
        self.generation = 0  # above those of all cliques that this process was in
        self._joined = False
        self._lock = threading.Lock()

    @staticmethod
    def required_xla_flags(collective_timeout_s: float) -> str:
        """What XLA_FLAGS must contain before jax is imported, for a hung peer to fail within `collective_timeout_s`."""
        return f"--xla_cpu_collective_timeout_seconds={max(1, round(collective_timeout_s))}"

    @property
    def joined(self) -> bool:
        return self._joined

    def join(self) -> None:
        """Blocks until every rank has connected once; a restarted rank joins a running world in milliseconds.

        Raises TransferError when the devices cannot be exchanged (a member died meanwhile); `join` may be repeated.
        """
        with self._lock:
            if self.joined:
                return
            if self._distributed is None:
                self._distributed = compat.connect_distributed(
                    self._coordinator, self.rank, self._heartbeat_s, _CONNECT_TIMEOUT_S)
            try:
                client = compat.make_comm_client(
                    self._distributed, self.rank, self._size, self._host_ip, self._max_generations * self.lanes)
            except compat.ERRORS as e:
                raise TransferError(f"rank {self.rank} could not join the world: {e}") from e
            devices: dict[int, list[jax.Device]] = {}
            for device in client.devices():  # in order of (rank, ordinal)
                devices.setdefault(device.process_index, []).append(device)
            self._devices = devices
            self._warm_up()
            self._joined = True

    def mesh(self, ranks: Collection[int], generation: int) -> Mesh:
        """Axes ("member", "lane") over the participants only, by rank. Raises TransferError if it cannot be used."""
        if not self._devices:
            raise TransferError(f"rank {self.rank} has not joined the world")
        if not 0 <= generation < self._max_generations:
            raise TransferError(f"generation {generation} of ranks {list(ranks)} is not below {self._max_generations}; "
                                f"restart the members or raise cluster.max_world")
        if generation < self._latest.get(frozenset(ranks), (self._least, False))[0]:
            raise TransferError(f"generation {generation} of ranks {list(ranks)} failed before; use another one")
        return self._mesh(ranks, generation)

    def _mesh(self, ranks: Collection[int], generation: int) -> Mesh:
        start = generation * self.lanes
        return Mesh(np.array([self._devices[r][start:start + self.lanes] for r in sorted(ranks)]), (MEMBER, LANE))

    def tick(self, ranks: Sequence[int], generation: int, chunk_bytes: int, ring: bool = False) -> Tick:
        """The program that passes chunks on in the order of `ranks`, compiled unless its last use is recent; a ring's
        moves one lane. Raises TransferError like `mesh`.

        With one device it runs in the calling thread; with several, the library runs one program at a time, which
        would make a chain wait for a ring.
        """
        mesh = self.mesh(ranks, generation)
        if ring:
            mesh = Mesh(mesh.devices[:, :1], mesh.axis_names)
        key = (tuple(ranks), generation, chunk_bytes, ring)
        tick = self._ticks.pop(key, None) or self._compiled(mesh, ranks, chunk_bytes, ring)
        self._ticks[key] = tick
        if len(self._ticks) > _MAX_TICKS:
            del self._ticks[next(iter(self._ticks))]
        return tick

    def _compiled(self, mesh: Mesh, ranks: Sequence[int], chunk_bytes: int, ring: bool) -> Tick:
        place = {rank: k for k, rank in enumerate(sorted(ranks))}
        hops = pairwise([*ranks, ranks[0]] if ring else ranks)
        return Tick(mesh, place[self.rank], chunk_bytes, [(place[a], place[b]) for a, b in hops])

    def meet(self, ranks: Collection[int], generation: int) -> None:
        """Before a clique's first collective: waits for all members, for at most the collective timeout.

        Without it a member that died after it prepared costs the others gloo's own fixed 30 s. Raises TransferError.
        """
        if self._latest.get(frozenset(ranks)) == (generation, True):
            return
        assert self._distributed is not None
        self._note(ranks, generation, True)
        name = f"blitzjax/{'-'.join(map(str, sorted(ranks)))}/{generation}"
        try:
            compat.wait_for_ranks(self._distributed, name, sorted(ranks), self.collective_timeout_s)
        except compat.ERRORS as e:
            self.retire(ranks, generation)
            raise TransferError(f"ranks {sorted(ranks)} did not meet in generation {generation}: {e}") from e

    def retire(self, ranks: Collection[int], generation: int) -> None:
        """Marks a clique as failed: `mesh` refuses it from now on."""
        self._note(ranks, generation + 1, False)
        failed = (frozenset(ranks), generation)
        self._ticks = {key: tick for key, tick in self._ticks.items() if (frozenset(key[0]), key[1]) != failed}

    def _note(self, ranks: Collection[int], generation: int, met: bool) -> None:
        """Makes room as the planner does, by giving up the oldest generation of all: it forms no clique of it any more."""
        members = frozenset(ranks)
        self.generation = max(self.generation, generation + met)
        self._latest[members] = max(self._latest.get(members, (0, False)), (generation, met))
        while len(self._latest) > _MAX_SETS:
            self._least += 1
            self._latest = {r: latest for r, latest in self._latest.items() if latest[0] >= self._least}

    def leave(self) -> None:
        """Disconnects; existing meshes must not be used afterwards. Other ranks are not disturbed."""
        with self._lock:
            self._joined = False
            self._devices = {}
            self._ticks = {}
            if self._distributed is not None:
                self._distributed.shutdown()
                self._distributed = None

    def _warm_up(self) -> None:
        """The first trace and compile of a process cost 0.2 s more than the next: pay now, not in a scale-up."""
        peer = (self.rank + 1) % self._size
        if peer != self.rank:
            pair = [self.rank, peer]
            tick = self._compiled(self._mesh(pair, 0), pair, ALIGNMENT, ring=False)
            tick.put([aligned_empty(ALIGNMENT)] * self.lanes)
