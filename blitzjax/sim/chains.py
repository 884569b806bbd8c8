"""How does one chain move its bytes? As fluid flows over its hops, unit by unit.

A hop that is slower than those before it starts a flow of its own, so that fast members are not held back by slow ones
behind them. Invariant: a member never has a unit that the member before it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blitzjax.sim.links import Fabric, Link

Mark = tuple[float, int, int]  # bytes of the flow, member, its units then


@dataclass(slots=True)
class _Segment:
    """Hops at one pace: `members` are the receivers' positions in the chain, `head` that of the first sender."""

    head: int
    members: list[int]
    links: list[Link]


class ChainFlow:
    """`prefix[u]` bytes are those of units [0, u); `got(member, units)` is called with rising units per member.

    The last member, and whoever sends into a slower hop, report every unit; the others report all of them at the end,
    or every one with `every`. Member j of a segment gets a byte (j - 1) chunks after the first.
    """

    def __init__(self, fabric: Fabric, routes: Sequence[list[Link]], prefix: Sequence[float], start: int, chunk: float,
                 every: bool, got: Callable[[int, int], None], source_done: Callable[[], None]) -> None:
        self._got, self._source_done = got, source_done
        self._stop = len(prefix) - 1
        self._raw = [0] * (len(routes) + 1)  # what the member's own flow has brought
        self._raw[0] = self._stop
        self._units = list(self._raw)  # what the member has: no more than the one before it
        self._segments = _segments(routes)
        self._head_of = {member: s.head for s in self._segments for member in s.members}
        self._followers = {s.head: s.members for s in self._segments}
        heads = self._followers.keys() | {len(routes)}
        for k, segment in enumerate(self._segments):
            marks: list[Mark] = []
            for hop, member in enumerate(segment.members):
                first = start + 1 if every or member in heads else self._stop
                marks += [(prefix[u] - prefix[start] + hop * chunk, member, u) for u in range(first, self._stop + 1)]
            marks.sort()
            fabric.begin(segment.links, [at for at, _, _ in marks], self._passer(marks, k == 0))

    def _passer(self, marks: list[Mark], is_first: bool) -> Callable[[int], None]:
        def passed(mark: int) -> None:
            _, member, units = marks[mark]
            self._raw[member] = units
            self._settle(member)
            if is_first and mark == len(marks) - 1:
                self._source_done()
        return passed

    def _settle(self, member: int) -> None:
        """Reports what is new at `member`, and then what that sets free behind it."""
        units = min(self._raw[member], self._units[self._head_of[member]])
        if units > self._units[member]:
            self._units[member] = units
            self._got(member, units)
            for follower in self._followers.get(member, ()):
                self._settle(follower)


def _segments(routes: Sequence[list[Link]]) -> list[_Segment]:
    segments: list[_Segment] = []
    pace = 0.0
    for hop, route in enumerate(routes):
        speed = min(link.capacity for link in route)
        if not segments or speed < pace:
            segments.append(_Segment(hop, [], []))
            pace = speed
        segments[-1].members.append(hop + 1)
        segments[-1].links += route
    return segments
