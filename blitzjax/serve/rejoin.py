"""A client's call that outlives its connection, or the server: when is it worth making again, and what was seen of it?

A server that resumes says so in a call's initial metadata; what it says itself, errors too, is final. Invariant: the
chunks that pass `unseen` are each answer once, in order, however often the server sent it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from blitzjax.errors import BlitzError, InvalidRequest, QueueFull, Unauthenticated, Unavailable, UnknownModel
from blitzjax.serve.unreached import meant
from blitzjax.v1 import inference_pb2 as pb

RESUME_KEY = "blitzjax-resume-s"  # initial metadata: for so many seconds a broken stream can be asked for again
FINAL_KEY = "blitzjax-final"  # trailing metadata: the server's own word, not a broken connection
_PAUSE_S = 0.1
_ERRORS = {kind.code: kind for kind in (InvalidRequest, UnknownModel, Unauthenticated, QueueFull, Unavailable)}

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(slots=True)
class Server:
    """What a client knows of its server, from one call to the next."""

    address: str = "the server"
    resume_s: float = 0.0  # 0: a stream that breaks is gone

    def said(self, metadata: Metadata | None) -> None:
        for key, value in metadata or ():
            if key == RESUME_KEY:
                self.resume_s = float(value)


@dataclass(slots=True)
class Patience:
    """One call, made again while a server that resumes is away."""

    server: Server
    timeout_s: float | None
    started: float = field(default_factory=time.monotonic)
    over: bool = False  # the server has said its last word
    _give_up: float | None = None  # when to stop; None: the last call was answered

    @property
    def left_s(self) -> float | None:
        """The next call's timeout."""
        return None if self.timeout_s is None else max(0.0, self.started + self.timeout_s - time.monotonic())

    def heard(self) -> None:
        """The server answers."""
        self._give_up = None

    def pause_after(self, error: grpc.RpcError, initial: Metadata | None, trailing: Metadata | None) -> float:
        """Seconds until the call is worth making again. Raises what the error means when it never is."""
        self.server.said(initial)
        if initial and any(key == RESUME_KEY for key, _ in initial):
            self.heard()
        self.over = any(key == FINAL_KEY for key, _ in trailing or ())
        now = time.monotonic()
        if self._give_up is None:
            self._give_up = now + self.server.resume_s
        late = now >= self._give_up or self.left_s == 0.0
        if error.code() is not grpc.StatusCode.UNAVAILABLE or self.over or late:
            raise error_of(error, None if self.over else self.server.address) from error
        return _PAUSE_S


@dataclass(slots=True)
class _Extent:
    """How much of one answer."""

    chars: int = 0
    tokens: int = 0
    prompt: bool = False  # what is said of it
    ended: bool = False


@dataclass(slots=True)
class Rejoin:
    """One answered request, in one call or several. `request` is what to send next."""

    request: pb.GenerateRequest
    patience: Patience
    _seen: dict[int, _Extent] = field(default_factory=dict)  # by index of the answer
    _sent: dict[int, _Extent] = field(default_factory=dict)  # in this call

    def __post_init__(self) -> None:
        self.request.request_id = self.request.request_id or uuid.uuid4().hex
        self.request.key = uuid.uuid4().hex

    def unseen(self, message: pb.GenerateResponse) -> pb.GenerateResponse | None:
        """What of the message is new; None: nothing. The message is changed."""
        self.patience.heard()
        seen = self._seen.setdefault(message.index, _Extent())
        sent = self._sent.setdefault(message.index, _Extent())
        chars, tokens = seen.chars - sent.chars, seen.tokens - sent.tokens  # sent now, but seen before
        sent.chars += len(message.text)
        sent.tokens += len(message.token_ids)
        if seen.ended:
            return None
        if chars > 0:
            message.text = message.text[chars:]
        if tokens > 0:
            del message.token_ids[:tokens], message.logprobs[:tokens]
        if seen.prompt:
            del message.prompt_token_ids[:], message.prompt_logprobs[:]
        seen.prompt = seen.prompt or bool(message.prompt_token_ids or message.prompt_logprobs)
        seen.chars, seen.tokens = max(seen.chars, sent.chars), max(seen.tokens, sent.tokens)
        seen.ended = bool(message.finish_reason)
        new = message.text or message.token_ids or message.prompt_token_ids or seen.ended or message.HasField("progress")
        return message if new else None

    def restart(self) -> None:
        """The next call begins; the server will send everything again."""
        self.request.resume = bool(self._seen)
        self._sent = {}


def error_of(error: grpc.RpcError, unreached: str | None) -> BlitzError:
    """The exception that the server raised, or a BlitzError with the status as its `code`.

    `unreached`: the address of a server that has not said so itself.
    """
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    name, details = error.code().name, error.details() or ""
    told = None if unreached is None else meant(details, unreached)
    if name in _ERRORS:
        return _ERRORS[name](told or details)
    out = BlitzError(told or f"{name}: {details}")
    out.code = name
    return out
