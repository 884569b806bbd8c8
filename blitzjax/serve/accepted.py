"""Which answers does the controller owe, and to whom?

An order is known from its admission until its client has had everything and could no longer miss a part of it; while
the controller is new, that includes the orders of its predecessor, whose clients may come back. Invariant: nothing here
causes an event; what follows for the brain is returned, so that a journal can be replayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from blitzjax import types
from blitzjax.serve.answers import Answer, Order, Progress
from blitzjax.serve.model import ServedModel

_DELIVERY_S = 5.0  # the last message of a stream may be on its way for so long


@dataclass(slots=True)
class _Visit:
    """One order: its answers, and whether anybody waits for them."""

    at: float
    first: int
    answers: tuple[Answer, ...]
    left_s: float | None = None  # when its stream had ended with everything


@dataclass(frozen=True, slots=True)
class PastOrder:
    """An order as a snapshot has it."""

    at: float
    order: Order
    first: int
    left_s: float | None
    answers: tuple[Progress, ...]
    running: tuple[bool, ...]  # which answers are not over


@dataclass(slots=True)
class Accepted:
    """Owned by the controller."""

    models: Mapping[str, ServedModel]
    _running: dict[types.RequestId, Answer] = field(default_factory=dict)
    _visits: dict[str, _Visit] = field(default_factory=dict)  # by the client's request id
    _unclaimed: set[str] = field(default_factory=set)
    next_number: int = 0  # of the next answer

    # ---- views

    def __bool__(self) -> bool:
        """Whether an answer is not over."""
        return bool(self._running)

    def __iter__(self) -> Iterator[Answer]:
        """The answers that are not over."""
        return iter(list(self._running.values()))

    def get(self, request_id: types.RequestId) -> Answer | None:
        """The answer, unless it is over."""
        return self._running.get(request_id)

    def answers(self, request_id: str) -> tuple[Answer, ...]:
        """All answers to the client's `request_id`."""
        visit = self._visits.get(request_id)
        return () if visit is None else visit.answers

    def running(self, request_id: str) -> list[Answer]:
        """Those that are not over."""
        return [a for a in self.answers(request_id) if a.request.id in self._running]

    # ---- coming

    def admit(self, order: Order, first: int, at: float) -> tuple[Answer, ...]:
        """New answers, numbered from `first` on: unlike the client's id such a number never comes back."""
        assert not self.running(order.request_id)
        changed = asyncio.Event()
        model = self.models[order.model]
        answers = tuple(Answer(f"{order.request_id}#{first + index}", order, index, model, at, changed)
                        for index in range(order.n))
        self.next_number = first + order.n
        self._visits[order.request_id] = _Visit(at, first, answers)
        self._unclaimed.discard(order.request_id)
        self._running |= {answer.request.id: answer for answer in answers}
        return answers

    def claim(self, order: Order) -> tuple[Answer, ...] | None:
        """What the order's client was waiting for when the last controller died; None if this is a new order.

        A seed that was drawn then is not drawn again.
        """
        if order.request_id not in self._unclaimed:
            return None
        visit = self._visits[order.request_id]
        known = visit.answers[0].order
        if replace(order, sampling=replace(order.sampling, seed=known.sampling.seed)) != known:
            return None
        self._unclaimed.discard(order.request_id)
        visit.left_s = None
        return visit.answers

    # ---- going

    def over(self, answer: Answer) -> bool:
        """Nothing more is expected of the answer. → whether it was not over before."""
        return self._running.pop(answer.request.id, None) is not None

    def stream_ended(self, first: types.RequestId, delivered: bool, at: float) -> None:
        """The client of the order whose first answer this is has everything, or will not come back."""
        request_id = first.rpartition("#")[0]
        visit = self._visits.get(request_id)
        if visit is None or visit.answers[0].request.id != first:
            return  # the client's id has another order already
        if delivered:
            visit.left_s = at
        else:
            del self._visits[request_id]

    def prune(self, at: float) -> None:
        """Forgets what was delivered for good."""
        for request_id, visit in list(self._visits.items()):
            if visit.left_s is not None and at - visit.left_s > _DELIVERY_S:
                del self._visits[request_id]
                self._unclaimed.discard(request_id)

    # ---- after a restart

    def await_clients(self) -> None:
        """Every order that is known may be claimed by its client."""
        self._unclaimed = set(self._visits)

    def abandoned(self) -> list[tuple[Answer, ...]]:
        """Orders that nobody came for; from now on nobody can."""
        left, self._unclaimed = sorted(self._unclaimed), set()
        return [self._visits[request_id].answers for request_id in left]

    def past(self) -> tuple[list[PastOrder], int]:
        return [PastOrder(v.at, v.answers[0].order, v.first, v.left_s, tuple(a.progress() for a in v.answers),
                          tuple(a.request.id in self._running for a in v.answers))
                for v in self._visits.values()], self.next_number

    def restore(self, past: list[PastOrder], next_number: int) -> None:
        for known in past:
            if known.order.model not in self.models:
                continue  # undeployed; its client has everything
            answers = self.admit(known.order, known.first, known.at)
            self._visits[known.order.request_id].left_s = known.left_s
            for answer, progress, running in zip(answers, known.answers, known.running, strict=True):
                answer.restore(progress)
                if not running:
                    self.over(answer)
        self.next_number = next_number
