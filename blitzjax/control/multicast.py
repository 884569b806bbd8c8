"""Down which chains do a model's parameters travel? The greedy planner of BlitzScale, section 5.1 and figures 11 to 14.

A serial chain takes size / bandwidth whatever its length, so targets are appended rather than served in turn; several
sources give several chains, hence several tails, and only tails can go live. Where targets share a fast domain, the
chains are lanes: each moves 1/k of every unit and the domain gathers them. Plain data in, plain data out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from blitzjax.control.topology import Topology
from blitzjax.types import Chain, InstanceId, MulticastPlan, Ring

Held = tuple[InstanceId, int]  # an instance and its watermark in units


@dataclass(slots=True)
class _Draft:
    members: list[InstanceId]
    lane: int = 0
    lanes: int = 1


def plan(ticket: int, model: str, sources: Sequence[Held], targets: Sequence[Held], topology: Topology,
         stop_unit: int, generation_of: Callable[[Collection[InstanceId]], int],
         local: Collection[InstanceId] = ()) -> MulticastPlan:
    """Chains that give every target units [its watermark, stop_unit).

    Sources that lack units or already send are pruned; without a source or target the plan has no chains. Those in
    `local` send KV out of their network port: they only send to targets in their own fast domain. The result does not
    depend on the order of the arguments.
    """
    complete = sorted(i for i, units in sources if units >= stop_unit and not topology.sending(i))
    usable = [i for i in complete if i not in local]
    units = dict(targets)
    groups = _groups(units, topology)
    inner = _deal_inside([i for i in complete if i in local], usable, groups, topology)
    groups = [group for group in groups if all(group[0] not in draft.members for draft in inner)]
    if not usable and inner:  # the first targets send on to the others
        return _finish(ticket, model, _deal(inner, groups, topology), [], units, stop_unit, generation_of)
    if not usable or not targets:
        return MulticastPlan(ticket, model, ())
    lanes, sharded = _choose_lanes(len(usable), groups, topology)
    others = [group for group in groups if group not in sharded]
    seeds = _seeds(usable, sharded, lanes, topology)
    free = [i for i in usable if i not in seeds]
    whole = [_Draft([seed]) for seed in _seeds(free, others, sum(map(len, others)), topology)]
    drafts = _deal_lanes(seeds, _ordered(sharded, seeds[:1], topology)) + _deal(whole, others, topology) + inner
    rings = [ring for group in sharded for ring in _rings(group, lanes)]
    return _finish(ticket, model, drafts, rings, units, stop_unit, generation_of)


def _finish(ticket: int, model: str, drafts: list[_Draft], rings: list[tuple[InstanceId, ...]],
            units: dict[InstanceId, int], stop_unit: int,
            generation_of: Callable[[Collection[InstanceId]], int]) -> MulticastPlan:
    """A chain begins where its least complete target does; lanes, which are gathered unit by unit, begin together."""
    start = {id(draft): min(units[i] for i in draft.members[1:]) for draft in drafts}
    together = min((start[id(draft)] for draft in drafts if draft.lanes > 1), default=0)
    return MulticastPlan(ticket, model, tuple(
        Chain(tuple(d.members), together if d.lanes > 1 else start[id(d)], stop_unit, generation_of(tuple(d.members)),
              d.lane, d.lanes) for d in drafts), tuple(Ring(ring, generation_of(ring)) for ring in rings))


def _deal_inside(local: list[InstanceId], usable: list[InstanceId], groups: list[list[InstanceId]],
                 topology: Topology) -> list[_Draft]:
    """Chains for groups whose fast domain has a source that may send nowhere else, and no other source."""
    ports = topology.ports
    served = {ports[i].domain for i in usable}
    source_of = {ports[i].domain: i for i in reversed(local) if ports[i].fast_gbps and ports[i].domain not in served}
    return [_Draft([source_of[ports[group[0]].domain], *group]) for group in groups
            if ports[group[0]].domain in source_of]


def _groups(targets: Collection[InstanceId], topology: Topology) -> list[list[InstanceId]]:
    """Targets by domain, the fastest of each first."""
    groups: dict[str, list[InstanceId]] = {}
    for i in sorted(targets, key=lambda i: (-topology.ports[i].gbps, i)):
        groups.setdefault(topology.ports[i].domain, []).append(i)
    return list(groups.values())


def _ordered(groups: list[list[InstanceId]], tails: Collection[InstanceId],
             topology: Topology) -> list[list[InstanceId]]:
    """What shares a fast domain with a tail first, then what passes on most.

    Of equals a leaf's come together, those in a tail's leaf first, so that no chain comes back to a leaf that it left;
    inside a leaf the largest summed bandwidth comes first.
    """
    ports = topology.ports
    near = {ports[i].domain for i in tails if ports[i].fast_gbps}
    leaves = {ports[i].leaf for i in tails}

    def key(group: list[InstanceId]) -> tuple[bool, float, bool, str, float, InstanceId]:
        slowest, speed = ports[group[-1]], sum(ports[i].gbps for i in group)
        return (slowest.domain not in near, -slowest.gbps, slowest.leaf not in leaves, slowest.leaf, -speed, group[0])

    return sorted(groups, key=key)


def _choose_lanes(sources: int, groups: list[list[InstanceId]],
                  topology: Topology) -> tuple[int, list[list[InstanceId]]]:
    """(k, groups that k lanes serve), or (0, []) when whole chains are as good.

    A group can be served by k lanes if it has k members in a fast domain; its bytes take 1/k of the time. The others
    need a source of their own. Chooses the k with the least mean time over all targets.
    """
    best: tuple[float, int, list[list[InstanceId]]] = (sum(map(len, groups)), 0, [])
    for k in range(2, sources + 1):
        sharded = [g for g in groups if len(g) >= k and topology.ports[g[0]].fast_gbps]
        rest = sum(map(len, groups)) - sum(map(len, sharded))
        cost = sum(map(len, sharded)) / k + rest
        if sharded and (not rest or sources > k) and cost < best[0]:
            best = (cost, k, sharded)
    return best[1], best[2]


def _deal_lanes(seeds: list[InstanceId], groups: list[list[InstanceId]]) -> list[_Draft]:
    """Every group has a member, or more, in every lane."""
    drafts = [_Draft([seed], lane=lane, lanes=len(seeds)) for lane, seed in enumerate(seeds)]
    for group in groups:
        for k, instance in enumerate(group):
            drafts[k % len(drafts)].members.append(instance)
    return drafts


def _rings(group: list[InstanceId], lanes: int) -> list[tuple[InstanceId, ...]]:
    """The group as `_deal_lanes` deals it, one member of each lane a ring; what is left over joins the last ring."""
    starts = range(0, len(group) - lanes + 1, lanes)
    return [tuple(group[start:] if start == starts[-1] else group[start:start + lanes]) for start in starts]


def _seeds(sources: list[InstanceId], groups: list[list[InstanceId]], most: int, topology: Topology) -> list[InstanceId]:
    """So many sources, at `most`: for each target one in its domain, else in its leaf, else the fastest.

    The nearest come last: a target that is near none gets another.
    """
    ports = topology.ports
    targets = [ports[i] for group in groups for i in group]
    near: dict[InstanceId, int] = {}
    ranked = sorted(sources, key=lambda i: (-ports[i].gbps, i))
    for level, place in enumerate((attrgetter("domain"), attrgetter("leaf"))):
        lacking = Counter(map(place, targets))
        for i in ranked:
            if lacking[place(ports[i])] > 0:
                near.setdefault(i, level)
            lacking[place(ports[i])] -= 1
        ranked.sort(key=lambda i: near.get(i, 2))
    return sorted(ranked[:most], key=lambda i: -near.get(i, 2))


def _deal(drafts: list[_Draft], groups: list[list[InstanceId]], topology: Topology) -> list[_Draft]:
    """Appends each target to the chain whose tail is in its domain, else in its leaf, else to the shortest.

    Once only as many targets are left as chains are empty, an empty chain gets it: k live tails need k chains.
    """
    targets = [i for group in _ordered(groups, [d.members[-1] for d in drafts], topology) for i in group]
    tails = _Tails(drafts, topology)
    empty, only_empty = sum(len(d.members) == 1 for d in drafts), False
    for left, instance in zip(range(len(targets), 0, -1), targets):
        if 0 < empty >= left and not only_empty:
            only_empty = True
            tails = _Tails([d for d in drafts if len(d.members) == 1], topology)
        draft = tails.nearest(instance)
        empty -= len(draft.members) == 1
        draft.members.append(instance)
        if not only_empty:
            tails.put(draft)
    return drafts


class _Tails:
    """Chains by where their tails are, shortest first. An entry is void once its chain has grown."""

    def __init__(self, drafts: list[_Draft], topology: Topology) -> None:
        self._ports = topology.ports
        self._heaps: dict[tuple[str, str], list[tuple[int, int, _Draft]]] = {}
        self._order = {id(draft): k for k, draft in enumerate(drafts)}
        for draft in drafts:
            self.put(draft)

    def put(self, draft: _Draft) -> None:
        port = self._ports[draft.members[-1]]
        for place in (("domain", port.domain), ("leaf", port.leaf), ("any", "")):
            heap = self._heaps.setdefault(place, [])
            heapq.heappush(heap, (len(draft.members), self._order[id(draft)], draft))

    def nearest(self, instance: InstanceId) -> _Draft:
        port = self._ports[instance]
        for place in (("domain", port.domain), ("leaf", port.leaf), ("any", "")):
            heap = self._heaps.get(place, [])
            while heap and len(heap[0][2].members) != heap[0][0]:
                heapq.heappop(heap)
            if heap:
                return heap[0][2]
        raise AssertionError("there are chains")
