"""Where is every accepted request: in the queue, or with which instance, and in which attempt?

Invariant: an entry is either queued or owned by one instance. It is forgotten exactly once: when it finished, when it
was cancelled and nobody runs it, or with a Reject.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from blitzjax.control.blocks import admitted_tokens, pages_for
from blitzjax.commands import Command, Reject
from blitzjax.types import InstanceId, Request, RequestId


@dataclass(slots=True)
class Entry:
    """One accepted request."""

    request: Request
    rank: tuple[float, int]  # (Request.rank_s, arrival): lower is earlier; kept over attempts
    attempt: int = 0  # the running or last attempt; 0: never assigned
    unbegun: int = 0  # attempts that were given back
    owner: InstanceId | None = None  # None: queued
    giver: InstanceId | None = None  # live partner that says it handed the request to `owner`, which has not confirmed
    handed: bool = False  # came to `owner` from its live partner, not from the queue
    answered: bool = False  # this attempt emitted its first token
    cancelled: bool = False
    pages: int = 0  # that the owner's account counts for it


@dataclass(slots=True)
class Account:
    """What the requests of one instance come to; kept up to date by the book, so that asking costs nothing."""

    page_size: int
    entries: dict[RequestId, Entry] = field(default_factory=dict)
    backlog_tokens: int = 0
    pages: int = 0


class RequestBook:
    """All accepted requests. `max_attempts` bounds how often one is run; one counts for the pages of its prompt and
    `answer_share` of its answer, which its instance admits it with.

    `changed` collects the instances whose requests changed, `left` those that a request left, for whoever keeps a
    picture of them and empties it.
    """

    def __init__(self, max_attempts: int, answer_share: float = 1.0) -> None:
        self._max_attempts = max_attempts
        self._answer_share = answer_share
        self._entries: dict[RequestId, Entry] = {}
        self._queue: list[tuple[tuple[float, int], RequestId]] = []  # sorted by rank
        self._accounts: dict[InstanceId, Account] = {}
        self._arrivals = 0
        self._backlog_tokens = 0  # of all entries
        self._pages = 0  # of all accounts
        self.changed: set[InstanceId] = set()
        self.left: set[InstanceId] = set()

    def open(self, instance: InstanceId, page_size: int) -> None:
        """`instance` may own requests from now on; its KV pages hold `page_size` tokens."""
        known = self._accounts.get(instance)
        assert known is None or not known.entries, f"{instance} still owns requests"
        self._accounts[instance] = Account(page_size)

    # ---- views

    def get(self, request_id: RequestId) -> Entry | None:
        return self._entries.get(request_id)

    def current(self, request_id: RequestId, attempt: int) -> Entry | None:
        """The entry, if no later attempt than `attempt` was assigned.

        It may be queued: we thought that the attempt was lost, yet somebody runs it.
        """
        entry = self._entries.get(request_id)
        return entry if entry is not None and entry.attempt == attempt >= 1 else None

    def head(self) -> Entry | None:
        """The queued request that goes next: first in rank, whatever its attempt."""
        return self._entries[self._queue[0][1]] if self._queue else None

    def waiting(self) -> list[Entry]:
        """Everything queued, in the order in which it goes."""
        return [self._entries[request_id] for _, request_id in self._queue]

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._entries) - len(self._queue)

    def account(self, instance: InstanceId) -> Account:
        """What the requests of `instance` come to, to be read."""
        return self._accounts[instance]

    def owned(self, instance: InstanceId) -> list[Entry]:
        return list(self._accounts[instance].entries.values())

    def owns(self, instance: InstanceId) -> int:
        """How many requests `instance` owns."""
        return len(self._accounts[instance].entries)

    def given(self, giver: InstanceId) -> list[Entry]:
        """Requests that `giver` says it handed over and whose new owner has not confirmed it."""
        return [e for e in self._entries.values() if e.giver == giver]

    def backlog_tokens(self, instance: InstanceId) -> int:
        """Prompt tokens assigned to `instance` without a first token."""
        return self._accounts[instance].backlog_tokens

    def pages(self, instance: InstanceId) -> int:
        """KV pages that the requests of `instance` are admitted with."""
        return self._accounts[instance].pages

    def need(self, request: Request, page_size: int) -> int:
        """KV pages of an instance that `request` is admitted with."""
        return pages_for(admitted_tokens(request, self._answer_share), page_size)

    @property
    def total_pages(self) -> int:
        return self._pages

    @property
    def total_backlog_tokens(self) -> int:
        """Prompt tokens queued, or assigned without a first token."""
        return self._backlog_tokens

    # ---- moves

    def arrive(self, request: Request) -> None:
        assert request.id not in self._entries
        self._arrivals += 1
        entry = self._entries[request.id] = Entry(request, (request.rank_s, self._arrivals))
        self._backlog_tokens += request.prompt_tokens
        self._enqueue(entry)

    def assign(self, entry: Entry, instance: InstanceId) -> None:
        """Queue → `instance`; starts the next attempt."""
        self._detach(entry)
        entry.attempt += 1
        self._own(entry, instance)

    def answer(self, entry: Entry) -> None:
        """The running attempt emitted its first token."""
        assert entry.owner is not None
        if not entry.answered:
            entry.answered = True
            self._accounts[entry.owner].backlog_tokens -= entry.request.prompt_tokens
            self._backlog_tokens -= entry.request.prompt_tokens
            self.changed.add(entry.owner)

    def give(self, entry: Entry, target: InstanceId, giver: InstanceId | None) -> None:
        """`target` runs the last attempt. `giver`: only that side says so yet; None: `target` says so itself."""
        if entry.owner != target:
            self._detach(entry)
            self._own(entry, target)
            entry.handed, entry.giver = True, giver
        elif giver is None:
            entry.giver = None

    def lose(self, entry: Entry, why: str) -> list[Command]:
        """The running attempt is lost: back into the queue at its old rank, or the end after too many attempts."""
        assert entry.owner is not None
        self._detach(entry)
        begun = entry.attempt - entry.unbegun
        if entry.cancelled or begun >= self._max_attempts:
            self._drop(entry)
            message = f"gave up after {begun} attempts, the last one: {why}"
            return [] if entry.cancelled else [Reject(entry.request.id, "UNAVAILABLE", message)]
        self._queue_again(entry)
        return []

    def give_back(self, entry: Entry) -> list[Command]:
        """The owner has not begun the attempt: back into the queue at its old rank; nothing is held against it."""
        self._detach(entry)
        entry.unbegun += 1
        if entry.cancelled:
            self._drop(entry)
            return []
        self._queue_again(entry)
        return []

    def forget(self, entry: Entry) -> None:
        """The request is over."""
        self._detach(entry)
        self._drop(entry)

    def check(self) -> None:
        """Asserts the invariant."""
        owned = [i for account in self._accounts.values() for i in account.entries]
        queued = [i for _, i in self._queue]
        assert sorted(owned + queued) == sorted(self._entries), "a request is lost or in two places"
        assert self._queue == sorted(self._queue)
        for instance, account in self._accounts.items():
            held = account.entries.values()
            assert all(e.owner == instance and e.attempt >= 1 for e in held)
            assert account.backlog_tokens == sum(e.request.prompt_tokens for e in held if not e.answered)
            assert account.pages == sum(self.need(e.request, account.page_size) for e in held)
        assert self._pages == sum(account.pages for account in self._accounts.values())
        assert self._backlog_tokens == sum(e.request.prompt_tokens for e in self._entries.values() if not e.answered)
        for i in queued:
            entry = self._entries[i]
            assert entry.owner is None and not (entry.cancelled or entry.answered or entry.handed), entry
        assert all(e.attempt - e.unbegun <= self._max_attempts for e in self._entries.values())

    # ----------------------------------------------------------------------------------------------------------------

    def _queue_again(self, entry: Entry) -> None:
        """Back at its old rank; its prompt has to run again."""
        if entry.answered:
            entry.answered = False
            self._backlog_tokens += entry.request.prompt_tokens
        entry.handed = False
        self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        bisect.insort(self._queue, (entry.rank, entry.request.id))

    def _own(self, entry: Entry, instance: InstanceId) -> None:
        account = self._accounts[instance]
        entry.owner, entry.pages = instance, self.need(entry.request, account.page_size)
        account.entries[entry.request.id] = entry
        self.changed.add(instance)
        self._charge(entry, account, 1)

    def _detach(self, entry: Entry) -> None:
        """Takes the entry out of the queue or from its owner."""
        if entry.owner is None:
            del self._queue[bisect.bisect_left(self._queue, (entry.rank, entry.request.id))]
            return
        account = self._accounts[entry.owner]
        self.left.add(entry.owner)
        self.changed.add(entry.owner)
        del account.entries[entry.request.id]
        self._charge(entry, account, -1)
        entry.owner = entry.giver = None

    def _charge(self, entry: Entry, account: Account, sign: int) -> None:
        """An entry comes to its owner's account (1) or leaves it (-1)."""
        account.pages += sign * entry.pages
        self._pages += sign * entry.pages
        if not entry.answered:
            account.backlog_tokens += sign * entry.request.prompt_tokens

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.request.id]
        if not entry.answered:
            self._backlog_tokens -= entry.request.prompt_tokens
