"""What does the cluster look like now? A frozen picture for people and dashboards."""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.types import Chain, InstanceId, Phase, Role


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """`waiting` and `running` count requests without and with a first token; pages are what they were admitted with.

    `kv_received_bytes`: of requests that came to it with their KV, since the start.
    """

    id: InstanceId
    phase: Phase
    units: int
    partner: InstanceId | None
    waiting: int
    running: int
    pages_used: int
    pages_total: int
    in_world: bool
    role: Role
    kv_received_bytes: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """`queued` requests have no instance, `running` ones have; `chains` are (ticket, chain), disk included."""

    instances: tuple[InstanceStatus, ...]
    queued: int
    running: int
    target: int
    chains: tuple[tuple[int, Chain], ...]
