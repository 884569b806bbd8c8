"""Which phases may an instance move between? One table, nothing else decides it.

IDLE ──► LOADING ◄──► LIVE          any ──► FAILED ──► IDLE | SERVING (rejoin)
  └────────┴──► SERVING ◄──► DRAINING ──► IDLE

Invariant: an illegal move raises and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from blitzjax.errors import IllegalMove
from blitzjax.types import Phase

MOVES: Mapping[Phase, frozenset[Phase]] = MappingProxyType({
    Phase.IDLE: frozenset({Phase.LOADING, Phase.LIVE, Phase.FAILED}),
    Phase.LOADING: frozenset({Phase.LIVE, Phase.SERVING, Phase.IDLE, Phase.FAILED}),
    Phase.LIVE: frozenset({Phase.LOADING, Phase.SERVING, Phase.IDLE, Phase.FAILED}),
    Phase.SERVING: frozenset({Phase.DRAINING, Phase.FAILED}),
    Phase.DRAINING: frozenset({Phase.SERVING, Phase.IDLE, Phase.FAILED}),
    Phase.FAILED: frozenset({Phase.IDLE, Phase.SERVING, Phase.FAILED}),
})

LOADED = frozenset({Phase.SERVING, Phase.DRAINING})  # phases that imply every unit


def move(phase: Phase, to: Phase) -> Phase:
    """The new phase. Raises IllegalMove when the table does not list it."""
    if to not in MOVES[phase]:
        raise IllegalMove(f"an instance cannot go from {phase.value} to {to.value}")
    return to
