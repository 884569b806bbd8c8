"""One instance's engine thread: takes commands and work in, steps the batch, gives tokens and events out.

Invariant: every Work that came in leaves as a finished, failed or handed-over request; the batcher's ledger knows every
sequence that is here. All state is touched by the thread that calls `run`; others only `post`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from jax import Array

from blitzjax.config import Config
from blitzjax.control.batching import Batcher, Chunk
from blitzjax.control.blocks import PageLedger, answer_share, pages_of
from blitzjax.engine import live, messages as m, migration
from blitzjax.engine.decoding import DecodeBatch
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore
from blitzjax.engine.prefixes import PrefixCache, kept_pages
from blitzjax.engine.runner import Prefill, Runner
from blitzjax.engine.sampling import Drawn
from blitzjax.engine.sequence import Sequence, sequence_of
from blitzjax.engine.stages import KV, Stages
from blitzjax.transfer.handoff import HandOff
from blitzjax.commands import Abort, EndLive, Migrate, Release, StartLive
from blitzjax.events import (
    Drained, Event, LiveDrained, PrefillDone, RequestFailed, RequestFinished, RequestHanded, RequestReturned,
)
from blitzjax.types import InstanceId, LivePair, RequestId, Span, TokenLogprob, Work

Output: TypeAlias = Event | m.Tokens
_NEAR_S = 0.2  # how long decode may pause for a partner's residuals


class Instance:
    def __init__(self, name: InstanceId, config: Config, store: LayerStore, stages: Stages, handoff: HandOff,
                 emit: Callable[[Output], None], connect: Callable[[InstanceId], m.Partner],
                 send_kv: Callable[[InstanceId, m.KVOffer], m.KVSession], now: Callable[[], float] = time.time,
                 checkpoint: Path | None = None):
        """`emit` must not block; `connect` opens OLD's connection to a live partner, `send_kv` one about a request.

        `checkpoint` has the embedding of prompts that begin before it arrives, where no partner lends their rows.
        """
        self.name, self.config, self.store = name, config, store
        self.spec = store.spec
        self.runner = Runner(stages, store)
        self.slots, self.pages = config.engine.max_num_seqs, pages_of(config.engine)
        self._checkpoint = checkpoint
        self._stages, self._handoff, self._emit, self._connect, self._now = stages, handoff, emit, connect, now
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._sequences: dict[RequestId, Sequence] = {}
        self._ready: list[Sequence] = []  # handed over by a partner, residuals here, layers left to run
        self._new: live.NewSide | None = None
        self._old: live.OldSide | None = None
        self._early: dict[InstanceId, list[m.Partnered | m.Pulled]] = {}  # came before their StartLive
        self._stopped = False
        self._moves = migration.Moves(self, handoff, send_kv, emit, now, config.transfer.handoff_timeout_s)
        self._reset()

    def post(self, message: object) -> None:
        """Thread-safe: a Work, a Command or one of engine/messages.py."""
        self._inbox.put(message)

    def run(self) -> None:
        """Steps until Stop; sleeps in the inbox when there is nothing to compute."""
        while not self._stopped:
            self._receive(wait=not self._step())

    @property
    def idle(self) -> bool:
        """No request is here. For tests and idle moments, like `check`."""
        return not self._sequences

    def check(self) -> None:
        """Asserts the invariants of the parts; for tests and idle moments."""
        self._batcher.check()
        self._prefixes.check()
        placed = {s for s in self._cache.slots if s is not None}
        assert placed <= self._sequences.keys(), (placed, self._sequences.keys())

    # ---- inbox ------------------------------------------------------------------------------------------------------

    def _receive(self, wait: bool) -> None:
        try:
            self._handle(self._inbox.get(wait, max(0.001, self._awaited_until - self._now()) if self._awaited_until else None))
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            if self._now() >= self._awaited_until:
                self._awaited_until = 0.0

    def _handle(self, message: object) -> None:
        match message:
            case Work():
                self._accept(message)
            case Abort():
                self._abort(message.request_id)
            case m.UnitsArrived():
                if self._new is not None:
                    self._new.arrived(self.store.usable)
            case m.Partnered():
                self._partnered(message)
            case m.Pulled():
                self._pulled(message)
            case m.Borrowed():
                if self._old is not None and self._old.pair.new == message.partner:
                    self._old.lend(message.borrow)
            case m.Lent():
                if self._new is not None and self._new.pair.old == message.partner:
                    self._new.lent(message.loan)
            case m.Taken():
                if self._new is not None:
                    self._new.taken(message.seq)
            case m.HandedOver():
                self._handed_over(message)
            case m.ActivationsTaken():
                self._activations_taken(message)
            case m.KVTaken():
                self._kv_taken(message)
            case (Migrate() | m.KVOffered() | m.KVWithdrawn() | m.KVArrived() | m.KVAnswered() | m.KVUnanswered()):
                self._moves.handle(message)
            case StartLive():
                self._start_live(message.pair)
            case EndLive():
                self._end_live(message.pair)
            case m.PartnerLost():
                self._partner_lost(message.partner)
            case Release(keep=keep):
                self._reset()
                self.store.keep() if keep else self.store.release()
                self._emit(Drained(self._now(), self.name))
            case m.ForgetRequests():
                self._reset()
            case m.Stop():
                self._stopped = True
            case _:
                raise AssertionError(f"unknown message {message!r}")

    def _accept(self, work: Work) -> None:
        if work.request.id in self._sequences:  # an earlier attempt that is still here is void
            self._leave(self._sequences[work.request.id])
        sequence = sequence_of(work)
        loading = self.store.usable < self.spec.units
        if loading and self._batcher.hold(work.request, len(sequence.tokens)):
            self._new = self._new or live.alone(self.name, self.runner, self._handoff, self._checkpoint)
            self._new.add(sequence)
        else:
            self._batcher.add(work.request, len(sequence.tokens), self._prefixes.keys(sequence))
        self._sequences[sequence.id] = sequence

    def _abort(self, request_id: RequestId) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._leave(sequence)
            self._emit(RequestFinished(self._now(), self.name, request_id, sequence.work.attempt, "abort"))

    def _reset(self) -> None:
        """Forgets every request and pair; parameters stay."""
        if self._old is not None:
            self._old.close()
        if self._new is not None:
            self._new.close()
        self._moves.close()
        self._old = self._new = None
        self._sequences, self._ready, self._early = {}, [], {}
        self._awaited_until = 0.0
        self._decode_due = 0.0  # prompt work that may still run before the next decode step, in whole steps
        self._cache = SlotCache(self._stages)
        engine, shapes = self.config.engine, self._stages.shapes
        ledger = PageLedger(self.pages, engine.page_size, kept_pages(self._stages, engine, self.pages))
        self._batcher = Batcher(self.slots, shapes.chunk_tokens, ledger, answer_share(self.config), shapes.hit_tokens)
        self._prefixes = PrefixCache(self._stages, self._batcher, engine)
        self._decoding = DecodeBatch(self.runner, self._cache, self._batcher, self._prefixes)

    # ---- live pairs -------------------------------------------------------------------------------------------------

    def _start_live(self, pair: LivePair) -> None:
        if pair.new == self.name:
            alone = self._new
            self._new = live.NewSide(pair, self.runner, self._handoff)
            self._new.arrived(self.store.usable)
            for sequence in alone.sequences if alone is not None else ():
                self._new.add(sequence)
            for message in self._early.pop(pair.old, ()):
                self._handle(message)
        else:
            if self._old is not None:
                self._old.close()
            self._old = live.OldSide(pair, self.runner, self._handoff, self._connect(pair.new), self.post,
                                     self.config.transfer.handoff_timeout_s)
            self._return_untouched()

    def _return_untouched(self) -> None:
        """What this side has not begun goes to the pair's queue, where NEW helps with it."""
        for sequence in list(self._sequences.values()):
            begun = sequence.prefill is not None or sequence.id in self._cache.slots or self._moves.leaving(sequence)
            if not begun and not sequence.awaited:
                self._forget(sequence)
                self._emit(RequestReturned(self._now(), self.name, sequence.id, sequence.work.attempt))

    def _end_live(self, pair: LivePair) -> None:
        if self._old is not None and self._old.pair == pair:
            self._old.close()
            self._old = None
        if self._new is not None and self._new.pair == pair:
            self._new.close()
            self._new.answer()

    def _partner_lost(self, partner: InstanceId) -> None:
        """The brain hears of it too and ends the pair; until then nothing more is pulled or handed over."""
        if self._old is not None and self._old.pair.new == partner:
            self._old.waiting, self._old.drained = False, True
        self._early.pop(partner, None)
        if self._new is not None and self._new.pair.old == partner:
            self._new.partner_left()

    def _partnered(self, message: m.Partnered) -> None:
        if self._new is None or self._new.pair.old != message.partner:
            self._early.setdefault(message.partner, []).append(message)
        else:
            self._new.partnered(message.old)

    def _pulled(self, pull: m.Pulled) -> None:
        if self._new is None or self._new.pair.old != pull.puller:
            self._early.setdefault(pull.puller, []).append(pull)
            return
        self._new.asked(pull)
        self._answer_pull()

    def _answer_pull(self) -> None:
        """Lets OLD have what it waits for, if there is something; the sequence leaves this instance."""
        sequence = self._new.answer() if self._new is not None else None
        if sequence is not None:
            self._forget(sequence)
            self._emit(RequestHanded(self._now(), self.name, sequence.id, sequence.work.attempt, self._new.pair.old))

    def _handed_over(self, message: m.HandedOver) -> None:
        if self._old is None or self._old.pair.new != message.partner:
            return  # the pair ended meanwhile: the brain runs the request again
        self._old.waiting = False
        answer = message.answer
        if answer.work is None:
            if answer.drained and not self._old.drained:
                self._old.drained = True
                self._emit(LiveDrained(self._now(), self.name))
            return
        work = answer.work
        self._emit(RequestHanded(self._now(), self.name, work.request.id, work.attempt, self.name))
        sequence = sequence_of(work)
        if not self._batcher.hold(work.request, len(sequence.tokens)):
            self._fail(work, f"{self.name} has no room for a request handed over by {message.partner}")
            return
        sequence.layers_helped, sequence.kv_missing = answer.next_layer, answer.next_layer > 0
        self._sequences[sequence.id] = sequence
        sequence.prefill = self._old.take(answer)
        sequence.awaited = sequence.prefill is None
        self._awaited_until = self._now() + _NEAR_S if sequence.awaited else 0.0
        if not sequence.awaited:
            self._ready.append(sequence)

    def _activations_taken(self, message: m.ActivationsTaken) -> None:
        sequence = self._current(message.work.request.id, message.work.attempt)
        if sequence is None:
            return
        if message.error:
            self._leave(sequence)
            self._fail(message.work, message.error)
            return
        sequence.awaited, self._awaited_until = False, 0.0
        sequence.prefill = live.resume(self.runner, message.work, message.next_layer, message.arrays)
        self._ready.append(sequence)
        if not sequence.kv_missing:
            self._adopt_kv(sequence)

    def _kv_taken(self, message: m.KVTaken) -> None:
        sequence = self._current(message.request_id, message.attempt)
        if sequence is None:
            if message.rest is not None:
                message.rest.settled(False)
            return
        if message.error:
            self._leave(sequence)
            self._fail(sequence.work, message.error)
            return
        sequence.partner_kv, sequence.partner_rest, sequence.kv_missing = message.arrays, message.rest, False
        if sequence.prefill is not None:
            self._adopt_kv(sequence)

    def _adopt_kv(self, sequence: Sequence) -> None:
        """The partner's layers of KV join the prompt's own; a prompt that waited for them joins the batch."""
        prefill, flat = sequence.prefill, sequence.partner_kv
        prefill.kv[: len(flat) // 2] = list(zip(flat[::2], flat[1::2], strict=True))
        sequence.partner_kv = []
        if sequence.answered > len(sequence.work.generated):
            if sequence.partner_rest is None:
                self._prefixes.keep(sequence, len(prefill.tokens), prefill.kv, 0)
            self._join_batch(sequence)

    def _current(self, request_id: RequestId, attempt: int) -> Sequence | None:
        sequence = self._sequences.get(request_id)
        return sequence if sequence is not None and sequence.work.attempt == attempt else None

    # ---- KV on the move: what Moves asks for, see migration.Host -----------------------------------------------------

    def find(self, request_id: RequestId) -> Sequence | None:
        return self._sequences.get(request_id)

    def lift(self, sequence: Sequence) -> list[KV] | None:
        if sequence.id not in self._cache.slots:
            if self._old is not None:
                self._old.leave_rest(sequence.id)
            return None
        self._batcher.pause(sequence.id)
        return self._cache.lift(sequence.id)

    def admit(self, sequence: Sequence) -> bool:
        complete = self.store.usable == self.spec.units
        if not complete or not self._batcher.hold(sequence.work.request, len(sequence.tokens)):
            return False
        self._sequences[sequence.id] = sequence
        return True

    def join(self, sequence: Sequence, kv: list[KV]) -> None:
        self._decoding.join(sequence, kv)

    def leave(self, sequence: Sequence) -> None:
        self._leave(sequence)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One decode step for the batch, one piece of prompt work. False: nothing to compute."""
        progress = self._step_new() if self._new is not None else False
        if self.store.usable < self.spec.units:
            return progress
        self._maybe_pull(layers_left=0)
        self._decoding.make_room(self._sequences)
        step = self._batcher.next_step()
        if step is not None and step.decode and (self._decode_due <= 0 or not self._prompt_is_near()):
            self._decode()
            self._decode_due = 1.0
            progress = True
        if self._ready:
            self._run_ready(self._ready.pop(0))
            return True
        if step is not None:
            for chunk, sequence in [(c, self._sequences[c.request_id]) for c in step.prefill]:
                self._run_chunk(chunk, sequence)
                progress = True
        return progress

    def _step_new(self) -> bool:
        """NEW's share: one layer while parameters arrive; afterwards one whole prompt, open to pulls between layers."""
        while True:
            self._answer_pull()
            progress, completed = self._new.step()
            if completed is not None:
                self._first_token(completed)
            whole = progress and completed is None and self.store.usable == self.spec.units
            if not whole:
                break
            self._receive(wait=False)
            if self._new is None:
                return True
        self._answer_pull()
        if self._new.over and self.store.usable == self.spec.units:
            self._new = None
        return progress

    def _maybe_pull(self, layers_left: int) -> None:
        """OLD asks for its next prompt when it is idle, or about to be."""
        old = self._old
        if old is None or old.waiting or old.drained or self._ready or self._batcher.waiting:
            return
        arriving = any(s.awaited for s in self._sequences.values())
        if layers_left <= self.config.transfer.pull_ahead_layers and not arriving and self._batcher.room:
            old.pull()

    def _run_ready(self, sequence: Sequence) -> None:
        """The rest of a handed-over prompt; asks for the next one shortly before the end."""
        self._decode_due -= self._share_of_step(sequence)
        prefill = sequence.prefill
        for layer in range(prefill.next_layer, self.spec.layers):
            before = prefill.x[-1]
            self.runner.run_span(prefill, Span(layer, layer + 1))
            if not self._between_layers(sequence, before):
                return
            self._maybe_pull(self.spec.layers - layer - 1)
        self._first_token(sequence)

    def _between_layers(self, sequence: Sequence, x: Array | None) -> bool:
        """Reads the inbox while a prompt runs: a partner waits for answers. → whether the prompt is still here.

        `x` is what the last layer works on: one layer is always under way, so the device does not wait.
        """
        if x is not None:
            x.block_until_ready()
        self._receive(wait=False)
        return self._here(sequence)

    def _here(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    def _prompt_is_near(self) -> bool:
        """A partner's prompt is ready to run, or will be in a moment: worth a pause, which a hung partner cannot stretch."""
        return bool(self._ready) or self._now() < self._awaited_until

    def _share_of_step(self, sequence: Sequence) -> float:
        """What is left of a prompt, as a share of a whole step's prompt work."""
        prefill = sequence.prefill
        tokens = len(prefill.tokens) / self._stages.shapes.chunk_tokens
        return tokens * (self.spec.layers - prefill.next_layer) / self.spec.layers

    def _run_chunk(self, chunk: Chunk, sequence: Sequence) -> None:
        """All layers over the pieces that the chunk is cut into."""
        if not self._here(sequence):  # aborted between the layers of an earlier chunk
            return
        prefill = sequence.prefill = sequence.prefill or self._begin_prompt(sequence, chunk.start)
        last = len(prefill.chunks) - 1
        for index in [i for i, piece in enumerate(prefill.chunks) if chunk.start <= piece.start < chunk.stop]:
            before = prefill.x[index]
            for layer in self.runner.layers_of_chunk(prefill, index):
                if not self._between_layers(sequence, before):
                    return
                before = prefill.x[index]
                if index == last:
                    self._maybe_pull(self.spec.layers - layer - 1)
            if sequence.scored:
                self.runner.score_chunk(prefill)
        self._batcher.chunk_done(chunk)
        if prefill.next_layer == self.spec.layers:
            self._first_token(sequence)

    def _begin_prompt(self, sequence: Sequence, hit: int) -> Prefill:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = hit
        return self.runner.begin(sequence.tokens, hit, self._prefixes.staged(sequence, hit) if hit else None)

    def _first_token(self, sequence: Sequence) -> None:
        """The prompt is through; of one that was preempted, a later token."""
        sampling, prefill = sequence.work.sampling, sequence.prefill
        drawn = self.runner.first_token(prefill, sampling, sequence.answered)
        prompt = self.runner.prompt_logprobs(prefill, sampling.prompt_logprobs) if sequence.scored else ()
        if sequence.answered == len(sequence.work.generated):
            self._emit(PrefillDone(self._now(), self.name, sequence.id, sequence.work.attempt))
        reason = self._say(sequence, drawn, 0, prompt)
        if not sequence.kv_missing:
            self._prefixes.keep(sequence, len(prefill.tokens), prefill.kv, 0)
        if reason:
            self._end(sequence, reason)
        elif not sequence.kv_missing:
            self._join_batch(sequence)

    def _join_batch(self, sequence: Sequence) -> None:
        kv, sequence.prefill = sequence.prefill.kv, None
        if not self._moves.send_if_wanted(sequence, kv):
            self.join(sequence, kv)

    def _decode(self) -> None:
        rows, drawn = self._decoding.step(self._sequences)
        for row, sequence in rows:
            if reason := self._say(sequence, drawn, row):
                self._end(sequence, reason)
        self._cache.shrink(max(len(sequence.tokens) for _, sequence in rows))

    def _say(self, sequence: Sequence, drawn: Drawn, row: int, prompt: tuple[TokenLogprob, ...] = ()) -> str:
        """Appends and emits a token. → why the sequence ends with it, if so."""
        start, token = sequence.answered, int(drawn.tokens[row])
        sequence.append(token)
        reason = sequence.finish_reason(self.spec)
        logprobs = drawn.logprobs(row, sequence.work.sampling.logprobs)
        sequence.logprobs += logprobs
        sequence.prompt_logprobs = sequence.prompt_logprobs or prompt
        self._emit(m.Tokens(sequence.id, sequence.work.attempt, start, (token,), reason, sequence.layers_helped,
                            logprobs, prompt, sequence.cached_tokens or 0))
        return reason

    def _end(self, sequence: Sequence, reason: str) -> None:
        self._leave(sequence)
        self._emit(RequestFinished(self._now(), self.name, sequence.id, sequence.work.attempt, reason))

    def _leave(self, sequence: Sequence) -> None:
        """Frees everything the sequence holds here."""
        self._moves.left(sequence.id)
        if self._new is not None:
            self._new.remove(sequence.id)
        if sequence in self._ready:
            self._ready.remove(sequence)
        self._decoding.leave(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._batcher.finish(sequence.id)
        del self._sequences[sequence.id]

    def _fail(self, work: Work, why: str) -> None:
        self._emit(RequestFailed(self._now(), self.name, work.request.id, work.attempt, why))
