"""Which answers does the controller owe, and to whom?

An order is known from its admission until its client has had everything and could no longer miss a part of it. Clients
whose connections broke may come back for theirs, and while the controller is new those of its predecessor. Invariant:
who has come back has its answers alone, and nothing here causes an event; what follows for the brain is returned, so
that a journal can be replayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from blitzjax import types
from blitzjax.serve.answers import Answer, Order, Progress
from blitzjax.serve.model import ServedModel


@dataclass(slots=True)
class _Visit:
    """One order: its answers, and whether anybody waits for them."""

    at: float
    first: int
    answers: tuple[Answer, ...]
    model: ServedModel  # it may be undeployed before the client has everything
    key: str = ""  # of its client, which may come back at any time; empty: after a crash only
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
    keep_s: float  # the last message of a stream may be on its way, or its client, for so long
    _running: dict[types.RequestId, Answer] = field(default_factory=dict)
    _visits: dict[str, _Visit] = field(default_factory=dict)  # by the client's request id
    _unclaimed: dict[str, float] = field(default_factory=dict)  # whose clients are away, and until when they may be
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
        self._visits[order.request_id] = _Visit(at, first, answers, model)
        self._unclaimed.pop(order.request_id, None)
        self._running |= {answer.request.id: answer for answer in answers}
        return answers

    def claim(self, order: Order, key: str) -> tuple[Answer, ...] | None:
        """What the order's client was waiting for when the last controller died, or when its connection broke, whether
        or not that was noticed: all of it, from the first token on. None if this is a new order.

        A seed that was drawn then is not drawn again.
        """
        visit = self._claimable(order.request_id, key)
        if visit is None:
            return None
        known = visit.answers[0].order
        if replace(order, sampling=replace(order.sampling, seed=known.sampling.seed)) != known:
            return None
        self._unclaimed.pop(order.request_id, None)
        changed, earlier = asyncio.Event(), visit.answers
        visit.answers, visit.left_s = tuple(answer.again(visit.model, changed) for answer in earlier), None
        for answer in visit.answers:
            if answer.request.id in self._running:
                self._running[answer.request.id] = answer
        for answer in earlier:
            answer.fail("ABORTED", "the client has called again")
        return self.attend(order.request_id, key)

    def model_of(self, request_id: str, key: str) -> ServedModel | None:
        """That of an order which its client may claim."""
        visit = self._claimable(request_id, key)
        return None if visit is None else visit.model

    def _claimable(self, request_id: str, key: str) -> _Visit | None:
        visit = self._visits.get(request_id)
        may = visit is not None and (visit.key == key if visit.key else request_id in self._unclaimed)
        return visit if may else None

    def attend(self, request_id: str, key: str) -> tuple[Answer, ...]:
        """A known order's answers, for who may come back with `key`."""
        self._visits[request_id].key = key
        return self._visits[request_id].answers

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
            if visit.left_s is not None and at - visit.left_s > self.keep_s:
                del self._visits[request_id]
                self._unclaimed.pop(request_id, None)

    # ---- clients that are away

    def await_client(self, request_id: str, at: float) -> None:
        """Its call is broken."""
        self._unclaimed[request_id] = at + self.keep_s

    def await_clients(self, at: float) -> None:
        """Those of the last controller: every order that is known may be claimed."""
        self._unclaimed = dict.fromkeys(self._visits, at + self.keep_s)

    def abandoned(self, at: float) -> list[tuple[Answer, ...]]:
        """Orders that nobody came for in time; from now on nobody can."""
        late = sorted(request_id for request_id, until in self._unclaimed.items() if at >= until)
        for request_id in late:
            del self._unclaimed[request_id]
        return [self._visits[request_id].answers for request_id in late]

    # ---- after a restart

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
