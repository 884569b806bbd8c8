"""What does the cluster look like now? A frozen picture for people and dashboards."""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.types import Chain, InstanceId, Phase, Role


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """`waiting` and `running` count requests without and with a first token; pages are what they were admitted with.

    `kv_received_bytes`: of requests that came to it with their KV, since the start. `units` are those of `model`, which
    is empty while it is an instance of none; `copies` are models that it keeps in host memory besides, whole or in the
    making.
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
    model: str
    copies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`queued` requests have no instance, `running` ones have. `copy`: who keeps it in host memory; `coming`: who will."""

    name: str
    serving: int
    target: int
    queued: int
    running: int
    copy: InstanceId | None
    coming: InstanceId | None
    least: int  # min_instances
    closing: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """`queued`, `running` and `target` are sums over the models; `chains` are (ticket, chain), disk included."""

    instances: tuple[InstanceStatus, ...]
    queued: int
    running: int
    target: int
    chains: tuple[tuple[int, Chain], ...]
    models: tuple[ModelStatus, ...]
