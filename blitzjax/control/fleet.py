"""Which instances are there, and what does the brain know of each?

Invariant: phases move only along the lifecycle table, and SERVING or DRAINING instances hold every unit.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

from blitzjax.control import lifecycle
from blitzjax.types import InstanceId, InstanceJoined, Phase, Role


@dataclass(slots=True)
class Member:
    """One instance. Mutated by the Fleet and by the parts of the brain that decide about it."""

    id: InstanceId
    incarnation: str
    host: str
    pages: int
    page_size: int
    slots: int
    units: int  # it holds units [0, units)
    phase: Phase
    in_world: bool = False
    role: Role = Role.MIXED
    releasing: bool = False  # Release was sent, Drained has not come yet
    failures: int = 0  # transfers to it that failed in this scale-up
    barred_until: float = float("-inf")  # not recruited before this time, after it was given up
    index: Index = field(kw_only=True, repr=False)

    @property
    def loading(self) -> bool:
        return self.phase in (Phase.LOADING, Phase.LIVE) and not self.releasing

    def move(self, to: Phase) -> None:
        to = lifecycle.move(self.phase, to)
        self.index.remove(self)
        self.phase = to
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

    def add(self, member: Member) -> None:
        self.version += 1
        bisect.insort(self._of[member.phase], (member.id, member), key=lambda pair: pair[0])
        self.changed.add(member.id)

    def remove(self, member: Member) -> None:
        members = self._of[member.phase]
        place = bisect.bisect_left(members, member.id, key=lambda pair: pair[0])
        assert members[place][1] is member
        del members[place]

    def members(self, phase: Phase) -> list[Member]:
        return [member for _, member in self._of[phase]]

    def count(self, phase: Phase) -> int:
        return len(self._of[phase])


class Fleet:
    """All instances that ever joined, by id. `units` is the number of units of the model."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.members: dict[InstanceId, Member] = {}
        self.pages = 0  # of the instance that has most
        self._index = Index()
        self._capacity_tokens: int | None = None
        self._counts: tuple[int, Counter[Role]] = (-1, Counter())  # as of this version
        self._loading: tuple[int, list[Member]] = (-1, [])  # as of this version

    @property
    def version(self) -> int:
        """Counts every change of a phase."""
        return self._index.version

    @property
    def changed(self) -> set[InstanceId]:
        """Members that changed their phase; the reader empties it."""
        return self._index.changed

    def alive(self, instance: InstanceId) -> Member | None:
        """The instance, unless it is unknown or FAILED."""
        member = self.members.get(instance)
        return None if member is None or member.phase is Phase.FAILED else member

    def all_alive(self) -> list[Member]:
        """In order of id, so that every decision is deterministic."""
        return [m for _, m in sorted(self.members.items()) if m.phase is not Phase.FAILED]

    def in_phase(self, phase: Phase) -> list[Member]:
        return self._index.members(phase)

    def count(self, phase: Phase) -> int:
        return self._index.count(phase)

    def loading(self) -> list[Member]:
        """LOADING and LIVE instances that are not being released."""
        if self._loading[0] != self._index.version:
            found = self._index.members(Phase.LOADING) + self._index.members(Phase.LIVE)
            self._loading = (self._index.version, sorted((m for m in found if not m.releasing), key=lambda m: m.id))
        return self._loading[1]

    def counted(self, role: Role) -> int:
        """LOADING, LIVE and SERVING instances of this role."""
        if self._counts[0] != self._index.version:
            self._counts = (self._index.version,
                            Counter(m.role for m in [*self._index.members(Phase.SERVING), *self.loading()]))
        return self._counts[1][role]

    def serving(self, role: Role) -> list[Member]:
        return [m for m in self._index.members(Phase.SERVING) if m.role is role]

    def capacity_tokens(self) -> int | None:
        """KV tokens of the largest instance; None before the first one joined."""
        return self._capacity_tokens

    def join(self, event: InstanceJoined) -> None:
        """A new or returned instance: SERVING with every unit, else IDLE with what it holds."""
        units = max(0, min(event.units, self.units))
        phase = Phase.SERVING if units == self.units else Phase.IDLE
        known = self.members.get(event.instance)
        if known is not None:
            lifecycle.move(known.phase, phase)
            self._index.remove(known)
        member = self.members[event.instance] = Member(
            event.instance, event.incarnation, event.host, event.pages, event.page_size, event.slots, units, phase,
            index=self._index)
        self._index.add(member)
        self.pages = max(m.pages for m in self.members.values())
        self._capacity_tokens = max(m.pages * m.page_size for m in self.members.values())

    def lose(self, member: Member) -> None:
        member.move(Phase.FAILED)
        member.units, member.in_world, member.releasing = 0, False, False

    def check(self) -> None:
        """Asserts that watermarks are in range and agree with the phases."""
        indexed = [m for phase in Phase for m in self._index.members(phase) if m.phase is phase]
        assert sorted(m.id for m in indexed) == sorted(self.members)
        for m in self.members.values():
            assert 0 <= m.units <= self.units, m
            assert m.phase not in lifecycle.LOADED or m.units == self.units, f"{m.id} serves without all units"
            assert m.phase is not Phase.IDLE or m.units < self.units, f"{m.id} is idle with all units"
            assert not m.releasing or m.phase in (Phase.LOADING, Phase.LIVE, Phase.DRAINING), m
