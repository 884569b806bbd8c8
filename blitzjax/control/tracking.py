"""Where is each request, and which attempt of it counts?

Invariant: an accepted request is queued or owned by exactly one instance, until it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.types import InstanceId, Request, RequestId


@dataclass(slots=True)
class Tracked:
    request: Request
    arrival: int  # order of arrival
    attempt: int = 0
    owner: InstanceId | None = None
    cancelled: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Higher priority first, then arrival; a request that comes back keeps its place."""
        return (-self.request.priority, self.arrival)


class RequestTable:
    """All accepted requests. Mutated by Cluster only."""

    def __init__(self) -> None:
        self._all: dict[RequestId, Tracked] = {}
        self._queue: list[Tracked] = []  # sorted by rank
        self._arrivals = 0

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._all

    def __len__(self) -> int:
        return len(self._all)

    def get(self, request_id: RequestId) -> Tracked | None:
        return self._all.get(request_id)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        return sum(t.request.prompt_tokens for t in self._queue)

    @property
    def head(self) -> Tracked | None:
        return self._queue[0] if self._queue else None

    def accept(self, request: Request) -> None:
        assert request.id not in self._all, f"{request.id} was accepted already"
        self._arrivals += 1
        self._all[request.id] = Tracked(request, self._arrivals)
        self.enqueue(self._all[request.id])

    def enqueue(self, tracked: Tracked) -> None:
        tracked.owner = None
        self._queue.append(tracked)
        self._queue.sort(key=lambda t: t.rank)  # nearly sorted: linear

    def take_head(self, owner: InstanceId) -> Tracked:
        """The head leaves the queue as a new attempt of `owner`."""
        tracked = self._queue.pop(0)
        tracked.owner, tracked.attempt = owner, tracked.attempt + 1
        return tracked

    def forget(self, tracked: Tracked) -> None:
        del self._all[tracked.request.id]
        if tracked.owner is None:
            self._queue.remove(tracked)

    def check(self) -> None:
        queued = {t.request.id for t in self._queue}
        assert len(queued) == len(self._queue), "a request is queued twice"
        for request_id, tracked in self._all.items():
            assert (tracked.owner is None) == (request_id in queued), f"{request_id} is in two places or none"
        assert queued <= self._all.keys()
