"""What does one instance compute in its next step? Continuous batching with prompts cut into fixed chunks.

        add ──► WAITING ──► PREFILLING ──► DECODING ──► finish (from any state)
                   ▲ requeue                  ▲
        hold ──► HELD ────────────────────────┘ prefilled: its prompt is run by the live queue

Invariant: PREFILLING, DECODING and HELD requests are at most `slots` and own all pages they can ever need; the rest
own none. Chunks of a prompt are [0, C), [C, 2C), ... whatever else runs, so load never changes the numerics.
"""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass

from blitzjax.control.blocks import PageLedger
from blitzjax.types import Request, RequestId


class State(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    HELD = "held"

    __hash__ = object.__hash__  # a key of what every request touches; Enum's own hashes the name each time


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, stop) of a request."""

    request_id: RequestId
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Step:
    """One token for each of `decode`, and at most one prompt chunk."""

    decode: tuple[RequestId, ...]
    prefill: tuple[Chunk, ...]


@dataclass(slots=True)
class _Seat:
    request: Request
    prompt_tokens: int  # with the tokens that an earlier attempt emitted
    rank: tuple[int, int]  # (-priority, arrival; negative when requeued): lower is earlier
    state: State
    done: int = 0  # prompt tokens [0, done) were run


class Batcher:
    """Owned by one engine thread. `max_batched_tokens` is the chunk size C, in tokens."""

    def __init__(self, slots: int, max_batched_tokens: int, ledger: PageLedger) -> None:
        assert slots >= 1 and max_batched_tokens >= 1
        self._slots = slots
        self._chunk_tokens = max_batched_tokens
        self._ledger = ledger
        self._seats: dict[RequestId, _Seat] = {}
        self._in: dict[State, dict[RequestId, _Seat]] = {state: {} for state in State}  # in order of entering the state
        self._queue: list[tuple[tuple[int, int], RequestId]] = []  # WAITING, sorted by rank
        self._arrivals = 0
        self._requeued = 0

    # ---- views

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in PREFILLING or DECODING."""
        return len(self._seats) - self.waiting - self.held

    @property
    def held(self) -> int:
        return len(self._in[State.HELD])

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that this batcher has still to schedule."""
        return sum(seat.prompt_tokens - seat.done for state in (State.WAITING, State.PREFILLING)
                   for seat in self._in[state].values())

    @property
    def room(self) -> bool:
        """A slot and at least one page are free."""
        return self._free_slots > 0 and self._ledger.free > 0

    def state(self, request_id: RequestId) -> State | None:
        seat = self._seats.get(request_id)
        return None if seat is None else seat.state

    @property
    def _free_slots(self) -> int:
        return self._slots - (len(self._seats) - self.waiting)

    # ---- coming

    def add(self, request: Request, prompt_tokens: int | None = None) -> None:
        """Queues a request, FCFS within its priority. `prompt_tokens` counts replayed tokens too (default: the prompt).

        The request must fit into the empty ledger, else it would block everything behind it for ever.
        """
        tokens = request.prompt_tokens if prompt_tokens is None else prompt_tokens
        assert request.id not in self._seats, f"{request.id} is already here"
        assert 1 <= tokens <= request.total_tokens, (request, tokens)
        assert self._ledger.could_fit(request.total_tokens), f"{request.id} can never fit"
        self._arrivals += 1
        self._wait(_Seat(request, tokens, (-request.priority, self._arrivals), State.WAITING))

    def hold(self, request: Request) -> bool:
        """Reserves a slot and pages for a request whose prompt is run elsewhere. False when they are not free."""
        assert request.id not in self._seats, f"{request.id} is already here"
        if self._free_slots < 1 or not self._ledger.reserve(request.id, request.total_tokens):
            return False
        self._arrivals += 1
        rank = (-request.priority, self._arrivals)
        self._enter(_Seat(request, request.prompt_tokens, rank, State.HELD))
        return True

    def requeue(self, request_id: RequestId) -> None:
        """HELD → head of WAITING within its priority: its prompt will be run here from the start."""
        seat = self._expect(request_id, State.HELD)
        self._ledger.release(request_id)
        self._requeued += 1
        seat.rank = (seat.rank[0], -self._requeued)
        self._wait(seat)

    # ---- steps

    def next_step(self) -> Step | None:
        """All decoding requests, and `next_chunks`; None when there is neither."""
        decode, prefill = tuple(self._in[State.DECODING]), self.next_chunks()
        return Step(decode, prefill) if decode or prefill else None

    def next_chunks(self) -> tuple[Chunk, ...]:
        """Prompt chunks of together at most C tokens, oldest prompt first. Admits from WAITING. Until `chunk_done`, the
        same chunks are given again.

        A prompt joins the step after another one only if its first chunk fits beside the last chunks of those before it.
        """
        prefill = [self._chunk(seat) for seat in self._unfinished()] or self._begin(self._chunk_tokens)
        room = self._chunk_tokens - sum(chunk.stop - chunk.start for chunk in prefill)
        while prefill and self._ends_prompt(prefill[-1]) and (more := self._begin(room)):
            prefill += more
            room -= more[0].stop - more[0].start
        return tuple(prefill)

    def chunk_done(self, chunk: Chunk) -> None:
        """The chunk was run. One of a request that left meanwhile is ignored."""
        if chunk.request_id not in self._seats:
            return
        seat = self._expect(chunk.request_id, State.PREFILLING)
        assert chunk == self._chunk(seat), f"{chunk} is not the next chunk"
        seat.done = chunk.stop

    def prefilled(self, request_id: RequestId) -> None:
        """The first token is out: PREFILLING or HELD → DECODING."""
        seat = self._expect(request_id, State.PREFILLING, State.HELD)
        assert seat.state is State.HELD or seat.done == seat.prompt_tokens, f"{request_id} has prompt left"
        seat.done = seat.prompt_tokens
        self._enter(seat, State.DECODING)

    # ---- leaving

    def finish(self, request_id: RequestId) -> None:
        """Frees slot and pages, in any state."""
        known = self.abort(request_id)
        assert known, f"{request_id} is not here"

    def abort(self, request_id: RequestId) -> bool:
        """`finish` for a request that may not be here; whether it was."""
        seat = self._seats.pop(request_id, None)
        if seat is None:
            return False
        del self._in[seat.state][request_id]
        if seat.state is State.WAITING:
            self._queue.remove((seat.rank, request_id))
        self._ledger.release(request_id)
        return True

    # ---- checks

    def check(self) -> None:
        """Asserts the invariants of the module docstring and those of the ledger."""
        self._ledger.check()
        waiting = {i for i, seat in self._seats.items() if seat.state is State.WAITING}
        assert {i for _, i in self._queue} == waiting and len(self._queue) == len(waiting)
        assert self._queue == sorted(self._queue)
        assert self._ledger.holders() == self._seats.keys() - waiting, "pages without a seat or a seat without pages"
        assert all(seat.state is state for state, seats in self._in.items() for seat in seats.values())
        assert sorted(i for seats in self._in.values() for i in seats) == sorted(self._seats)
        assert self._free_slots >= 0, "more sequences than slots"
        begun = sum(chunk.stop - chunk.start for chunk in map(self._chunk, self._unfinished()))
        assert begun <= self._chunk_tokens, "more prompt tokens under way than a step may have"
        assert all(0 <= seat.done <= seat.prompt_tokens for seat in self._seats.values())

    # ----------------------------------------------------------------------------------------------------------------

    def _expect(self, request_id: RequestId, *states: State) -> _Seat:
        seat = self._seats.get(request_id)
        assert seat is not None and seat.state in states, f"{request_id} is {seat and seat.state}, not {states}"
        return seat

    def _enter(self, seat: _Seat, state: State | None = None) -> None:
        """The seat is new, or moves on to `state`."""
        if state is not None:
            del self._in[seat.state][seat.request.id]
            seat.state = state
        self._seats[seat.request.id] = self._in[seat.state][seat.request.id] = seat

    def _wait(self, seat: _Seat) -> None:
        self._enter(seat, State.WAITING if seat.request.id in self._seats else None)
        bisect.insort(self._queue, (seat.rank, seat.request.id))

    def _unfinished(self) -> list[_Seat]:
        """Prompts that were begun; no other starts before all of them are at their last chunk."""
        return [seat for seat in self._in[State.PREFILLING].values() if seat.done < seat.prompt_tokens]

    def _begin(self, room: int) -> list[Chunk]:
        """The first chunk of the head of WAITING, if it has at most `room` tokens and the prompt can be admitted."""
        if not self._queue or min(self._seats[self._queue[0][1]].prompt_tokens, self._chunk_tokens) > room:
            return []
        seat = self._admit()
        return [] if seat is None else [self._chunk(seat)]

    def _ends_prompt(self, chunk: Chunk) -> bool:
        return chunk.stop == self._seats[chunk.request_id].prompt_tokens

    def _admit(self) -> _Seat | None:
        """Moves the head of WAITING to PREFILLING when a slot and its pages are free; nothing overtakes it."""
        if not self._queue or self._free_slots < 1:
            return None
        _, request_id = self._queue[0]
        seat = self._seats[request_id]
        if not self._ledger.reserve(request_id, seat.request.total_tokens):
            return None
        del self._queue[0]
        self._enter(seat, State.PREFILLING)
        return seat

    def _chunk(self, seat: _Seat) -> Chunk:
        return Chunk(seat.request.id, seat.done, min(seat.done + self._chunk_tokens, seat.prompt_tokens))
