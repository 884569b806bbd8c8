"""When does what happen? A virtual clock and its agenda.

Invariant: time never goes back, and what is due at the same time happens in the order in which it was scheduled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import inf


class Clock:
    """Seconds since the run began. Whoever schedules something that may become void checks that itself."""

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._scheduled = 0

    def at(self, when: float, action: Callable[..., None], *args: object) -> None:
        """Runs `action(*args)` at `when`, or now if that is past."""
        self._scheduled += 1
        heapq.heappush(self._agenda, (max(when, self.now), self._scheduled, action, args))

    def after(self, delay_s: float, action: Callable[..., None], *args: object) -> None:
        self._scheduled += 1
        heapq.heappush(self._agenda, (self.now + max(delay_s, 0.0), self._scheduled, action, args))

    def run(self, until: float = inf) -> bool:
        """Lets everything happen that is due before or at `until`. → whether something is left."""
        agenda = self._agenda
        while agenda and agenda[0][0] <= until:
            self.now, _, action, args = heapq.heappop(agenda)
            action(*args)
        return bool(agenda)
