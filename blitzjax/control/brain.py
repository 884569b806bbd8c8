"""The brain: `handle(event) -> [command]`. What does the cluster do next?

Deterministic and sans I/O: time comes in events, commands go out as values. The same object runs behind the live
controller and in tests. It never raises on late, odd or repeated events; `check` says whether its state is sound.
"""

from __future__ import annotations

from typing import assert_never

from blitzjax.config import Config
from blitzjax.control import autoscale
from blitzjax.control.assignments import Assignments
from blitzjax.control.load import Load
from blitzjax.control.loads import MAX_FAILURES, Loads
from blitzjax.control.members import ClusterStatus, InstanceStatus, Member
from blitzjax.control.state import State
from blitzjax.types import (
    Command, Drained, Event, InstanceId, InstanceJoined, InstanceLost, LayerLoaded, LiveDrained, ModelSpec, Phase,
    PrefillDone, RequestArrived, RequestCancelled, RequestFailed, RequestFinished, RequestHanded, ScaleRequested, Ticked,
    TransferEnded, TransferReady, WorldJoined,
)


class Cluster:
    """Owned by one shell, which feeds every event in order and carries out every command before the next event."""

    def __init__(self, config: Config, spec: ModelSpec) -> None:
        self._config, self._spec = config, spec
        self._state = State(config, spec)
        self._assignments = Assignments(self._state)
        self._loads = Loads(self._state)
        self._target = config.scale.min_instances
        self._memory = autoscale.Memory()
        self._hold_until = 0.0  # an operator's wish stands until then, in seconds

    def handle(self, event: Event) -> list[Command]:
        """What follows from `event`."""
        self._apply(event)
        self._reconcile(event.at)
        self._assignments.dispatch()
        commands, self._state.commands = self._state.commands, []
        return commands

    def check(self) -> None:
        """AssertionError when an invariant is broken."""
        self._state.check()
        assert self._target >= 1

    def status(self) -> ClusterStatus:
        state = self._state
        return ClusterStatus(
            instances=tuple(self._instance_status(state.members[i]) for i in sorted(state.members)),
            queued=state.requests.queued, running=len(state.requests) - state.requests.queued, target=self._target,
            chains=state.transfers.chains)

    def _apply(self, event: Event) -> None:
        match event:
            case RequestArrived():
                self._assignments.arrived(event)
            case RequestCancelled():
                self._assignments.cancelled(event.request_id)
            case PrefillDone():
                self._assignments.started(event.instance, event.request_id, event.attempt)
            case RequestHanded():
                self._assignments.handed(event.target, event.request_id, event.attempt)
            case RequestFinished():
                self._assignments.finished(event)
            case RequestFailed():
                self._assignments.failed(event)
            case LayerLoaded():
                self._loads.arrived(event.instance, event.units)
            case TransferReady():
                self._loads.ready(event.instance, event.ticket)
            case TransferEnded():
                self._loads.ended(event.instance, event.ticket, event.units, event.error)
            case LiveDrained():
                self._loads.drained(event.instance)
            case Drained():
                self._drained(event.instance)
            case InstanceJoined():
                self._joined(event)
            case WorldJoined():
                if event.instance in self._state.members:
                    self._state.members[event.instance].in_world = True
            case InstanceLost():
                self._lost(event.instance, event.reason)
            case ScaleRequested():
                self._scale_requested(event)
            case Ticked():
                self._autoscale(event.at)
            case _:
                assert_never(event)

    # ---- instances come and go

    def _joined(self, event: InstanceJoined) -> None:
        """A worker is up, for the first time or again; it may have kept its parameters from before."""
        known = self._state.members.get(event.instance)
        if known is not None:
            self._lost(event.instance, "it joined again")
            if known.incarnation != event.incarnation:
                self._state.transfers.member_restarted(event.instance)
        member = Member(event.instance, event.incarnation, event.units, event.pages, event.page_size, event.slots,
                        Phase.FAILED if known is not None else Phase.IDLE)
        self._state.members[event.instance] = member
        self._state.topology.add(event.instance, event.host)
        if event.units == self._spec.units:
            member.phase = Phase.SERVING
        elif known is not None:
            member.move(Phase.IDLE)

    def _lost(self, instance: InstanceId, reason: str) -> None:
        member = self._state.members.get(instance)
        if member is None or member.phase is Phase.FAILED:
            return
        member.move(Phase.FAILED)
        member.units, member.in_world, member.releasing = 0, False, False
        self._loads.lost(instance)
        self._assignments.owner_lost(instance, reason)

    def _drained(self, instance: InstanceId) -> None:
        member = self._state.members.get(instance)
        if member is not None and member.releasing:
            member.releasing, member.units = False, 0
            if member.phase is Phase.DRAINING:
                member.move(Phase.IDLE)

    # ---- how many instances

    def _scale_requested(self, event: ScaleRequested) -> None:
        scale = self._config.scale
        self._target = max(1, min(event.target, len(self._state.members)))
        self._loads.live, self._loads.source = event.live or scale.live, event.source or scale.source
        self._hold_until = event.at + scale.down_after_s
        self._memory = autoscale.Memory()

    def _autoscale(self, at: float) -> None:
        serving = self._state.in_phase(Phase.SERVING)
        if self._config.scale.policy != "auto" or at < self._hold_until or not serving:
            return
        requests, counted = self._state.requests, self._state.counted
        load = Load(at, len(counted), requests.queued_tokens + sum(m.backlog_tokens for m in counted),
                    sum(m.pages_used for m in counted), serving[0].pages)
        wanted, self._memory = autoscale.step(load, self._memory, self._config.scale)
        available = sum(m.phase is not Phase.FAILED for m in self._state.members.values())
        wanted = min(wanted, max(available, 1))
        if wanted != len(counted):
            self._target = wanted
            self._loads.live, self._loads.source = self._config.scale.live, self._config.scale.source

    def _reconcile(self, at: float) -> None:
        """Moves what is there towards the target; every step of it may be repeated."""
        for member in self._state.in_phase(Phase.LOADING, Phase.LIVE):
            if member.failures >= MAX_FAILURES and not self._state.transfers.involved(member.id):
                self._assignments.owner_lost(member.id, "its parameters could not be loaded")
                self._loads.give_up(member)
                self._target = max(1, self._target - 1)
        missing = self._target - len(self._state.counted)
        if missing > 0:
            missing -= self._revive(missing)
        elif missing < 0:
            self._drain(-missing)
        self._release_empty()
        orphans = [m for m in self._state.in_phase(Phase.LOADING, Phase.LIVE)
                   if not self._state.transfers.receiving(m.id)]
        idle = [m for m in self._state.in_phase(Phase.IDLE) if not m.releasing]
        idle.sort(key=lambda m: (not m.in_world, -m.units, m.id))
        wanted = orphans + idle[: max(0, missing)]
        if wanted:
            self._loads.begin(at, wanted)

    def _revive(self, missing: int) -> int:
        """Draining instances still hold everything: they serve again at once. → how many"""
        revived = [m for m in self._state.in_phase(Phase.DRAINING) if not m.releasing][:missing]
        for member in revived:
            member.move(Phase.SERVING)
        return len(revived)

    def _drain(self, surplus: int) -> None:
        """The least busy instances take nothing new. Pairs, senders and the last instance stay."""
        serving = self._state.in_phase(Phase.SERVING)
        free = [m for m in serving
                if self._state.pair_of(m.id) is None and not self._state.transfers.involved(m.id)]
        free.reverse()  # of equally busy ones the latest goes first
        free.sort(key=lambda m: len(m.owned))
        for member in free[: min(surplus, len(serving) - 1)]:
            member.move(Phase.DRAINING)

    def _release_empty(self) -> None:
        for member in self._state.in_phase(Phase.DRAINING):
            busy = member.owned or self._state.transfers.involved(member.id) or self._state.pair_of(member.id)
            if not busy and not member.releasing:
                self._loads.release(member)

    def _instance_status(self, member: Member) -> InstanceStatus:
        pair = self._state.pair_of(member.id)
        partner = None if pair is None else pair.new if pair.old == member.id else pair.old
        return InstanceStatus(member.id, member.phase, member.units, partner, len(member.unstarted),
                              len(member.owned) - len(member.unstarted), member.pages_used, member.pages,
                              member.in_world)
