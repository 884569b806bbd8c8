"""Which loads are under way, and who has still to answer for them?

Invariant: a transfer lives until every participant has answered TransferEnded or was lost; an instance takes part in at
most one transfer as a receiver.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.types import Chain, InstanceId, MulticastPlan


@dataclass(slots=True)
class Transfer:
    """A multicast plan, or with `plan` None one instance's load from its own disk."""

    ticket: int
    plan: MulticastPlan | None
    pending: set[InstanceId]  # have not left yet
    unready: set[InstanceId] = field(default_factory=set)  # have not answered PrepareTransfer
    cancelled: set[InstanceId] = field(default_factory=set)

    @property
    def started(self) -> bool:
        return not self.unready

    def chain_of(self, instance: InstanceId) -> Chain | None:
        chains = self.plan.chains if self.plan is not None else ()
        return next((c for c in chains if instance in c.instances), None)

    def receives(self, instance: InstanceId) -> bool:
        chain = self.chain_of(instance)
        return instance in self.pending and (chain is None or chain.instances[0] != instance)

    def doomed_with(self, instance: InstanceId) -> set[InstanceId]:
        """Who cannot finish once `instance` left in trouble: its chain, or the whole plan before the start."""
        chain = self.chain_of(instance)
        others = set(chain.instances) if chain is not None and self.started else set(self.pending)
        return (others & self.pending) - {instance} - self.cancelled


class TransferTable:
    """All transfers. Mutated by Cluster only."""

    def __init__(self) -> None:
        self._all: dict[int, Transfer] = {}
        self._tickets = 0
        self._generations: dict[tuple[InstanceId, ...], int] = {}  # ordered members → the clique they may use

    def next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def begin(self, transfer: Transfer) -> None:
        self._all[transfer.ticket] = transfer

    def get(self, ticket: int) -> Transfer | None:
        return self._all.get(ticket)

    def of(self, instance: InstanceId) -> list[Transfer]:
        """Transfers that still wait for `instance`."""
        return [t for t in self._all.values() if instance in t.pending]

    def receiving(self, instance: InstanceId) -> bool:
        return any(t.receives(instance) for t in self._all.values())

    def involved(self, instance: InstanceId) -> bool:
        return bool(self.of(instance))

    def leave(self, transfer: Transfer, instance: InstanceId) -> None:
        transfer.pending.discard(instance)
        transfer.unready.discard(instance)
        if not transfer.pending:
            del self._all[transfer.ticket]

    def generation_of(self, members: tuple[InstanceId, ...]) -> int:
        """Which clique of `members` to use: none that failed, none of an earlier life of a member."""
        return self._generations.setdefault(members, 0)

    def clique_failed(self, members: tuple[InstanceId, ...]) -> None:
        self._generations[members] += 1

    def member_restarted(self, instance: InstanceId) -> None:
        for members in self._generations:
            if instance in members:
                self._generations[members] += 1

    @property
    def chains(self) -> tuple[tuple[int, Chain], ...]:
        return tuple((t.ticket, c) for t in self._all.values() if t.plan is not None for c in t.plan.chains
                     if t.pending & set(c.instances))

    def check(self) -> None:
        for transfer in self._all.values():
            assert transfer.pending and transfer.unready <= transfer.pending
        receivers = [i for t in self._all.values() for i in t.pending if t.receives(i)]
        assert len(receivers) == len(set(receivers)), "an instance receives twice"
