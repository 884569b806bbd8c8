"""Which links are there, how fast are they, and who is using them?

Links are full duplex (BlitzScale, section 5.1): sending and receiving do not disturb each other, two flows in the same
direction do. Invariant: each direction of an instance's link carries at most one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.types import InstanceId


@dataclass(frozen=True, slots=True)
class Link:
    """An instance's network port. `gbps` is the bandwidth of each direction."""

    host: str
    gbps: float


@dataclass(slots=True)
class Topology:
    """Ports of all instances and the transfers on them. Mutated by the owner of the transfers."""

    links: dict[InstanceId, Link] = field(default_factory=dict)
    _sending: dict[InstanceId, int] = field(default_factory=dict)  # → ticket
    _receiving: dict[InstanceId, int] = field(default_factory=dict)

    def add(self, instance: InstanceId, host: str, gbps: float = 100.0) -> None:
        self.links[instance] = Link(host, gbps)

    def same_host(self, a: InstanceId, b: InstanceId) -> bool:
        return self.links[a].host == self.links[b].host

    def sending(self, instance: InstanceId) -> bool:
        return instance in self._sending

    def receiving(self, instance: InstanceId) -> bool:
        return instance in self._receiving

    def begin(self, ticket: int, instances: tuple[InstanceId, ...]) -> None:
        """A chain is about to move bytes: all but the last send, all but the first receive."""
        for instance in instances[:-1]:
            assert instance not in self._sending, f"{instance} already sends"
            self._sending[instance] = ticket
        for instance in instances[1:]:
            assert instance not in self._receiving, f"{instance} already receives"
            self._receiving[instance] = ticket

    def end(self, ticket: int, instance: InstanceId) -> None:
        """`instance` left transfer `ticket`; both directions are free again."""
        for ledger in (self._sending, self._receiving):
            if ledger.get(instance) == ticket:
                del ledger[instance]
