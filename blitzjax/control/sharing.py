"""Several models want more workers than there are: who gets the idle ones, and who must give one up?

Plain data in, plain data out. A model below its least (its minimum, and one while requests wait) comes first; among
equals the one with the largest backlog per instance. Only a model below its least takes from others, and never what
brings them to theirs: the last instance of a model with requests stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Want:
    """One model's side. `instances` are LOADING, LIVE or SERVING; `missing` more are wanted."""

    model: str
    instances: int
    missing: int
    least: int
    backlog_tokens: int
    spare: int = 0  # instances that could drain now without falling below what it must have


def deal(idle: int, wants: Sequence[Want]) -> dict[str, int]:
    """How many of `idle` workers each model may recruit."""
    granted = {want.model: 0 for want in wants}

    def need(want: Want) -> tuple[bool, float, str]:
        has = want.instances + granted[want.model]
        return has >= want.least, -want.backlog_tokens / (has + 1), want.model

    for _ in range(idle):
        hungry = [want for want in wants if granted[want.model] < want.missing]
        if not hungry:
            break
        granted[min(hungry, key=need).model] += 1
    return granted


def donor(wants: Sequence[Want]) -> str | None:
    """The model that gives up an instance: of those with one to spare, the one with the least backlog per instance."""
    able = [want for want in wants if want.spare > 0]
    return min(able, key=lambda want: (want.backlog_tokens / want.instances, want.model)).model if able else None
