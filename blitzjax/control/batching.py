"""What does one instance compute in its next step? Continuous batching with prompts cut into fixed chunks.

        add ──► WAITING ──► PREFILLING ──► DECODING ──► finish (from any state)
                 ▲  ▲ preempt │               │ ▲
         requeue │  └─────────┴───────────────┘ │
        hold ──► HELD ◄─────────────────────────┘ prefilled, pause: its prompt is run by the live queue, or its KV moves

Invariant: PREFILLING, DECODING and HELD requests are at most `slots` and own pages for what they were admitted with and
what they have; the rest own none. When pages run out the last in rank gives up its own, so the first always gets on.
Chunks of a prompt are [h, h + C), [h + C, h + 2C), ... behind its h tokens of prefix-cache hit, whatever else runs: load
never changes the numerics.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from blitzjax.control.blocks import PageLedger, admitted_tokens
from blitzjax.control.prefixes import PageKey
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
    rank: tuple[float, int]  # (Request.rank_s, arrival here): lower is earlier; kept for as long as it is here
    state: State
    keys: Sequence[PageKey] = ()  # of the prompt's full pages; none: nothing is hit
    done: int = 0  # prompt tokens [0, done) were run, or found in the prefix cache


class Batcher:
    """Owned by one engine thread. `max_batched_tokens` is the chunk size C, in tokens; a hit is a multiple of
    `hit_tokens`. A request is admitted with pages for its prompt and `answer_share` of its answer (1: never preempted).
    """

    def __init__(self, slots: int, max_batched_tokens: int, ledger: PageLedger, answer_share: float = 1.0,
                 hit_tokens: int = 1) -> None:
        assert slots >= 1 and max_batched_tokens >= 1 and 0 <= answer_share <= 1 and hit_tokens >= 1
        self._slots = slots
        self._chunk_tokens = max_batched_tokens
        self._ledger = ledger
        self._answer_share = answer_share
        self._hit_tokens = hit_tokens
        self._seats: dict[RequestId, _Seat] = {}
        self._in: dict[State, dict[RequestId, _Seat]] = {state: {} for state in State}  # in order of entering the state
        self._queue: list[tuple[tuple[float, int], RequestId]] = []  # WAITING, sorted by rank
        self._arrivals = 0

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

    def could_fit(self, request: Request) -> bool:
        """Whether it can ever be admitted."""
        return self._ledger.could_fit(request.total_tokens)

    def state(self, request_id: RequestId) -> State | None:
        seat = self._seats.get(request_id)
        return None if seat is None else seat.state

    @property
    def _free_slots(self) -> int:
        return self._slots - (len(self._seats) - self.waiting)

    # ---- coming

    def add(self, request: Request, prompt_tokens: int | None = None, keys: Sequence[PageKey] = ()) -> None:
        """Queues a request by its rank. `prompt_tokens` counts replayed tokens too (default: the prompt); with `keys`,
        those of its full pages, its first tokens may be found in the prefix cache.

        The request must fit into the empty ledger, else it would block everything behind it for ever.
        """
        assert self.could_fit(request), f"{request.id} can never fit"
        self._wait(self._arrived(request, prompt_tokens, State.WAITING, keys))

    def hold(self, request: Request, prompt_tokens: int | None = None) -> bool:
        """Reserves a slot and pages for a request whose prompt is run elsewhere. False when they are not free."""
        seat = self._arrived(request, prompt_tokens, State.HELD)
        if self._free_slots < 1 or not self._ledger.reserve(request.id, self._admitted_tokens(seat)):
            return False
        self._enter(seat)
        return True

    def requeue(self, request_id: RequestId) -> None:
        """HELD → WAITING, at its rank: its prompt will be run here from the start."""
        seat = self._expect(request_id, State.HELD)
        self._ledger.release(request_id)
        self._wait(seat)

    # ---- memory

    def held_tokens(self, request_id: RequestId) -> int:
        """How many tokens a request that does not wait has pages for."""
        return self._ledger.held_tokens(request_id)

    def victim(self, tokens: Mapping[RequestId, int]) -> RequestId | None:
        """Gives the DECODING ones of these requests pages for so many tokens, earlier ranks first. → None when all have
        some; else the last in rank, PREFILLING or DECODING, which must be preempted before this is asked again.
        """
        decoding = self._in[State.DECODING]
        short = [decoding[i] for i, count in tokens.items() if i in decoding and self.held_tokens(i) < count]
        for seat in sorted(short, key=lambda seat: seat.rank):
            if not self._ledger.grow(seat.request.id, tokens[seat.request.id]):
                running = [*decoding.values(), *self._in[State.PREFILLING].values()]
                return max(running, key=lambda seat: seat.rank).request.id
        return None

    def preempt(self, request_id: RequestId, prompt_tokens: int, keys: Sequence[PageKey] = ()) -> None:
        """PREFILLING or DECODING → WAITING, at its rank. Its pages are free; it will go on once its prompt and what it
        answered, together `prompt_tokens` tokens, were run again.
        """
        seat = self._expect(request_id, State.PREFILLING, State.DECODING)
        self._ledger.release(request_id)
        seat.prompt_tokens, seat.keys, seat.done = prompt_tokens, keys, 0
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
        if not self._queue and not self._in[State.PREFILLING]:
            return ()
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
        assert chunk.start == seat.done < chunk.stop <= seat.prompt_tokens, f"{chunk} is not the next chunk"
        seat.done = chunk.stop

    def prefilled(self, request_id: RequestId) -> None:
        """The first token is out: PREFILLING or HELD → DECODING."""
        seat = self._expect(request_id, State.PREFILLING, State.HELD)
        assert seat.state is State.HELD or seat.done == seat.prompt_tokens, f"{request_id} has prompt left"
        seat.done = seat.prompt_tokens
        self._enter(seat, State.DECODING)

    def remember(self, request_id: RequestId, keys: Sequence[PageKey]) -> tuple[int, ...]:
        """The request's first pages hold what `keys` stand for: later prompts may hit them. → which of `keys`, by index,
        are new; their content must be kept until their keys are `forgotten`, which is to be read first.
        """
        return self._ledger.remember(request_id, keys)

    @property
    def forgotten(self) -> list[PageKey]:
        """Keys that cannot be hit any more; the reader empties it."""
        return self._ledger.forgotten

    def known(self) -> set[PageKey]:
        """Keys that can be hit."""
        return self._ledger.known()

    def pause(self, request_id: RequestId) -> None:
        """DECODING → HELD: it leaves the batch and keeps its slot and pages; `prefilled` lets it go on."""
        self._enter(self._expect(request_id, State.DECODING), State.HELD)

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
        for seat in self._seats.values():
            waits = seat.state is State.WAITING
            assert waits or self.held_tokens(seat.request.id) >= seat.prompt_tokens, f"{seat.request.id} lacks pages"
            assert not (waits and seat.done), f"{seat.request.id} has run tokens and no pages"
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

    def _arrived(self, request: Request, prompt_tokens: int | None, state: State,
                 keys: Sequence[PageKey] = ()) -> _Seat:
        tokens = request.prompt_tokens if prompt_tokens is None else prompt_tokens
        assert request.id not in self._seats, f"{request.id} is already here"
        assert 1 <= tokens <= request.total_tokens, (request, tokens)
        self._arrivals += 1
        return _Seat(request, tokens, (request.rank_s, self._arrivals), state, keys)

    def _wait(self, seat: _Seat) -> None:
        self._enter(seat, State.WAITING if seat.request.id in self._seats else None)
        bisect.insort(self._queue, (seat.rank, seat.request.id))

    def _unfinished(self) -> list[_Seat]:
        """Prompts that were begun; no other starts before all of them are at their last chunk."""
        return [seat for seat in self._in[State.PREFILLING].values() if seat.done < seat.prompt_tokens]

    def _begin(self, room: int) -> list[Chunk]:
        """The first chunk of the head of WAITING, if it has at most `room` tokens and the prompt can be admitted."""
        if not self._queue or self._free_slots < 1:
            return []
        seat = self._seats[self._queue[0][1]]
        hit = self._hit(seat)
        done = len(hit) * self._ledger.page_size
        if min(seat.prompt_tokens - done, self._chunk_tokens) > room:
            return []
        if not self._ledger.reserve(seat.request.id, self._admitted_tokens(seat), hit):
            return []
        del self._queue[0]
        seat.done = done
        self._enter(seat, State.PREFILLING)
        return [self._chunk(seat)]

    def _ends_prompt(self, chunk: Chunk) -> bool:
        return chunk.stop == self._seats[chunk.request_id].prompt_tokens

    def _hit(self, seat: _Seat) -> tuple[int, ...]:
        """Pages of its prompt that the prefix cache has, but the last token's: something must be run for an answer."""
        if not seat.keys:
            return ()
        found = self._ledger.find(seat.keys)
        tokens = min(len(found) * self._ledger.page_size, seat.prompt_tokens - 1)
        unit = lcm(self._ledger.page_size, self._hit_tokens)
        return found[: tokens // unit * unit // self._ledger.page_size]

    def _admitted_tokens(self, seat: _Seat) -> int:
        """With at least one for the next token, so that an answer that was preempted gets on."""
        wanted = max(seat.prompt_tokens + 1, admitted_tokens(seat.request, self._answer_share))
        return min(wanted, seat.request.total_tokens)

    def _chunk(self, seat: _Seat) -> Chunk:
        return Chunk(seat.request.id, seat.done, min(seat.done + self._chunk_tokens, seat.prompt_tokens))
