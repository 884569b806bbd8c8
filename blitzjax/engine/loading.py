"""How parameters get into a worker's LayerStores, as an instance's or as a host copy: from its disk, or down a chain.

One dispatcher thread does all of it, in the order in which commands came: collectives block their thread, and two of
them in different order in two processes would wait for each other. Every job ends in one TransferEnded.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blitzjax.config import Config
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.params import LayerStore
from blitzjax.errors import BlitzError, CheckpointError, TransferError
from blitzjax.transfer import broadcast
from blitzjax.transfer.world import World
from blitzjax.commands import CancelTransfer, DropCopy, KeepCopy, LoadFromDisk, PrepareTransfer, StartTransfer, UseCopy
from blitzjax.events import Event, LayerLoaded, TransferEnded, TransferReady
from blitzjax.types import Chain, InstanceId, MulticastPlan

log = logging.getLogger(__name__)

Job: TypeAlias = (PrepareTransfer | StartTransfer | CancelTransfer | LoadFromDisk | KeepCopy | UseCopy | DropCopy)


@dataclass(frozen=True, slots=True)
class Holder:
    """One model of the worker: its store, its checkpoint if there is one here, and who hears of arrived units."""

    store: LayerStore
    checkpoint: Path | None
    on_unit: Callable[[], None]


class Loader:
    """Writes the stores of `holders`, by model; others may add to them and, once a model is gone, take away."""

    def __init__(self, name: InstanceId, config: Config, holders: Mapping[str, Holder], world: World,
                 ranks: Mapping[InstanceId, int], emit: Callable[[Event], None],
                 now: Callable[[], float] = time.time):
        self.name = name
        self._config, self._holders, self._world, self._ranks = config, holders, world, dict(ranks)
        self._emit, self._now = emit, now
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._prepared: dict[int, tuple[broadcast.Session, Chain, Holder]] = {}
        self._cancelled: set[int] = set()  # until their turn comes among the jobs

    def post(self, command: Job) -> None:
        """Thread-safe. A cancellation takes effect inside the job that is under way."""
        if isinstance(command, CancelTransfer):
            self._cancelled.add(command.ticket)
        self._jobs.put(command)

    def run(self) -> None:
        """The dispatcher thread, for ever."""
        while True:
            job = self._jobs.get()
            match job:
                case PrepareTransfer():
                    self._prepare(job.plan)
                case StartTransfer():
                    self._start(job.ticket)
                case CancelTransfer():
                    self._cancelled.discard(job.ticket)  # what follows is of a new controller, whose tickets may be the same
                    if (found := self._prepared.pop(job.ticket, None)) is not None:
                        self._ended(job.ticket, found[2].store, "cancelled before it started")
                case LoadFromDisk() | KeepCopy():
                    self._load(job.ticket, job.model, copy=isinstance(job, KeepCopy))
                case UseCopy():
                    self._use(job)
                case DropCopy():
                    if job.model in self._holders:
                        self._holders[job.model].store.release()
                case _:
                    raise AssertionError(f"unknown job {job!r}")

    def _prepare(self, plan: MulticastPlan) -> None:
        chain, holder = next(c for c in plan.chains if self.name in c.instances), self._holders[plan.model]
        ranks = [self._ranks[i] for i in chain.instances]
        share = self._share(plan, chain)
        chunk = broadcast.chunk_size(holder.store.slab_bytes(0), self._config.transfer.chunk_bytes, share.part)
        try:
            session = broadcast.prepare(self._world, ranks, chain.generation, holder.store.lanes, chunk, share)
        except TransferError as e:
            self._ended(plan.ticket, holder.store, str(e))
            return
        if chain.instances[0] != self.name:
            _become(holder.store, plan.copy)
        self._prepared[plan.ticket] = (session, chain, holder)
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
        session, chain, holder = found
        with self._reported(ticket, holder.store):
            stop = session.run(holder.store, chain.start_unit, chain.stop_unit, lambda unit: self._arrived(holder),
                               lambda: ticket in self._cancelled)
            if stop != chain.stop_unit:
                raise TransferError("cancelled")

    def _load(self, ticket: int, model: str, copy: bool) -> None:
        """Units from the watermark on, one at a time."""
        holder = self._holders[model]
        store = holder.store
        _become(store, copy)
        with self._reported(ticket, store):
            if holder.checkpoint is None:
                raise CheckpointError(f"{self.name} has no checkpoint directory; start it with one or use multicast")
            checkpoint = Checkpoint.open(holder.checkpoint)
            for unit in range(store.units, store.spec.units):
                if ticket in self._cancelled:
                    raise TransferError("cancelled")
                checkpoint.load_unit(unit, store)
                for lane in range(store.lanes):
                    store.checksum(unit, lane)  # remembered: a multicast must not compute it beside the decode
                self._arrived(holder)

    def _use(self, job: UseCopy) -> None:
        holder = self._holders[job.model]
        with self._reported(job.ticket, holder.store):
            holder.store.use()
            self._arrived(holder)

    def _arrived(self, holder: Holder) -> None:
        """Units of a copy are nobody's business until it is whole."""
        if not holder.store.is_copy:
            holder.on_unit()
            self._emit(LayerLoaded(self._now(), self.name, holder.store.units))

    @contextmanager
    def _reported(self, ticket: int, store: LayerStore) -> Iterator[None]:
        """The job inside ends in a TransferEnded, whether it succeeds or not."""
        try:
            yield
        except BlitzError as e:
            self._ended(ticket, store, str(e))
        else:
            self._ended(ticket, store, "")

    def _ended(self, ticket: int, store: LayerStore, error: str) -> None:
        if error:
            log.warning("%s: transfer %d ended: %s", self.name, ticket, error)
        self._emit(TransferEnded(self._now(), self.name, ticket, store.units, error))


def _become(store: LayerStore, copy: bool) -> None:
    """What a receiver has of the model, however it came there, is of the kind that the rest will be."""
    store.keep() if copy else store.use()
