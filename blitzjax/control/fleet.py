"""Which instances are there, and what does the brain know of each?

Invariant: phases move only along the lifecycle table, and SERVING or DRAINING instances hold every unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.control import lifecycle
from blitzjax.types import InstanceId, InstanceJoined, Phase


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
    releasing: bool = False  # Release was sent, Drained has not come yet
    failures: int = 0  # transfers to it that failed in this scale-up
    barred_until: float = float("-inf")  # not recruited before this time, after it was given up

    @property
    def counted(self) -> bool:
        """Part of the capacity that the policy asked for."""
        return self.phase in lifecycle.COUNTED and not self.releasing

    @property
    def loading(self) -> bool:
        return self.phase in (Phase.LOADING, Phase.LIVE) and not self.releasing

    def move(self, to: Phase) -> None:
        self.phase = lifecycle.move(self.phase, to)


class Fleet:
    """All instances that ever joined, by id. `units` is the number of units of the model."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.members: dict[InstanceId, Member] = {}

    def alive(self, instance: InstanceId) -> Member | None:
        """The instance, unless it is unknown or FAILED."""
        member = self.members.get(instance)
        return None if member is None or member.phase is Phase.FAILED else member

    def all_alive(self) -> list[Member]:
        """In order of id, so that every decision is deterministic."""
        return [m for _, m in sorted(self.members.items()) if m.phase is not Phase.FAILED]

    def in_phase(self, phase: Phase) -> list[Member]:
        return [m for _, m in sorted(self.members.items()) if m.phase is phase]

    def counted(self) -> int:
        """LOADING, LIVE and SERVING instances."""
        return sum(m.counted for m in self.members.values())

    def capacity_tokens(self) -> int | None:
        """KV tokens of the largest instance; None before the first one joined."""
        return max((m.pages * m.page_size for m in self.members.values()), default=None)

    def join(self, event: InstanceJoined) -> None:
        """A new or returned instance: SERVING with every unit, else IDLE with what it holds."""
        units = max(0, min(event.units, self.units))
        phase = Phase.SERVING if units == self.units else Phase.IDLE
        known = self.members.get(event.instance)
        if known is not None:
            lifecycle.move(known.phase, phase)
        self.members[event.instance] = Member(
            event.instance, event.incarnation, event.host, event.pages, event.page_size, event.slots, units, phase)

    def lose(self, member: Member) -> None:
        member.move(Phase.FAILED)
        member.units, member.in_world, member.releasing = 0, False, False

    def check(self) -> None:
        """Asserts that watermarks are in range and agree with the phases."""
        for m in self.members.values():
            assert 0 <= m.units <= self.units, m
            assert m.phase not in lifecycle.LOADED or m.units == self.units, f"{m.id} serves without all units"
            assert m.phase is not Phase.IDLE or m.units < self.units, f"{m.id} is idle with all units"
            assert not m.releasing or m.phase in (Phase.LOADING, Phase.LIVE, Phase.DRAINING), m
