"""What a simulated instance is made of: its requests, those that decode, a stretch of their steps, a live pair's sides."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING

from blitzjax.control.zigzag import LiveQueue
from blitzjax.types import LivePair, Request, RequestId

if TYPE_CHECKING:
    from blitzjax.sim.partners import Partners


@dataclass(slots=True)
class Sequence:
    request: Request
    attempt: int
    next_layer: int = 0  # layers [0, next_layer) were run by the live partner
    stop_kv: Callable[[], None] | None = None  # their KV is on its way: how it is stopped
    answered: bool = False  # its prompt is through


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


class DecodeBatch:
    """Requests that decode together, one token each per step. `kv_tokens` is the KV of all."""

    def __init__(self) -> None:
        self._steps = 0  # run so far
        self._ends: list[tuple[int, RequestId]] = []  # heap: after which step each has its last token
        self.kv_tokens = 0

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def steps_left(self) -> int:
        """Until the first of them ends."""
        return self._ends[0][0] - self._steps

    @property
    def ended(self) -> RequestId | None:
        """One that has all of its tokens, and is still here."""
        return self._ends[0][1] if self._ends and self._ends[0][0] <= self._steps else None

    def ran(self, steps: int) -> None:
        self._steps += steps
        self.kv_tokens += steps * len(self._ends)

    def join(self, request: Request, left: int) -> None:
        """`left` tokens are still to be decoded."""
        heapq.heappush(self._ends, (self._steps + left, request.id))
        self.kv_tokens += request.total_tokens - 1 - left

    def leave(self, request: Request) -> int | None:
        """→ how many tokens were left; None when it was not here."""
        if self._ends and self._ends[0][1] == request.id:
            ended = heapq.heappop(self._ends)
        elif others := [entry for entry in self._ends if entry[1] == request.id]:
            ended, = others
            self._ends.remove(ended)
            heapq.heapify(self._ends)
        else:
            return None
        left = ended[0] - self._steps
        self.kv_tokens -= request.total_tokens - 1 - left
        return left


class NewSide:
    """The loading side of a pair, as engine/live.py has it."""

    def __init__(self, pair: LivePair, layers: int) -> None:
        self.pair = pair
        self.queue: LiveQueue[RequestId] = LiveQueue(layers, pair.mode)
        self.open = True  # OLD may pull
        self.puller: Partners | None = None  # OLD waits for an answer
        self.embedded_at: float | None = None  # alone: when the embedding was read from disk


    def close(self) -> None:
        """Nothing is handed over any more."""
        self.open = False
        self.queue.close()


class OldSide:
    def __init__(self, pair: LivePair, partner: Partners) -> None:
        self.pair, self.partner = pair, partner
        self.waiting = False  # a pull is on its way
        self.drained = False
