"""Which instances have probably got the KV of how a prompt begins? Those that were sent such prompts lately.

A guess, for instances evict what they like: it decides between instances that could all take the request, never whether
one can. Invariant: memory and time are bounded, whatever prompts come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from blitzjax.types import InstanceId

_BEGINNINGS = 8192  # the last ones that were sent; a prompt has one for each doubling of its length
_HOLDERS = 8  # of one beginning, the last ones: every instance has the system prompt that all share


class Affinity:
    """Owned by the router."""

    def __init__(self) -> None:
        self._sent: OrderedDict[int, dict[InstanceId, int]] = OrderedDict()  # by beginning: who, in which life
        self._lives: dict[InstanceId, int] = {}

    def sent(self, instance: InstanceId, beginnings: Sequence[int]) -> None:
        """`instance` runs a prompt that begins so; see control.prefixes.beginnings."""
        for name in beginnings:
            holders = self._sent.pop(name, {})
            holders.pop(instance, None)
            holders[instance] = self._lives.setdefault(instance, 0)
            if len(holders) > _HOLDERS:
                del holders[next(iter(holders))]
            self._sent[name] = holders
        while len(self._sent) > _BEGINNINGS:
            self._sent.popitem(last=False)

    def forget(self, instance: InstanceId) -> None:
        """It dropped the parameters, and so its KV, or is gone."""
        if instance in self._lives:
            self._lives[instance] += 1

    def holders(self, beginnings: Sequence[int]) -> Iterator[tuple[int, list[InstanceId]]]:
        """Pages in common, at least, and who has them: the longest beginning first."""
        for index in range(len(beginnings) - 1, -1, -1):
            holders = self._sent.get(beginnings[index])
            if holders:
                yield 1 << index, [i for i, life in holders.items() if self._lives[i] == life]
