"""Which parameter transfers are in flight, who takes part, and who has left them?

A plan's chains are prepared together, start together and end one by one; a load from an instance's own disk or host
copy is a chain of one. Invariant: an instance takes part in at most one run at a time, as source or as target, whatever
models they move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from blitzjax.control import multicast
from blitzjax.control.topology import Topology
from blitzjax.commands import CancelTransfer, Command, KeepCopy, LoadFromDisk, PrepareTransfer, StartTransfer, UseCopy
from blitzjax.types import Chain, InstanceId, LiveMode, MulticastPlan, Ring

_MAX_CLIQUES = 4096  # whose generations are told apart
DISK_TICKET = -1  # a worker may report the end of a disk load with this ticket


@dataclass(slots=True)
class Run:
    """One chain, or one load of an instance alone, from its command to the last TransferEnded."""

    ticket: int
    model: str
    chain: Chain
    alone: bool
    copy: bool  # into host memory: its targets are no instances of the model
    live: LiveMode  # how its tail may execute meanwhile
    unready: set[InstanceId]  # have not answered PrepareTransfer
    active: set[InstanceId]  # have not left
    rings: tuple[Ring, ...]  # that this chain and its fellow lanes meet in
    disk: bool = False  # its parameters come from there
    broken: bool = False  # cancelled: what its targets miss comes with another plan

    @property
    def targets(self) -> tuple[InstanceId, ...]:
        return self.chain.instances if self.alone else self.chain.instances[1:]


@dataclass(slots=True)
class _Flight:
    """A plan in flight."""

    runs: list[Run]
    started: bool = False


@dataclass(slots=True)
class Transfers:
    """Owned by the provisioner. Issues tickets that only grow."""

    topology: Topology
    max_generations: int  # cliques that one set of members may form
    _flights: dict[int, _Flight] = field(default_factory=dict)
    _generations: dict[frozenset[InstanceId], int] = field(default_factory=dict)  # the next clique of these members
    _least: int = 0  # the next clique of all others; above all that they ever formed
    _above: dict[InstanceId, int] = field(default_factory=dict)  # all that an instance was in when it joined
    _last_ticket: int = 0
    _in: dict[InstanceId, Run] = field(default_factory=dict)  # the run that the instance has not left
    _settling: Counter[InstanceId] = field(default_factory=Counter)  # runs with the instance that somebody is still in
    version: int = 0  # counts every change of who is in what

    # ---- views

    def runs(self) -> Iterator[Run]:
        return (run for flight in self._flights.values() for run in flight.runs)

    def run_of(self, instance: InstanceId) -> Run | None:
        """The run that `instance` has not left."""
        return self._in.get(instance)

    def busy(self, instance: InstanceId) -> bool:
        return instance in self._in

    def settling(self, instance: InstanceId) -> bool:
        """`instance` is in a run, or has left one that others are still in."""
        return self._settling[instance] > 0

    # ---- beginning

    def joined(self, instance: InstanceId, generation: int) -> None:
        """The cliques that `instance` was in, also those that another brain formed, are of generations below."""
        self._above[instance] = generation

    def plan(self, model: str, sources: list[multicast.Held], targets: list[multicast.Held], stop_unit: int,
             live: LiveMode, local: Collection[InstanceId] = (), copy: bool = False
             ) -> tuple[list[Command], list[InstanceId]]:
        """Prepares chains from `sources` to `targets`; those in `local` send inside their fast domain only.

        Second result: targets whose chain would need one clique more than the world allows; they must use their disks.
        """
        plan = multicast.plan(self._last_ticket + 1, model, sources, targets, self.topology, stop_unit,
                              self._generation_of, local)
        spent = self._spent(plan)
        chains = tuple(chain for chain in plan.chains if chain not in spent)
        rings = plan.rings if any(chain.lanes > 1 for chain in chains) else ()
        if chains:
            self._last_ticket += 1
            self._open([self._run(model, chain, False, copy, live, rings if chain.lanes > 1 else ()) for chain in chains])
        plan = MulticastPlan(plan.ticket, model, chains, rings, copy)
        prepare: list[Command] = [PrepareTransfer(i, plan) for chain in chains for i in chain.instances]
        return prepare, [i for chain in spent for i in chain.instances[1:]]

    def load(self, instance: InstanceId, model: str, start_unit: int, stop_unit: int,
             live: LiveMode) -> tuple[Run, Command]:
        """Begins a load from the instance's own disk."""
        run = self._alone(instance, model, start_unit, stop_unit, False, live)
        run.disk = True
        return run, LoadFromDisk(instance, run.ticket, start_unit, model)

    def use_copy(self, instance: InstanceId, model: str, stop_unit: int) -> Command:
        """Begins to make an instance of its own host copy."""
        return UseCopy(instance, self._alone(instance, model, 0, stop_unit, False, "off").ticket, model)

    def keep_copy(self, instance: InstanceId, model: str, stop_unit: int) -> Command:
        """Begins to make a host copy from the instance's own disk."""
        return KeepCopy(instance, self._alone(instance, model, 0, stop_unit, True, "off").ticket, model)

    def ready(self, ticket: int, instance: InstanceId) -> None:
        """`instance` answered PrepareTransfer; late answers are ignored."""
        for run in self._flights[ticket].runs if ticket in self._flights else ():
            run.unready.discard(instance)

    def start(self, ticket: int) -> tuple[list[Run], list[Command]]:
        """Starts the plan once every member of its unbroken chains is ready; else does nothing."""
        flight = self._flights.get(ticket)
        runs = [run for run in flight.runs if not run.broken] if flight is not None else []
        if flight is None or flight.started or not runs or any(run.unready for run in runs):
            return [], []
        flight.started = True
        return runs, [StartTransfer(i, ticket) for run in runs for i in run.chain.instances]

    # ---- ending

    def find(self, ticket: int, instance: InstanceId) -> Run | None:
        """The run that a TransferEnded of `instance` is about; None when it is stale."""
        run = self.run_of(instance)
        if run is None or (ticket != run.ticket and not (run.alone and ticket == DISK_TICKET)):
            return None
        return run

    def leave(self, run: Run, instance: InstanceId) -> None:
        """`instance` takes part no longer; the last one closes the run."""
        if instance not in run.active:
            return
        self.version += 1
        run.active.discard(instance)
        run.unready.discard(instance)
        del self._in[instance]
        if not run.active:
            self._settling.subtract(run.chain.instances)
        self.topology.end(run.ticket, instance)
        if not any(other.active for other in self._flights[run.ticket].runs):
            del self._flights[run.ticket]

    def break_off(self, run: Run) -> list[Command]:
        """The chain cannot go on, nor can its fellow lanes: cancels those still in them, and the same members form
        another clique next time."""
        commands: list[Command] = []
        if run.broken:
            return commands
        for ring in run.rings:
            self._renew(ring.instances)
        for other in self._gang(run):
            other.broken = True
            self._renew(other.chain.instances)
            commands += [CancelTransfer(i, other.ticket) for i in other.chain.instances if i in other.active]
        return commands

    def lose(self, instance: InstanceId) -> tuple[list[Run], list[Command]]:
        """`instance` died: breaks its chains, even those that it has left (others may still wait for its bytes).

        → (they, cancellations). The cliques that it was in are never joined again.
        """
        runs = [run for run in self.runs() if instance in run.chain.instances]
        commands = []
        for run in runs:
            self.leave(run, instance)
            commands += self.break_off(run)
        broken = {frozenset(run.chain.instances) for run in runs}
        broken |= {frozenset(ring.instances) for run in runs for ring in run.rings}
        for members in self._generations:
            if instance in members and members not in broken:
                self._renew(members)
        return runs, commands

    def check(self) -> None:
        """Asserts the invariant."""
        active = {i: run for run in self.runs() for i in run.active}
        assert active == self._in and sum(len(run.active) for run in self.runs()) == len(active), (
            "an instance is in two runs")
        assert +self._settling == Counter(i for run in self.runs() if run.active for i in run.chain.instances)
        for ticket, flight in self._flights.items():
            assert 0 < ticket <= self._last_ticket and any(run.active for run in flight.runs)
            for run in flight.runs:
                assert run.unready <= run.active <= set(run.chain.instances)
                assert 0 <= run.chain.start_unit < run.chain.stop_unit
                assert all(other.broken == run.broken for other in self._gang(run)), "lanes break together"
                assert not (flight.started and run.unready and not run.broken)

    # ----------------------------------------------------------------------------------------------------------------

    def _generation_of(self, instances: Collection[InstanceId]) -> int:
        """Makes room for one more by forgetting the oldest generation of all: nobody forms a clique of it any more."""
        members = frozenset(instances)
        while members not in self._generations and len(self._generations) >= _MAX_CLIQUES:
            self._least += 1
            self._generations = {m: g for m, g in self._generations.items() if g >= self._least}
        return self._generations.setdefault(members, max(self._least, *(self._above.get(i, 0) for i in members)))

    def _renew(self, instances: Collection[InstanceId]) -> None:
        """Their clique is never used again. Alone they form none, and forgotten ones form another in any case."""
        members = frozenset(instances)
        if members in self._generations:
            self._generations[members] += 1

    def _gang(self, run: Run) -> list[Run]:
        """The run, and those that its targets need parts of every unit from."""
        flight = self._flights.get(run.ticket)
        if run.chain.lanes == 1 or flight is None:
            return [run]
        return [other for other in flight.runs if other.chain.lanes > 1]

    def _spent(self, plan: MulticastPlan) -> list[Chain]:
        """Chains that would need one clique more than the world allows; lanes go together or not at all."""
        gang: list[Chain | Ring] = [*plan.rings, *(chain for chain in plan.chains if chain.lanes > 1)]
        gang_spent = any(clique.generation >= self.max_generations for clique in gang)
        return [chain for chain in plan.chains
                if (gang_spent if chain.lanes > 1 else chain.generation >= self.max_generations)]

    def _alone(self, instance: InstanceId, model: str, start_unit: int, stop_unit: int, copy: bool,
               live: LiveMode) -> Run:
        self._last_ticket += 1
        run = self._run(model, Chain((instance,), start_unit, stop_unit, 0), True, copy, live, ())
        self._open([run])
        self._flights[run.ticket].started = True
        return run

    def _run(self, model: str, chain: Chain, alone: bool, copy: bool, live: LiveMode, rings: tuple[Ring, ...]) -> Run:
        members = set(chain.instances)
        return Run(self._last_ticket, model, chain, alone, copy, live, set() if alone else set(members), members, rings)

    def _open(self, runs: list[Run]) -> None:
        self._flights[self._last_ticket] = _Flight(runs)
        for run in runs:
            self.topology.begin(run.ticket, run.chain.instances)
            self._in.update(dict.fromkeys(run.active, run))
            self._settling.update(run.chain.instances)
        self.version += 1
