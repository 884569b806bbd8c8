"""What reaches the engine thread besides Commands and Work, and what leaves it besides Events. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jax import Array

from blitzjax.types import InstanceId, RequestId, TokenLogprob, Work


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of an answer, starting at its index `start`; `finish_reason` is empty until the last ones."""

    request_id: RequestId
    attempt: int
    start: int
    token_ids: tuple[int, ...]
    finish_reason: str
    layers_helped: int
    logprobs: tuple[TokenLogprob, ...] = ()  # of each token, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with token 0, of the prompt but its first token, if asked for
    cached_tokens: int = 0  # of the prompt, that the prefix cache had


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token more for each of several answers that go on: all that most of a decode step's rows have to say."""

    request_ids: tuple[RequestId, ...]
    attempts: tuple[int, ...]
    starts: tuple[int, ...]  # the token's index in its answer
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """NEW's answer to pull `seq`. `work` None: nothing, and nothing will come (`drained`) or the pair ended.

    Layers [0, next_layer) were run; the residuals wait at `address` under `activation_uuid`, KV under one id per layer, laid
    out as `layout` says.
    """

    seq: int
    work: Work | None
    next_layer: int = 0
    address: str = ""
    activation_uuid: int = 0
    kv_uuids: tuple[int, ...] = ()
    drained: bool = False
    layout: str = ""


@dataclass(frozen=True, slots=True)
class KVPiece:
    """Keys and values of layers [start, stop), `width` tokens long and laid out as `layout` says, wait at `address` under
    `uuid`.
    """

    address: str
    uuid: int
    start: int
    stop: int
    width: int
    layout: str


@dataclass(frozen=True, slots=True)
class KVOffer:
    """What the source of a Migrate says to the target. `said`: all tokens of this attempt, in one message.

    The pieces are every layer once; those that a live partner ran and the source never got wait at the partner.
    """

    work: Work
    said: Tokens
    pieces: tuple[KVPiece, ...]

    @property
    def key(self) -> int:
        """No other offer has it."""
        return self.pieces[0].uuid


@dataclass(frozen=True, slots=True)
class KVOffered:
    """A request's KV may be taken, in the target's inbox. `source` waits for the answer."""

    offer: KVOffer
    source: KVSource


@dataclass(frozen=True, slots=True)
class KVWithdrawn:
    """The source of an offer ended its session, in the target's inbox; nothing changes when it was answered before."""

    offer: KVOffer


@dataclass(frozen=True, slots=True)
class KVArrived:
    """Keys and values of every layer are here, or `error` says why not."""

    offer: KVOffer
    layers: list[tuple[Array, Array]]
    error: str


@dataclass(frozen=True, slots=True)
class KVAnswered:
    """The target has the KV and decodes the request, or `error` says why not, in the source's inbox."""

    offer: KVOffer
    error: str


@dataclass(frozen=True, slots=True)
class KVUnanswered:
    """The session with the target broke, or was closed, before it answered."""

    offer: KVOffer


@dataclass(frozen=True, slots=True)
class UnitsArrived:
    """The store's watermark moved."""


@dataclass(frozen=True, slots=True)
class Borrow:
    """NEW's request for the embedded rows of a prompt that it wants to run before it holds the embedding."""

    request_id: RequestId
    attempt: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loan:
    """OLD's answer: rows [tokens, D] of the residual stream, in `dtype`, which may be narrower but never loses a bit."""

    request_id: RequestId
    attempt: int
    dtype: str
    rows: bytes


@dataclass(frozen=True, slots=True)
class Partnered:
    """OLD opened a session with NEW. What NEW says to `old` leaves through it."""

    old: Old


@dataclass(frozen=True, slots=True)
class Pulled:
    """OLD asks NEW for its next item, which goes out as a HandOver of the same `seq`."""

    old: Old
    seq: int


@dataclass(frozen=True, slots=True)
class Borrowed:
    """NEW asks OLD, in OLD's inbox."""

    partner: Partner
    borrow: Borrow


@dataclass(frozen=True, slots=True)
class Lent:
    """OLD's loan, in NEW's inbox."""

    old: Old
    loan: Loan


@dataclass(frozen=True, slots=True)
class Taken:
    """OLD has the arrays of hand-over `seq`."""

    old: Old
    seq: int


@dataclass(frozen=True, slots=True)
class HandedOver:
    """NEW answered OLD's pull."""

    partner: Partner
    answer: HandOver


@dataclass(frozen=True, slots=True)
class ActivationsTaken:
    """The residuals of hand-over `seq` are here, or `error` says why not."""

    work: Work
    seq: int
    next_layer: int
    arrays: list[Array]
    error: str


@dataclass(frozen=True, slots=True)
class KVTaken:
    """Keys and values of layers [0, n) of a handed-over prompt are here, or `error` says why not. n is all of the
    partner's layers, or `rest` says where the others are.
    """

    request_id: RequestId
    attempt: int
    arrays: list[Array]
    error: str
    rest: KVRest | None = None


@dataclass(frozen=True, slots=True)
class KVRest:
    """KV that stayed with a live partner, one of `uuids` per layer, for whoever gets the request.

    `settled(taken)` must be called once; until then the connection to the partner stays open.
    """

    address: str
    uuids: tuple[int, ...]
    width: int
    settled: Callable[[bool], None]


@dataclass(frozen=True, slots=True)
class PartnerLost:
    """A session with a live partner is over. One with the same partner, for another pair, may have begun."""

    session: Old | Partner


@dataclass(frozen=True, slots=True)
class ForgetRequests:
    """The controller is gone: drop every request, keep the parameters."""


@dataclass(frozen=True, slots=True)
class Stop:
    pass


class KVSource(Protocol):
    """The target's side of a session about one request's KV."""

    def answer(self, error: str) -> None: ...


class KVSession(Protocol):
    """The source's side. The answer arrives in the inbox as KVAnswered, a break as KVUnanswered."""

    def close(self) -> None: ...


class Old(Protocol):
    """NEW's side of the session that OLD opened for one pair. Nothing it is told may block the engine thread."""

    name: InstanceId  # OLD's

    def hand_over(self, answer: HandOver) -> None: ...

    def borrow(self, borrow: Borrow) -> None: ...


class Partner(Protocol):
    """OLD's session with NEW. Answers arrive in the inbox as HandedOver and Borrowed, its end as PartnerLost."""

    def pull(self, seq: int) -> None: ...

    def lend(self, loan: Loan) -> None: ...

    def taken(self, seq: int) -> None: ...

    def close(self) -> None: ...
