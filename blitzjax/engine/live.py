"""The two sides of a live pair: NEW runs layers of queued prompts as they arrive, OLD pulls prompts and finishes them.

Invariant: a prompt is in NEW's queue or on OLD, never on both; what travels is its residual (needed at once) and the KV
of the layers that NEW ran (needed when OLD begins to decode it). The embedding comes after the layers, so until then OLD
lends NEW the embedded rows of the prompts that NEW is about to run. Where no instance serves, not yet or not any more,
a NEW side is alone and takes the embedding from its own checkpoint.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from jax import Array

from blitzjax.control.zigzag import Handed, LiveQueue
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.messages import ActivationsTaken, Borrow, HandOver, KVRest, KVTaken, Loan, Old, Partner, Pulled
from blitzjax.engine.runner import Prefill, Runner
from blitzjax.engine.sequence import Sequence
from blitzjax.errors import CheckpointError, TransferError
from blitzjax.transfer.handoff import HandOff
from blitzjax.types import InstanceId, LivePair, RequestId, Span, Work

log = logging.getLogger(__name__)
_LOANS_AHEAD = 2  # prompts: enough to keep NEW busy
_KV_AT_ONCE = 1 << 20  # bytes: residuals do not wait long behind them, and not every layer costs a round trip


class NewSide:
    """Owned by NEW's engine thread. Lives until the parameters are complete, the pair has ended and the queue is empty."""

    def __init__(self, pair: LivePair, runner: Runner, handoff: HandOff):
        self.pair = pair
        self.open = True  # OLD may pull
        self._runner, self._handoff = runner, handoff
        self._queue: LiveQueue[RequestId] = LiveQueue(runner.spec.layers, pair.mode)
        self._sequences: dict[RequestId, Sequence] = {}
        self._offers: dict[int, tuple[int, ...]] = {}  # pull seq → uuids not yet confirmed
        self.old: Old | None = None  # its session, once it is here
        self._asked: Pulled | None = None  # OLD waits for an answer
        self._loans: set[RequestId] = set()  # asked for

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    @property
    def sequences(self) -> list[Sequence]:
        """Queued here, oldest first."""
        return [self._sequences[i] for i in self._queue.items]

    @property
    def over(self) -> bool:
        """Nothing queued, nothing to be taken, and nobody will ask."""
        return not self.open and not self._sequences and not self._offers

    @property
    def offered(self) -> bool:
        """OLD has not taken all that was handed over."""
        return bool(self._offers)

    def add(self, sequence: Sequence) -> None:
        sequence.prefill = self._runner.begin(sequence.tokens)
        self._sequences[sequence.id] = sequence
        self._loans.discard(sequence.id)
        request = sequence.work.request
        self._queue.add(sequence.id, self._has_embedding, (request.rank_s,))

    def remove(self, request_id: RequestId) -> None:
        self._queue.remove(request_id)
        self._sequences.pop(request_id, None)

    def arrived(self, units: int) -> None:
        """Everything below the watermark is usable; the last layer counts once the head is here too."""
        spec = self._runner.spec
        self._queue.loaded(spec.layers if units == spec.units else min(spec.layers_loaded(units), spec.layers - 1))
        if self._has_embedding:
            for request_id in self._queue.items:
                self._queue.ready(request_id)

    def lent(self, loan: Loan) -> None:
        """Embedded rows are here; those of a prompt that left meanwhile are dropped."""
        sequence = self._sequences.get(loan.request_id)
        if sequence is not None and sequence.work.attempt == loan.attempt and not sequence.begun.x:
            rows = np.frombuffer(loan.rows, np.dtype(loan.dtype)).reshape(len(sequence.tokens), -1)
            self._runner.enter(sequence.begun, rows)
            self._queue.ready(sequence.id)

    def step(self) -> tuple[bool, Sequence | None]:
        """Runs at most one layer of one prompt. → (did anything, a prompt that this side has completed)."""
        self._borrow()
        chosen = self._queue.next()
        if chosen is None:
            return False, None
        request_id, layer = chosen
        sequence = self._sequences[request_id]
        self._runner.run_span(sequence.begun, Span(layer, layer + 1))
        jax.block_until_ready(sequence.begun.x)  # OLD may pull between layers, so the layer must be over
        done = self._queue.ran(request_id)
        return True, self._sequences.pop(request_id) if done else None

    def asked(self, pull: Pulled) -> None:
        self._asked = pull

    def answer(self) -> Sequence | None:
        """Answers OLD if it waits and something can be handed over. → the sequence that left, for its bookkeeping."""
        pull = self._asked
        if pull is None:
            return None
        given = self._queue.pull() if self.open else None
        if isinstance(given, Handed):
            sequence = self._sequences.pop(given.item)
            self._asked = None
            pull.old.hand_over(self._offer(pull.seq, sequence, given.next_layer))
            return sequence
        if not self.open or self._queue.drained:
            self._asked = None
            pull.old.hand_over(HandOver(pull.seq, None, drained=True))
        return None

    def taken(self, seq: int) -> None:
        self._handoff.forget(self._offers.pop(seq, ()))

    def close(self) -> None:
        """The pair ended: nothing is handed over any more, what is queued is finished here."""
        self.open = False
        self._queue.close()

    def partner_left(self) -> None:
        """OLD's session is over: what it has not taken by now it never will."""
        self.close()
        uuids = [uuid for pair in self._offers.values() for uuid in pair]
        self._offers.clear()
        if uuids:
            threading.Thread(target=lambda: [self._handoff.withdraw(u) for u in uuids], daemon=True).start()

    @property
    def _has_embedding(self) -> bool:
        return bool(self._runner.store.embedding)

    def _borrow(self) -> None:
        """Keeps a few prompts ahead of what NEW runs on loan; more would only delay the layers on the same link."""
        if self._has_embedding or not self.open or self.old is None:
            return
        fresh = [s for s in self._sequences.values() if s.begun.next_layer == 0]
        ahead = sum(s.id in self._loans for s in fresh)
        for sequence in [s for s in fresh if s.id not in self._loans][: max(0, _LOANS_AHEAD - ahead)]:
            self._loans.add(sequence.id)
            self.old.borrow(Borrow(sequence.id, sequence.work.attempt, tuple(sequence.tokens)))

    def _offer(self, seq: int, sequence: Sequence, next_layer: int) -> HandOver:
        if next_layer == 0:
            return HandOver(seq, sequence.work)
        kv = [pair for pair in sequence.begun.kv[:next_layer] if pair is not None]
        offered = self._handoff.offer(sequence.begun.x, *kv)
        self._offers[seq] = offered.uuids
        activations, *layers = offered.uuids
        return HandOver(seq, sequence.work, next_layer, offered.address, activations, tuple(layers),
                        layout=self._runner.stages.layout.name)


