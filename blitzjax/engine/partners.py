"""What do live partners say to this instance, and what becomes of prompts that go from one to the other?

Invariant: a prompt that OLD took over leaves as a finished or failed request once its residuals and the partner's layers
of KV are here; what a partner said before its StartLive came is answered when it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

from blitzjax.engine import live, messages as m
from blitzjax.engine.runner import Runner
from blitzjax.engine.sequence import Sequence
from blitzjax.transfer.handoff import HandOff
from blitzjax.commands import EndLive, StartLive
from blitzjax.events import Event, LiveDrained, RequestFailed, RequestHanded, RequestReturned
from blitzjax.types import InstanceId, LivePair, RequestId, Work

_NEAR_S = 0.2  # how long decode may pause for a partner's residuals

Message = (StartLive | EndLive | m.UnitsArrived | m.Partnered | m.Pulled | m.Borrowed | m.Lent | m.Taken | m.HandedOver
           | m.ActivationsTaken | m.KVTaken | m.PartnerLost)


class Host(Protocol):
    """The instance that has the partners. All of it but `post` is called by its engine thread."""

    name: InstanceId
    runner: Runner

    def post(self, message: object) -> None: ...

    def find(self, request_id: RequestId) -> Sequence | None: ...

    def sequences(self) -> Iterable[Sequence]:
        """All that are here."""

    def sequence(self, work: Work) -> Sequence:
        """A new one, that the host does not have yet."""

    def untouched(self) -> Iterable[Sequence]:
        """What waits here and was not begun."""

    def admit(self, sequence: Sequence) -> bool:
        """Gives a sequence from elsewhere a seat. False: there is none, or the parameters are not here."""

    def enqueue(self, sequence: Sequence) -> bool:
        """It waits for a seat, and then is run from the start. False: there will never be one."""

    def answer_whole(self, sequence: Sequence) -> None:
        """Its first token is out and the KV of its prompt is complete: it decodes from now on."""

    def forget(self, sequence: Sequence) -> None:
        """Its seat is free: it goes on elsewhere."""

    def leave(self, sequence: Sequence) -> None:
        """Frees everything that the sequence holds."""


class Partners:
    """Owned by the engine thread; at most one pair on each side. `connect` opens OLD's connection to a partner;
    `checkpoint` has the embedding where there is no partner to lend a prompt's rows of it.
    """

    def __init__(self, host: Host, handoff: HandOff, connect: Callable[[InstanceId], m.Partner],
                 emit: Callable[[Event], None], now: Callable[[], float], timeout_s: float, checkpoint: Path | None):
        self._host, self._handoff, self._connect, self._timeout_s = host, handoff, connect, timeout_s
        self._emit, self._now, self._checkpoint = emit, now, checkpoint
        self.new: live.NewSide | None = None
        self.old: live.OldSide | None = None
        self.ready: list[Sequence] = []  # handed over by a partner, residuals here, layers left to run
        self.awaited_until = 0.0  # residuals should be here by then; 0: none are on their way
        self._early: dict[InstanceId, list[m.Partnered | m.Pulled]] = {}  # of sessions that came before their StartLive
        self._left: list[live.NewSide] = []  # of earlier pairs, whose OLD is still to take what it was offered

    @property
    def prompt_is_near(self) -> bool:
        """A partner's prompt is ready to run, or will be in a moment: worth a pause, which a hung partner cannot stretch."""
        return bool(self.ready) or self._now() < self.awaited_until

    @property
    def busy(self) -> bool:
        """What one partner computed is on its way to the other."""
        offered = self.new is not None and self.new.offered
        return offered or any(sequence.kv_missing for sequence in self._host.sequences())

    def handle(self, message: Message) -> None:
        match message:
            case StartLive():
                self._start(message.pair)
            case EndLive():
                self._end(message.pair)
            case m.PartnerLost():
                self._lost(message.session)
            case m.HandedOver():
                if self.old is not None and self.old.partner is message.partner:
                    self._handed_over(self.old, message.answer)  # else the pair ended: the brain runs it again
            case m.ActivationsTaken():
                self._activations_taken(message)
            case m.KVTaken():
                self._kv_taken(message)
            case m.Borrowed():
                if self.old is not None and self.old.partner is message.partner:
                    self.old.lend(message.borrow)
            case m.Partnered() | m.Pulled():
                self._met(message)
            case m.Lent():
                if self.new is not None and self.new.old is message.old:
                    self.new.lent(message.loan)
            case m.UnitsArrived():
                if self.new is not None:
                    self.new.arrived(self._host.runner.store.usable)
            case m.Taken():
                for side in self._sides_of(message.old):
                    side.taken(message.seq)

    def begin_early(self, sequence: Sequence) -> None:
        """Its prompt runs behind the parameters that arrive, in the pair's queue or, without a pair, alone."""
        if self.new is None:
            self.new = live.alone(self._host.name, self._host.runner, self._handoff, self._checkpoint)
        self.new.add(sequence)

    def answer_pull(self) -> None:
        """Lets OLD have what it waits for, if there is something; the sequence leaves this instance."""
        new = self.new
        if new is not None and (sequence := new.answer()) is not None:
            self._host.forget(sequence)
            self._handed(sequence.work, new.pair.old)

    def left(self, sequence: Sequence) -> None:
        """The request is over here."""
        if self.new is not None:
            self.new.remove(sequence.id)
        if sequence in self.ready:
            self.ready.remove(sequence)

    def close(self) -> None:
        """Every request and pair is forgotten."""
        if self.old is not None:
            self.old.close()
        if self.new is not None:
            self.new.close()
            self._leave(self.new)
        self.old = self.new = None
        self.ready, self.awaited_until, self._early = [], 0.0, {}

    # ---- pairs

    def _start(self, pair: LivePair) -> None:
        host = self._host
        if pair.new == host.name:
            before, self.new = self.new, live.NewSide(pair, host.runner, self._handoff)
            self.new.arrived(host.runner.store.usable)
            if before is not None:
                self._leave(before)
                for sequence in before.sequences:
                    self.new.add(sequence)
            for message in self._early.pop(pair.old, ()):
                self._met(message)
            return
        if self.old is not None:
            self.old.close()
        self.old = live.OldSide(pair, host.runner, self._handoff, self._connect(pair.new), host.post, self._timeout_s)
        for sequence in list(host.untouched()):  # goes to the pair's queue, where NEW helps with it
            host.forget(sequence)
            self._emit(RequestReturned(self._now(), host.name, sequence.id, sequence.work.attempt))

    def _end(self, pair: LivePair) -> None:
        if self.old is not None and self.old.pair == pair:
            self.old.close()
            self.old = None
        if self.new is not None and self.new.pair == pair:
            self.new.close()
            self.new.answer()
            live.go_on_alone(self.new, self._host.runner, self._checkpoint)

    def _lost(self, session: m.Old | m.Partner) -> None:
        """Nothing more is pulled or handed over. Both sides may live on, so the brain must hear that the pair may end."""
        if self.old is not None and self.old.partner is session:
            self.old.waiting = False
            self._drained(self.old)
        self._early = {name: early for name, early in self._early.items() if early[0].old is not session}
        for side in self._sides_of(session):
            side.partner_left()
        self._left = [side for side in self._left if side.offered]

    def _leave(self, side: live.NewSide) -> None:
        if side.offered:
            self._left.append(side)

    def _sides_of(self, session: m.Old | m.Partner) -> list[live.NewSide]:
        return [side for side in (self.new, *self._left) if side is not None and side.old is session]

    def _drained(self, old: live.OldSide) -> None:
        """OLD asks no more."""
        if not old.drained:
            old.drained = True
            self._emit(LiveDrained(self._now(), self._host.name))

    # ---- NEW

    def _met(self, message: m.Partnered | m.Pulled) -> None:
        """OLD's session is here, or OLD asks for a prompt; either may come before StartLive, and late for another pair."""
        old, early = message.old, self._early.get(message.old.name, ())
        if isinstance(message, m.Partnered):
            if self.new is not None and self.new.pair.old == old.name and self.new.old is None:
                self.new.old = old
            else:
                self._early[old.name] = [message]
        elif self.new is not None and self.new.old is old:
            self.new.asked(message)
            self.answer_pull()
        elif early and early[0].old is old:
            early.append(message)

    # ---- OLD

    def _handed_over(self, old: live.OldSide, answer: m.HandOver) -> None:
        host, work = self._host, answer.work
        old.waiting = False
        if work is None:
            if answer.drained:
                self._drained(old)
            return
        here = host.find(work.request.id)
        if here is not None and here.work.attempt >= work.attempt:
            return  # NEW frees what it offered with the session
        if here is not None:  # void, its Abort is still on the way
            host.leave(here)
        self._handed(work, host.name)
        sequence = host.sequence(work)
        if not host.admit(sequence):  # once there is room it runs whole; what NEW ran of it stays there
            if not host.enqueue(sequence):
                self._fail(work, f"{host.name} can never hold a request handed over by {old.pair.new}")
            return
        sequence.layers_helped = answer.next_layer
        sequence.leave_kv = partial(old.leave_rest, answer) if answer.next_layer else None
        sequence.prefill = old.take(answer)
        sequence.awaited = sequence.prefill is None
        self.awaited_until = self._now() + _NEAR_S if sequence.awaited else 0.0
        if not sequence.awaited:
            self.ready.append(sequence)

    def _activations_taken(self, message: m.ActivationsTaken) -> None:
        sequence = self._current(message.work.request.id, message.work.attempt)
        if sequence is None:
            return
        if message.error:
            self._host.leave(sequence)
            self._fail(message.work, message.error)
            return
        sequence.awaited, self.awaited_until = False, 0.0
        sequence.prefill = live.resume(self._host.runner, message.work, message.next_layer, message.arrays)
        self.ready.append(sequence)
        if not sequence.kv_missing:
            self._adopt_kv(sequence)

    def _kv_taken(self, message: m.KVTaken) -> None:
        sequence = self._current(message.request_id, message.attempt)
        if sequence is None:
            if message.rest is not None:
                message.rest.settled(False)
            return
        if message.error:
            self._host.leave(sequence)
            self._fail(sequence.work, message.error)
            return
        sequence.partner_kv, sequence.partner_rest, sequence.leave_kv = message.arrays, message.rest, None
        if sequence.prefill is not None:
            self._adopt_kv(sequence)

    def _adopt_kv(self, sequence: Sequence) -> None:
        """The partner's layers of KV join the prompt's own; a prompt that waited for them joins the batch."""
        flat = sequence.partner_kv
        sequence.begun.kv[: len(flat) // 2] = list(zip(flat[::2], flat[1::2], strict=True))
        sequence.partner_kv = []
        if sequence.answered > len(sequence.work.generated):
            self._host.answer_whole(sequence)

    def _current(self, request_id: RequestId, attempt: int) -> Sequence | None:
        sequence = self._host.find(request_id)
        return sequence if sequence is not None and sequence.work.attempt == attempt else None

    def _handed(self, work: Work, target: InstanceId) -> None:
        self._emit(RequestHanded(self._now(), self._host.name, work.request.id, work.attempt, target))

    def _fail(self, work: Work, why: str) -> None:
        self._emit(RequestFailed(self._now(), self._host.name, work.request.id, work.attempt, why))
