"""The brain: events in, commands out, no clock and no I/O. What should every instance do next?

Invariant: every accepted request is queued or owned by one instance and ends once; `handle` never raises, whatever
comes late, twice or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

from blitzjax import types
from blitzjax.config import Config
from blitzjax.control.blocks import answer_share
from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.migrations import Migrations
from blitzjax.control.provision import Provisioner
from blitzjax.control.requests import Entry, RequestBook
from blitzjax.control.routing import Router, Seat
from blitzjax.control.scaling import Scaler
from blitzjax.control.status import ClusterStatus, InstanceStatus
from blitzjax.control.topology import Port
from blitzjax.types import Abort, Assign, Command, Event, InstanceId, ModelSpec, Phase, Reject, Request, RequestId, Role


# Events that say nothing about instances, nor leave one without requests: no step towards the goal can follow them.
_ONLY_REQUESTS = (types.RequestArrived, types.PrefillDone, types.LayerLoaded)


class Cluster:
    """All instances and requests of one model. One caller: each command is carried out before the next event.

    `ports` says where instances sit in the network; one that it does not name has 100 Gbps and its host's domain.
    """

    def __init__(self, config: Config, spec: ModelSpec,
                 ports: Mapping[InstanceId, Port] = MappingProxyType({})) -> None:
        self._config = config
        self._ports = dict(ports)
        self._spec = spec
        self._fleet = Fleet(spec.units)
        share = answer_share(config)
        self._book = RequestBook(config.serve.max_attempts, share)
        self._provisioner = Provisioner(config, spec, self._fleet, self._book)
        self._migrations = Migrations(self._fleet, self._book)
        self._scaler = Scaler(config, self._fleet, self._book, self._provisioner, self._migrations.inbound)
        self._router = Router(2 * config.engine.max_num_batched_tokens, config.scale.live_queue_tokens, share)

    def handle(self, event: Event) -> list[Command]:
        """What to do about `event`, in the order in which commands must be sent."""
        commands = self._react(event)
        if not isinstance(event, _ONLY_REQUESTS):
            commands += self._scaler.reconcile(event.at)
        commands += self._dispatch()
        commands += self._migrations.start()
        return commands

    def status(self) -> ClusterStatus:
        chains = tuple((run.ticket, run.chain) for run in self._provisioner.transfers.runs())
        members = [m for _, m in sorted(self._fleet.members.items())]
        return ClusterStatus(tuple(self._picture(m) for m in members), self._book.queued, self._book.running,
                             self._scaler.goal.target, chains)

    def check(self) -> None:
        """Asserts every invariant of the brain."""
        self._book.check()
        self._fleet.check()
        self._provisioner.check()
        self._migrations.check()
        for m in self._fleet.members.values():
            entries = self._book.owned(m.id)
            assert not entries or m.phase not in (Phase.IDLE, Phase.FAILED), f"{m.id} is {m.phase} and owns requests"
            assert not (entries and m.releasing), f"{m.id} forgets its requests"
            # What a live partner hands over waits inside the instance if need be; what we assigned must fit.
            assert sum(not e.handed for e in entries) <= m.slots, f"{m.id} has more requests than slots"
            assigned = sum(self._book.need(e.request, m.page_size) for e in entries if not e.handed)
            assert assigned <= m.pages, f"{m.id} is short of pages"

    # ---- events

    def _react(self, event: Event) -> list[Command]:
        match event:
            case types.RequestArrived(request=request):
                return self._arrived(request)
            case types.RequestCancelled(request_id=request_id):
                return self._cancelled(request_id)
            case types.ScaleRequested():
                self._scaler.request(event)
                return []
            case types.Ticked(at=at):
                self._scaler.tick(at)
                return []
            case types.InstanceJoined():
                return self._joined(event)
        member = self._fleet.alive(event.instance)
        return [] if member is None else self._reported(member, event)

    def _reported(self, member: Member, event: Event) -> list[Command]:
        """Something that a living instance says, or that is said of it."""
        match event:
            case types.PrefillDone(request_id=request_id, attempt=attempt):
                return self._prefilled(member, request_id, attempt)
            case types.RequestHanded():
                return self._handed(event)
            case types.KVMigrated(request_id=request_id, attempt=attempt, kv_bytes=kv_bytes):
                self._migrations.received_bytes[member.id] += kv_bytes
                entry = self._book.current(request_id, attempt)
                return self._disown(member.id, request_id) if entry is None else self._take_over(entry, member)
            case types.RequestFinished(request_id=request_id, attempt=attempt, reason=reason):
                return self._finished(member, request_id, attempt, reason)
            case types.RequestFailed(request_id=request_id, attempt=attempt, message=message):
                entry = self._book.current(request_id, attempt)
                running = entry is not None and entry.owner is not None
                return self._book.lose(entry, f"{member.id}: {message}") if running else []
            case types.RequestReturned(request_id=request_id, attempt=attempt):
                entry = self._book.current(request_id, attempt)
                return self._book.give_back(entry) if entry is not None and entry.owner == member.id else []
            case types.LayerLoaded(units=units):
                self._provisioner.arrived(member, units)
                return []
            case types.TransferReady(ticket=ticket):
                return self._provisioner.ready(member.id, ticket)
            case types.TransferEnded():
                return self._provisioner.ended(member, event)
            case types.LiveDrained():
                return self._provisioner.drained(member.id)
            case types.Drained():
                return self._released(member)
            case types.WorldJoined():
                member.in_world = True
                return []
            case types.InstanceLost(reason=reason):
                return self._lost(member, reason)
            case (types.RequestArrived() | types.RequestCancelled() | types.ScaleRequested() | types.Ticked()
                  | types.InstanceJoined()):
                raise AssertionError(f"{event} is not about one instance")
        assert_never(event)

    # ---- requests

    def _arrived(self, request: Request) -> list[Command]:
        if self._book.get(request.id) is not None:
            return []
        refusal = self._refusal(request)
        if refusal is not None:
            return [refusal]
        self._book.arrive(request)
        return []

    def _refusal(self, request: Request) -> Reject | None:
        """Why the request cannot be accepted, naming the limit."""
        limit = min(self._spec.max_len, self._config.engine.max_model_len)
        bound = self._config.serve.max_queued_requests
        if request.model != self._spec.name:
            return Reject(request.id, "NOT_FOUND", f"no model {request.model!r} here; this is {self._spec.name!r}")
        if request.total_tokens > limit:
            return Reject(request.id, "INVALID_ARGUMENT", f"prompt and max_tokens make {request.total_tokens} tokens; "
                                                          f"the limit is {limit}")
        if self._too_large(request):
            return self._reject_too_large(request)
        if self._book.queued >= bound:
            return Reject(request.id, "RESOURCE_EXHAUSTED", f"{bound} requests are waiting already; try again later")
        return None

    def _too_large(self, request: Request) -> bool:
        """More KV than the largest instance has; unknown before one joined."""
        capacity = self._fleet.capacity_tokens()
        return capacity is not None and request.total_tokens > capacity

    def _reject_too_large(self, request: Request) -> Reject:
        return Reject(request.id, "INVALID_ARGUMENT", f"prompt and max_tokens make {request.total_tokens} tokens; the "
                                                      f"KV cache of an instance holds {self._fleet.capacity_tokens()}")

    def _cancelled(self, request_id: RequestId) -> list[Command]:
        entry = self._book.get(request_id)
        if entry is None:
            return []
        if entry.owner is None:
            self._book.forget(entry)
            return []
        entry.cancelled = True
        return [Abort(entry.owner, request_id)]

    def _prefilled(self, member: Member, request_id: RequestId, attempt: int) -> list[Command]:
        entry = self._book.current(request_id, attempt)
        if entry is None:
            return self._disown(member.id, request_id)
        commands = self._take_over(entry, member)
        if entry.owner is not None:
            self._book.answer(entry)
            if self._fleet.members[entry.owner].role is Role.PREFILL and entry.request.max_tokens > 1:
                self._migrations.wait(entry)
        return commands

    def _finished(self, member: Member, request_id: RequestId, attempt: int,
                  reason: types.FinishReason) -> list[Command]:
        entry = self._book.current(request_id, attempt)
        if entry is None:
            return [] if self._book.get(request_id) is None else self._disown(member.id, request_id)
        if reason == "abort" and not entry.cancelled:  # an Abort that was meant for a void attempt
            return [] if entry.owner is None else self._book.lose(entry, f"{member.id} dropped it")
        self._book.forget(entry)
        return []

    def _disown(self, instance: InstanceId, request_id: RequestId) -> list[Command]:
        """`instance` runs an attempt that is void: it stops, unless it owns the valid one, which displaces it there."""
        entry = self._book.get(request_id)
        return [] if entry is not None and entry.owner == instance else [Abort(instance, request_id)]

    def _handed(self, event: types.RequestHanded) -> list[Command]:
        """OLD took over a request of NEW. OLD's word is final; NEW's holds while both live and are a pair."""
        entry = self._book.current(event.request_id, event.attempt)
        target = self._fleet.alive(event.target)
        if event.instance == event.target:
            assert target is not None  # it speaks
            return self._take_over(entry, target) if entry is not None else self._disown(target.id, event.request_id)
        if entry is None or entry.owner != event.instance:
            return []  # known already, or over
        pair = self._provisioner.pairs.of(event.instance)
        if target is None or pair is None or (pair.old, pair.new) != (target.id, event.instance):
            return self._book.lose(entry, f"{event.target} left before it took the request over")
        return self._take_over(entry, target, giver=event.instance)

    def _take_over(self, entry: Entry, member: Member, giver: InstanceId | None = None) -> list[Command]:
        """`member` runs the current attempt now. A cancelled request chases its owner."""
        if member.releasing:  # it is about to forget the request
            return [] if entry.owner is None else self._book.lose(entry, f"{member.id} was released")
        moved = entry.owner != member.id or entry.giver is not None
        self._book.give(entry, member.id, giver)
        return [Abort(member.id, entry.request.id)] if moved and entry.cancelled else []

    # ---- instances

    def _joined(self, event: types.InstanceJoined) -> list[Command]:
        commands: list[Command] = []
        known = self._fleet.alive(event.instance)
        if known is not None:
            if known.incarnation == event.incarnation:
                return []
            commands = self._lost(known, "it came back as another process")
        self._fleet.join(event)
        self._book.open(event.instance, event.page_size)
        self._scaler.place(self._fleet.members[event.instance])
        here = Port(event.host, event.host, fast_gbps=self._config.cluster.fast_gbps)
        self._provisioner.topology.add(event.instance, self._ports.get(event.instance, here))
        return commands

    def _lost(self, member: Member, reason: str) -> list[Command]:
        commands = self._provisioner.lost(member.id)
        self._fleet.lose(member)
        self._migrations.lost(member.id)
        for entry in [*self._book.owned(member.id), *self._book.given(member.id)]:
            commands += self._book.lose(entry, f"{member.id} was lost: {reason}")
        return commands

    def _released(self, member: Member) -> list[Command]:
        if member.releasing:
            member.move(Phase.IDLE)
            member.units, member.releasing = 0, False
        return []

    # ---- dispatch

    def _dispatch(self) -> list[Command]:
        """Gives queued requests to instances, strictly in order: nothing overtakes the head."""
        commands: list[Command] = []
        while (entry := self._book.head()) is not None:
            if self._too_large(entry.request):
                commands.append(self._reject_too_large(entry.request))
                self._book.forget(entry)
                continue
            self._refresh_seats()
            instance = self._router.choose(entry.request)
            if instance is None:
                break
            self._book.assign(entry, instance)
            commands.append(Assign(instance, entry.request.id, entry.attempt))
        return commands

    def _refresh_seats(self) -> None:
        """The router hears of the instances whose requests, phase or pair changed."""
        changed = self._book.changed
        for source in (self._fleet.changed, self._provisioner.pairs.changed):
            if source:
                changed |= source
                source.clear()
        if not changed:
            return
        for instance in sorted(changed.union(*map(self._provisioner.pairs.sides, changed))):
            self._router.update(self._seat(self._fleet.members[instance]))
        changed.clear()

    def _seat(self, m: Member) -> Seat:
        """LIVE and SERVING members are never being released."""
        return Seat(m.id, m.phase, m.slots - self._book.owns(m.id), m.pages - self._book.pages(m.id), m.page_size,
                    self._book.backlog_tokens(m.id), m.role is Role.DECODE or self._provisioner.redirected(m.id))

    def _picture(self, m: Member) -> InstanceStatus:
        entries = self._book.owned(m.id)
        running = sum(e.answered for e in entries)
        return InstanceStatus(m.id, m.phase, m.units, self._provisioner.pairs.partner(m.id), len(entries) - running,
                              running, self._book.pages(m.id), m.pages, m.in_world, m.role,
                              self._migrations.received_bytes[m.id])
