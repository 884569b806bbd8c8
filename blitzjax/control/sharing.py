"""Several models want more workers than there are: who gets the idle ones, and who must give one up?

Plain data in, plain data out. A model below its least (its minimum, and one while requests wait) comes first, of these
the one whose requests have waited longest for a first instance; then the one with the largest backlog per instance. Only
a model below its least takes from others, and not what brings them to theirs, unless it has none: see Scaler.spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Want:
    """One model's side. `instances` are LOADING, LIVE or SERVING; `missing` more are wanted; `usable` idle workers
    would do. `waited_s`: how long a request has waited for the first instance; None: nobody does.
    """

    model: str
    instances: int
    missing: int
    usable: int
    least: int
    backlog_tokens: int
    waited_s: float | None = None


def deal(idle: int, wants: Sequence[Want]) -> dict[str, int]:
    """How many of `idle` workers each model may recruit."""
    granted = {want.model: 0 for want in wants}

    def need(want: Want) -> tuple[bool, float, float, str]:
        has = want.instances + granted[want.model]
        return has >= want.least, 0.0 if has else -(want.waited_s or 0.0), -want.backlog_tokens / (has + 1), want.model

    for _ in range(idle):
        hungry = [want for want in wants if granted[want.model] < min(want.missing, want.usable)]
        if not hungry:
            break
        granted[min(hungry, key=need).model] += 1
    return granted


def donor(able: Sequence[Want]) -> str | None:
    """The model that gives up an instance, of those with one to spare: the one with the least backlog per instance."""
    return min(able, key=lambda want: (want.backlog_tokens / want.instances, want.model)).model if able else None
