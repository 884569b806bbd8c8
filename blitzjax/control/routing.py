"""Which instance takes the next queued request? Late binding: a request stays in the global queue until one has room.

While parameters arrive at the NEW side of a live pair, its OLD side takes nothing from the queue; NEW takes for both
(BlitzScale, section 5.1: new requests are redirected, payloads are tiny) and OLD pulls from NEW.

The least busy instance takes it - the fewest prompt tokens to run; of equals, the most free slots - or one that
probably has the KV of how the prompt begins: that one may have as many more prompt tokens to run as the hit saves, and
half the free slots.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from blitzjax.control.affinity import Affinity
from blitzjax.control.blocks import admitted_tokens, pages_for
from blitzjax.types import InstanceId, Phase, Request


class Seat(NamedTuple):
    """An instance as the router sees it: made anew for every change, which a tuple is fastest at."""

    instance: InstanceId
    phase: Phase
    free_slots: int
    free_pages: int
    page_size: int
    backlog_tokens: int  # prompt tokens assigned and without a first token
    redirected: bool = False  # takes nothing from the queue: it decodes only, or its live partner takes for both


_KEEPS_KV = (Phase.SERVING, Phase.LIVE, Phase.DRAINING)
_Place = tuple[int, bool, int, InstanceId, int, Seat]  # backlog, is it LIVE, minus free slots, who, when


class Router:
    """Seats by backlog. Its owner says which of them changed; choosing costs nothing for those that cannot take more.

    Invariant: a seat is in exactly one of `_order` (may take a request), `_passed` (had no room for the request that
    was asked for last) or neither (takes nothing until it changes).
    """

    def __init__(self, serving_tokens: int, live_tokens: int, answer_share: float = 1.0) -> None:
        self._serving_tokens, self._live_tokens, self._answer_share = serving_tokens, live_tokens, answer_share
        self._seats: dict[InstanceId, Seat] = {}
        self._order: list[_Place] = []  # heap; void unless it holds the seat's last picture
        self._passed: list[_Place] = []
        self._updates = 0
        self._asked: Request | None = None
        self._affinity = Affinity()

    def update(self, seat: Seat) -> None:
        """What the instance looks like from now on."""
        self._seats[seat.instance] = seat
        if seat.phase not in _KEEPS_KV:
            self._affinity.forget(seat.instance)
        if self._takes(seat):
            self._updates += 1
            place = (seat.backlog_tokens, seat.phase is Phase.LIVE, -seat.free_slots, seat.instance, self._updates, seat)
            heapq.heappush(self._order, place)
        if len(self._order) > 4 * len(self._seats) + 64:
            self._order = [place for place in self._order if self._seats[place[3]] is place[5]]
            heapq.heapify(self._order)

    def assigned(self, request: Request, instance: InstanceId) -> None:
        """`instance` got it."""
        self._affinity.sent(instance, request.beginnings)

    def choose(self, request: Request) -> InstanceId | None:
        """The instance with the least backlog among those with room, or one that has the prompt's beginning; None: keep
        waiting.

        SERVING instances take requests while their backlog is below `serving_tokens` prompt tokens; LIVE ones as long
        as it stays within `live_tokens`. Either takes any request when it has no backlog at all.
        """
        best = self._least_busy(request)
        if best is None:
            return None
        return self._holder(request, best) or best.instance

    def _holder(self, request: Request, best: Seat) -> InstanceId | None:
        """Whoever has most of the prompt and is not much busier than `best`; of these, the least busy."""
        for pages, instances in self._affinity.holders(request.beginnings):
            seats = [self._seats[i] for i in instances if self._seats[i].phase is Phase.SERVING]
            near = [(seat.backlog_tokens, -seat.free_slots, seat.instance) for seat in seats
                    if self._takes(seat) and self._has_room(seat, request) and 2 * seat.free_slots >= best.free_slots
                    and seat.backlog_tokens <= best.backlog_tokens + pages * seat.page_size]
            if near:
                return min(near)[2]
        return None

    def _least_busy(self, request: Request) -> Seat | None:
        if request is not self._asked:
            for place in self._passed:
                heapq.heappush(self._order, place)
            self._passed, self._asked = [], request
        while self._order:
            seat = self._order[0][5]
            if self._seats[seat.instance] is not seat:
                heapq.heappop(self._order)
            elif self._has_room(seat, request):
                return seat
            else:
                self._passed.append(heapq.heappop(self._order))
        return None

    def _takes(self, seat: Seat) -> bool:
        """Whether there are requests that it has room for."""
        if seat.free_slots < 1 or seat.free_pages < 1 or seat.redirected:
            return False
        if seat.phase is Phase.SERVING:
            return seat.backlog_tokens < self._serving_tokens or seat.backlog_tokens == 0
        return seat.phase is Phase.LIVE

    def _has_room(self, seat: Seat, request: Request) -> bool:
        if pages_for(admitted_tokens(request, self._answer_share), seat.page_size) > seat.free_pages:
            return False
        fits = seat.backlog_tokens + request.prompt_tokens <= self._live_tokens
        return seat.phase is Phase.SERVING or fits or seat.backlog_tokens == 0
