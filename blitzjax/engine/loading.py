"""How parameters get into an instance's LayerStore: from its own disk, or down a multicast chain.

One dispatcher thread does all of it, in the order in which commands came: collectives block their thread, and two of
them in different order in two processes would wait for each other. Every job ends in one TransferEnded.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from blitzjax.config import Config
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.params import LayerStore
from blitzjax.errors import BlitzError, CheckpointError, TransferError
from blitzjax.transfer import broadcast
from blitzjax.transfer.world import World
from blitzjax.types import (
    CancelTransfer, Chain, Event, InstanceId, LayerLoaded, LoadFromDisk, MulticastPlan, PrepareTransfer, StartTransfer,
    TransferEnded, TransferReady,
)

log = logging.getLogger(__name__)


class Loader:
    """Writes the store; `on_unit` tells the engine thread that the watermark moved."""

    def __init__(self, name: InstanceId, config: Config, store: LayerStore, checkpoint: Path | None, world: World,
                 ranks: Mapping[InstanceId, int], emit: Callable[[Event], None], on_unit: Callable[[], None],
                 now: Callable[[], float] = time.time):
        self.name, self.store = name, store
        self._config, self._checkpoint, self._world, self._ranks = config, checkpoint, world, dict(ranks)
        self._emit, self._on_unit, self._now = emit, on_unit, now
        self._jobs: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._prepared: dict[int, tuple[broadcast.Session, Chain]] = {}
        self._cancelled: set[int] = set()
        threading.Thread(target=self._run, name="dispatcher", daemon=True).start()

    def post(self, command: PrepareTransfer | StartTransfer | CancelTransfer | LoadFromDisk) -> None:
        """Thread-safe. A cancellation takes effect inside the job that is under way."""
        if isinstance(command, CancelTransfer):
            self._cancelled.add(command.ticket)
        self._jobs.put(command)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            match job:
                case PrepareTransfer():
                    self._prepare(job.plan)
                case StartTransfer():
                    self._start(job.ticket)
                case CancelTransfer():
                    if self._prepared.pop(job.ticket, None) is not None:
                        self._ended(job.ticket, "cancelled before it started")
                case LoadFromDisk():
                    self._load(job.ticket)
                case _:
                    raise AssertionError(f"unknown job {job!r}")

    def _prepare(self, plan: MulticastPlan) -> None:
        chain = next(c for c in plan.chains if self.name in c.instances)
        ranks = [self._ranks[i] for i in chain.instances]
        share = self._share(plan, chain)
        chunk = broadcast.chunk_size(self.store.slab_bytes(0), self._config.transfer.chunk_bytes, share.part)
        try:
            session = broadcast.prepare(self._world, ranks, chain.generation, self.store.lanes, chunk, share)
        except TransferError as e:
            self._ended(plan.ticket, str(e))
            return
        self._prepared[plan.ticket] = (session, chain)
        self._emit(TransferReady(self._now(), self.name, plan.ticket))

    def _share(self, plan: MulticastPlan, chain: Chain) -> broadcast.Share:
        """What this instance moves of every unit, and with whom it gathers the rest."""
        part = broadcast.Part(chain.lane, chain.lanes)
        ring = next((ring for ring in plan.rings if self.name in ring.instances), None)
        if ring is None:
            return broadcast.Share(part)
        lane_of = {i: c.lane for c in plan.chains for i in c.instances}
        return broadcast.Share(part, tuple(self._ranks[i] for i in ring.instances),
                               tuple(lane_of[i] for i in ring.instances), ring.generation)

    def _start(self, ticket: int) -> None:
        found = self._prepared.pop(ticket, None)
        if found is None:  # cancelled before: already ended
            return
        session, chain = found
        try:
            stop = session.run(self.store, chain.start_unit, chain.stop_unit, lambda unit: self._arrived(),
                               lambda: ticket in self._cancelled)
        except TransferError as e:
            self._ended(ticket, str(e))
            return
        self._ended(ticket, "" if stop == chain.stop_unit else "cancelled")

    def _load(self, ticket: int) -> None:
        """Units from the watermark on, one at a time."""
        try:
            if self._checkpoint is None:
                raise CheckpointError(f"{self.name} has no checkpoint directory; start it with one or use multicast")
            checkpoint = Checkpoint.open(self._checkpoint)
            for unit in range(self.store.units, self.store.spec.units):
                if ticket in self._cancelled:
                    raise TransferError("cancelled")
                checkpoint.load_unit(unit, self.store)
                for lane in range(self.store.lanes):
                    self.store.checksum(unit, lane)  # remembered: a multicast must not compute it beside the decode
                self._arrived()
        except BlitzError as e:
            self._ended(ticket, str(e))
            return
        self._ended(ticket, "")

    def _arrived(self) -> None:
        self._on_unit()
        self._emit(LayerLoaded(self._now(), self.name, self.store.units))

    def _ended(self, ticket: int, error: str) -> None:
        if error:
            log.warning("%s: transfer %d ended: %s", self.name, ticket, error)
        self._emit(TransferEnded(self._now(), self.name, ticket, self.store.units, error))
