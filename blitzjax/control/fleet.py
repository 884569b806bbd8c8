"""Which instances are there, which model is each an instance of, and what does the brain know of it?

Invariant: phases move only along the lifecycle table; an IDLE or FAILED instance belongs to nobody, any other to the
fleet of one model; SERVING or DRAINING instances hold every unit of it.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from blitzjax.control import lifecycle
from blitzjax.events import InstanceJoined
from blitzjax.types import InstanceId, Phase, Role


@dataclass(slots=True)
class Member:
    """One instance. Mutated by the Roster, the Fleets and the parts of the brain that decide about it."""

    id: InstanceId
    incarnation: str
    host: str
    pages: int
    page_size: int
    slots: int
    units: int  # it holds units [0, units) of `model`
    phase: Phase
    model: str = ""  # that it is, or while IDLE was, an instance of; empty: none
    ready: set[str] = field(default_factory=set)  # models that it is compiled for
    in_world: bool = False
    role: Role = Role.MIXED
    releasing: bool = False  # Release was sent, Drained has not come yet
    yielded: bool = False  # drains for the sake of another model
    failures: int = 0  # transfers to it that failed in this scale-up
    barred_until: dict[str, float] = field(default_factory=dict)  # not recruited for a model that was given up here
    home: Index = field(kw_only=True, repr=False)  # where it is while nobody's
    index: Index = field(kw_only=True, repr=False)

    @property
    def loading(self) -> bool:
        return self.phase in (Phase.LOADING, Phase.LIVE) and not self.releasing

    @property
    def counted(self) -> bool:
        """It is among those that a goal is about."""
        return self.loading or self.phase is Phase.SERVING

    def move(self, to: Phase) -> None:
        to = lifecycle.move(self.phase, to)
        self.index.remove(self)
        self.phase = to
        if to in (Phase.IDLE, Phase.FAILED):
            self.index, self.yielded = self.home, False
        self.index.add(self)

    def assume(self, role: Role) -> None:
        """The brain uses it for something else from now on; what it holds stays."""
        self.role = role
        self.index.version += 1
        self.index.changed.add(self.id)

    def release(self) -> None:
        """Release was sent."""
        self.releasing = True
        self.index.version += 1


class Index:
    """Members by phase, each list in order of id. `changed` collects those that moved, for who keeps a picture."""

    def __init__(self) -> None:
        self._of: dict[Phase, list[tuple[InstanceId, Member]]] = {phase: [] for phase in Phase}
        self.changed: set[InstanceId] = set()
        self.version = 0  # counts every change
        self.size = 0

    def add(self, member: Member) -> None:
        self.version, self.size = self.version + 1, self.size + 1
        bisect.insort(self._of[member.phase], (member.id, member), key=lambda pair: pair[0])
        self.changed.add(member.id)

    def remove(self, member: Member) -> None:
        self.version, self.size = self.version + 1, self.size - 1
        members = self._of[member.phase]
        place = bisect.bisect_left(members, member.id, key=lambda pair: pair[0])
        assert members[place][1] is member
        del members[place]
        self.changed.add(member.id)

    def members(self, phase: Phase) -> list[Member]:
        return [member for _, member in self._of[phase]]

    def count(self, phase: Phase) -> int:
        return len(self._of[phase])


class Roster:
    """All instances that ever joined, by id: the pool that the models share."""

    def __init__(self) -> None:
        self.members: dict[InstanceId, Member] = {}
        self.pages = 0  # of the living instance that has most
        self.tokens: int | None = None  # KV of the largest living one; None before the first one joined
        self._free = Index()  # IDLE and FAILED

    @property
    def version(self) -> int:
        """Counts every change of who is IDLE or FAILED."""
        return self._free.version

    def idle(self) -> list[Member]:
        return self._free.members(Phase.IDLE)

    def alive(self, instance: InstanceId) -> Member | None:
        """The instance, unless it is unknown or FAILED."""
        member = self.members.get(instance)
        return None if member is None or member.phase is Phase.FAILED else member

    def all_alive(self) -> list[Member]:
        """In order of id, so that every decision is deterministic."""
        return [m for _, m in sorted(self.members.items()) if m.phase is not Phase.FAILED]

    def join(self, event: InstanceJoined, fleets: Mapping[str, Fleet]) -> Member:
        """A new or returned instance: SERVING with every unit of a deployed model, else IDLE with what it holds."""
        model = event.model or (next(iter(fleets), "") if event.units else "")
        fleet = fleets.get(model)
        units = max(0, min(event.units, fleet.units)) if fleet is not None else event.units
        phase = Phase.SERVING if fleet is not None and units == fleet.units else Phase.IDLE
        known = self.members.get(event.instance)
        if known is not None:
            lifecycle.move(known.phase, phase)
            known.index.remove(known)
        index = fleet.index if fleet is not None and phase is Phase.SERVING else self._free
        member = self.members[event.instance] = Member(
            event.instance, event.incarnation, event.host, event.pages, event.page_size, event.slots, units, phase,
            model if units else "", set(event.models or fleets), home=self._free, index=index)
        index.add(member)
        self._count_pages()
        return member

    def lose(self, member: Member) -> None:
        member.move(Phase.FAILED)
        member.units, member.model, member.in_world, member.releasing = 0, "", False, False
        self._count_pages()

    def _count_pages(self) -> None:
        living = [m for m in self.members.values() if m.phase is not Phase.FAILED]
        self.pages = max((m.pages for m in living), default=self.pages)
        self.tokens = max((m.pages * m.page_size for m in living), default=self.tokens)

    def check(self, fleets: Mapping[str, Fleet]) -> None:
        """Asserts that every instance is in one index, and that watermarks are in range and agree with the phases."""
        indexed = [m for index in (self._free, *(f.index for f in fleets.values())) for phase in Phase
                   for m in index.members(phase) if m.phase is phase and m.index is index]
        assert sorted(m.id for m in indexed) == sorted(self.members)
        assert self._free.size + sum(f.size for f in fleets.values()) == len(self.members)
        for m in self.members.values():
            free = m.phase in (Phase.IDLE, Phase.FAILED)
            assert (m.index is self._free) == free, f"{m.id} is {m.phase} and in the wrong index"
            assert free or m.index is fleets[m.model].index, f"{m.id} is in the fleet of another model"
            assert not (m.releasing or m.yielded) or m.phase in (Phase.LOADING, Phase.LIVE, Phase.DRAINING), m
            assert m.units == 0 or m.model, f"{m.id} holds units of nothing"


class Fleet:
    """The instances of one model, which has `units` units. Shares the roster with the fleets of other models."""

    def __init__(self, model: str, units: int, roster: Roster) -> None:
        self.model, self.units, self.roster = model, units, roster
        self.index = Index()
        self._counts: tuple[int, Counter[Role]] = (-1, Counter())  # as of this version
        self._serving: tuple[int, dict[Role, list[Member]]] = (-1, {})  # as of this version

    @property
    def members(self) -> Mapping[InstanceId, Member]:
        """Every instance, of whatever model."""
        return self.roster.members

    @property
    def version(self) -> int:
        """Counts every change of a phase."""
        return self.index.version

    @property
    def changed(self) -> set[InstanceId]:
        """Members that changed their phase, came or left; the reader empties it."""
        return self.index.changed

    def alive(self, instance: InstanceId) -> Member | None:
        """The instance if it is one of this model."""
        member = self.roster.members.get(instance)
        return member if member is not None and member.index is self.index else None

    @property
    def size(self) -> int:
        """Instances in any phase."""
        return self.index.size

    def take(self, member: Member) -> str:
        """IDLE → LOADING, for this model. → the model of which it still holds units that are of no use now, or ""."""
        assert member.phase is Phase.IDLE
        stale = member.model if member.units and member.model != self.model else ""
        if member.model != self.model:
            member.units = member.failures = 0
        lifecycle.move(member.phase, Phase.LOADING)
        member.index.remove(member)
        member.model, member.phase, member.index = self.model, Phase.LOADING, self.index
        self.index.add(member)
        return stale

    def in_phase(self, phase: Phase) -> list[Member]:
        return self.index.members(phase)

    def count(self, phase: Phase) -> int:
        return self.index.count(phase)

    def loading(self) -> list[Member]:
        """LOADING and LIVE instances that are not being released."""
        found = self.index.members(Phase.LOADING) + self.index.members(Phase.LIVE)
        return sorted((m for m in found if not m.releasing), key=lambda m: m.id)

    def counted(self, role: Role) -> int:
        """LOADING, LIVE and SERVING instances of this role."""
        if self._counts[0] != self.index.version:
            self._counts = (self.index.version,
                            Counter(m.role for m in [*self.index.members(Phase.SERVING), *self.loading()]))
        return self._counts[1][role]

    def serving(self, role: Role) -> list[Member]:
        """SERVING instances of this role, to be read."""
        if self._serving[0] != self.index.version:
            found: dict[Role, list[Member]] = {role: [] for role in Role}
            for m in self.index.members(Phase.SERVING):
                found[m.role].append(m)
            self._serving = (self.index.version, found)
        return self._serving[1][role]

    def check(self) -> None:
        """Asserts that watermarks agree with the phases, and that who serves is known by role."""
        serving = self.index.members(Phase.SERVING)
        assert all(self.serving(role) == [m for m in serving if m.role is role] for role in Role), "an old picture"
        for m in (m for phase in Phase for m in self.index.members(phase)):
            assert m.model == self.model and 0 <= m.units <= self.units, m
            assert m.phase not in lifecycle.LOADED or m.units == self.units, f"{m.id} serves without all units"
