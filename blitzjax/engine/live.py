"""The two sides of a live pair: NEW runs layers of queued prompts as they arrive, OLD pulls prompts and finishes them.

Invariant: a prompt is in NEW's queue or on OLD, never on both; what travels is its residual (needed at once) and the KV
of the layers that NEW ran (needed when OLD begins to decode it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
from jax import Array

from blitzjax.control.zigzag import Handed, LiveQueue
from blitzjax.engine.messages import ActivationsTaken, HandOver, KVTaken, Partner, Pulled
from blitzjax.engine.runner import Prefill, Runner
from blitzjax.engine.sequence import Sequence
from blitzjax.errors import TransferError
from blitzjax.transfer.handoff import HandOff
from blitzjax.types import LivePair, RequestId, Span, Work


class NewSide:
    """Owned by NEW's engine thread. Lives until the parameters are complete, the pair has ended and the queue is empty."""

    def __init__(self, pair: LivePair, runner: Runner, handoff: HandOff):
        self.pair = pair
        self.open = True  # OLD may pull
        self._runner, self._handoff = runner, handoff
        self._queue: LiveQueue[RequestId] = LiveQueue(runner.spec.layers, pair.mode)
        self._sequences: dict[RequestId, Sequence] = {}
        self._offers: dict[int, tuple[int, ...]] = {}  # pull seq → uuids not yet confirmed
        self._asked: Pulled | None = None  # OLD waits for an answer

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    @property
    def over(self) -> bool:
        """Nothing queued, nothing to be taken, and nobody will ask."""
        return not self.open and not self._sequences and not self._offers

    def add(self, sequence: Sequence) -> None:
        sequence.prefill = self._runner.begin(sequence.tokens)
        self._sequences[sequence.id] = sequence
        self._queue.add(sequence.id)

    def remove(self, request_id: RequestId) -> None:
        self._queue.remove(request_id)
        self._sequences.pop(request_id, None)

    def arrived(self, units: int) -> None:
        """Everything below the watermark is usable; the last layer counts once the head is here too."""
        spec = self._runner.spec
        self._queue.loaded(spec.layers if units == spec.units else min(spec.layers_loaded(units), spec.layers - 1))

    def step(self) -> tuple[bool, Sequence | None]:
        """Runs at most one layer of one prompt. → (did anything, a prompt that this side has completed)."""
        chosen = self._queue.next()
        if chosen is None:
            return False, None
        request_id, layer = chosen
        sequence = self._sequences[request_id]
        self._runner.run_span(sequence.prefill, Span(layer, layer + 1))
        jax.block_until_ready(sequence.prefill.x)  # OLD may pull between layers, so the layer must be over
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
            pull.reply(self._offer(pull.seq, sequence, given.next_layer))
            return sequence
        if not self.open or self._queue.drained:
            self._asked = None
            pull.reply(HandOver(pull.seq, None, drained=True))
        return None

    def taken(self, seq: int) -> None:
        self._offers.pop(seq, None)

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

    def _offer(self, seq: int, sequence: Sequence, next_layer: int) -> HandOver:
        if next_layer == 0:
            return HandOver(seq, sequence.work)
        prefill = sequence.prefill
        kv = [array for pair in prefill.kv[:next_layer] for array in pair]
        uuids = (self._handoff.offer(prefill.x), self._handoff.offer(kv))
        self._offers[seq] = uuids
        return HandOver(seq, sequence.work, next_layer, self._handoff.address, *uuids)


class OldSide:
    """Owned by OLD's engine thread; two threads of its own wait for arrays."""

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

    def pull(self) -> None:
        assert not self.waiting
        self.waiting = True
        self._seq += 1
        self.partner.pull(self._seq)

    def take(self, answer: HandOver) -> Prefill | None:
        """NEW handed a prompt over: starts fetching what NEW computed. Returns it at once if nothing was computed."""
        assert answer.work is not None
        prefill = self._runner.begin([*answer.work.prompt, *answer.work.generated])
        if answer.next_layer == 0:
            return prefill
        x, kv = self._specs(prefill, answer.next_layer)
        self._activations.submit(self._take_activations, answer, x)
        self._kv.submit(self._take_kv, answer, kv)
        return None

    def close(self) -> None:
        """Nothing is pulled any more; arrays on their way still arrive, then the connection closes."""
        self._kv.submit(self.partner.close)
        self._kv.shutdown(wait=False)
        self._activations.shutdown(wait=False)

    def _take_activations(self, answer: HandOver, specs: list[jax.ShapeDtypeStruct]) -> None:
        arrays, error = self._fetch(answer.address, answer.activation_uuid, specs)
        self._post(ActivationsTaken(answer.work, answer.seq, answer.next_layer, arrays, error))

    def _take_kv(self, answer: HandOver, specs: list[jax.ShapeDtypeStruct]) -> None:
        arrays, error = self._fetch(answer.address, answer.kv_uuid, specs)
        if not error:
            self.partner.taken(answer.seq)
        self._post(KVTaken(answer.work.request.id, answer.work.attempt, arrays, error))

    def _fetch(self, address: str, uuid: int, specs: list[jax.ShapeDtypeStruct]) -> tuple[list[Array], str]:
        try:
            return self._handoff.take(address, uuid, specs, self._timeout_s), ""
        except TransferError as e:
            return [], str(e)

    def _specs(self, prefill: Prefill, layers: int) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
        stages, spec = self._runner.stages, self._runner.spec
        x = [jax.ShapeDtypeStruct((1, c.width, spec.dim), "float32", sharding=stages.replicated) for c in prefill.chunks]
        return x, [a for _ in range(layers) for a in stages.kv_specs(1, prefill.context)]


def resume(runner: Runner, work: Work, next_layer: int, activations: list[Array]) -> Prefill:
    """A prompt whose layers [0, next_layer) were run elsewhere, ready for the rest."""
    prefill = runner.begin([*work.prompt, *work.generated])
    prefill.x, prefill.next_layer = list(activations), next_layer
    return prefill
