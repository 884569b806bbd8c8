"""Whose KV goes where? Split roles: requests whose prompt is done move from where it ran to where they are decoded.

First come, first served. Invariant: an instance receives the KV of at most one request at a time, and sends that of at
most one; a target has room for everything that is on its way to it. When no target has room the requests stay, keep
their pages and thereby hold back new prompts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.requests import Entry, RequestBook
from blitzjax.commands import Command, Migrate
from blitzjax.types import InstanceId, Phase, RequestId, Role


@dataclass(frozen=True, slots=True)
class _Move:
    entry: Entry
    attempt: int
    source: InstanceId


class Migrations:
    """Requests that wait for a decode instance, and those on their way. Owned by the Cluster."""

    def __init__(self, fleet: Fleet, book: RequestBook) -> None:
        self._fleet, self._book = fleet, book
        self._waiting: dict[RequestId, _Move] = {}
        self._inbound: dict[InstanceId, _Move] = {}  # by target
        self.received_bytes: Counter[InstanceId] = Counter()  # KV, by target

    def wait(self, entry: Entry) -> None:
        """The prompt is done where the entry is."""
        assert entry.owner is not None
        self._waiting[entry.request.id] = _Move(entry, entry.attempt, entry.owner)

    def inbound(self, target: InstanceId) -> bool:
        return target in self._inbound

    def start(self) -> list[Command]:
        """Begins every move that can begin now."""
        if not self._waiting and not self._inbound:
            return []
        self._forget_void()
        commands: list[Command] = []
        sending = {move.source for move in self._inbound.values()}
        for request_id, move in list(self._waiting.items()):
            if move.source in sending:
                continue
            target = self._choose(move.entry)
            if target is None:
                break  # nothing overtakes it
            del self._waiting[request_id]
            self._inbound[target.id] = move
            sending.add(move.source)
            commands.append(Migrate(move.source, request_id, move.attempt, target.id))
        return commands

    def lost(self, target: InstanceId) -> None:
        """`target` died: what was on its way to it waits again, before all others."""
        move = self._inbound.pop(target, None)
        if move is not None:
            self._waiting = {move.entry.request.id: move} | self._waiting

    def _forget_void(self) -> None:
        """Requests that ended, were lost or have arrived; those whose target is gone wait again, before all others."""
        again = {}
        for target, move in list(self._inbound.items()):
            if not self._holds(move):
                del self._inbound[target]
            elif not self._may_decode(self._fleet.members[target]):
                del self._inbound[target]
                again[move.entry.request.id] = move
        kept = {i: move for i, move in self._waiting.items() if self._holds(move) and self._must_leave(move)}
        self._waiting = again | kept

    def _holds(self, move: _Move) -> bool:
        """The request is still where it was."""
        return move.entry.owner == move.source and move.entry.attempt == move.attempt and move.entry.answered

    def _must_leave(self, move: _Move) -> bool:
        """An instance that became a decode instance keeps what it has."""
        return self._fleet.members[move.source].role is Role.PREFILL

    def _may_decode(self, m: Member) -> bool:
        return (m.role is Role.DECODE and m.phase in (Phase.SERVING, Phase.DRAINING) and not m.releasing
                and self._fleet.alive(m.id) is not None)

    def _choose(self, entry: Entry) -> Member | None:
        """The decode instance with the fewest pages in use, among those that have room and receive nothing else."""
        free = [m for m in self._fleet.serving(Role.DECODE) if m.id not in self._inbound
                and self._book.owns(m.id) < m.slots
                and self._book.pages(m.id) + self._book.need(entry.request, m.page_size) <= m.pages]
        return min(free, key=lambda m: (self._book.pages(m.id), m.id), default=None)

    def check(self) -> None:
        """Asserts the invariant."""
        sources = [move.source for move in self._inbound.values()]
        assert len(sources) == len(set(sources)), "an instance sends two requests"
        for target, move in self._inbound.items():
            m = self._fleet.members[target]
            if self._holds(move) and self._may_decode(m):
                need = self._book.need(move.entry.request, m.page_size)
                assert self._book.pages(target) + need <= m.pages, f"{target} has no room for what comes"
