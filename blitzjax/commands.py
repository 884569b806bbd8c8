"""Commands: imperative, what the shell must do for the brain. All but Reject go to `instance`.

Invariant: frozen values of the stdlib and blitzjax.types; field names equal those of worker.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from blitzjax.types import InstanceId, LivePair, MulticastPlan, RequestId


@dataclass(frozen=True, slots=True)
class Assign:
    """Run this request. The shell adds prompt, sampling and the tokens that earlier attempts already emitted."""

    instance: InstanceId
    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this request; answered by RequestFinished(reason="abort") if the instance had it, else by nothing."""

    instance: InstanceId
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Migrate:
    """Stop decoding this request and send its KV to `target`, which answers KVMigrated.

    A later Migrate of it replaces this one (its target was lost); without one, the source decodes it on when the target
    is gone. A request that is not here any more is answered by RequestFailed: its target may have died with it.
    """

    instance: InstanceId
    request_id: RequestId
    attempt: int
    target: InstanceId


@dataclass(frozen=True, slots=True)
class Reject:
    """End the request with an error. `code` is a gRPC status name."""

    request_id: RequestId
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class LoadFromDisk:
    """Read units [start_unit, L+2) from the instance's own checkpoint; ends in TransferEnded(ticket)."""

    instance: InstanceId
    ticket: int
    start_unit: int
    model: str


@dataclass(frozen=True, slots=True)
class KeepCopy:
    """Read the whole model from the own checkpoint into host memory, and keep it; ends in TransferEnded(ticket)."""

    instance: InstanceId
    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class UseCopy:
    """Become an instance of the own host copy, which is used up; ends in TransferEnded(ticket)."""

    instance: InstanceId
    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class DropCopy:
    """Forget what is kept of a model in host memory, whole or in part."""

    instance: InstanceId
    model: str


@dataclass(frozen=True, slots=True)
class PrepareTransfer:
    instance: InstanceId
    plan: MulticastPlan


@dataclass(frozen=True, slots=True)
class StartTransfer:
    instance: InstanceId
    ticket: int


@dataclass(frozen=True, slots=True)
class CancelTransfer:
    """Leave plan `ticket` as soon as the collective returns; always answered by TransferEnded."""

    instance: InstanceId
    ticket: int


@dataclass(frozen=True, slots=True)
class StartLive:
    """Sent to both sides of the pair."""

    instance: InstanceId
    pair: LivePair


@dataclass(frozen=True, slots=True)
class EndLive:
    """Sent to both sides: stop pulling; the new side keeps what it still has and finishes it alone."""

    instance: InstanceId
    pair: LivePair


@dataclass(frozen=True, slots=True)
class Release:
    """Be no instance any more: drop the parameters, or `keep` them as a host copy; answered by Drained."""

    instance: InstanceId
    keep: bool = False


Command: TypeAlias = (
    Assign | Abort | Migrate | Reject | LoadFromDisk | KeepCopy | UseCopy | DropCopy | PrepareTransfer | StartTransfer
    | CancelTransfer | StartLive | EndLive | Release
)
