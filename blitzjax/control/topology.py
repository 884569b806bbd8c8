"""Which ports does every instance have, how fast are they, and who is using them?

Links are full duplex (BlitzScale, section 5.1): sending and receiving do not disturb each other, two flows in the same
direction do. Invariant: each direction of an instance's network port carries at most one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.types import InstanceId


@dataclass(frozen=True, slots=True)
class Port:
    """Where an instance sits. `gbps` is what it sends, and receives, over the network: its devices' NICs together.

    Instances of one `domain` (NVLink, say) exchange `fast_gbps`; 0: nothing faster than the network joins them. Inside
    a `leaf` any two ports reach their full speed.
    """

    host: str
    domain: str
    leaf: str = ""
    gbps: float = 100.0
    fast_gbps: float = 0.0


@dataclass(slots=True)
class Topology:
    """Ports of all instances and the transfers on them. Mutated by the owner of the transfers."""

    ports: dict[InstanceId, Port] = field(default_factory=dict)
    _sending: dict[InstanceId, int] = field(default_factory=dict)  # → ticket
    _receiving: dict[InstanceId, int] = field(default_factory=dict)

    def add(self, instance: InstanceId, port: Port) -> None:
        self.ports[instance] = port

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