class OldSide:
    """Owned by OLD's engine thread; two threads of its own wait for arrays.

    Both kinds of arrays come over one link, and residuals are needed first: KV is taken a few layers at a time, and only
    while no residuals are on their way.
    """

    def __init__(self, pair: LivePair, runner: Runner, handoff: HandOff, partner: Partner, post: Callable[[object], None],
                 timeout_s: float):
        """`post` puts ActivationsTaken and KVTaken into the engine's inbox."""
        self.pair, self.partner = pair, partner
        self.waiting = False  # a pull is on its way
        self.drained = False
        self._runner, self._handoff, self._post, self._timeout_s = runner, handoff, post, timeout_s
        self._seq = 0
        self._activations = ThreadPoolExecutor(1, thread_name_prefix="take-activations")
        self._kv = ThreadPoolExecutor(1, thread_name_prefix="take-kv")
        self._link_free = threading.Event()  # no residuals are on their way
        self._link_free.set()
        self._lock = threading.Lock()
        self._closed = False
        self._owed: set[int] = set()  # hand-overs whose KV is not all here, nor with whoever takes the rest from NEW
        self._leaving: set[int] = set()  # hand-overs whose KV that is not here yet stays with NEW
        self._fetches: dict[int, tuple[Future[None], int]] = {}  # of KV, and how long it is, by hand-over

    def pull(self) -> None:
        assert not self.waiting
        self.waiting = True
        self._seq += 1
        self.partner.pull(self._seq)

    def take(self, answer: HandOver) -> Prefill | None:
        """NEW handed a prompt over: starts fetching what NEW computed. Returns the prompt at once if nothing was."""
        work = answer.work
        assert work is not None
        prefill = self._runner.begin([*work.prompt, *work.generated])
        if answer.next_layer == 0:
            return prefill
        self._link_free.clear()
        with self._lock:
            self._owed.add(answer.seq)
        self._activations.submit(self._take_activations, work, answer, self._residuals(prefill))
        self._fetches[answer.seq] = self._kv.submit(self._take_kv, answer, prefill.context), prefill.context
        return None

    def lend(self, borrow: Borrow) -> None:
        rows = self._runner.embedded(list(borrow.tokens))
        narrow = rows.astype(self._runner.spec.compute_dtype)
        if np.array_equal(narrow.astype(np.float32), rows):  # most families only look rows up
            rows = narrow
        self.partner.lend(Loan(borrow.request_id, borrow.attempt, rows.dtype.name, rows.tobytes()))

    def leave_rest(self, answer: HandOver) -> None:
        """The request leaves this instance: what is not here of its KV need not come."""
        self._leaving.add(answer.seq)
        fetch, context = self._fetches.get(answer.seq, (None, 0))
        if fetch is not None and fetch.cancel():  # it was behind others
            self._kv_over(answer, context, [], "")

    def close(self) -> None:
        """Nothing is pulled any more; arrays on their way still arrive, here or elsewhere, then the connection closes."""
        self._activations.shutdown(wait=False)
        with self._lock:
            self._closed = True
            self._hang_up_if_over()

    def _hang_up_if_over(self) -> None:
        if self._closed and not self._owed:
            self._kv.submit(self.partner.close)
            self._kv.shutdown(wait=False)

    def _settle(self, seq: int, taken: bool) -> None:
        """Nobody needs NEW's KV of hand-over `seq` any more; NEW frees it now, or with the connection."""
        if taken:
            self.partner.taken(seq)
        with self._lock:
            self._owed.remove(seq)
            self._hang_up_if_over()

    def _take_activations(self, work: Work, answer: HandOver, specs: list[jax.ShapeDtypeStruct]) -> None:
        arrays: list[Array] = []
        error = ""
        try:
            arrays = self._handoff.take(answer.address, answer.activation_uuid, specs, self._timeout_s)
        except TransferError as e:
            error = str(e)
        self._link_free.set()
        self._post(ActivationsTaken(work, answer.seq, answer.next_layer, arrays, error))

    def _take_kv(self, answer: HandOver, context: int) -> None:
        """Keys and values of every layer that NEW ran, some layers at a time, unless the request leaves meanwhile."""
        arrays: list[Array] = []
        error = ""
        try:
            specs = self._runner.stages.taken_specs(answer.layout, context)
            step = max(1, _KV_AT_ONCE // sum(spec.size * spec.dtype.itemsize for spec in specs))
            for at in range(0, len(answer.kv_uuids), step):
                self._link_free.wait()
                if answer.seq in self._leaving:
                    break
                wanted = [(uuid, specs) for uuid in answer.kv_uuids[at : at + step]]
                arrays += chain.from_iterable(self._handoff.take_all(answer.address, wanted, self._timeout_s))
        except TransferError as e:
            error = str(e)
        self._kv_over(answer, context, arrays, error)

    def _kv_over(self, answer: HandOver, context: int, arrays: list[Array], error: str) -> None:
        """Nothing more comes here; what stays with NEW is for whoever gets the request."""
        self._fetches.pop(answer.seq, None)
        rest, kept = None, answer.kv_uuids[len(arrays) // 2 :]
        if kept and not error:
            rest = KVRest(answer.address, kept, context, partial(self._settle, answer.seq))
        else:
            self._settle(answer.seq, taken=not error)
        work = answer.work
        assert work is not None
        self._post(KVTaken(work.request.id, work.attempt, arrays, error, rest))

    def _residuals(self, prefill: Prefill) -> list[jax.ShapeDtypeStruct]:
        stages = self._runner.stages
        return [jax.ShapeDtypeStruct((1, chunk.width, stages.spec.dim), "float32", sharding=stages.replicated)
                for chunk in prefill.chunks]


def alone(name: InstanceId, runner: Runner, handoff: HandOff, checkpoint: Path | None) -> NewSide:
    """A NEW side whom nobody lends rows to nor pulls from."""
    new = NewSide(LivePair("", name, "zigzag"), runner, handoff)
    new.close()
    go_on_alone(new, runner, checkpoint)
    return new


def go_on_alone(new: NewSide, runner: Runner, checkpoint: Path | None) -> None:
    """Its prompts get the embedding from disk; without a readable checkpoint they wait for it to arrive."""
    if checkpoint is not None and not runner.store.embedding:
        try:
            runner.store.preview(Checkpoint.open(checkpoint).read_unit(runner.spec.embed_unit))
        except CheckpointError as e:
            log.warning("%s: prompts wait for the embedding: %s", new.pair.new, e)
    new.arrived(runner.store.usable)


def resume(runner: Runner, work: Work, next_layer: int, activations: list[Array]) -> Prefill:
    """A prompt whose layers [0, next_layer) were run elsewhere, ready for the rest."""
    prefill = runner.begin([*work.prompt, *work.generated])
    prefill.x, prefill.next_layer = list(activations), next_layer
    return prefill
