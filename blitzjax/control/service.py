"""One deployed model: its requests, its instances, its goal. What should become of every request for it?

Invariant: every accepted request is queued or owned by one instance and ends once, whatever comes late, twice or never.
"""

from __future__ import annotations

from dataclasses import replace

from blitzjax import events, types
from blitzjax.config import Config
from blitzjax.control.blocks import answer_share
from blitzjax.control.fleet import Fleet, Member, Roster
from blitzjax.control.hostcache import HostCache
from blitzjax.control.migrations import Migrations
from blitzjax.control.pace import Pace
from blitzjax.control.provision import Provisioner
from blitzjax.control.requests import Entry, RequestBook
from blitzjax.control.routing import Router, Seat
from blitzjax.control.scaling import Scaler
from blitzjax.control.status import InstanceStatus, ModelStatus
from blitzjax.control.transfers import Transfers
from blitzjax.commands import Abort, Assign, Command, Reject
from blitzjax.events import ModelDeployed
from blitzjax.types import InstanceId, Phase, Request, RequestId, Role


class Service:
    """Owned by the Cluster, which shares roster, transfers and host copies among its services."""

    def __init__(self, config: Config, deployed: ModelDeployed, roster: Roster, transfers: Transfers,
                 copies: HostCache) -> None:
        scale, least, most = config.scale, deployed.min_instances, deployed.max_instances
        config = replace(config, scale=replace(
            scale, min_instances=scale.min_instances if least is None else least,
            max_instances=scale.max_instances if most is None else most))
        spec = deployed.spec
        self.name = spec.name
        self._config, self._roster = config, roster
        self._limit = min(spec.max_len, config.engine.max_model_len)  # tokens of a request
        self.fleet = Fleet(spec.name, spec.units, roster)
        share = answer_share(config)
        self.book = RequestBook(config.serve.max_attempts, share)
        self.provisioner = Provisioner(spec, self.fleet, self.book, transfers, copies)
        self.migrations = Migrations(self.fleet, self.book, scale.drain_by_moving)
        self._capacity: tuple[int, int | None] = (-1, None)  # of the largest instance, as of this version
        self._pace = Pace()
        self.scaler = Scaler(config, self.fleet, self.book, self.provisioner, copies, self.migrations.inbound, self._pace)
        self._router = Router(2 * config.engine.max_num_batched_tokens, config.scale.live_queue_tokens, share)
        for member in roster.members.values():
            self.book.open(member.id, member.page_size)

    def check(self) -> None:
        """Asserts every invariant of this model's part of the brain."""
        self.book.check()
        self.fleet.check()
        self.provisioner.check()
        self.migrations.check()
        for m in self._roster.members.values():
            entries = self.book.owned(m.id)
            assert not entries or self.fleet.alive(m.id), f"{m.id} is {m.phase} of {m.model!r} and owns requests"
            assert not (entries and m.releasing), f"{m.id} forgets its requests"
            # What a live partner hands over waits inside the instance if need be; what we assigned must fit.
            assert sum(not e.handed for e in entries) <= m.slots, f"{m.id} has more requests than slots"
            assigned = sum(self.book.need(e.request, m.page_size) for e in entries if not e.handed)
            assert assigned <= m.pages, f"{m.id} is short of pages"

    # ---- requests

    def arrived(self, request: Request) -> list[Command]:
        refusal = self._refusal(request)
        if refusal is not None:
            return [refusal]
        self.book.arrive(request)
        return []

    def _refusal(self, request: Request) -> Reject | None:
        """Why the request cannot be accepted, naming the limit."""
        bound = self._config.serve.max_queued_requests
        if request.total_tokens > self._limit:
            return Reject(request.id, "INVALID_ARGUMENT", f"prompt and max_tokens make {request.total_tokens} tokens; "
                                                          f"the limit is {self._limit}")
        if self._too_large(request):
            return self._reject_too_large(request)
        if self.book.queued >= bound:
            return Reject(request.id, "RESOURCE_EXHAUSTED", f"{bound} requests are waiting already; try again later")
        return None

    def _too_large(self, request: Request) -> bool:
        """More KV than the largest instance has."""
        capacity = self._capacity_tokens()
        return capacity is not None and request.total_tokens > capacity

    def _capacity_tokens(self) -> int | None:
        """KV of the largest instance, or where there is none of the largest worker; None before the first one joined."""
        if self._capacity[0] != self.fleet.version:
            members = [*self.fleet.in_phase(Phase.SERVING), *self.fleet.loading()]
            self._capacity = self.fleet.version, max((m.pages * m.page_size for m in members), default=None)
        return self._roster.tokens if self._capacity[1] is None else self._capacity[1]

    def _reject_too_large(self, request: Request) -> Reject:
        return Reject(request.id, "INVALID_ARGUMENT", f"prompt and max_tokens make {request.total_tokens} tokens; the "
                                                      f"KV cache of an instance holds {self._capacity_tokens()}")

    def turn_away(self, arrived_by: float, why: str) -> list[Command]:
        """Those that have waited for an instance since then, and get none."""
        late = [entry for entry in self.book.waiting() if entry.request.arrival_s <= arrived_by]
        for entry in late:
            self.book.forget(entry)
        return [Reject(entry.request.id, "UNAVAILABLE", f"no instance of {self.name!r}: {why}") for entry in late]

    def cancelled(self, request_id: RequestId) -> list[Command]:
        entry = self.book.get(request_id)
        if entry is None:
            return []
        if entry.owner is None:
            self.book.forget(entry)
            return []
        entry.cancelled = True
        return [Abort(entry.owner, request_id)]

    def reported(self, member: Member, event: events.PrefillDone | events.RequestHanded | events.KVMigrated
                 | events.RequestFinished | events.RequestFailed | events.RequestReturned) -> list[Command]:
        """What a living instance says of a request."""
        request_id, attempt = event.request_id, event.attempt
        match event:
            case events.PrefillDone():
                return self._prefilled(member, event)
            case events.RequestHanded():
                return self._handed(member, event)
            case events.KVMigrated(kv_bytes=kv_bytes):
                self.migrations.received_bytes[member.id] += kv_bytes
                entry = self.book.current(request_id, attempt)
                return self._disown(member.id, request_id) if entry is None else self._take_over(entry, member)
            case events.RequestFinished(reason=reason):
                return self._finished(member, request_id, attempt, reason)
            case events.RequestFailed(message=message):
                entry = self._owned(member, request_id, attempt)
                return [] if entry is None else self.book.lose(entry, f"{member.id}: {message}")
            case events.RequestReturned():
                entry = self._owned(member, request_id, attempt)
                return [] if entry is None else self.book.give_back(entry)

    def _owned(self, member: Member, request_id: RequestId, attempt: int) -> Entry | None:
        """None: it goes on elsewhere, or is over."""
        entry = self.book.current(request_id, attempt)
        return entry if entry is not None and entry.owner == member.id else None

    def _prefilled(self, member: Member, event: events.PrefillDone) -> list[Command]:
        entry = self.book.current(event.request_id, event.attempt)
        if entry is None:
            return self._disown(member.id, event.request_id)
        commands = self._take_over(entry, member)
        if entry.owner is not None:
            self.book.answer(entry)
            if entry.handed or self.provisioner.pairs.of(member.id) is not None:
                self._pace.unknown(member.id)
            self._pace.ran(member.id, event.at, entry.request.prompt_tokens, self.book.backlog_tokens(member.id) > 0)
            if self.fleet.members[entry.owner].role is Role.PREFILL and entry.request.max_tokens > 1:
                self.migrations.wait(entry)
        return commands

    def _finished(self, member: Member, request_id: RequestId, attempt: int,
                  reason: types.FinishReason) -> list[Command]:
        entry = self.book.current(request_id, attempt)
        if entry is None:
            return [] if self.book.get(request_id) is None else self._disown(member.id, request_id)
        if reason == "abort" and not entry.cancelled:  # an Abort that was meant for a void attempt
            return [] if entry.owner is None else self.book.lose(entry, f"{member.id} dropped it")
        self.book.forget(entry)
        return []

    def _disown(self, instance: InstanceId, request_id: RequestId) -> list[Command]:
        """`instance` runs an attempt that is void: it stops, unless it owns the valid one, which displaces it there."""
        entry = self.book.get(request_id)
        return [] if entry is not None and entry.owner == instance else [Abort(instance, request_id)]

    def _handed(self, member: Member, event: events.RequestHanded) -> list[Command]:
        """OLD took over a request of NEW. OLD's word is final; NEW's holds while both live and are a pair."""
        entry = self.book.current(event.request_id, event.attempt)
        if member.id == event.target:
            return self._take_over(entry, member) if entry is not None else self._disown(member.id, event.request_id)
        target = self.fleet.alive(event.target)
        if entry is None or entry.owner != event.instance:
            return []  # known already, or over
        pair = self.provisioner.pairs.of(event.instance)
        if target is None or pair is None or (pair.old, pair.new) != (target.id, event.instance):
            return self.book.lose(entry, f"{event.target} left before it took the request over")
        return self._take_over(entry, target, giver=event.instance)

    def _take_over(self, entry: Entry, member: Member, giver: InstanceId | None = None) -> list[Command]:
        """`member` runs the current attempt now. A cancelled request chases its owner."""
        if member.releasing or self.fleet.alive(member.id) is None:  # it forgets the request
            return [] if entry.owner is None else self.book.lose(entry, f"{member.id} was released")
        moved = entry.owner != member.id or entry.giver is not None
        self.book.give(entry, member.id, giver)
        return [Abort(member.id, entry.request.id)] if moved and entry.cancelled else []

    # ---- instances

    def lost(self, member: Member, reason: str) -> list[Command]:
        """One of its instances died and is out of the fleet; its pair has ended."""
        self.migrations.lost(member.id)
        commands: list[Command] = []
        for entry in [*self.book.owned(member.id), *self.book.given(member.id)]:
            commands += self.book.lose(entry, f"{member.id} was lost: {reason}")
        return commands

    # ---- dispatch

    def dispatch(self, at: float) -> list[Command]:
        """Gives queued requests to instances, strictly in order: nothing overtakes the head."""
        commands: list[Command] = []
        while (entry := self.book.head()) is not None:
            if self._too_large(entry.request):
                commands.append(self._reject_too_large(entry.request))
                self.book.forget(entry)
                continue
            self._refresh_seats()
            instance = self._router.choose(entry.request)
            if instance is None:
                break
            if not self.book.backlog_tokens(instance):
                self._begin_prompts(at, self.fleet.members[instance])
            self.book.assign(entry, instance)
            self._router.assigned(entry.request, instance)
            commands.append(Assign(instance, entry.request.id, entry.attempt))
        return commands

    def _begin_prompts(self, at: float, member: Member) -> None:
        whole = member.phase is Phase.SERVING and self.provisioner.pairs.of(member.id) is None
        self._pace.began(member.id, at) if whole else self._pace.unknown(member.id)

    def _refresh_seats(self) -> None:
        """The router hears of the instances whose requests, phase or pair changed."""
        changed, pairs = self.book.changed, self.provisioner.pairs
        for source in (self.fleet.changed, pairs.changed):
            if source:
                changed |= source
                source.clear()
        if pairs and changed:  # a pair's new phase says what its other side may take
            changed |= {side for instance in changed for side in pairs.sides(instance)}
        for instance in changed:
            self._router.update(self._seat(self.fleet.members[instance]))
        changed.clear()

    def _seat(self, m: Member) -> Seat:
        """LIVE and SERVING members are never being released; those of other models take nothing."""
        phase = m.phase if m.index is self.fleet.index else Phase.IDLE
        account, coming = self.book.account(m.id), self.migrations.reserved(m.id)
        return Seat(m.id, phase, m.slots - len(account.entries) - (coming > 0), m.pages - account.pages - coming,
                    m.page_size, account.backlog_tokens, m.role is Role.DECODE or self.provisioner.redirected(m.id))

    # ---- pictures

    def status(self, copy: InstanceId | None, coming: InstanceId | None) -> ModelStatus:
        """`copy`, `coming`: where its host copy is, or is in the making."""
        return ModelStatus(self.name, self.fleet.count(Phase.SERVING), self.scaler.goal.target, self.book.queued,
                           self.book.running, copy, coming, self._config.scale.min_instances, self.scaler.closing)

    def picture(self, m: Member, kv_received_bytes: int, copies: tuple[str, ...]) -> InstanceStatus:
        """Of one of its instances; `copies` are the models that it keeps in host memory besides."""
        entries = self.book.owned(m.id)
        running = sum(e.answered for e in entries)
        return InstanceStatus(m.id, m.phase, m.units, self.provisioner.pairs.partner(m.id), len(entries) - running,
                              running, self.book.pages(m.id), m.pages, m.in_world, m.role, kv_received_bytes, self.name,
                              copies)
