"""Down which chains do a model's parameters travel? The greedy planner of BlitzScale, section 5.1 and figure 11.

A serial chain takes size / bandwidth whatever its length, so targets are appended rather than served in turn; several
sources give several chains, hence several tails, and only tails can go live. Plain data in, plain data out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blitzjax.control.topology import Topology
from blitzjax.types import Chain, InstanceId, MulticastPlan

Held = tuple[InstanceId, int]  # an instance and its watermark in units


@dataclass(slots=True)
class _Draft:
    members: list[InstanceId]
    watermarks: list[int] = field(default_factory=list)  # of the targets


def plan(ticket: int, model: str, sources: Sequence[Held], targets: Sequence[Held], topology: Topology,
         stop_unit: int, generation_of: Callable[[tuple[InstanceId, ...]], int]) -> MulticastPlan:
    """Chains that give every target units [its watermark, stop_unit), min(#sources, #targets) of them.

    Sources that lack units or already send are pruned; without a source or target the plan has no chains. The result
    does not depend on the order of the arguments.
    """
    usable = [i for i, units in sources if units >= stop_unit and not topology.sending(i)]
    ordered = sorted(targets, key=lambda held: (-topology.links[held[0]].gbps, held[0]))
    drafts = [_Draft([source]) for source in _seeds(usable, [i for i, _ in ordered], topology)]
    if not drafts:
        return MulticastPlan(ticket, model, ())
    for left, (instance, units) in zip(range(len(ordered), 0, -1), ordered):
        draft = _choose(drafts, instance, left, topology)
        draft.members.append(instance)
        draft.watermarks.append(units)
    return MulticastPlan(ticket, model, tuple(_chain(draft, stop_unit, generation_of) for draft in drafts))


def _seeds(sources: list[InstanceId], targets: list[InstanceId], topology: Topology) -> list[InstanceId]:
    """As many sources as chains; those that share a host with a target first, then the fastest."""
    hosts = {topology.links[i].host for i in targets}
    ranked = sorted(sources, key=lambda i: (topology.links[i].host not in hosts, -topology.links[i].gbps, i))
    return ranked[: len(targets)]


def _choose(drafts: list[_Draft], target: InstanceId, left: int, topology: Topology) -> _Draft:
    """The chain for `target`, one of `left` targets to deal: same host as the tail first, then the shortest.

    Once only as many targets are left as chains are empty, an empty chain gets it: k live tails need k chains.
    """
    empty = [draft for draft in drafts if not draft.watermarks]
    open_drafts = empty if len(empty) >= left else drafts
    return min(open_drafts, key=lambda d: (not topology.same_host(d.members[-1], target), len(d.members)))


def _chain(draft: _Draft, stop_unit: int, generation_of: Callable[[tuple[InstanceId, ...]], int]) -> Chain:
    members = tuple(draft.members)
    return Chain(members, min(draft.watermarks), stop_unit, generation_of(members))
