"""How fast do bytes move when several flows share links? Fluid flows with max-min fair rates, per direction.

A flow crosses its links at one rate, as a pipelined chain does: its rate is that of its slowest hop. A chain may cross a
link several times. Invariant: no link carries more than its capacity, and every flow is held back by a full link on which
no flow is faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf

from blitzjax.sim.clock import Clock


class Link:
    """One direction of one port. `carried` counts bytes up to the last change of a rate on it."""

    __slots__ = ("name", "capacity", "carried", "flows")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        assert bytes_per_s > 0
        self.name, self.capacity = name, bytes_per_s
        self.carried = 0.0
        self.flows: dict[Flow, None] = {}  # insertion-ordered set


class Flow:
    """`marks` are byte counts in rising order; `passed(k)` is called when the k-th of them has moved.

    The last mark is the flow's size. Created by Fabric.begin.
    """

    __slots__ = ("links", "marks", "passed", "moved", "rate", "since", "next_mark", "version")

    def __init__(self, links: tuple[Link, ...], marks: list[float], passed: Callable[[int], None], now: float) -> None:
        self.links, self.marks, self.passed = links, marks, passed
        self.moved, self.rate, self.since = 0.0, 0.0, now
        self.next_mark, self.version = 0, 0


class Fabric:
    """All flows under way."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def begin(self, links: Iterable[Link], marks: list[float], passed: Callable[[int], None]) -> Flow:
        """Starts moving marks[-1] bytes over all of `links` at once; one that is named twice carries them twice."""
        assert marks and all(a <= b for a, b in zip(marks, marks[1:])) and marks[0] >= 0
        flow = Flow(tuple(links), marks, passed, self._clock.now)
        assert flow.links
        for link in flow.links:
            link.flows[flow] = None
        self._share(flow)
        return flow

    def stop(self, flow: Flow) -> None:
        """Ends the flow where it is; one that has ended already is ignored."""
        if flow.version < 0:
            return
        self._advance(flow)
        flow.version = -1
        for link in flow.links:
            link.flows.pop(flow, None)
        shared: set[Flow] = set()
        for neighbour in {other: None for link in flow.links for other in link.flows}:
            if neighbour not in shared:  # else it is connected with one before it
                shared |= self._share(neighbour)

    # ----------------------------------------------------------------------------------------------------------------

    def _advance(self, flow: Flow) -> None:
        """Accounts for what moved since the last change of rate."""
        now = self._clock.now
        moved = flow.rate * (now - flow.since)
        flow.moved += moved
        flow.since = now
        for link in flow.links:
            link.carried += moved

    def _share(self, start: Flow) -> set[Flow]:
        """New rates for everything that shares links with `start`, directly or not. Returns what that is."""
        flows = _connected(start)
        rates = max_min(flows)
        for flow in flows:
            if flow.rate != rates[flow]:
                self._advance(flow)
                flow.rate = rates[flow]
                self._schedule(flow)
        return set(flows)

    def _schedule(self, flow: Flow) -> None:
        flow.version += 1
        left = flow.marks[flow.next_mark] - flow.moved
        self._clock.after(max(left, 0.0) / flow.rate, self._reached, flow, flow.version)

    def _reached(self, flow: Flow, version: int) -> None:
        if flow.version != version:
            return
        self._advance(flow)
        flow.moved = max(flow.moved, flow.marks[flow.next_mark])  # rounding must not leave a mark behind
        mark = flow.next_mark
        flow.next_mark += 1
        if flow.next_mark == len(flow.marks):
            self.stop(flow)
        else:
            self._schedule(flow)
        flow.passed(mark)


def max_min(flows: Iterable[Flow]) -> dict[Flow, float]:
    """Progressive filling: the tightest link first gives its flows equal shares of what is left."""
    open_flows = dict.fromkeys(flows)
    counts = Counter(link for flow in open_flows for link in flow.links)  # crossings
    left = {link: link.capacity for link in counts}
    rates: dict[Flow, float] = {}
    while open_flows:
        tightest, share = None, inf
        for link, count in counts.items():
            if count > 0 and left[link] / count < share:
                tightest, share = link, left[link] / count
        assert tightest is not None
        for flow in [f for f in tightest.flows if f in open_flows]:
            rates[flow] = share
            del open_flows[flow]
            for link in flow.links:
                left[link] = max(0.0, left[link] - share)
                counts[link] -= 1
        del counts[tightest]
    return rates


def _connected(start: Flow) -> list[Flow]:
    """Those that share a link with it, or with one that does, and so on."""
    flows, links, todo = {start: None}, set(), [start]
    while todo:
        for link in todo.pop().links:
            if link not in links:  # else all of its flows are known
                links.add(link)
                new = [flow for flow in link.flows if flow not in flows]
                flows |= dict.fromkeys(new)
                todo += new
    return list(flows)
