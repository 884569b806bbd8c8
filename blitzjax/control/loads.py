"""How parameters reach instances: disk loads and multicasts from prepare to end, live pairs, retries after failures.

Invariant: an instance that is LOADING or LIVE without a transfer is given one as soon as a source allows; after
MAX_FAILURES broken loads it is given up.
"""

from __future__ import annotations

from collections.abc import Sequence

from blitzjax.control import multicast
from blitzjax.control.members import Member
from blitzjax.control.state import State
from blitzjax.control.tickets import Transfer
from blitzjax.types import (
    CancelTransfer, EndLive, InstanceId, LiveMode, LivePair, LoadFromDisk, Phase, PrepareTransfer, Release, Source,
    StartLive, StartTransfer,
)

MAX_FAILURES = 3
_DISK_AFTER = 2  # broken loads after which an instance reads from its own disk
_WORLD_PATIENCE_S = 5.0  # an instance that has not joined the collectives by then loads from disk


class Loads:
    """`live` and `source` are the modes of the scale-up under way."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.live: LiveMode = state.config.scale.live
        self.source: Source = state.config.scale.source
        self._drained: set[InstanceId] = set()  # OLD sides that said so

    def begin(self, at: float, wanted: Sequence[Member]) -> None:
        """Starts loads for as many of `wanted` (none of them receiving) as sources allow now; the rest waits."""
        sources = self._state.in_phase(Phase.SERVING, Phase.DRAINING)
        for member in wanted:
            member.wanted_since = at if member.wanted_since is None else member.wanted_since
        disk = [m for m in wanted if self._from_disk(m, at, sources)]
        if not sources and self.source == "multicast":  # one reads, the others copy from it
            reading = any(self._state.transfers.receiving(m.id) for m in self._state.members.values())
            disk = [] if reading else disk[:1]
        for member in disk:
            self._load_from_disk(member)
        reachable = [m for m in wanted if m not in disk and m.in_world]
        if reachable:
            self._multicast(reachable, [s for s in sources if s.in_world])

    def ready(self, instance: InstanceId, ticket: int) -> None:
        """Once everybody is prepared, everybody starts; tails go live."""
        transfer = self._state.transfers.get(ticket)
        if transfer is None or instance not in transfer.unready:
            return
        transfer.unready.discard(instance)
        if transfer.unready or transfer.cancelled:
            return
        for chain in transfer.plan.chains:
            for member in chain.instances:
                self._state.say(StartTransfer(member, ticket))
            self._go_live(chain.instances[-1], chain.instances[0])

    def arrived(self, instance: InstanceId, units: int) -> None:
        member = self._state.members.get(instance)
        if member is not None and member.phase in (Phase.LOADING, Phase.LIVE):
            member.units = max(member.units, units)

    def ended(self, instance: InstanceId, ticket: int, units: int, error: str) -> None:
        """A participant left: complete receivers serve, trouble takes the rest of the chain down with it."""
        transfer = self._state.transfers.get(ticket)
        if transfer is None or instance not in transfer.pending:
            return
        member, received = self._state.members[instance], transfer.receives(instance)
        if received and member.phase in (Phase.LOADING, Phase.LIVE):
            member.units = units
            if units == self._state.spec.units:
                member.move(Phase.SERVING)
                member.failures, member.wanted_since = 0, None
                self._end_if_drained(instance)
            elif instance not in transfer.cancelled:
                member.failures += 1
        self._leave(transfer, instance, broken=bool(error))

    def lost(self, instance: InstanceId) -> None:
        """An instance is gone: its transfers break, its pair ends."""
        for transfer in self._state.transfers.of(instance):
            self._leave(transfer, instance, broken=True)
        pair = self._state.pair_of(instance)
        if pair is not None:
            self._end_pair(pair)

    def drained(self, old: InstanceId) -> None:
        """OLD can get nothing more from a NEW that is complete: the pair has done its work.

        OLD may say so before NEW reports that it is complete.
        """
        pair = self._state.pair_of(old)
        if pair is not None and pair.old == old:
            self._drained.add(old)
            self._end_if_drained(pair.new)

    def give_up(self, member: Member) -> None:
        """Too many broken loads: back to idle, without parameters."""
        pair = self._state.pair_of(member.id)
        if pair is not None:
            self._end_pair(pair)
        member.move(Phase.IDLE)
        member.failures, member.wanted_since = 0, None
        self.release(member)

    def release(self, member: Member) -> None:
        member.releasing = True
        self._state.say(Release(member.id))

    # ----------------------------------------------------------------------------------------------------------------

    def _from_disk(self, member: Member, at: float, sources: Sequence[Member]) -> bool:
        if self.source == "disk" or not sources or member.failures >= _DISK_AFTER:
            return True
        out_of_world = not member.in_world or not any(s.in_world for s in sources)
        return out_of_world and at - member.wanted_since >= _WORLD_PATIENCE_S

    def _load_from_disk(self, member: Member) -> None:
        ticket = self._state.transfers.next_ticket()
        self._state.transfers.begin(Transfer(ticket, None, {member.id}))
        if member.phase is Phase.IDLE:
            member.move(Phase.LOADING)
        self._state.say(LoadFromDisk(member.id, ticket, member.units))
        self._go_live(member.id, None)

    def _multicast(self, targets: Sequence[Member], sources: Sequence[Member]) -> None:
        state, ticket = self._state, self._state.transfers.next_ticket()
        plan = multicast.plan(ticket, state.spec.name, [(s.id, s.units) for s in sources],
                              [(t.id, t.units) for t in targets], state.topology, state.spec.units,
                              state.transfers.generation_of)
        members = {i for chain in plan.chains for i in chain.instances}
        if not members:
            return  # every source is sending: asked again with the next event
        state.transfers.begin(Transfer(ticket, plan, set(members), unready=set(members)))
        for chain in plan.chains:
            state.topology.begin(ticket, chain.instances)
            for instance in chain.instances:
                state.say(PrepareTransfer(instance, plan))
        for target in targets:
            if target.phase is Phase.IDLE:
                target.move(Phase.LOADING)

    def _go_live(self, new: InstanceId, source: InstanceId | None) -> None:
        """Pairs a loading instance with the overloaded one it can help: its source if that is free, else the busiest."""
        member = self._state.members[new]
        if self.live == "off" or member.phase is not Phase.LOADING or self._state.pair_of(new) is not None:
            return
        free = [m for m in self._state.in_phase(Phase.SERVING) if self._state.pair_of(m.id) is None]
        old = min(free, key=lambda m: (m.id != source, -m.backlog_tokens, m.id), default=None)
        if old is None:
            return
        pair = LivePair(old.id, new, self.live)
        self._state.pairs.append(pair)
        member.move(Phase.LIVE)
        self._state.say(StartLive(new, pair))
        self._state.say(StartLive(old.id, pair))

    def _end_if_drained(self, new: InstanceId) -> None:
        pair = self._state.pair_of(new)
        if pair is not None and pair.old in self._drained and self._state.members[pair.new].phase is not Phase.LIVE:
            self._end_pair(pair)

    def _end_pair(self, pair: LivePair) -> None:
        self._state.pairs.remove(pair)
        self._drained.discard(pair.old)
        new = self._state.members[pair.new]
        if new.phase is Phase.LIVE:
            new.move(Phase.LOADING)
        for instance in (pair.new, pair.old):
            if self._state.members[instance].phase is not Phase.FAILED:
                self._state.say(EndLive(instance, pair))

    def _leave(self, transfer: Transfer, instance: InstanceId, broken: bool) -> None:
        """`instance` is out of `transfer`. If it broke, the clique is burnt and those who depend on it stop."""
        chain, doomed = transfer.chain_of(instance), transfer.doomed_with(instance)
        first_break = broken and not transfer.cancelled & set(chain.instances if chain else ())
        self._state.topology.end(transfer.ticket, instance)
        self._state.transfers.leave(transfer, instance)
        if not broken or chain is None:
            return
        if first_break and transfer.started:
            self._state.transfers.clique_failed(chain.instances)
        for other in sorted(doomed):
            transfer.cancelled.add(other)
            self._state.say(CancelTransfer(other, transfer.ticket))
