"""Which instances execute together while parameters arrive?

Invariant: an instance is in at most one pair.
"""

from __future__ import annotations

from collections.abc import Iterator

from blitzjax.commands import Command, EndLive, StartLive
from blitzjax.types import InstanceId, LiveMode, LivePair


class LivePairs:
    """Live pairs from StartLive to EndLive. Mutated by the provisioner and by lost instances."""

    def __init__(self) -> None:
        self._of: dict[InstanceId, LivePair] = {}
        self._drained: set[InstanceId] = set()  # OLD sides that said LiveDrained
        self.changed: set[InstanceId] = set()  # sides of pairs that began or ended; the reader empties it

    def __iter__(self) -> Iterator[LivePair]:
        """Every pair once, in order of the OLD side's id."""
        return iter(sorted((pair for i, pair in self._of.items() if i == pair.old), key=lambda pair: pair.old))

    def __len__(self) -> int:
        return len(self._of) // 2

    def of(self, instance: InstanceId) -> LivePair | None:
        return self._of.get(instance)

    def sides(self, instance: InstanceId) -> tuple[InstanceId, ...]:
        """Both sides of the instance's pair, if it is in one."""
        pair = self._of.get(instance)
        return () if pair is None else (pair.old, pair.new)

    def partner(self, instance: InstanceId) -> InstanceId | None:
        pair = self._of.get(instance)
        if pair is None:
            return None
        return pair.new if pair.old == instance else pair.old

    def start(self, old: InstanceId, new: InstanceId, mode: LiveMode) -> list[Command]:
        assert old != new and old not in self._of and new not in self._of
        pair = LivePair(old, new, mode)
        self._of[old] = self._of[new] = pair
        self.changed |= {old, new}
        return [StartLive(new, pair), StartLive(old, pair)]

    def mark_drained(self, old: InstanceId) -> None:
        """OLD found nothing to pull; ignored for instances that are no OLD side."""
        pair = self._of.get(old)
        if pair is not None and pair.old == old:
            self._drained.add(old)

    def drained(self, pair: LivePair) -> bool:
        return pair.old in self._drained

    def end(self, pair: LivePair, lost: InstanceId | None = None) -> list[Command]:
        """Dissolves the pair; a `lost` side is told nothing."""
        del self._of[pair.old], self._of[pair.new]
        self._drained.discard(pair.old)
        self.changed |= {pair.old, pair.new}
        return [EndLive(i, pair) for i in (pair.old, pair.new) if i != lost]

    def check(self) -> None:
        """Asserts the invariant."""
        for instance, pair in self._of.items():
            assert instance in (pair.old, pair.new)
            assert self._of[pair.old] == self._of[pair.new] == pair
        assert self._drained <= {pair.old for pair in self._of.values()}
