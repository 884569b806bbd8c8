"""Whose KV goes where?

Split roles: requests whose prompt is done move from where it ran to where they are decoded, first come, first served. When
no target has room they stay, keep their pages and thereby hold back new prompts. Mixed roles: where that is configured,
answers leave instances that drain for those that serve.

Invariant: an instance receives the KV of at most one request at a time, and sends that of at most one; a target has room
for everything that is on its way to it.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import pairwise

from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.requests import Entry, RequestBook
from blitzjax.commands import Abort, Command, Migrate
from blitzjax.types import InstanceId, Phase, Role


@dataclass(frozen=True, slots=True)
class _Move:
    turn: int  # lower is earlier
    entry: Entry
    attempt: int
    source: InstanceId
    begun: bool = False  # its KV was sent once, to an instance that may have taken it before it died


class Migrations:
    """Requests that wait for a decode instance, and those on their way. Owned by the Cluster.

    A look costs nothing unless a request left an instance, or a member changed, since the last one. `empties`: mixed
    instances that drain send their answers to others.
    """

    def __init__(self, fleet: Fleet, book: RequestBook, empties: bool) -> None:
        self._fleet, self._book, self._empties = fleet, book, empties
        self._waiting: dict[InstanceId, deque[_Move]] = {}  # by source, in order of their turns; some may be void
        self._ready: list[tuple[int, InstanceId]] = []  # heap: first turns of sources that send nothing
        self._inbound: dict[InstanceId, _Move] = {}  # by target
        self._sending: dict[InstanceId, InstanceId] = {}  # source → target
        self._last_turn = self._first_turn = 0  # given out so far
        self._version = -1  # of the fleet, as of the last look
        self._stuck = False  # the first that waits found no target
        self._targets: list[tuple[int, InstanceId]] = []  # heap: who may receive, by at most the pages in use there
        self.received_bytes: Counter[InstanceId] = Counter()  # KV, by target

    def wait(self, entry: Entry) -> None:
        """The prompt is done where the entry is."""
        assert entry.owner is not None
        self._last_turn += 1
        self._waiting.setdefault(entry.owner, deque()).append(
            _Move(self._last_turn, entry, entry.attempt, entry.owner))
        self._offer(entry.owner)

    def inbound(self, target: InstanceId) -> bool:
        return target in self._inbound

    def reserved(self, target: InstanceId) -> int:
        """KV pages that the request on its way to `target` will need there; 0: there is none."""
        move = self._inbound.get(target)
        return 0 if move is None else self._book.need(move.entry.request, self._fleet.members[target].page_size)

    def start(self) -> list[Command]:
        """Begins every move that can begin now."""
        emptying = self._empties and self._fleet.count(Phase.DRAINING) > 0
        if not self._waiting and not self._inbound and not emptying:
            return []
        commands = self._notice()
        while not self._stuck and (move := self._first()) is not None:
            target = self._choose(move.entry)
            if target is None:
                self._stuck = True  # nothing overtakes it
                break
            self._take(move.source)
            commands.append(self._begin(move, target))
        return commands + (self._empty() if emptying else [])

    def lost(self, target: InstanceId) -> None:
        """`target` died: what was on its way to it waits again, before all others."""
        if target in self._inbound:
            self._again([self._arrived(target)])

    # ----------------------------------------------------------------------------------------------------------------

    def _notice(self) -> list[Command]:
        """Moves that arrived or became void; those whose target is gone wait again, before all others."""
        commands: list[Command] = []
        left = self._book.left
        if left:
            for source in left & self._sending.keys():
                if not self._holds(self._inbound[self._sending[source]]):
                    self._arrived(self._sending[source])
            for target in left:
                self._welcome(target)
            left.clear()
            self._stuck = False
        if self._version != self._fleet.version or len(self._targets) > 4 * self._fleet.size + 64:
            self._version, self._stuck = self._fleet.version, False
            self._targets.clear()
            for m in self._fleet.serving(Role.DECODE):
                self._welcome(m.id)
            self._again([self._arrived(i) for i in list(self._inbound) if not self._may_decode(self._fleet.members[i])])
            for source in list(self._waiting):
                if self._fleet.members[source].role is not Role.PREFILL:
                    commands += self._kept(self._waiting.pop(source))
                elif not self._fleet.counted(Role.DECODE):
                    commands += self._kept(self._waiting[source])
        return commands

    def _begin(self, move: _Move, target: Member) -> Command:
        self._inbound[target.id], self._sending[move.source] = move, target.id
        if self._empties:  # it runs prompts, too: room is reserved there
            self._book.changed.add(target.id)
        return Migrate(move.source, move.entry.request.id, move.attempt, target.id)

    def _empty(self) -> list[Command]:
        """An answer of each mixed instance that drains and sends nothing, to the one with the fewest pages in use."""
        commands: list[Command] = []
        for source in self._fleet.in_phase(Phase.DRAINING):
            if source.role is not Role.MIXED or source.releasing or source.id in self._sending:
                continue
            entry = next((e for e in self._book.owned(source.id) if e.answered and not e.cancelled), None)
            if entry is None:
                continue
            able = [m for m in self._fleet.serving(Role.MIXED) if m.id not in self._inbound and self._has_room(m, entry)]
            if able:
                target = min(able, key=lambda m: (self._book.pages(m.id), m.id))
                commands.append(self._begin(_Move(0, entry, entry.attempt, source.id), target))
        return commands

    def _has_room(self, m: Member, entry: Entry) -> bool:
        return (self._book.owns(m.id) < m.slots
                and self._book.pages(m.id) + self._book.need(entry.request, m.page_size) <= m.pages)

    def _arrived(self, target: InstanceId) -> _Move:
        """Nothing is on its way to `target` any more."""
        if self._empties:
            self._book.changed.add(target)
        move = self._inbound.pop(target)
        del self._sending[move.source]
        self._offer(move.source)
        self._welcome(target)
        return move

    def _again(self, moves: list[_Move]) -> None:
        for move in reversed(moves):
            self._first_turn -= 1
            again = replace(move, turn=self._first_turn, begun=True)
            self._waiting.setdefault(move.source, deque()).appendleft(again)
            self._offer(move.source)
            self._stuck = False

    def _kept(self, moves: deque[_Move]) -> list[Command]:
        """Their source decodes now, or nobody else does: it keeps what it has. What was sent once may be gone: it runs
        again.
        """
        commands: list[Command] = []
        for move in moves:
            if move.begun and self._holds(move):
                commands.append(Abort(move.source, move.entry.request.id))
                commands += self._book.lose(move.entry, "the instance that its KV went to died")
        return commands

    def _offer(self, source: InstanceId) -> None:
        """The first of `source` may go, unless it sends already."""
        queue = self._waiting.get(source)
        if queue and source not in self._sending:
            heapq.heappush(self._ready, (queue[0].turn, source))

    def _take(self, source: InstanceId) -> None:
        """The first of `source` waits no longer."""
        queue = self._waiting[source]
        queue.popleft()
        if not queue:
            del self._waiting[source]

    def _first(self) -> _Move | None:
        """Who waits for longest, of those whose source sends nothing."""
        while self._ready:
            turn, source = self._ready[0]
            queue = self._waiting.get(source)
            if queue is None or queue[0].turn != turn or source in self._sending:
                heapq.heappop(self._ready)
            elif self._holds(queue[0]):
                return queue[0]
            else:
                self._take(source)
                self._offer(source)
        return None

    def _holds(self, move: _Move) -> bool:
        """The request is still where it was."""
        return move.entry.owner == move.source and move.entry.attempt == move.attempt and move.entry.answered

    def _may_decode(self, m: Member) -> bool:
        return (m.role is not Role.PREFILL and m.phase in (Phase.SERVING, Phase.DRAINING) and not m.releasing
                and self._fleet.alive(m.id) is not None)

    def _welcome(self, target: InstanceId) -> None:
        """Fewer pages of a decode instance are in use than before, or nothing is on its way to it any more."""
        m = self._fleet.members[target]
        if m.role is Role.DECODE and m.phase is Phase.SERVING and target not in self._inbound:
            heapq.heappush(self._targets, (self._book.pages(target), target))

    def _choose(self, entry: Entry) -> Member | None:
        """The decode instance with the fewest pages in use, among those that have room and receive nothing else."""
        chosen: Member | None = None
        full: list[tuple[int, InstanceId]] = []
        while self._targets and chosen is None:
            pages, target = heapq.heappop(self._targets)
            m, used = self._fleet.members[target], self._book.pages(target)
            if used > pages:
                self._welcome(target)
            elif used < pages or target in self._inbound:
                continue  # there is another entry, or will be
            elif self._has_room(m, entry):
                chosen = m
            else:
                full.append((pages, target))
        for place in full:
            heapq.heappush(self._targets, place)
        return chosen

    def check(self) -> None:
        """Asserts the invariant."""
        assert self._sending == {move.source: target for target, move in self._inbound.items()}
        assert len(self._sending) == len(self._inbound), "an instance sends two requests"
        assert all(self._waiting.values())
        assert all(a.turn < b.turn for queue in self._waiting.values() for a, b in pairwise(queue))
        firsts = {(queue[0].turn, i) for i, queue in self._waiting.items() if i not in self._sending}
        assert firsts <= set(self._ready), "one that could go is forgotten"
        if self._version == self._fleet.version and not self._book.left:
            least = {target: pages for pages, target in sorted(self._targets, reverse=True)}
            free = [m.id for m in self._fleet.serving(Role.DECODE) if m.id not in self._inbound]
            assert all(least[i] <= self._book.pages(i) for i in free), "one that could receive is forgotten"
        for target, move in self._inbound.items():
            m = self._fleet.members[target]
            if self._holds(move) and self._may_decode(m) and m.role is Role.DECODE:  # others get prompts of a live partner, too
                need = self._book.need(move.entry.request, m.page_size)
                assert self._book.pages(target) + need <= m.pages, f"{target} has no room for what comes"
