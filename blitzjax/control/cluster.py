"""The brain: events in, commands out, no clock and no I/O. What should every instance do next?

It shares one pool of workers among all deployed models. Invariant: `handle` never raises, whatever comes late, twice or
never; requests are the services', instances the roster's, host copies the cache's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

from blitzjax import events
from blitzjax.config import Config
from blitzjax.control import sharing
from blitzjax.control.fleet import Fleet, Member, Roster
from blitzjax.control.hostcache import HostCache
from blitzjax.control.scaling import usable
from blitzjax.control.service import Service
from blitzjax.control.status import ClusterStatus, InstanceStatus
from blitzjax.control.topology import Port, Topology
from blitzjax.control.transfers import Transfers
from blitzjax.commands import Command, DropCopy, Reject
from blitzjax.events import Event, ModelDeployed
from blitzjax.types import InstanceId, ModelSpec, Phase, Request, RequestId

# Events that say nothing about instances, nor leave one without requests: no step towards the goal can follow them.
_ONLY_REQUESTS = frozenset({events.RequestArrived, events.PrefillDone, events.LayerLoaded})
# Events after which only the model of their instance may have a next step.
_ONE_MODEL = (events.RequestFinished, events.RequestFailed, events.RequestReturned, events.RequestHanded,
              events.KVMigrated)


class Cluster:
    """All models, instances and requests. One caller: each command is carried out before the next event.

    `specs`: the models that are deployed from the start. `ports` says where instances sit in the network; one that it
    does not name has 100 Gbps and its host's domain.
    """

    def __init__(self, config: Config, specs: ModelSpec | Sequence[ModelSpec],
                 ports: Mapping[InstanceId, Port] = MappingProxyType({})) -> None:
        self._config = config
        self._ports = dict(ports)
        self._topology = Topology()
        self._transfers = Transfers(self._topology, config.cluster.max_world)
        self._roster = Roster()
        self._copies = HostCache(self._roster, self._transfers, config.cluster.pool, config.scale.host_copies)
        self._services: dict[str, Service] = {}
        self._parts: set[InstanceId] = set()  # joined IDLE with some units of an instance
        self._shut_out: dict[str, float] = {}  # models with requests that get no worker, and since when
        for spec in [specs] if isinstance(specs, ModelSpec) else specs:
            self._deploy(ModelDeployed(0.0, spec))

    def handle(self, event: Event) -> list[Command]:
        """What to do about `event`, in the order in which commands must be sent."""
        commands = self._react(event)
        unsettled = [s for s in self._concerned(event) if not s.scaler.settled or self._copies.due(s.fleet)]
        if unsettled or self._parts:
            commands += self._reconcile(event.at, unsettled)
        for service in self._services.values():
            if service.book.queued:
                commands += service.dispatch(event.at)
            commands += service.migrations.start()
        return commands

    @property
    def models(self) -> Collection[str]:
        """Those that are deployed, or not gone yet."""
        return self._services.keys()

    def status(self) -> ClusterStatus:
        chains = tuple((run.ticket, run.chain) for run in self._transfers.runs())
        models = tuple(service.status(self._copies.where(name), self._copies.coming(name))
                       for name, service in self._services.items())
        return ClusterStatus(tuple(self._picture(m) for _, m in sorted(self._roster.members.items())),
                             sum(m.queued for m in models), sum(m.running for m in models),
                             sum(m.target for m in models), chains, models)

    def uncompiled(self, model: str) -> list[InstanceId]:
        """The workers that are here and not compiled for it yet."""
        return [member.id for member in self._roster.all_alive() if model not in member.ready]

    def check(self) -> None:
        """Asserts every invariant of the brain."""
        fleets = self._fleets()
        self._roster.check(fleets)
        self._transfers.check()
        self._copies.check(fleets)
        for service in self._services.values():
            service.check()
        for run in self._transfers.runs():
            assert run.model in self._services, f"a transfer of {run.model}, which is not deployed"
            assert all(self._roster.alive(i) is not None for i in run.active), "a FAILED instance is in a transfer"
            assert all(i in self._roster.members for i in run.chain.instances)

    # ---- events

    def _react(self, event: Event) -> list[Command]:
        match event:
            case events.RequestArrived(request=request):
                return self._arrived(request)
            case events.RequestCancelled(request_id=request_id):
                service = self._of(request_id)
                return [] if service is None else service.cancelled(request_id)
            case events.ScaleRequested(model=model):
                service = self._named(model)
                if service is not None and not service.scaler.closing:
                    service.scaler.request(event)
                return []
            case events.Ticked(at=at):
                for service in self._services.values():
                    service.scaler.tick(at)
                return self._turn_away(at)
            case events.ModelDeployed():
                return self._deploy(event)
            case events.ModelUndeployed(model=model):
                if model in self._services:
                    self._services[model].scaler.close()
                return []
            case events.InstanceJoined():
                return self._joined(event)
        member = self._roster.alive(event.instance)
        return [] if member is None else self._reported(member, event)

    def _reported(self, member: Member, event: Event) -> list[Command]:
        """Something that a living instance says, or that is said of it."""
        match event:
            case (events.PrefillDone() | events.RequestHanded() | events.KVMigrated() | events.RequestFinished()
                  | events.RequestFailed() | events.RequestReturned()):
                service = self._of(event.request_id) or self._services.get(member.model)
                return [] if service is None else service.reported(member, event)
            case events.LayerLoaded(units=units):
                if member.model in self._services:
                    self._services[member.model].provisioner.arrived(member, units)
                return []
            case events.TransferReady(ticket=ticket):
                self._transfers.ready(ticket, member.id)
                return self._start(ticket)
            case events.TransferEnded():
                return self._ended(member, event)
            case events.LiveDrained():
                service = self._services.get(member.model)
                return [] if service is None else service.provisioner.drained(member.id)
            case events.Drained():
                self._released(member)
                return []
            case events.WorldJoined():
                member.in_world = True
                return []
            case events.ModelReady(model=model):
                if model in self._services:  # else it was undeployed meanwhile
                    member.ready.add(model)
                return []
            case events.InstanceLost(reason=reason):
                return self._lost(member, reason)
            case (events.RequestArrived() | events.RequestCancelled() | events.ScaleRequested() | events.Ticked()
                  | events.InstanceJoined() | events.ModelDeployed() | events.ModelUndeployed()):
                raise AssertionError(f"{event} is not about one instance")
        assert_never(event)

    # ---- models and requests

    def _deploy(self, event: ModelDeployed) -> list[Command]:
        if event.spec.name not in self._services:
            self._services[event.spec.name] = Service(self._config, event, self._roster, self._transfers, self._copies)
        return []

    def _arrived(self, request: Request) -> list[Command]:
        if self._of(request.id) is not None:
            return []
        service = self._services.get(request.model)
        if service is None or service.scaler.closing:
            names = ", ".join(repr(name) for name, s in self._services.items() if not s.scaler.closing)
            return [Reject(request.id, "NOT_FOUND", f"no model {request.model!r} here; there is {names or 'none'}")]
        return service.arrived(request)

    def _wakes(self, event: Event) -> bool:
        """A request for a model that has no instance and wants none."""
        if type(event) is not events.RequestArrived:
            return False
        service = self._services.get(event.request.model)
        return service is not None and service.scaler.asleep

    def _concerned(self, event: Event) -> list[Service]:
        """Whose next steps to look for."""
        if type(event) in _ONLY_REQUESTS and not self._wakes(event):
            return []
        member = self._roster.members.get(event.instance) if isinstance(event, _ONE_MODEL) else None
        service = self._services.get(member.model) if member is not None else None
        if service is None:
            return list(self._services.values())
        waited = type(event) is not events.RequestFinished or service.scaler.waits_for(event.instance)
        return [service] if waited else []

    def _of(self, request_id: RequestId) -> Service | None:
        """Whose request it is."""
        for service in self._services.values():
            if service.book.get(request_id) is not None:
                return service
        return None

    def _named(self, model: str) -> Service | None:
        """The service of this name; without a name, the only one."""
        if not model and len(self._services) == 1:
            return next(iter(self._services.values()))
        return self._services.get(model)

    def _fleets(self) -> dict[str, Fleet]:
        return {name: service.fleet for name, service in self._services.items()}

    # ---- instances

    def _joined(self, event: events.InstanceJoined) -> list[Command]:
        commands: list[Command] = []
        known = self._roster.alive(event.instance)
        if known is not None:
            if known.incarnation == event.incarnation:
                return []
            commands = self._lost(known, "it came back as another process")
        self._transfers.joined(event.instance, event.generation)
        member = self._roster.join(event, self._fleets())
        for service in self._services.values():
            service.book.open(event.instance, event.page_size)
        if member.phase is Phase.SERVING:
            self._services[member.model].scaler.place(member)
        elif member.units:
            self._parts.add(member.id)
        for model in event.copies:
            served = self._services.get(model)
            commands += self._copies.found(model, member.id, None if served is None else served.fleet)
        here = Port(event.host, event.host, event.leaf, fast_gbps=self._config.cluster.fast_gbps)
        self._topology.add(event.instance, self._ports.get(event.instance, here))
        return commands

    def _lost(self, member: Member, reason: str) -> list[Command]:
        service = self._services.get(member.model)
        commands = service.provisioner.unpair(member.id, lost=True) if service is not None else []
        runs, cancels = self._transfers.lose(member.id)
        commands += cancels
        self._roster.lose(member)
        self._copies.lost(member.id)
        for run in runs:  # others may wait for nobody else; whoever goes live pairs with the living
            commands += self._start(run.ticket)
        return commands if service is None else commands + service.lost(member, reason)

    def _released(self, member: Member) -> None:
        if not member.releasing:
            return
        model, keeps = member.model, self._copies.coming(member.model) == member.id
        member.move(Phase.IDLE)
        member.model, member.units, member.releasing = "", 0, False
        if keeps:
            self._copies.kept(model, member.id)

    # ---- transfers

    def _start(self, ticket: int) -> list[Command]:
        runs, commands = self._transfers.start(ticket)
        for run in runs:
            if not run.copy:
                commands += self._services[run.model].provisioner.go_live(run)
        return commands

    def _ended(self, member: Member, event: events.TransferEnded) -> list[Command]:
        run = self._transfers.find(event.ticket, member.id)
        if run is None:
            return []
        service = self._services[run.model]
        if run.copy:
            return self._copies.ended(run, member, event, service.fleet.units) + self._start(run.ticket)
        return service.provisioner.ended(run, member, event) + self._start(run.ticket)

    # ---- getting there

    def _reconcile(self, at: float, services: list[Service]) -> list[Command]:
        """Their next steps. Repeating it without a new event does nothing."""
        commands: list[Command] = []
        for service in services:
            service.scaler.wake()
        short = any(service.scaler.missing for service in services)
        idle = self._roster.idle() if short else []
        quotas = dict.fromkeys(self._services, len(idle))
        if short and len(self._services) > 1:
            wants = [service.scaler.want(at, idle) for service in self._services.values()]
            quotas = sharing.deal(len(idle), wants)
            givers = self._take_from_others(at, wants, quotas)
            services = [*services, *(s for s in givers if s not in services)]
        for service in services:
            commands += service.scaler.reconcile(at, idle, quotas[service.name])
        commands += self._drop_parts()
        for service in services:
            commands += self._copies.reconcile(at, service.fleet, not service.scaler.closing)
            if service.scaler.closing:
                self._close(service)
        return commands

    def _drop_parts(self) -> list[Command]:
        """Parts of instances that nobody is going to complete."""
        commands: list[Command] = []
        for member in [self._roster.members[i] for i in sorted(self._parts)]:
            service = self._services.get(member.model)
            if member.phase is not Phase.IDLE or not member.units:
                self._parts.discard(member.id)
            elif service is None or not service.scaler.missing:
                self._parts.discard(member.id)
                commands.append(DropCopy(member.id, member.model))
                member.model, member.units = "", 0
        return commands

    def _take_from_others(self, at: float, wants: list[sharing.Want], quotas: dict[str, int]) -> list[Service]:
        """A model below its least that gets no worker takes one from another, unless one is on its way already."""
        givers: list[Service] = []
        short = [w for w in wants if w.instances + quotas[w.model] < w.least and w.missing > quotas[w.model]]
        coming = [m for m in self._roster.members.values() if m.releasing or m.yielded]
        for want in short:
            expected = next((m for m in coming if usable(m, at, want.model)), None)
            if expected is not None:
                coming.remove(expected)
                continue
            spare = {other.model: self._services[other.model].scaler.spare(at, want.model, want.waited_s)
                     for other in wants if other.model != want.model}
            giver = sharing.donor([other for other in wants if spare.get(other.model)])
            if giver is not None:
                givers.append(self._services[giver])
                givers[-1].scaler.give_up(spare[giver], self._copies.where(want.model))
                wants = [self._services[w.model].scaler.want(at, []) for w in wants]
        return givers

    def _turn_away(self, at: float) -> list[Command]:
        """Where operators set the goals nobody makes room: who has found every worker in those of others is told so."""
        scale, services = self._config.scale, self._services.values()
        if scale.policy != "manual":
            return []
        alive = self._roster.all_alive()
        fixed = alive and all(m.counted for m in alive) and not any(s.scaler.surplus for s in services)
        shut_out = [s for s in services if fixed and s.book.queued and not s.fleet.size]
        self._shut_out = {s.name: self._shut_out.get(s.name, at) for s in shut_out}
        late = at - scale.yield_after_s
        if min(self._shut_out.values(), default=at) > late:
            return []
        goals = ", ".join(f"{s.name} {s.scaler.goal.target}" for s in services if s.fleet.size)
        why = f"for {scale.yield_after_s:g} s all workers have served other models, as they were told to ({goals}); scale down"
        return [c for s in shut_out if self._shut_out[s.name] <= late for c in s.turn_away(late, why)]

    def _close(self, service: Service) -> None:
        """A model that was undeployed is forgotten once nothing of it is left."""
        name = service.name
        left = (service.fleet.size or service.book.queued or service.book.running or self._copies.where(name)
                or self._copies.coming(name) or any(run.model == name for run in self._transfers.runs()))
        if not left:
            del self._services[name]
            for member in self._roster.members.values():
                member.ready.discard(name)

    def _picture(self, m: Member) -> InstanceStatus:
        copies, service = self._copies.kept_by(m.id), self._services.get(m.model)
        received = sum(s.migrations.received_bytes[m.id] for s in self._services.values())
        if service is not None:
            return service.picture(m, received, copies)
        return InstanceStatus(m.id, m.phase, m.units, None, 0, 0, 0, m.pages, m.in_world, m.role, received, m.model,
                              copies)
