"""How long did the answers take that ended? Counts and histograms by model, for metrics.py.

Times are the controller's: a token comes when it hears of it, an answer ends when its stream has all of it. Invariant: an
answer counts once, then, those that failed, or whose clients left, never; but each token does when its stream gets it.
"""

from __future__ import annotations

import typing
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from blitzjax.serve.answers import Answer
from blitzjax.types import FinishReason

# Upper ends of the buckets in seconds; vLLM's for the first token.
BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
            80.0, 160.0, 640.0, 2560.0)


@dataclass(slots=True)
class Histogram:
    """Durations, by the first bound that they do not pass."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def cumulated(self) -> Iterator[tuple[str, int]]:
        """(bound, how many were at most that long), as Prometheus wants it."""
        return zip([*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"], accumulate(self.counts), strict=True)


@dataclass(slots=True)
class Latencies:
    """The answers to one model's requests. Owned by the controller; streams add to it."""

    first_token: Histogram = field(default_factory=Histogram)  # since the arrival
    per_token: Histogram = field(default_factory=Histogram)  # mean of an answer's tokens after the first
    between_tokens: Histogram = field(default_factory=Histogram)  # each token after the first
    whole: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)  # until an instance had room
    prefill: Histogram = field(default_factory=Histogram)  # from there to the first token
    decode: Histogram = field(default_factory=Histogram)  # from there to the last one
    inference: Histogram = field(default_factory=Histogram)  # both
    reasons: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(typing.get_args(FinishReason), 0)))
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def told(self, answer: Answer) -> None:
        """The answer's stream has all of it that there is."""
        tokens = len(answer.generated)
        if tokens and not answer.counted_tokens:
            self.prompt_tokens += answer.request.prompt_tokens
        self.generated_tokens += tokens - answer.counted_tokens
        answer.counted_tokens = tokens

    def ended(self, answer: Answer, at: float) -> None:
        if answer.counted:
            return
        answer.counted = True
        arrival_s, tokens = answer.request.arrival_s, len(answer.generated)
        assert answer.finish_reason is not None
        self.reasons[answer.finish_reason] += 1
        self.whole.add(at - arrival_s)
        if answer.assigned_s is None:
            return  # the client had what it wanted before an instance had room
        self.queued.add(answer.assigned_s - arrival_s)
        if answer.first_token_s is None or answer.last_token_s is None:
            return
        decode_s = answer.last_token_s - answer.first_token_s
        self.first_token.add(answer.first_token_s - arrival_s)
        self.prefill.add(answer.first_token_s - answer.assigned_s)
        self.decode.add(decode_s)
        self.inference.add(answer.last_token_s - answer.assigned_s)
        if tokens > 1:
            self.per_token.add(decode_s / (tokens - 1))
        for gap_s in answer.gaps_s:
            self.between_tokens.add(gap_s)
