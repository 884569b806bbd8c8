"""How do receivers serve before any of them is whole? As in λScale's execute-while-load (arXiv 2502.09922).

Each chain of a plan moves all units in an order of its own, rotated by its share of the bytes, so that receivers in the
same place of their chains hold complementary blocks. Once these cover the model the group is a pipeline: it serves, and
when a member is whole that one goes on alone (mode switch). Invariant: a pipeline's members together hold every unit.

Simplified: the chains are our planner's, in place of binomial trees, and its lanes are taken as whole chains; stages
count as balanced, so that a member with its own batch in the pipeline computes at the pace of one instance and pays a
hop per stage and pass; at the switch it fetches the KV of the layers that others ran, of the requests that it decodes.
Neither shares links with other traffic. To the brain a member is an instance like others, which sends once it is whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, zip_longest

from blitzjax.sim.chains import ChainFlow
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.sim.hosts import Fleetports
from blitzjax.sim.links import Fabric
from blitzjax.types import InstanceId, MulticastPlan


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What an instance in one pays. `stages` are its members, in the order of the layers that they run."""

    ticket: int
    stages: tuple[InstanceId, ...]
    hop_s: float  # a command, and latency, for each stage but the last
    row_s: float  # of one token's residuals over all hops
    kv_token_s: float  # at the switch, of one token's KV in the layers of the others

    def pass_s(self, tokens: int) -> float:
        """What a pass over `tokens` rows takes longer than in an instance that is whole."""
        return (len(self.stages) - 1) * self.hop_s + tokens * self.row_s


@dataclass(slots=True)
class _Group:
    """Receivers in the same place of their chains; `orders` are the units as they come to each."""

    ticket: int
    orders: dict[InstanceId, list[int]]
    brought: dict[InstanceId, int] = field(default_factory=dict)  # units, of members that are not whole
    formed: bool = False

    def got(self, name: InstanceId, count: int) -> bool:
        """`name` has the first `count` units of its order. → whether the group has become a pipeline."""
        order = self.orders[name]
        self.brought[name] = count
        if count == len(order):
            del self.brought[name]
        held = {unit for i, n in self.brought.items() for unit in self.orders[i][:n]}
        if self.formed or len(self.brought) < 2 or len(held) < len(order):
            return False
        self.formed = True
        return True


class Scatter:
    """Plans moved in rotated orders. `form(name, pipeline)` is called for every member of one that begins to serve,
    `whole(name, ticket)` for every receiver that has everything.
    """

    def __init__(self, fabric: Fabric, machine: MachineCosts, costs: ModelCosts, ports: Fleetports,
                 form: Callable[[InstanceId, Pipeline], None], whole: Callable[[InstanceId, int], None]) -> None:
        self._fabric, self._machine, self._costs, self._ports = fabric, machine, costs, ports
        self._form, self._whole = form, whole

    def begin(self, plan: MulticastPlan, source_done: Callable[[InstanceId], None]) -> None:
        assert all(chain.start_unit == 0 for chain in plan.chains), "receivers begin with nothing"
        orders = rotations(self._costs.unit_bytes, len(plan.chains))
        rows = zip_longest(*([(name, order) for name in chain.instances[1:]]
                             for chain, order in zip(plan.chains, orders)))
        group_of = {name: group for row in rows for group in [_Group(plan.ticket, dict(filter(None, row)))]
                    for name in group.orders}
        for chain, order in zip(plan.chains, orders):
            names = chain.instances

            def got(member: int, count: int, names: tuple[InstanceId, ...] = names) -> None:
                self._got(group_of[names[member]], names[member], count)

            def done(source: InstanceId = names[0]) -> None:
                source_done(source)

            prefix = [0.0, *accumulate(self._costs.unit_bytes[unit] for unit in order)]
            ChainFlow(self._fabric, [self._ports.route(a, b) for a, b in pairwise(names)], prefix, 0,
                      self._machine.chunk_bytes, True, got, done)

    def _got(self, group: _Group, name: InstanceId, count: int) -> None:
        if group.got(name, count):
            stages = tuple(group.brought)
            for member in stages:
                self._form(member, self._pipeline(group.ticket, stages))
        if name not in group.brought:
            self._whole(name, group.ticket)

    def _pipeline(self, ticket: int, stages: tuple[InstanceId, ...]) -> Pipeline:
        costs, machine = self._costs, self._machine
        slowest = [min(link.capacity for link in self._ports.route(a, b)) for a, b in pairwise(stages)]
        others = (len(stages) - 1) / len(stages) * costs.kv_token_bytes
        return Pipeline(ticket, stages, machine.rpc_s + machine.handoff_s,
                        sum(2.0 * costs.spec.dim / rate for rate in slowest), others / min(slowest))


def rotations(sizes: tuple[float, ...], count: int) -> list[list[int]]:
    """`count` orders of the units, the k-th beginning where about k / count of all bytes are before."""
    prefix = [0.0, *accumulate(sizes)]
    starts = [bisect_left(prefix, prefix[-1] * k / count - 1e-6) for k in range(count)]
    return [[*range(start, len(sizes)), *range(start)] for start in starts]
