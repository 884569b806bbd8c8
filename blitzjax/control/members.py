"""What the brain knows of each instance, and the frozen picture of it all that shells show.

Invariant: `owned` requests fit an instance's slots; SERVING and DRAINING instances hold every unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.control import lifecycle
from blitzjax.control.routing import Seat
from blitzjax.types import Chain, InstanceId, Phase, RequestId


@dataclass(slots=True)
class Member:
    """One instance. Mutated by Cluster only; `phase` moves along control/lifecycle.py."""

    id: InstanceId
    incarnation: str
    units: int
    pages: int
    page_size: int
    slots: int
    phase: Phase = Phase.IDLE
    in_world: bool = False
    releasing: bool = False  # told to drop its parameters
    failures: int = 0  # loads that broke, in this scale-up
    wanted_since: float | None = None  # waits for the world
    owned: dict[RequestId, int] = field(default_factory=dict)  # → pages
    unstarted: dict[RequestId, int] = field(default_factory=dict)  # no first token yet → prompt tokens

    @property
    def pages_used(self) -> int:
        return sum(self.owned.values())

    @property
    def backlog_tokens(self) -> int:
        return sum(self.unstarted.values())

    def move(self, to: Phase) -> None:
        self.phase = lifecycle.move(self.phase, to)

    def seat(self, redirected: bool) -> Seat:
        return Seat(self.id, self.phase, self.slots - len(self.owned), self.pages - self.pages_used, self.page_size,
                    self.backlog_tokens, redirected)


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    id: InstanceId
    phase: Phase
    units: int
    partner: InstanceId | None
    waiting: int  # requests without a first token
    running: int
    pages_used: int
    pages_total: int
    in_world: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    instances: tuple[InstanceStatus, ...]
    queued: int
    running: int  # requests that an instance has
    target: int
    chains: tuple[tuple[int, Chain], ...]  # ticket, chain under way
