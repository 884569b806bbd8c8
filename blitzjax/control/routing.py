"""Which instance takes the next queued request? Late binding: a request stays in the global queue until one has room.

While parameters arrive at the NEW side of a live pair, its OLD side takes nothing from the queue; NEW takes for both
(BlitzScale, section 5.1: new requests are redirected, payloads are tiny) and OLD pulls from NEW.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blitzjax.control.blocks import pages_for
from blitzjax.types import InstanceId, Phase, Request


@dataclass(frozen=True, slots=True)
class Seat:
    """An instance as the router sees it."""

    instance: InstanceId
    phase: Phase
    free_slots: int
    free_pages: int
    page_size: int
    backlog_tokens: int  # prompt tokens assigned and without a first token
    redirected: bool = False  # OLD of a pair that is still loading


def choose(request: Request, seats: Iterable[Seat], serving_tokens: int, live_tokens: int) -> InstanceId | None:
    """The instance with the least backlog among those with room; None: keep waiting.

    SERVING instances take requests while their backlog is below `serving_tokens` prompt tokens; LIVE ones as long as it
    stays within `live_tokens`. Either takes any request when it has no backlog at all.
    """
    def has_room(seat: Seat) -> bool:
        if seat.free_slots < 1 or pages_for(request.total_tokens, seat.page_size) > seat.free_pages:
            return False
        if seat.phase is Phase.SERVING and not seat.redirected:
            return seat.backlog_tokens < serving_tokens or seat.backlog_tokens == 0
        if seat.phase is Phase.LIVE:
            return seat.backlog_tokens + request.prompt_tokens <= live_tokens or seat.backlog_tokens == 0
        return False

    free = [seat for seat in seats if has_room(seat)]
    best = min(free, key=lambda s: (s.backlog_tokens, s.phase is Phase.LIVE, s.instance), default=None)
    return None if best is None else best.instance
