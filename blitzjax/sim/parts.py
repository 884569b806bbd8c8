"""What a simulated instance is made of: its requests, a stretch of decode steps, and the sides of a live pair."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING

from blitzjax.control.zigzag import LiveQueue
from blitzjax.types import LivePair, Request, RequestId

if TYPE_CHECKING:
    from blitzjax.sim.instance import SimInstance


@dataclass(slots=True)
class Sequence:
    request: Request
    attempt: int
    next_layer: int = 0  # layers [0, next_layer) were run by the live partner


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decode steps of one batch from `start`: step i takes first_s + i x growth_s."""

    start: float
    first_s: float
    growth_s: float
    steps: int

    def lasts(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    def steps_by(self, at: float) -> int:
        """The fewest whole steps that end at or after `at`, at least one."""
        elapsed = max(at - self.start, 0.0)
        b = self.first_s - self.growth_s / 2
        steps = ceil(2 * elapsed / (b + sqrt(b * b + 2 * self.growth_s * elapsed)) - 1e-9)  # root of lasts(n) = elapsed
        return min(max(steps, 1), self.steps)


class NewSide:
    """The loading side of a pair, as engine/live.py has it."""

    def __init__(self, pair: LivePair, layers: int) -> None:
        self.pair = pair
        self.queue: LiveQueue[RequestId] = LiveQueue(layers, pair.mode)
        self.open = True  # OLD may pull
        self.puller: SimInstance | None = None  # OLD waits for an answer


class OldSide:
    def __init__(self, pair: LivePair, partner: SimInstance) -> None:
        self.pair, self.partner = pair, partner
        self.waiting = False  # a pull is on its way
        self.drained = False
