"""Events: past tense, what happened, as the shell tells the brain. `at` is seconds on the shell's clock.

Invariant: frozen values of the stdlib and blitzjax.types; field names equal those of worker.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from blitzjax.types import FinishReason, InstanceId, LiveMode, ModelSpec, Request, RequestId, Source


@dataclass(frozen=True, slots=True)
class RequestArrived:
    at: float
    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client went away, its deadline passed, or the frontend saw a stop string."""

    at: float
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The first token of this attempt was emitted by `instance`."""

    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestHanded:
    """`target` (OLD) took over a request from its live partner; `instance` is the side that says so, NEW or OLD."""

    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int
    target: InstanceId


@dataclass(frozen=True, slots=True)
class KVMigrated:
    """`instance` has the whole KV of a request after Migrate, and decodes it from now on. `kv_bytes` were moved."""

    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RequestFinished:
    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """`instance` lost this attempt (its partner died in a hand-off, say); the request itself can run elsewhere."""

    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int
    message: str


@dataclass(frozen=True, slots=True)
class RequestReturned:
    """`instance` has not begun this attempt and leaves the request to others: it became the OLD side of a pair."""

    at: float
    instance: InstanceId
    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class LayerLoaded:
    """`instance` now holds units [0, units)."""

    at: float
    instance: InstanceId
    units: int


@dataclass(frozen=True, slots=True)
class TransferReady:
    """`instance` answered PrepareTransfer: its program is compiled and its dispatcher waits for StartTransfer."""

    at: float
    instance: InstanceId
    ticket: int


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """`instance` left plan `ticket` (or a disk load, ticket -1) holding `units` units; `error` is empty on success."""

    at: float
    instance: InstanceId
    ticket: int
    units: int
    error: str


@dataclass(frozen=True, slots=True)
class LiveDrained:
    """`instance` (old side of a live pair) asked for work and its loaded partner had none left."""

    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Drained:
    """`instance` dropped its parameters after Release."""

    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """A worker is up, compiled, and an instance that holds `units` units. `pages` x `page_size` tokens of KV, `slots`
    sequences. Names may be left out where there is one model.
    """

    at: float
    instance: InstanceId
    incarnation: str
    host: str
    units: int
    pages: int
    page_size: int
    slots: int
    model: str = ""  # that the units are of
    models: tuple[str, ...] = ()  # that it is compiled for; empty: every one deployed now
    copies: tuple[str, ...] = ()  # that it keeps whole in host memory
    generation: int = 0  # above those of all cliques that it was in
    leaf: str = ""  # the switch, or rack, of its host; hosts of one reach each other at full speed


@dataclass(frozen=True, slots=True)
class ModelReady:
    """`instance` is compiled for one more model."""

    at: float
    instance: InstanceId
    model: str


@dataclass(frozen=True, slots=True)
class WorldJoined:
    """`instance` can take part in collectives."""

    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class InstanceLost:
    at: float
    instance: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class ModelDeployed:
    """An operator wants one more model served; None keeps the configured bound of its instances."""

    at: float
    spec: ModelSpec
    min_instances: int | None = None
    max_instances: int | None = None


@dataclass(frozen=True, slots=True)
class ModelUndeployed:
    """An operator wants a model gone: it takes nothing new, finishes what it has, and leaves no copy."""

    at: float
    model: str


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """An operator wants `target` instances; None keeps the configured mode or source."""

    at: float
    target: int
    live: LiveMode | None = None
    source: Source | None = None
    model: str = ""  # empty: the only one


@dataclass(frozen=True, slots=True)
class Ticked:
    at: float


Event: TypeAlias = (
    RequestArrived | RequestCancelled | PrefillDone | RequestHanded | KVMigrated | RequestFinished | RequestFailed
    | RequestReturned | LayerLoaded
    | TransferReady | TransferEnded | LiveDrained | Drained | InstanceJoined | ModelReady | WorldJoined | InstanceLost
    | ModelDeployed | ModelUndeployed | ScaleRequested | Ticked
)
