"""How do parameters move in virtual time? Chains, lanes, and loads from SSD or host memory, over shared links.

Mirrors transfer/broadcast.py and engine/loading.py: the same commands in, the same events out. Lanes of one plan
meet in every domain: a unit is there once each lane has brought its part and the domain has gathered them. All models
have the same costs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from blitzjax.sim.chains import ChainFlow
from blitzjax.sim.clock import Clock
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.sim.hosts import Fleetports, HostCopies
from blitzjax.sim.instance import SimInstance
from blitzjax.sim.links import Fabric
from blitzjax.sim.pipelines import Pipeline, Scatter
from blitzjax.commands import Command, DropCopy, KeepCopy, LoadFromDisk, PrepareTransfer, StartTransfer, UseCopy
from blitzjax.events import Event, LayerLoaded, TransferEnded, TransferReady
from blitzjax.types import Chain, InstanceId, MulticastPlan


class Loading:
    """All parameter transfers under way. `emit` gives events to the brain, `whole(name, ticket)` is called for a
    receiver that has everything. With `scatter` receivers serve in pipelines before that.
    """

    def __init__(self, clock: Clock, fabric: Fabric, machine: MachineCosts, costs: ModelCosts, ports: Fleetports,
                 copies: HostCopies, instances: dict[InstanceId, SimInstance], emit: Callable[[Event], None],
                 whole: Callable[[InstanceId, int], None] = lambda name, ticket: None, scatter: bool = False) -> None:
        self._clock, self._machine, self._costs = clock, machine, costs
        self._ports, self._copies, self._instances, self._emit = ports, copies, instances, emit
        self._fabric, self._whole = fabric, whole
        self._scatter = Scatter(fabric, machine, costs, ports, self._formed, self._is_whole) if scatter else None
        self._partial: dict[InstanceId, list[int]] = {}  # in a pipeline → plans that it will send once it is whole
        self._plans: dict[int, MulticastPlan] = {}  # prepared and not started
        self._units = costs.spec.units
        self._prefix = [0.0, *accumulate(costs.unit_bytes)]  # bytes of units [0, u)

    def obey(self, command: Command) -> None:
        match command:
            case PrepareTransfer(instance=name, plan=plan):
                self._plans[plan.ticket] = plan
                if plan.copy and name == plan.chains[0].instances[-1]:
                    self._copies.keep(plan.model, name)
                self._clock.after(self._machine.setup_s, self._prepared, name, plan.ticket)
            case StartTransfer(ticket=ticket):
                begun = self._plans.pop(ticket, None)  # its members get the command together; the first one starts it
                if begun is not None:
                    self._begin(begun)
            case LoadFromDisk():
                self._begin_load(command)
            case KeepCopy(instance=name, ticket=ticket, model=model):
                self._copies.keep(model, name)
                self._fabric.begin([self._ports.of[name].ssd], [self._prefix[-1]],
                                   lambda mark: self._sent(name, ticket))
            case UseCopy():
                self._use_copy(command)
            case DropCopy(model=model):
                self._copies.drop(model)
            case _:
                raise AssertionError(f"{command} moves no parameters")

    def _prepared(self, name: InstanceId, ticket: int) -> None:
        if name in self._partial:
            self._partial[name].append(ticket)
        else:
            self._emit(TransferReady(self._clock.now, name, ticket))

    def _begin(self, plan: MulticastPlan) -> None:
        if not plan.copy:
            for name in (name for chain in plan.chains for name in chain.instances[1:]):
                self._instances[name].model = plan.model
        if self._scatter is not None and not plan.copy:
            self._scatter.begin(plan, lambda source: self._sent(source, plan.ticket))
            return
        gather = _Gather([chain for chain in plan.chains if chain.lanes > 1], self._ports)
        for chain in plan.chains:
            names = chain.instances
            tail = names[-1]

            def got(member: int, units: int, names: tuple[InstanceId, ...] = names, tail: InstanceId = tail) -> None:
                if not plan.copy:
                    self._arrived(plan.ticket, names[member], units, names[member] == tail)
                elif units == self._units:
                    self._sent(names[member], plan.ticket)

            def lane_got(member: int, units: int, chain: Chain = chain) -> None:
                for names, here in gather.got(chain.lane, chain.instances[member], units):
                    self._clock.after(self._gather_s(chain, names[0]), self._gathered, plan.ticket, names, here)

            def source_done(source: InstanceId = names[0]) -> None:
                self._sent(source, plan.ticket)

            ChainFlow(self._fabric, [self._ports.route(a, b) for a, b in pairwise(names)],
                      [at / chain.lanes for at in self._prefix], chain.start_unit, self._machine.chunk_bytes,
                      chain.lanes > 1, lane_got if chain.lanes > 1 else got, source_done)

    def _sent(self, name: InstanceId, ticket: int) -> None:
        """A source has sent everything, or a host copy is whole."""
        self._emit(TransferEnded(self._clock.now, name, ticket, self._units, ""))

    def _formed(self, name: InstanceId, pipeline: Pipeline) -> None:
        """To the brain it is an instance like others from now on."""
        self._partial[name] = []
        self._instances[name].join(pipeline)
        self._serves(name, pipeline.ticket)

    def _is_whole(self, name: InstanceId, ticket: int) -> None:
        waiting, instance = self._partial.pop(name, None), self._instances[name]
        if waiting is None:
            self._arrived(ticket, name, self._units, False)
            return
        if instance.pipeline is not None and instance.pipeline.ticket == ticket:  # else it was released meanwhile
            instance.leave(instance.pipeline)
        self._whole(name, ticket)
        for later in waiting:
            self._prepared(name, later)

    def _serves(self, name: InstanceId, ticket: int) -> None:
        self._copies.hold(self._ports.of[name].host, self._instances[name].model)
        self._emit(TransferEnded(self._clock.now, name, ticket, self._units, ""))

    def _gather_s(self, chain: Chain, name: InstanceId) -> float:
        """Inside the domain, of the unit that came last: every member receives what the other lanes brought."""
        unit = max(self._costs.unit_bytes)
        return unit * (chain.lanes - 1) / chain.lanes / self._ports.of[name].fast_in.capacity

    def _gathered(self, ticket: int, names: list[InstanceId], units: int) -> None:
        for name in names:
            self._arrived(ticket, name, units, True)

    def _begin_load(self, command: LoadFromDisk) -> None:
        """From host memory if the host has a copy, else from SSD through host memory."""
        name, start, ports = command.instance, command.start_unit, self._ports.of[command.instance]
        self._instances[name].model = command.model
        hit = self._copies.hit(ports.host, command.model, self._clock.now)
        marks = [at - self._prefix[start] for at in self._prefix[start + 1:]]
        self._fabric.begin([ports.pcie] if hit else [ports.ssd, ports.pcie], marks,
                           lambda mark: self._arrived(command.ticket, name, start + mark + 1, True))

    def _use_copy(self, command: UseCopy) -> None:
        """Onto the GPUs of who keeps it; whole at once, as engine/loading.py has it."""
        name = command.instance
        self._instances[name].model = command.model

        def moved(mark: int) -> None:
            self._copies.drop(command.model)
            self._arrived(command.ticket, name, self._units, False)
        self._fabric.begin([self._ports.of[name].pcie], [self._prefix[-1]], moved)

    def _arrived(self, ticket: int, name: InstanceId, units: int, may_be_live: bool) -> None:
        """Only chain tails and lone loads can be live: the brain hears of the others when they are complete."""
        instance = self._instances[name]
        if units <= instance.units:
            return
        instance.arrived(units)
        if units == self._units:
            self._serves(name, ticket)
            self._whole(name, ticket)
        elif may_be_live:
            self._emit(LayerLoaded(self._clock.now, name, units))


class _Gather:
    """What each lane has brought into each domain."""

    def __init__(self, lanes: list[Chain], ports: Fleetports) -> None:
        self._ports = ports
        self._lanes = len(lanes)
        self._brought: dict[str, list[int]] = {}  # domain → units per lane
        self._members: dict[str, list[InstanceId]] = {}
        self._here: dict[str, int] = {}  # units that every lane has brought
        for chain in lanes:
            for name in chain.instances[1:]:
                self._members.setdefault(ports.of[name].domain, []).append(name)

    def got(self, lane: int, name: InstanceId, units: int) -> list[tuple[list[InstanceId], int]]:
        """`name` has its lane's part of units [0, units). → (members of a domain, units complete there now)."""
        domain = self._ports.of[name].domain
        brought = self._brought.setdefault(domain, [0] * self._lanes)
        brought[lane] = max(brought[lane], units)
        here = min(brought)
        if here <= self._here.get(domain, 0):
            return []
        self._here[domain] = here
        return [(self._members[domain], here)]
