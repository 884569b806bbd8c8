"""How do parameters move in virtual time? Chains and loads from SSD or host memory, unit by unit, over shared links.

Mirrors transfer/broadcast.py and engine/loading.py: the same commands in, the same events out. A chain is one flow over
all its hops; member j gets a byte (j - 1) chunks later than member 1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from blitzjax.sim.clock import Clock
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.sim.hosts import Fleetports, HostCopies
from blitzjax.sim.instance import SimInstance
from blitzjax.sim.links import Fabric
from blitzjax.types import (
    Chain, Event, InstanceId, LayerLoaded, LoadFromDisk, MulticastPlan, PrepareTransfer, StartTransfer, TransferEnded,
    TransferReady,
)


class Loading:
    """All parameter transfers under way. `emit` gives events to the brain."""

    def __init__(self, clock: Clock, machine: MachineCosts, costs: ModelCosts, ports: Fleetports, copies: HostCopies,
                 instances: dict[InstanceId, SimInstance], emit: Callable[[Event], None]) -> None:
        self._clock, self._machine, self._costs = clock, machine, costs
        self._ports, self._copies, self._instances, self._emit = ports, copies, instances, emit
        self._fabric = Fabric(clock)
        self._plans: dict[int, MulticastPlan] = {}  # prepared and not started
        self._prefix = [0.0, *accumulate(costs.unit_bytes)]  # bytes of units [0, u)

    def obey(self, command: PrepareTransfer | StartTransfer | LoadFromDisk) -> None:
        match command:
            case PrepareTransfer(instance=name, plan=plan):
                self._plans[plan.ticket] = plan
                self._emit(TransferReady(self._clock.now, name, plan.ticket))
            case StartTransfer(ticket=ticket):
                plan = self._plans.pop(ticket, None)  # its members get the command together; the first one starts it
                for chain in plan.chains if plan is not None else ():
                    self._begin_chain(ticket, chain)
            case LoadFromDisk(instance=name, ticket=ticket, start_unit=start):
                self._begin_load(ticket, name, start)

    def _begin_chain(self, ticket: int, chain: Chain) -> None:
        members = chain.instances
        links = [link for a, b in zip(members, members[1:]) for link in self._ports.route(a, b)]
        marks = self._marks(chain.start_unit, members[1:])

        def passed(mark: int) -> None:
            _, name, units = marks[mark]
            self._arrived(ticket, name, units)
            if mark == len(marks) - 1:
                self._emit(TransferEnded(self._clock.now, members[0], ticket, self._costs.spec.units, ""))

        self._fabric.begin(links, [at for at, _, _ in marks], passed)

    def _marks(self, start: int, targets: tuple[InstanceId, ...]) -> list[tuple[float, InstanceId, int]]:
        """(bytes of the flow, who has, how many units then): every unit for the tail, which may be live; the last one
        for the others."""
        marks = []
        for hop, name in enumerate(targets):
            lag = hop * self._machine.chunk_bytes
            first = start + 1 if hop == len(targets) - 1 else self._costs.spec.units
            marks += [(self._prefix[units] - self._prefix[start] + lag, name, units)
                      for units in range(first, self._costs.spec.units + 1)]
        return sorted(marks)

    def _begin_load(self, ticket: int, name: InstanceId, start: int) -> None:
        """From host memory if the host has a copy, else from SSD through host memory."""
        ports = self._ports.of[name]
        links = [ports.pcie] if self._copies.hit(ports.host, self._clock.now) else [ports.ssd, ports.pcie]
        marks = self._marks(start, (name,))
        self._fabric.begin(links, [at for at, _, _ in marks], lambda mark: self._arrived(ticket, name, marks[mark][2]))

    def _arrived(self, ticket: int, name: InstanceId, units: int) -> None:
        self._instances[name].arrived(units)
        if units == self._costs.spec.units:
            self._copies.hold(self._ports.of[name].host)
            self._emit(TransferEnded(self._clock.now, name, ticket, units, ""))
        else:
            self._emit(LayerLoaded(self._clock.now, name, units))
