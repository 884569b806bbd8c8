"""KV on the move: requests that leave this instance after Migrate, and those that come from others.

The source stops decoding and offers keys and values in pieces of some layers; the target takes them while it decodes
others, joins the request to its batch, and answers. Invariant: the source keeps what it has until the target has
answered. Without an answer the target is gone: then the source decodes on, and a later Migrate starts anew.

Of a prompt that two instances ran, the first layers may still be with the live partner when Migrate comes: the target
takes them from there, and the source never has the whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Protocol

from blitzjax.engine import messages as m
from blitzjax.engine.runner import Runner
from blitzjax.engine.sequence import Sequence
from blitzjax.engine.stages import KV
from blitzjax.errors import TransferError
from blitzjax.transfer.handoff import HandOff
from blitzjax.commands import Migrate
from blitzjax.events import Event, KVMigrated, RequestFailed
from blitzjax.types import InstanceId, RequestId, Work

_PIECE_BYTES = 1 << 20  # so many layers are offered together that a round trip is worth it
_AT_ONCE = 8  # pieces that a target asks for together

Message = Migrate | m.KVOffered | m.KVWithdrawn | m.KVArrived | m.KVAnswered | m.KVUnanswered


class Host(Protocol):
    """The instance whose requests come and go. All of it is called by its engine thread."""

    name: InstanceId
    runner: Runner

    def post(self, message: object) -> None: ...

    def find(self, request_id: RequestId) -> Sequence | None: ...

    def sequence(self, work: Work) -> Sequence:
        """A new one, that the host does not have yet."""

    def lift(self, sequence: Sequence) -> list[KV] | None:
        """Stops decoding it: its seat stays, its keys and values are copied out. None: its KV is not whole yet, and
        those layers that have still to come from a partner stay there, see `Sequence.partner_rest`.
        """

    def admit(self, sequence: Sequence) -> bool:
        """Gives a sequence from elsewhere a seat. False: there is none, or the parameters are not here."""

    def join(self, sequence: Sequence, kv: list[KV]) -> None:
        """Decodes a seated sequence from now on."""

    def leave(self, sequence: Sequence) -> None:
        """Frees everything that the sequence holds."""


@dataclass(slots=True)
class _Leaving:
    """A request whose KV was offered to another instance."""

    sequence: Sequence
    kv: list[KV | None]  # None: with the live partner that ran the layer
    offer: m.KVOffer
    session: m.KVSession


@dataclass(slots=True)
class _Coming:
    """A request whose KV is being taken; the thread that takes it stops after `withdrawn`."""

    offer: m.KVOffer
    source: m.KVSource
    withdrawn: threading.Event = field(default_factory=threading.Event)


class Moves:
    """Owned by the engine thread. `open_session` must not block; what the target says comes back into the inbox."""

    def __init__(self, host: Host, handoff: HandOff, open_session: Callable[[InstanceId, m.KVOffer], m.KVSession],
                 emit: Callable[[Event | m.Tokens], None], now: Callable[[], float], timeout_s: float):
        self._host, self._handoff, self._open_session, self._timeout_s = host, handoff, open_session, timeout_s
        self._emit, self._now = emit, now
        self._stages = host.runner.stages
        self._leaving: dict[RequestId, _Leaving] = {}
        self._wanted: dict[RequestId, InstanceId] = {}  # where to, once it is known where each layer of KV is
        self._coming: dict[int, _Coming] = {}  # by the offer's key

    def handle(self, message: Message) -> None:
        match message:
            case Migrate():
                self._migrate(message)
            case m.KVAnswered() | m.KVUnanswered():
                self._answered(message)
            case m.KVOffered(offer=offer, source=source):
                coming = self._coming[offer.key] = _Coming(offer, source)
                threading.Thread(target=self._take, args=(coming,), name="take-moved-kv").start()
            case m.KVWithdrawn(offer=offer):
                self._forget(offer)
            case m.KVArrived():
                self._arrived(message)

    @property
    def busy(self) -> bool:
        """KV is on its way to or from here."""
        return bool(self._leaving or self._coming)

    def leaving(self, sequence: Sequence) -> bool:
        """Its KV is on its way, or will be."""
        return sequence.id in self._leaving or sequence.id in self._wanted

    def send_if_wanted(self, sequence: Sequence, kv: list[KV | None]) -> bool:
        """A prompt is done, and no more of its KV comes here: whether it leaves, since its Migrate came before."""
        target = self._wanted.pop(sequence.id, None)
        if target is not None:
            self._send(sequence, kv, target)
        return target is not None

    def left(self, request_id: RequestId) -> None:
        """The request is over here: nobody may have its KV any more."""
        self._wanted.pop(request_id, None)
        leaving = self._retract(request_id)
        if leaving is not None:
            _settle(leaving.sequence, taken=False)

    def close(self) -> None:
        """Every request is forgotten."""
        for request_id in list(self._leaving):
            self.left(request_id)
        for coming in list(self._coming.values()):
            self._forget(coming.offer)
        self._wanted.clear()

    # ---- the source

    def _migrate(self, command: Migrate) -> None:
        sequence = self._host.find(command.request_id)
        if sequence is None or sequence.work.attempt != command.attempt:
            self._fail(command.request_id, command.attempt, "its KV is not here any more")
            return
        before = self._retract(sequence.id)
        kv = before.kv if before is not None else self._host.lift(sequence)
        if kv is None:
            self._wanted[sequence.id] = command.target
        else:
            self._send(sequence, [*kv], command.target)

    def _send(self, sequence: Sequence, kv: list[KV | None], target: InstanceId) -> None:
        width = self._stages.shapes.moved(len(sequence.tokens) - 1)  # the last token has no KV yet
        kv = [None if pair is None else self._stages.fitted(pair, width) for pair in kv]
        offer = m.KVOffer(sequence.work, sequence.said, tuple(self._pieces(kv, sequence.partner_rest)))
        self._leaving[sequence.id] = _Leaving(sequence, kv, offer, self._open_session(target, offer))

    def _pieces(self, kv: list[KV | None], rest: m.KVRest | None) -> Iterator[m.KVPiece]:
        """Ours are offered; then come those that a partner offers: the layers that are None."""
        absent = [layer for layer, pair in enumerate(kv) if pair is None]
        first, last = (absent[0], absent[-1] + 1) if absent else (len(kv), len(kv))
        for start, stop in ((0, first), (last, len(kv))):
            own = [pair for pair in kv[start:stop] if pair is not None]
            group = max(1, _PIECE_BYTES // sum(a.nbytes for a in own[0])) if own else 1
            for at in range(0, len(own), group):
                pairs = own[at : at + group]
                offered = self._handoff.offer([a for pair in pairs for a in pair])
                yield m.KVPiece(offered.address, offered.uuids[0], start + at, start + at + len(pairs),
                                self._stages.layout.tokens(pairs[0]), self._stages.layout.name)
        assert rest is not None or not absent
        if rest is not None:
            for layer, uuid in zip(absent, rest.uuids, strict=True):
                yield m.KVPiece(rest.address, uuid, layer, layer + 1, rest.width, self._stages.layout.name)

    def _answered(self, message: m.KVAnswered | m.KVUnanswered) -> None:
        """The target has it, cannot have it, or is gone."""
        request_id = message.offer.work.request.id
        leaving = self._leaving.get(request_id)
        if leaving is None or leaving.offer.key != message.offer.key:
            return  # retracted meanwhile
        sequence = leaving.sequence
        if isinstance(message, m.KVAnswered) and not message.error:
            del self._leaving[request_id]
            self._handoff.forget([piece.uuid for piece in leaving.offer.pieces])
            _settle(sequence, taken=True)
            self._host.leave(sequence)
            return
        self._retract(request_id)
        kv = [pair for pair in leaving.kv if pair is not None]
        if isinstance(message, m.KVUnanswered) and len(kv) == len(leaving.kv):
            self._host.join(sequence, self._placeable(kv))
            return
        _settle(sequence, taken=False)
        self._host.leave(sequence)
        why = message.error if isinstance(message, m.KVAnswered) else "its target left with a part of its KV"
        self._fail(request_id, sequence.work.attempt, why)

    def _retract(self, request_id: RequestId) -> _Leaving | None:
        """Ends the session, if there is one, and frees what its target has not taken."""
        leaving = self._leaving.pop(request_id, None)
        if leaving is not None:
            leaving.session.close()
            threading.Thread(target=self._withdraw, args=(leaving.offer.pieces,), name="withdraw-kv").start()
        return leaving

    def _withdraw(self, pieces: tuple[m.KVPiece, ...]) -> None:
        """What is taken together comes in order: those before one that was taken are gone, too."""
        for together in reversed(list(_together(pieces))):
            own = [piece.uuid for piece in reversed(together) if self._handoff.offers(piece.uuid)]
            if not all([self._handoff.withdraw(uuid) for uuid in own]):
                return

    def _fail(self, request_id: RequestId, attempt: int, why: str) -> None:
        self._emit(RequestFailed(self._now(), self._host.name, request_id, attempt, why))

    # ---- the target

    def _take(self, coming: _Coming) -> None:
        """Keys and values of every layer, piece by piece. In a thread of its own."""
        layers: dict[int, KV] = {}
        error = ""
        try:
            for pieces in _together(coming.offer.pieces):
                if coming.withdrawn.is_set():
                    return
                wanted = [(piece.uuid, self._stages.taken_specs(piece.layout, piece.width) * (piece.stop - piece.start))
                          for piece in pieces]
                taken = self._handoff.take_all(pieces[0].address, wanted, self._timeout_s)
                for piece, arrays in zip(pieces, taken, strict=True):
                    pairs = zip(arrays[::2], arrays[1::2], strict=True)
                    layers |= dict(zip(range(piece.start, piece.stop), pairs, strict=True))
        except TransferError as e:
            error = str(e)
        self._host.post(m.KVArrived(coming.offer, [layers[layer] for layer in sorted(layers)], error))

    def _forget(self, offer: m.KVOffer) -> None:
        coming = self._coming.pop(offer.key, None)
        if coming is not None:
            coming.withdrawn.set()

    def _arrived(self, message: m.KVArrived) -> None:
        coming = self._coming.pop(message.offer.key, None)
        if coming is not None:
            coming.source.answer(message.error or self._adopt(coming.offer, message.layers))

    def _adopt(self, offer: m.KVOffer, kv: list[KV]) -> str:
        """The request is this instance's from now on, unless the text that comes back says why not.

        What the source said of it is said again: its own words may be lost with it, or come later than ours.
        """
        work = offer.work
        here = self._host.find(work.request.id)
        if here is not None and here.work.attempt >= work.attempt:
            return f"{self._host.name} runs attempt {here.work.attempt} of it"
        if here is not None:
            self._host.leave(here)
        sequence = self._host.sequence(work)
        sequence.repeat(offer.said)
        if not self._host.admit(sequence):
            return f"{self._host.name} has no room for a request that was sent to it"
        moved = sum(a.nbytes for pair in kv for a in pair)
        self._emit(KVMigrated(self._now(), self._host.name, sequence.id, work.attempt, moved))
        self._emit(offer.said)
        self._host.join(sequence, self._placeable(kv))
        return ""

    def _placeable(self, kv: list[KV]) -> list[KV]:
        """As long as a decode cache can take."""
        length = self._stages.shapes.context(max(map(self._stages.layout.tokens, kv)))
        return [self._stages.fitted(pair, length) for pair in kv]


def _together(pieces: Iterable[m.KVPiece]) -> Iterator[list[m.KVPiece]]:
    """In order, those that a target asks for together: all of one address, a few at a time."""
    for _, there in groupby(pieces, key=lambda piece: piece.address):
        while here := list(islice(there, _AT_ONCE)):
            yield here


def _settle(sequence: Sequence, taken: bool) -> None:
    rest, sequence.partner_rest = sequence.partner_rest, None
    if rest is not None:
        rest.settled(taken)
