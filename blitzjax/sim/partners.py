"""What do the sides of a live pair say to each other in virtual time, and what becomes of the prompts that they share?

Mirrors engine/partners.py and engine/live.py. Invariant: a prompt is in NEW's queue or with OLD, never with both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blitzjax.control.batching import State
from blitzjax.control.zigzag import Handed
from blitzjax.events import Event, LiveDrained, RequestHanded, RequestReturned
from blitzjax.sim.clock import Clock
from blitzjax.sim.parts import NewSide, OldSide, Sequence
from blitzjax.types import InstanceId, LivePair, ModelSpec, RequestId

if TYPE_CHECKING:
    from blitzjax.sim.instance import SimInstance


class Partners:
    """Owned by `host`, whose batcher and sequences they share. `send_rows` and `embed_s` are as in SimInstance; `find`
    finds the partners of another instance.
    """

    def __init__(self, host: SimInstance, spec: ModelSpec, clock: Clock, emit: Callable[[Event], None],
                 find: Callable[[InstanceId], Partners], send_rows: Callable[[InstanceId, InstanceId, int], float],
                 rpc_s: float, embed_s: float) -> None:
        self._host, self._spec, self._clock, self._emit = host, spec, clock, emit
        self._find, self._send_rows, self._rpc_s, self._embed_s = find, send_rows, rpc_s, embed_s
        self.close()

    def close(self) -> None:
        """Every pair is forgotten."""
        self.new: NewSide | None = None
        self._old: OldSide | None = None
        self.ready: list[Sequence] = []  # handed over, residuals here

    def start(self, pair: LivePair) -> None:
        if pair.new == self._host.name:
            self.new = NewSide(pair, self._spec.layers)
            self._note_layers(self.new)
        else:
            self._old = OldSide(pair, self._find(pair.new))
            self._return_untouched()
            self._host.wake()

    def end(self, pair: LivePair) -> None:
        if self._old is not None and self._old.pair == pair:
            self._old = None
        if self.new is not None and self.new.pair == pair:
            self.new.close()
            self.answer()
            self._host.wake()

    def left(self, sequence: Sequence) -> None:
        """The request is over here."""
        if self.new is not None:
            self.new.queue.remove(sequence.request.id)
        self.ready = [s for s in self.ready if s is not sequence]

    # ---- NEW

    def begin_early(self, sequence: Sequence) -> None:
        """Its prompt runs behind the units that arrive, in the pair's queue or, without a pair, alone. Until the
        embedding is here OLD lends the prompt's embedded rows; who is alone reads it from disk.
        """
        if self.new is None:
            self.new = NewSide(LivePair("", self._host.name, "zigzag"), self._spec.layers)
            self.new.close()
            self.new.embedded_at = self._clock.now + self._embed_s
            self._note_layers(self.new)
        new, request = self.new, sequence.request
        has_embedding = self._host.units > self._spec.embed_unit
        new.queue.add(request.id, has_embedding, (request.rank_s,))
        if new.embedded_at is not None and not has_embedding:
            self._clock.at(new.embedded_at, self._lent, new, request.id)
        elif not has_embedding:
            rows_s = self._send_rows(new.pair.old, self._host.name, request.prompt_tokens)
            self._clock.after(2 * self._rpc_s + rows_s, self._lent, new, request.id)
        self.answer()

    def _lent(self, new: NewSide, request_id: RequestId) -> None:
        new.queue.ready(request_id)
        self._host.wake()

    def arrived(self) -> None:
        """More units are here."""
        if self.new is not None:
            self._note_layers(self.new)
            self.answer()

    def _note_layers(self, new: NewSide) -> None:
        """The last layer counts once the head is here too, as in engine/live.py."""
        spec, units = self._spec, self._host.units
        if units > spec.embed_unit:
            for request_id in new.queue.items:
                new.queue.ready(request_id)
        new.queue.loaded(spec.layers if self._host.complete else min(spec.layers_loaded(units), spec.layers - 1))

    def pulled(self, old: Partners) -> None:
        if self.new is None:  # the pair is over, or its StartLive is still on the way
            self._clock.after(self._rpc_s, old.handed, self._host.name, None)
            return
        self.new.puller = old
        self.answer()

    def answer(self) -> None:
        """Lets OLD have what it waits for, if there is something; the sequence leaves this instance."""
        new, name = self.new, self._host.name
        if new is None or new.puller is None:
            return
        given = new.queue.pull() if new.open else None
        old = new.puller
        if isinstance(given, Handed):
            sequence = self._host.sequences.pop(given.item)
            self._host.batcher.finish(given.item)
            new.puller = None
            self._emit(RequestHanded(self._clock.now, name, given.item, sequence.attempt, old.name))
            sequence.next_layer = given.next_layer
            rows_s = 0.0
            if given.next_layer:
                rows_s = self._send_rows(name, old.name, sequence.request.prompt_tokens)
                self._host.send_layers(sequence, old.name)
            self._clock.after(self._rpc_s + rows_s, old.handed, name, sequence)
        elif not new.open or new.queue.drained:
            new.puller = None
            self._clock.after(self._rpc_s, old.handed, name, None)

    # ---- OLD

    @property
    def name(self) -> InstanceId:
        return self._host.name

    def _return_untouched(self) -> None:
        """What this side has not begun goes to the pair's queue, where NEW helps with it."""
        for sequence in list(self._host.sequences.values()):
            if self._host.batcher.state(sequence.request.id) is State.WAITING:
                self._host.forget(sequence)
                self._emit(RequestReturned(self._clock.now, self.name, sequence.request.id, sequence.attempt))

    def maybe_pull(self) -> None:
        """OLD asks for its next prompt when it is idle, or about to be."""
        old, batcher = self._old, self._host.batcher
        if old is None or old.waiting or old.drained or self.ready or batcher.waiting or not batcher.room:
            return
        old.waiting = True
        self._clock.after(self._rpc_s, old.partner.pulled, self)

    def handed(self, partner: InstanceId, sequence: Sequence | None) -> None:
        """The answer to a pull: a prompt and its residuals, or None when there is nothing any more."""
        old = self._old
        if old is not None and old.pair.new == partner:
            old.waiting = False
            if sequence is None:
                if not old.drained:
                    old.drained = True
                    self._emit(LiveDrained(self._clock.now, self.name))
                return
        if sequence is None:
            return
        request = sequence.request
        self._emit(RequestHanded(self._clock.now, self.name, request.id, sequence.attempt, self.name))
        self._host.sequences[request.id] = sequence
        if self._host.batcher.hold(request):
            self.ready.append(sequence)
        else:
            self._host.batcher.add(request)  # once there is room it runs whole
        self._host.wake()
