"""One instance in virtual time: the Batcher and the LiveQueue decide what is computed, the cost table how long.

Mirrors engine/instance.py, whose steps it names. Decode steps of an unchanged batch are one event however many they
are; layers are events only on the NEW side of a live pair. Invariant: what is running has exactly one valid end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from blitzjax.config import Config
from blitzjax.control.batching import Batcher, Chunk
from blitzjax.control.blocks import PageLedger
from blitzjax.sim.clock import Clock
from blitzjax.sim.costs import ModelCosts
from blitzjax.sim.partners import Partners
from blitzjax.sim.parts import DecodeBatch, NewSide, Sequence, Stretch
from blitzjax.sim.pipelines import Pipeline
from blitzjax.commands import Abort, EndLive, Migrate, Release, StartLive
from blitzjax.events import Drained, Event, KVMigrated, PrefillDone, RequestFailed, RequestFinished
from blitzjax.types import FinishReason, InstanceId, Request, RequestId


class SimInstance:
    """`emit` gives events to the brain, `find` finds partners, `send_rows(source, target, tokens)` moves the rows of a
    prompt between live partners and says how many seconds they take; `send_kv(source, target, tokens, then)` moves the
    KV of a request until what it gives is called. Reading the embedding from disk takes `embed_s`.
    """

    def __init__(self, name: InstanceId, config: Config, costs: ModelCosts, clock: Clock,
                 emit: Callable[[Event], None], find: Callable[[InstanceId], SimInstance],
                 send_rows: Callable[[InstanceId, InstanceId, int], float],
                 send_kv: Callable[[InstanceId, InstanceId, float, Callable[[], None]], Callable[[], None]], rpc_s: float,
                 embed_s: float = 0.0) -> None:
        self._leaving: dict[RequestId, tuple[int, Callable[[], None]]] = {}  # KV on its way → tokens left, how it is stopped
        self.name, self.units, self._version = name, 0, 0  # the version of what is running
        self.model = ""  # that the units are of
        self._config, self._costs, self._clock, self._all_units = config, costs, clock, costs.spec.units
        self._emit, self._find, self._send_kv = emit, find, send_kv
        self.partners = Partners(self, costs.spec, clock, emit, lambda name: find(name).partners, send_rows, rpc_s,
                                 embed_s)
        self._reset()

    def _reset(self) -> None:
        engine = self._config.engine
        self.batcher = Batcher(engine.max_num_seqs, engine.max_num_batched_tokens,
                               PageLedger(engine.kv_pages, engine.page_size))
        self.sequences: dict[RequestId, Sequence] = {}
        for request_id in list(self._leaving):
            self._retract(request_id)
        self.partners.close()
        self._busy = False
        self._version += 1
        self._stretch: Stretch | None = None  # set while only decode steps run
        self._decoding = DecodeBatch()
        self._decode_due = 0.0
        self._due: list[Callable[[], None]] = []  # waits for the end of the running step
        self._regular_turn = False  # NEW, complete: the batch is next, then a prompt of the pair
        self.pipeline: Pipeline | None = None  # it has every unit together with others only

    @property
    def complete(self) -> bool:
        return self.units == self._all_units

    def check(self) -> None:
        """Asserts the invariants of the parts."""
        self.batcher.check()
        assert len(self._decoding) <= len(self.sequences) and self._decoding.kv_tokens >= 0
        runnable = self.complete and (self.partners.ready or self._decoding or self.batcher.waiting_tokens)
        assert self._busy or not runnable, f"{self.name} sleeps over work"

    # ---- commands

    def assign(self, request: Request, attempt: int) -> None:
        self.sequences[request.id] = Sequence(request, attempt)
        if not self.complete and self.batcher.hold(request):
            self.partners.begin_early(self.sequences[request.id])
        else:
            self.batcher.add(request)
        self.wake()

    def obey(self, command: Abort | Migrate | StartLive | EndLive | Release) -> None:
        match command:
            case Abort(request_id=request_id):
                if request_id in self.sequences:
                    self._between_steps(partial(self._abort, self.sequences[request_id]))
            case Migrate():
                self._between_steps(partial(self._begin_migration, command))
            case StartLive(pair=pair):
                self.partners.start(pair)
            case EndLive(pair=pair):
                self.partners.end(pair)
            case Release():
                self._reset()
                self.units = 0
                self._emit(Drained(self._clock.now, self.name))

    def arrived(self, units: int) -> None:
        """Units [0, units) are here."""
        self.units = units
        self.partners.arrived()
        self.wake()

    def join(self, pipeline: Pipeline) -> None:
        """With the other members it has every unit."""
        self.pipeline = pipeline
        self.arrived(self._all_units)

    def leave(self, pipeline: Pipeline) -> None:
        """It has every unit itself: fetches the KV that the others have, then goes on alone."""
        self.pipeline = None
        self._between_steps(partial(self._fetch_kv, pipeline.kv_token_s))

    def _fetch_kv(self, token_s: float) -> None:
        if self._busy:  # with another pass of the same step
            self._due.append(partial(self._fetch_kv, token_s))
        else:
            self._run(token_s * self._decoding.kv_tokens, lambda: None)

    def _abort(self, sequence: Sequence) -> None:
        request_id = sequence.request.id
        if self.sequences.get(request_id) is not sequence:
            return
        self.partners.left(sequence)
        self.forget(sequence)
        self._say_finished(sequence, "abort")

    # ---- KV of a live partner, and migration

    def send_layers(self, sequence: Sequence, old: InstanceId) -> None:
        """The KV of the layers that ran here follows a prompt that its partner took."""
        tokens = sequence.request.prompt_tokens * sequence.next_layer / self._costs.spec.layers
        sequence.stop_kv = self._send_kv(self.name, old, tokens, lambda: self._find(old).kv_arrived(sequence))

    def kv_arrived(self, sequence: Sequence) -> None:
        """A prompt that is through waited for that to be decoded."""
        sequence.stop_kv = None
        if sequence.answered:
            self._between_steps(partial(self._join_batch, sequence, sequence.request.max_tokens - 1))
            self.wake()

    def _begin_migration(self, command: Migrate) -> None:
        """Stops decoding the request; its seat and pages stay until the KV has left. What was on its way elsewhere is
        taken back; what was on its way here leaves from here.
        """
        sequence = self.sequences.get(command.request_id)
        if sequence is None or sequence.attempt != command.attempt:
            return
        request = sequence.request
        left = self._retract(request.id) if request.id in self._leaving else self._decoding.leave(request)
        if sequence.stop_kv is not None and sequence.answered:
            left = request.max_tokens - 1
            self._stop_kv(sequence)
        if left is not None:
            tokens = request.total_tokens - 1 - left
            then = partial(self._migrated, sequence, left, command.target)
            self._leaving[request.id] = left, self._send_kv(self.name, command.target, tokens, then)

    def _retract(self, request_id: RequestId) -> int:
        """→ tokens that were left to be decoded."""
        left, stop = self._leaving.pop(request_id)
        stop()
        return left

    def _stop_kv(self, sequence: Sequence) -> None:
        if sequence.stop_kv is not None:
            sequence.stop_kv()
            sequence.stop_kv = None

    def _migrated(self, sequence: Sequence, left: int, target: InstanceId) -> None:
        self.forget(sequence)
        if not self._find(target).adopt(sequence, left):
            self._emit(RequestFailed(self._clock.now, self.name, sequence.request.id, sequence.attempt,
                                     f"{target} has no room for a request that was sent to it"))
        self.wake()

    def adopt(self, sequence: Sequence, left: int) -> bool:
        """The whole KV of a request is here; `left` tokens are still to be decoded. False: there is no seat for it."""
        request = sequence.request
        if not self.complete or not self.batcher.hold(request):
            return False
        self.sequences[request.id] = sequence
        self._emit(KVMigrated(self._clock.now, self.name, request.id, sequence.attempt))
        self._between_steps(partial(self._join_batch, sequence, left))
        self.wake()
        return True

    def _join_batch(self, sequence: Sequence, left: int) -> None:
        request = sequence.request
        if self.sequences.get(request.id) is sequence:
            self.batcher.prefilled(request.id)
            self._decoding.join(request, left)

    # ---- what runs

    def wake(self) -> None:
        """Something new is here: decode steps that were foreseen end with the running one."""
        if not self._busy:
            self._begin()
        elif self._stretch is not None and (self.partners.ready or self.batcher.waiting):
            self._shorten()

    def _shorten(self) -> None:
        stretch = self._stretch
        assert stretch is not None
        steps = stretch.steps_by(self._clock.now)
        if steps < stretch.steps:
            self._stretch = Stretch(stretch.start, stretch.first_s, stretch.growth_s, steps)
            self._run(stretch.start + stretch.lasts(steps) - self._clock.now, self._decoded, steps)

    def _between_steps(self, action: Callable[[], None]) -> None:
        """Runs `action` once the running step, or prompt, is over."""
        self._due.append(action)
        if not self._busy:
            self._settle_due()
        elif self._stretch is not None:
            self._shorten()

    def _settle_due(self) -> None:
        due, self._due = self._due, []
        for action in due:
            action()

    def _run(self, seconds: float, then: Callable[..., None], *args: object) -> None:
        self._busy = True
        self._version += 1
        self._clock.after(seconds, self._ended, self._version, then, args)

    def _ended(self, version: int, then: Callable[..., None], args: tuple[object, ...]) -> None:
        if version != self._version:
            return
        self._busy, self._stretch = False, None
        then(*args)
        self._settle_due()
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        """Starts the next piece of work, if there is any: `_step` of engine/instance.py."""
        if self.partners.new is not None and self._begin_layer():
            return
        if not self.complete:
            return
        self.partners.maybe_pull()
        chunks = self.batcher.next_chunks()
        if self.partners.ready:
            self._run_ready(self.partners.ready.pop(0))
        elif chunks:
            passes = [(chunk,) for chunk in chunks] if self._costs.chunk_s else [chunks]  # the paper's: all at once
            decode_s = self._decode_s() if self._decoding else 0.0
            self._run(decode_s + self._pass_s(passes[0]), self._stepped, passes)
        elif self._decoding:
            self._run_decode()
        elif self._regular_turn:
            self._regular_turn = False
            self._begin()

    def _begin_layer(self) -> bool:
        """NEW's next layer. Once it is complete, its batch has a turn after every prompt."""
        new = self.partners.new
        assert new is not None
        if self._regular_turn and (self._decoding or self.partners.ready or self.batcher.waiting_tokens):
            self._regular_turn = False
            return False
        chosen = new.queue.next()
        if chosen is None:
            if not new.open and self.complete and not new.queue.items:
                self.partners.new = None
            return False
        tokens = self.sequences[chosen[0]].request.prompt_tokens
        self._run(self._costs.prefill_s(tokens) / self._costs.spec.layers, self._layer_ran, new, chosen[0])
        return True

    def _layer_ran(self, new: NewSide, request_id: RequestId) -> None:
        if new.queue.ran(request_id):
            self._first_token(self.sequences[request_id])
            self._regular_turn = self.complete
        self.partners.answer()

    def _run_ready(self, sequence: Sequence) -> None:
        """The rest of a handed-over prompt, after a decode step when one is due."""
        spec, engine = self._costs.spec, self._config.engine
        rest = (spec.layers - sequence.next_layer) / spec.layers
        decode = bool(self._decoding) and self._decode_due <= 0
        seconds = rest * self._costs.prefill_s(sequence.request.prompt_tokens) + (self._decode_s() if decode else 0.0)
        self._decode_due = (1.0 if decode else self._decode_due) - (
            rest * sequence.request.prompt_tokens / engine.max_num_batched_tokens)
        ahead_s = self._config.transfer.pull_ahead_layers / spec.layers * seconds
        self._clock.after(seconds - ahead_s, self.partners.maybe_pull)
        self._run(seconds, self._ran_ready, sequence, decode)

    def _ran_ready(self, sequence: Sequence, decode: bool) -> None:
        self._count_steps(int(decode))
        if self.sequences.get(sequence.request.id) is sequence:
            self._first_token(sequence)

    def _pass_s(self, chunks: tuple[Chunk, ...]) -> float:
        tokens = sum(chunk.stop - chunk.start for chunk in chunks)
        seconds = self._costs.prefill_s(tokens)
        return seconds if self.pipeline is None else seconds + self.pipeline.pass_s(tokens)

    def _stepped(self, passes: list[tuple[Chunk, ...]]) -> None:
        """The decode step is over, and the first pass."""
        self._count_steps(1)
        self._ran_pass(passes)

    def _ran_pass(self, passes: list[tuple[Chunk, ...]]) -> None:
        for chunk in passes[0]:
            self.batcher.chunk_done(chunk)
            sequence = self.sequences.get(chunk.request_id)
            if sequence is not None and chunk.stop == sequence.request.prompt_tokens:
                self._first_token(sequence)
        if passes[1:]:
            self._run(self._pass_s(passes[1]), self._ran_pass, passes[1:])

    def _run_decode(self) -> None:
        prompts_wait = self.partners.new is not None and len(self.partners.new.queue) > 0
        steps = 1 if prompts_wait else self._decoding.steps_left
        growth_s = len(self._decoding) * self._costs.kv_token_s
        self._stretch = Stretch(self._clock.now, self._decode_s(), growth_s, steps)
        self._run(self._stretch.lasts(steps), self._decoded, steps)

    def _decoded(self, steps: int) -> None:
        self._decode_due = 1.0
        self._count_steps(steps)

    def _decode_s(self) -> float:
        seconds = self._costs.decode_s(len(self._decoding), self._decoding.kv_tokens)
        return seconds if self.pipeline is None else seconds + self.pipeline.pass_s(len(self._decoding))

    def _count_steps(self, steps: int) -> None:
        """`steps` tokens for every decoding sequence; those that have all of theirs finish."""
        self._decoding.ran(steps)
        while (request_id := self._decoding.ended) is not None:
            sequence = self.sequences[request_id]
            self.forget(sequence)
            self._say_finished(sequence, "length")

    def _first_token(self, sequence: Sequence) -> None:
        request = sequence.request
        sequence.answered = True
        if request.max_tokens > 1 and sequence.stop_kv is None:
            self._join_batch(sequence, request.max_tokens - 1)
        self._emit(PrefillDone(self._clock.now, self.name, request.id, sequence.attempt))
        if request.max_tokens == 1:
            self.forget(sequence)
            self._say_finished(sequence, "length")

    def _say_finished(self, sequence: Sequence, reason: FinishReason) -> None:
        self._emit(RequestFinished(self._clock.now, self.name, sequence.request.id, sequence.attempt, reason))

    def forget(self, sequence: Sequence) -> None:
        """Frees everything that the sequence holds here."""
        request = sequence.request
        self.batcher.finish(request.id)
        if request.id in self._leaving:
            self._retract(request.id)
        self._stop_kv(sequence)
        self._decoding.leave(request)
        del self.sequences[request.id]
