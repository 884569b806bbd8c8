"""One answer on its way to a client: tokens in from workers, text out to a stream.

Invariant: `generated` is what the client was or will be told, in order, whatever attempts produced it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from blitzjax.serve.calls import tags_of
from blitzjax.serve.model import ServedModel
from blitzjax.serve.tokenizer import IncrementalDecoder, StopStrings, Tokenizer
from blitzjax.types import FinishReason, Request, Sampling, TokenLogprob, Work


@dataclass(frozen=True, slots=True)
class Order:
    """A validated request for `n` answers, before it has an arrival time."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    priority: int
    n: int
    echo: str | None  # the prompt's text, which answers shall begin with
    beginnings: tuple[int, ...] = ()  # of the prompt, for routing
    tool_call_parser: str = ""  # that reads calls out of the text; empty: there are no functions to call


@dataclass(frozen=True, slots=True)
class Failure:
    code: str  # gRPC status name
    message: str


@dataclass(slots=True)
class Piece:
    """What a stream has not sent yet."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one for each token, if asked for
    prompt_token_ids: tuple[int, ...] = ()  # of an echo, whose text is the prompt's
    prompt_logprobs: Sequence[TokenLogprob] = ()  # in an echo or with the first token; none for the prompt's first one
    echo: Piece | None = None  # a message of its own, before this: nobody could tell where in a text the answer begins


@dataclass(frozen=True, slots=True)
class Progress:
    """What an answer has come to; with its order it makes the answer again."""

    generated: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    attempt: int
    attempts: int
    layers_helped: int
    cached_tokens: int
    assigned_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    finish_reason: FinishReason | None
    failure: Failure | None


class Answer:
    """One of an order's answers in the shell. The controller mutates it; the order's stream takes pieces from it."""

    def __init__(self, request_id: str, order: Order, index: int, model: ServedModel, arrival_s: float,
                 changed: asyncio.Event):
        """`request_id` is the shell's own: unlike the client's it never comes back while a worker has the old one.
        `changed` is set whenever there is something to take; the order's answers share it.
        """
        self.order, self.index, self.changed = order, index, changed
        self.sampling = replace(order.sampling, seed=seed_of(order.sampling.seed, index))
        self.request = Request(id=request_id, model=order.model, prompt_tokens=len(order.prompt),
                               max_tokens=order.sampling.max_tokens, arrival_s=arrival_s, priority=order.priority,
                               beginnings=order.beginnings)
        self.generated: list[int] = []
        self._logprobs: list[TokenLogprob] = []  # of `generated`, if asked for
        self._prompt_logprobs: Sequence[TokenLogprob] = ()
        self.attempt = -1  # no attempt yet
        self.attempts = 0
        self.layers_helped = 0
        self.cached_tokens = 0
        self.assigned_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.gaps_s: list[float] = []  # between one message with tokens and the next, as this process heard them
        self.finish_reason: FinishReason | None = None
        self.failure: Failure | None = None
        self.counted, self.counted_tokens = False, 0  # by latencies.py
        self._piece = Piece()
        eos = () if order.sampling.ignore_eos else model.spec.eos_token_ids
        self._silent = frozenset(order.sampling.stop_token_ids) | frozenset(eos)
        self._decoder = None if model.tokenizer is None else IncrementalDecoder(
            model.tokenizer, order.prompt, _tags(order, model.tokenizer))
        self._stops = StopStrings(order.stop)

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def stop_string(self) -> str:
        """That ended it; empty: something else did, or will."""
        return self._stops.hit

    def ends(self, token: int) -> bool:
        """It stops this answer, unless that is too short yet, and is not part of its text."""
        return token in self._silent

    def work(self, attempt: int, now: float) -> Work:
        """Starts an attempt: it continues after the tokens that earlier ones emitted."""
        self.attempt, self.attempts = attempt, self.attempts + 1
        self.assigned_s = now if self.assigned_s is None else self.assigned_s
        return Work(self.request, attempt, self.order.prompt, tuple(self.generated), self.sampling)

    def push(self, start: int, token_ids: list[int], reason: FinishReason | None, now: float,
             logprobs: Sequence[TokenLogprob] = (), prompt_logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Appends tokens [start, start + len) of the answer; those it already has are ignored. Ends the answer when
        `reason` is given or a stop string is complete. Raises IndexError when tokens are missing before `start`.
        """
        if start > len(self.generated):
            raise IndexError(f"tokens {len(self.generated)}..{start - 1} of {self.request.id} never came")
        known = len(self.generated) - start
        fresh, logprobs = token_ids[known:], logprobs[known:]
        if fresh:
            if self.last_token_s is None:
                self._begin(now, prompt_logprobs)
            else:
                self.gaps_s.append(now - self.last_token_s)
            self.last_token_s = now
        for i, token in enumerate(fresh):
            self._piece.logprobs.extend(logprobs[i : i + 1])
            self._logprobs.extend(logprobs[i : i + 1])
            last = reason is not None and i == len(fresh) - 1
            self._append(token, silent=last and reason == "stop" and token in self._silent)
            if self._stops.hit:
                return self.end("stop")
        if reason is not None:
            return self.end(reason)
        self.changed.set()

    def end(self, reason: FinishReason) -> None:
        """Nothing is emitted afterwards."""
        if self.ended:
            return
        if self._decoder is not None and not self._stops.hit:
            self._piece.text += self._searched(self._decoder.flush())
            reason = "stop" if self._stops.hit else reason
            self._piece.text += self._stops.flush()
        self.finish_reason = reason
        self.changed.set()

    def fail(self, code: str, message: str) -> None:
        if not self.ended:
            self.failure = Failure(code, message)
            self.changed.set()

    def take(self) -> Piece:
        """What came since the last call; the stream sends it."""
        piece, self._piece = self._piece, Piece()
        return piece

    def progress(self) -> Progress:
        return Progress(tuple(self.generated), tuple(self._logprobs), tuple(self._prompt_logprobs), self.attempt,
                        self.attempts, self.layers_helped, self.cached_tokens, self.assigned_s, self.first_token_s,
                        self.last_token_s, self.finish_reason, self.failure)

    def restore(self, past: Progress) -> None:
        """Makes a new answer what another one was; all of it can be taken again."""
        if past.first_token_s is not None:
            reason = past.finish_reason if past.finish_reason in ("stop", "length") else None
            self.push(0, list(past.generated), reason, past.first_token_s, past.logprobs, past.prompt_logprobs)
        if past.finish_reason is not None:
            self.end(past.finish_reason)
        self.attempt, self.attempts = past.attempt, past.attempts
        self.layers_helped, self.cached_tokens = past.layers_helped, past.cached_tokens
        self.assigned_s, self.first_token_s, self.last_token_s = past.assigned_s, past.first_token_s, past.last_token_s
        if past.failure is not None:
            self.fail(past.failure.code, past.failure.message)

    def again(self, model: ServedModel, changed: asyncio.Event) -> Answer:
        """The same answer, of which nothing has been taken, in place of this one."""
        out = Answer(self.request.id, self.order, self.index, model, self.request.arrival_s, changed)
        out.restore(self.progress())
        out.gaps_s, out.counted, out.counted_tokens = self.gaps_s, self.counted, self.counted_tokens
        return out

    def _begin(self, now: float, prompt_logprobs: Sequence[TokenLogprob]) -> None:
        """The first token is here; what is said of the prompt goes with it."""
        self.first_token_s, self._prompt_logprobs, about = now, prompt_logprobs, self._piece
        if self.order.echo is not None:
            about = self._piece.echo = Piece(text=self.order.echo, prompt_token_ids=self.order.prompt)
        about.prompt_logprobs = prompt_logprobs

    def _append(self, token: int, silent: bool) -> None:
        self.generated.append(token)
        self._piece.token_ids.append(token)
        if self._decoder is not None and not silent:
            self._piece.text += self._searched(self._decoder.push((token,)))

    def _searched(self, text: str) -> str:
        """What of the newest text may be shown: stop strings count in what comes after the least number of tokens."""
        return text if len(self.generated) <= self.sampling.min_tokens else self._stops.push(text)


def _tags(order: Order, tokenizer: Tokenizer) -> Collection[int]:
    """Special tokens that say where calls are."""
    return tokenizer.ids(tags_of(order.tool_call_parser)).values() if order.tool_call_parser else ()


def seed_of(seed: int, index: int) -> int:
    """The seed of answer `index` of an order, beyond the first in [0, 2^63); answer 0 is the one that n = 1 gives."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()) >> 1
