"""One request on one instance: its tokens, and where its prompt and its KV are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jax import Array

from blitzjax.control.prefixes import PageKey
from blitzjax.engine.grammars import Grammars, Matcher
from blitzjax.engine.messages import KVRest, Tokens
from blitzjax.engine.runner import Prefill
from blitzjax.engine.sampling import edits_until, end_tokens, penalised
from blitzjax.types import FinishReason, ModelSpec, RequestId, TokenLogprob, Work


@dataclass(slots=True)
class Sequence:
    """Owned by the engine thread. `tokens` is prompt + answer so far; the last one has no KV yet."""

    work: Work
    tokens: list[int]
    answered: int  # tokens of the answer so far, those of earlier attempts included
    _array: np.ndarray  # i32[prompt + max_tokens], `tokens` again, when penalties read them at every step; else empty
    edits_until: float  # see sampling.edits_until
    ends: tuple[int, ...]  # tokens that end the answer
    matcher: Matcher | None  # where the answer is in its grammar, if it has one
    prefill: Prefill | None = None  # until the sequence joined the decode batch
    layers_helped: int = 0  # layers of the prompt pass that a live partner ran
    awaited: bool = False  # its residuals are on their way from a partner
    leave_kv: Callable[[], None] | None = None  # tells the partner's layers of KV to stay there; None: none are on their way
    keys: list[PageKey] = field(default_factory=list)  # of its full pages so far, see PrefixCache
    cached_tokens: int | None = None  # of the prompt, that the prefix cache had when it was first run here
    partner_kv: list[Array] = field(default_factory=list)  # they are here: k, v of layer 0, k, v of layer 1, ...
    partner_rest: KVRest | None = None  # those of the partner's layers that stay there: the request is about to leave
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of this attempt's tokens, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # as they went with the first token

    @property
    def id(self) -> RequestId:
        return self.work.request.id

    @property
    def kv_missing(self) -> bool:
        """Layers of KV that a partner ran are still on their way."""
        return self.leave_kv is not None

    @property
    def begun(self) -> Prefill:
        """Its prompt's way through the layers, which has begun and is not over."""
        assert self.prefill is not None
        return self.prefill

    @property
    def scored(self) -> bool:
        """The prompt's logprobs are wanted and were not sent; they travel with the answer's first token."""
        return self.work.sampling.prompt_logprobs >= 0 and not self.answered

    @property
    def history(self) -> np.ndarray:
        """i32[tokens], if penalties read it; else empty."""
        return self._array[: len(self.tokens)]

    def append(self, token: int) -> FinishReason | Literal[""]:
        """ → why the answer ends with the token: "stop", "length", or "" to go on; "error": it was not to be drawn."""
        if len(self._array):
            self._array[len(self.tokens)] = token
        self.tokens.append(token)
        self.answered += 1
        sampling = self.work.sampling
        if self.matcher is not None:
            self.matcher.push(token)
            if self.matcher.error or self.matcher.over:
                return "error" if self.matcher.error else "stop"
        if token in self.ends and self.answered > sampling.min_tokens:
            return "stop"
        return "length" if self.answered >= sampling.max_tokens else ""

    @property
    def allowed(self) -> np.ndarray | None:
        """u32[words], what its grammar leaves of the vocabulary for the next token; None: it has none."""
        return None if self.matcher is None else self.matcher.allowed(self.answered)

    @property
    def said(self) -> Tokens:
        """Every token of this attempt, in one message."""
        start = len(self.work.generated)
        return Tokens(self.id, self.work.attempt, start, tuple(self.tokens[len(self.work.prompt) + start :]), "",
                      self.layers_helped, tuple(self.logprobs), self.prompt_logprobs, self.cached_tokens or 0)

    def repeat(self, said: Tokens) -> None:
        """Continues an attempt after the tokens that another instance said."""
        for token in said.token_ids:
            self.append(token)
        self.layers_helped, self.cached_tokens = said.layers_helped, said.cached_tokens
        self.logprobs, self.prompt_logprobs = list(said.logprobs), said.prompt_logprobs


def sequence_of(work: Work, spec: ModelSpec, grammars: Grammars) -> Sequence:
    tokens = [*work.prompt, *work.generated]
    array = np.zeros(work.request.total_tokens if penalised(work.sampling) else 0, np.int32)
    array[: len(tokens)] = tokens[: len(array)]
    return Sequence(work, tokens, len(work.generated), array, edits_until(work.sampling),
                    end_tokens(work.sampling, spec), grammars.matcher(work.sampling, work.generated))
