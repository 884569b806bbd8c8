"""Plans of several lanes as the transfer tests run them: who sends to whom, and which targets gather."""

from __future__ import annotations

from dataclasses import dataclass

from transfer_peers import Cluster

UNITS = 7  # of peer.UNIT_BYTES
SOURCES = [0, 1]


@dataclass(frozen=True)
class Plan:
    """`chains[k]` is lane k; every target is in one of `rings`."""

    chains: list[list[int]]
    rings: list[list[int]]

    @property
    def ranks(self) -> list[int]:
        return [rank for chain in self.chains for rank in chain]

    @property
    def targets(self) -> list[int]:
        return [rank for chain in self.chains for rank in chain[1:]]

    def lane(self, rank: int) -> int:
        return next(k for k, chain in enumerate(self.chains) if rank in chain)

    def orders(self, generation: int) -> dict[int, dict[str, object]]:
        orders = {}
        for lane, chain in enumerate(self.chains):
            for rank in chain:
                ring = next((r for r in self.rings if rank in r), [])
                orders[rank] = {"ranks": chain, "generation": generation, "part": (lane, len(self.chains)),
                                "ring": ring, "parts": [self.lane(r) for r in ring], "ring_generation": generation}
        return orders


ONE_DOMAIN = Plan([[0, 2], [1, 3]], [[2, 3]])
TWO_DOMAINS = Plan([[0, 2, 4], [1, 3, 5]], [[2, 3], [4, 5]])
THREE_IN_A_DOMAIN = Plan([[0, 2, 4, 5], [1, 3, 6]], [[2, 3, 4], [5, 6]])  # hops of a ring's members differ
THREE_LANES = Plan([[0, 3, 6], [1, 4], [2, 5]], [[3, 4, 5, 6]])


def begin(cluster: Cluster, plan: Plan, start: int = 0, stop: int = UNITS, paces: tuple[float, ...] = (0.0,) * 3,
          holds: tuple[int, ...] = (0,) * 3, generation: int | None = None, **more: object) -> None:
    """Sources have a pace, and may hold, each lane's its own."""
    generation = cluster.generation() if generation is None else generation
    for rank, order in plan.orders(generation).items():
        lane = plan.lane(rank)
        source = {"pace_s": paces[lane], "hold": holds[lane]} if rank == plan.chains[lane][0] else {}
        cluster.peers[rank].send("multicast", start=start, stop=stop, **source, **order, **more)


def answers(cluster: Cluster, ranks: list[int]) -> dict[int, dict]:
    return {rank: cluster.peers[rank].answer() for rank in ranks}


def fill(cluster: Cluster, plan: Plan, seed: int, units: int = UNITS) -> object:
    """Sources hold `units` units, the same; targets none. → their checksums."""
    for rank in plan.targets:
        cluster.peers[rank].ask("fill", units=0, seed=0)
    wanted = [cluster.peers[chain[0]].ask("fill", units=units, seed=seed) for chain in plan.chains]
    assert all(w == wanted[0] for w in wanted)
    return wanted[0]
