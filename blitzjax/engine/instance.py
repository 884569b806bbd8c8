"""One instance's engine thread: takes commands and work in, steps the batch, gives tokens and events out.

Invariant: every Work that came in leaves as a finished, failed or handed-over request; the batcher's ledger knows every
sequence that is here. All state is touched by the thread that calls `run`; others only `post`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from jax import Array

from blitzjax.config import Config
from blitzjax.control.batching import Batcher, Chunk
from blitzjax.control.blocks import PageLedger, answer_share
from blitzjax.engine import messages as m, migration
from blitzjax.engine.decoding import DecodeBatch
from blitzjax.engine.grammars import Grammars, no_tokenizer
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.memory import room_on
from blitzjax.engine.params import LayerStore
from blitzjax.engine.partners import Partners
from blitzjax.engine.prefixes import PrefixCache, kept_pages
from blitzjax.engine.runner import Prefill, Runner
from blitzjax.engine.sequence import Sequence, sequence_of
from blitzjax.engine.stages import KV, Stages
from blitzjax.transfer.handoff import HandOff
from blitzjax.commands import Abort, EndLive, Migrate, Release, StartLive
from blitzjax.events import Drained, Event, PrefillDone, RequestFailed, RequestFinished
from blitzjax.types import FinishReason, InstanceId, RequestId, Span, TokenLogprob, Work

Output: TypeAlias = Event | m.Tokens | m.Decoded


class Instance:
    def __init__(self, name: InstanceId, config: Config, store: LayerStore, stages: Stages, handoff: HandOff,
                 emit: Callable[[Output], None], connect: Callable[[InstanceId], m.Partner],
                 send_kv: Callable[[InstanceId, m.KVOffer], m.KVSession], now: Callable[[], float] = time.time,
                 checkpoint: Path | None = None, tokenizer: Callable[[], str] = no_tokenizer):
        """`emit` must not block; `connect` opens OLD's connection to a live partner, `send_kv` one about a request.

        `checkpoint` has the embedding of prompts that begin before it arrives, where no partner lends their rows;
        `tokenizer` is what grammars ask for, see Grammars.
        """
        self.name, self.config, self.store = name, config, store
        self.spec = store.spec
        self.runner = Runner(stages, store)
        self._grammars = Grammars(self.spec, tokenizer)
        self.room = room_on(stages, store, config.engine)
        self._stages, self._emit, self._now = stages, emit, now
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._sequences: dict[RequestId, Sequence] = {}
        self._stopped = False
        self.turns = 0  # how often it has looked into its inbox: between the layers of a prompt, and after every step
        self.rests = False  # there is nothing to compute
        timeout_s = config.transfer.handoff_timeout_s
        self._to_forget = self._forgotten = 0  # times
        self._partners = Partners(self, handoff, connect, emit, now, timeout_s, checkpoint)
        self._moves = migration.Moves(self, handoff, send_kv, emit, now, timeout_s)
        self._reset()

    def post(self, message: object) -> None:
        """Thread-safe: a Work, a Command or one of engine/messages.py."""
        match message:
            case (Work(sampling=sampling) | m.KVOffered(offer=m.KVOffer(work=Work(sampling=sampling)))
                  | m.HandedOver(answer=m.HandOver(work=Work(sampling=sampling)))):
                self.prepare(sampling.grammar)
        self._inbox.put(message)

    def prepare(self, grammar: str) -> None:
        """Compiles it, unless it is empty or known; takes long where the tokenizer is still to be read. Thread-safe."""
        self._grammars.prepare(grammar)

    def forget_requests(self) -> None:
        """Thread-safe, for one caller at a time."""
        self._to_forget += 1
        self._inbox.put(m.ForgetRequests())

    @property
    def forgetful(self) -> bool:
        """It was told to forget its requests and has not got to it: what it says of them is void. Thread-safe."""
        return self._to_forget != self._forgotten

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
        self._decoding.check(self._sequences)

    # ---- inbox ------------------------------------------------------------------------------------------------------

    def _receive(self, wait: bool) -> None:
        until = self._partners.awaited_until
        try:
            self._handle(self._next(wait, max(0.001, until - self._now()) if until else None))
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            if self._now() >= self._partners.awaited_until:
                self._partners.awaited_until = 0.0

    def _next(self, wait: bool, timeout_s: float | None) -> object:
        self.turns, self.rests = self.turns + 1, wait
        try:
            return self._inbox.get(wait, timeout_s)
        finally:
            self.rests = False

    def _handle(self, message: object) -> None:
        match message:
            case Work():
                self._accept(message)
            case Abort():
                self._abort(message.request_id)
            case (Migrate() | m.KVOffered() | m.KVWithdrawn() | m.KVArrived() | m.KVAnswered() | m.KVUnanswered()):
                self._moves.handle(message)
            case (StartLive() | EndLive() | m.PartnerLost() | m.UnitsArrived() | m.Partnered() | m.Pulled() | m.Borrowed()
                  | m.Lent() | m.Taken() | m.HandedOver() | m.ActivationsTaken() | m.KVTaken()):
                self._partners.handle(message)
            case Release(keep=keep):
                self._reset()
                self.store.keep() if keep else self.store.release()
                self._emit(Drained(self._now(), self.name))
            case m.ForgetRequests():
                self._reset()
                self._forgotten += 1
            case m.Stop():
                self._stopped = True
            case _:
                raise AssertionError(f"unknown message {message!r}")

    def _accept(self, work: Work) -> None:
        if work.request.id in self._sequences:  # an earlier attempt that is still here is void
            self.leave(self._sequences[work.request.id])
        sequence = self.sequence(work)
        loading = self.store.usable < self.spec.units
        if loading and self._batcher.hold(work.request, len(sequence.tokens)):
            self._partners.begin_early(sequence)
            self._sequences[sequence.id] = sequence
        else:
            fits = self.enqueue(sequence)
            assert fits, f"{sequence.id} can never fit"

    def _abort(self, request_id: RequestId) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.leave(sequence)
            self._emit(RequestFinished(self._now(), self.name, request_id, sequence.work.attempt, "abort"))

    def _reset(self) -> None:
        """Forgets every request and pair; parameters stay."""
        self._partners.close()
        self._moves.close()
        self._sequences = {}
        self._decode_due = 0.0  # prompt work that may still run before the next decode step, in whole steps
        self._cache = SlotCache(self._stages)
        engine, shapes = self.config.engine, self._stages.shapes
        ledger = PageLedger(self.room.pages, engine.page_size, kept_pages(self._stages, engine, self.room.pages))
        self._batcher = Batcher(self.room.slots, shapes.chunk_tokens, ledger, answer_share(self.config), shapes.hit_tokens)
        self._prefixes = PrefixCache(self._stages, self._batcher, engine, self.store.own_memory)
        self._decoding = DecodeBatch(self.runner, self._cache, self._batcher, self._prefixes)

    # ---- what Partners and Moves ask for, see partners.Host and migration.Host ---------------------------------------

    def find(self, request_id: RequestId) -> Sequence | None:
        return self._sequences.get(request_id)

    def sequences(self) -> Iterable[Sequence]:
        return self._sequences.values()

    def sequence(self, work: Work) -> Sequence:
        return sequence_of(work, self.spec, self._grammars)

    def untouched(self) -> Iterable[Sequence]:
        for sequence in self._sequences.values():
            begun = sequence.prefill is not None or sequence.id in self._cache.slots or self._moves.leaving(sequence)
            if not begun and not sequence.awaited:
                yield sequence

    def lift(self, sequence: Sequence) -> list[KV] | None:
        kv = self._decoding.lift(sequence)
        if kv is None and sequence.leave_kv is not None:
            sequence.leave_kv()
        return kv

    def admit(self, sequence: Sequence) -> bool:
        complete = self.store.usable == self.spec.units
        if not complete or not self._batcher.hold(sequence.work.request, len(sequence.tokens)):
            return False
        self._sequences[sequence.id] = sequence
        return True

    def enqueue(self, sequence: Sequence) -> bool:
        if not self._batcher.could_fit(sequence.work.request):
            return False
        self._batcher.add(sequence.work.request, len(sequence.tokens), self._prefixes.keys(sequence))
        self._sequences[sequence.id] = sequence
        return True

    def join(self, sequence: Sequence, kv: list[KV]) -> None:
        self._decoding.join(sequence, kv)

    def answer_whole(self, sequence: Sequence) -> None:
        if sequence.partner_rest is None:
            self._prefixes.keep(sequence, len(sequence.begun.tokens), sequence.begun.whole_kv, 0)
        self._join_batch(sequence)

    def leave(self, sequence: Sequence) -> None:
        self._moves.left(sequence.id)
        self._partners.left(sequence)
        self._decoding.leave(sequence)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        self._batcher.finish(sequence.id)
        del self._sequences[sequence.id]

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One decode step for the batch, one piece of prompt work. False: nothing to compute."""
        progress = self._step_new() if self._partners.new is not None else False
        if self.store.usable < self.spec.units:
            return progress
        self._maybe_pull(layers_left=0)
        self._decoding.make_room(self._sequences)
        step = self._batcher.next_step()
        if step is not None and step.decode and (self._decode_due <= 0 or not self._partners.prompt_is_near):
            self._decode()
            self._decode_due = 1.0
            progress = True
        if self._partners.ready:
            self._run_ready(self._partners.ready.pop(0))
            return True
        if step is not None:
            for chunk, sequence in [(c, self._sequences[c.request_id]) for c in step.prefill]:
                self._run_chunk(chunk, sequence)
                progress = True
        return progress

    def _step_new(self) -> bool:
        """NEW's share: one layer while parameters arrive; afterwards one whole prompt, open to pulls between layers."""
        partners, progress = self._partners, False
        while (new := partners.new) is not None:
            partners.answer_pull()
            progress, completed = new.step()
            if completed is not None:
                self._first_token(completed)
            if not progress or completed is not None or self.store.usable < self.spec.units:
                partners.answer_pull()
                if new.over and self.store.usable == self.spec.units:
                    partners.new = None
                break
            self._receive(wait=False)
        return progress

    def _maybe_pull(self, layers_left: int) -> None:
        """OLD asks for its next prompt when it is idle, or about to be."""
        old = self._partners.old
        if old is None or old.waiting or old.drained or self._partners.ready or self._batcher.waiting:
            return
        arriving = any(s.awaited for s in self._sequences.values())
        if layers_left <= self.config.transfer.pull_ahead_layers and not arriving and self._batcher.room:
            old.pull()

    def _run_ready(self, sequence: Sequence) -> None:
        """The rest of a handed-over prompt; asks for the next one shortly before the end."""
        self._decode_due -= self._share_of_step(sequence)
        prefill = sequence.begun
        for layer in range(prefill.next_layer, self.spec.layers):
            before = prefill.x[-1] if prefill.x else None
            self.runner.run_span(prefill, Span(layer, layer + 1))
            if not self._between_layers(sequence, before, prefill.x[-1]):
                return
            self._maybe_pull(self.spec.layers - layer - 1)
        self._first_token(sequence)

    def _between_layers(self, sequence: Sequence, before: Array | None, x: Array) -> bool:
        """Reads the inbox while a prompt runs: a partner waits for answers. → whether the prompt is still here.

        `x` comes out of the last layer, `before` went in: one layer is always under way, so the device does not wait. But
        a CPU's only thread goes from layer to layer and leaves arrays that are to be sent or received until the end.
        """
        moving = not self.store.own_memory and (self._moves.busy or self._partners.busy)
        last = x if moving else before
        if last is not None:
            last.block_until_ready()
        self._receive(wait=False)
        return self._here(sequence)

    def _here(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    def _share_of_step(self, sequence: Sequence) -> float:
        """What is left of a prompt, as a share of a whole step's prompt work."""
        prefill = sequence.begun
        tokens = len(prefill.tokens) / self._stages.shapes.chunk_tokens
        return tokens * (self.spec.layers - prefill.next_layer) / self.spec.layers

    def _run_chunk(self, chunk: Chunk, sequence: Sequence) -> None:
        """All layers over the pieces that the chunk is cut into."""
        if not self._here(sequence):  # aborted between the layers of an earlier chunk
            return
        prefill = sequence.prefill = sequence.prefill or self._begin_prompt(sequence, chunk.start)
        last = len(prefill.chunks) - 1
        for index in [i for i, piece in enumerate(prefill.chunks) if chunk.start <= piece.start < chunk.stop]:
            before: Array | None = None
            for layer in self.runner.layers_of_chunk(prefill, index):
                x = prefill.x[index]
                if not self._between_layers(sequence, before, x):
                    return
                before = x
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
        sampling, prefill = sequence.work.sampling, sequence.begun
        drawn = self.runner.first_token(prefill, sampling, sequence.answered, sequence.allowed)
        prompt = self.runner.prompt_logprobs(prefill, sampling.prompt_logprobs) if sequence.scored else ()
        sequence.prompt_logprobs = sequence.prompt_logprobs or prompt
        if sequence.answered == len(sequence.work.generated):
            self._emit(PrefillDone(self._now(), self.name, sequence.id, sequence.work.attempt))
        reason = sequence.append(int(drawn.tokens[0]))
        self._say(sequence, reason, drawn.logprobs(0, sampling.logprobs), prompt)
        if not sequence.kv_missing:
            self._prefixes.keep(sequence, len(prefill.tokens), prefill.whole_kv, 0)
        if reason:
            self._end(sequence, reason)
        elif not sequence.kv_missing:
            self._join_batch(sequence)

    def _join_batch(self, sequence: Sequence) -> None:
        prefill, sequence.prefill = sequence.begun, None
        if not self._moves.send_if_wanted(sequence, prefill.kv):
            self.join(sequence, prefill.whole_kv)

    def _decode(self) -> None:
        """One message has the tokens of all who have nothing else to say."""
        rows, drawn = self._decoding.step(self._sequences)
        tokens, alike, others = drawn.tokens.tolist(), [], []
        for row, sequence in rows:
            reason = sequence.append(tokens[row])
            if reason or sequence.work.sampling.logprobs >= 0:
                others.append((row, sequence, reason))
            else:
                alike.append(sequence)
        if alike:
            self._emit(m.Decoded(tuple([s.id for s in alike]), tuple([s.work.attempt for s in alike]),
                                 tuple([s.answered - 1 for s in alike]), tuple([s.tokens[-1] for s in alike])))
        for row, sequence, reason in others:
            self._say(sequence, reason, drawn.logprobs(row, sequence.work.sampling.logprobs))
            if reason:
                self._end(sequence, reason)

    def _say(self, sequence: Sequence, reason: str, logprobs: tuple[TokenLogprob, ...],
             prompt: tuple[TokenLogprob, ...] = ()) -> None:
        """Emits the last token, unless it is an error; `reason`: why the answer ends with it, if so."""
        if reason == "error":
            return
        sequence.logprobs += logprobs
        self._emit(m.Tokens(sequence.id, sequence.work.attempt, sequence.answered - 1, (sequence.tokens[-1],), reason,
                            sequence.layers_helped, logprobs, prompt, sequence.cached_tokens or 0))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self.leave(sequence)
        end = (self._now(), self.name, sequence.id, sequence.work.attempt)
        error = sequence.matcher is not None and sequence.matcher.error
        self._emit(RequestFailed(*end, error) if error else RequestFinished(*end, reason))
