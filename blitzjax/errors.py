"""The exception tree. Everything the outside world can cause is a BlitzError; our own mistakes are AssertionErrors.

BlitzError
├── InvalidRequest     the caller's fault: message names the limit           → INVALID_ARGUMENT
├── UnknownModel       no such model is served                              → NOT_FOUND
├── Unauthenticated    the API key is wrong or missing                       → UNAUTHENTICATED
├── QueueFull          accepted work is bounded                              → RESOURCE_EXHAUSTED
├── Unavailable        nothing can serve this now (draining, no instance)    → UNAVAILABLE
├── CheckpointError    a checkpoint is missing, truncated or corrupt; names the tensor
├── TransferError      a multicast or hand-off broke (peer died, timeout, checksum)
├── ConfigError        an unknown or ill-typed knob; names it
└── IllegalMove        a lifecycle transition that control/lifecycle.py does not list
"""

from __future__ import annotations

_MOST_BYTES = 2048  # 6 KB percent-encoded; gRPC refuses metadata above 8 KB now and then, above 16 KB always


class BlitzError(Exception):
    """Root of everything that is not a bug. `code` is the gRPC status name that the frontend answers with."""

    code = "INTERNAL"


class InvalidRequest(BlitzError):
    code = "INVALID_ARGUMENT"


class UnknownModel(BlitzError):
    code = "NOT_FOUND"


class Unauthenticated(BlitzError):
    code = "UNAUTHENTICATED"


class QueueFull(BlitzError):
    code = "RESOURCE_EXHAUSTED"


class Unavailable(BlitzError):
    code = "UNAVAILABLE"


class CheckpointError(BlitzError):
    code = "FAILED_PRECONDITION"


class TransferError(BlitzError):
    code = "UNAVAILABLE"


class ConfigError(BlitzError):
    code = "INVALID_ARGUMENT"


class IllegalMove(BlitzError):
    code = "FAILED_PRECONDITION"


def brief(message: str) -> str:
    """As much of it as a gRPC status may say: longer ones do not arrive, and the caller gets another status instead."""
    said = message.encode(errors="replace")
    return said[:_MOST_BYTES].decode(errors="ignore") + "..." * (len(said) > _MOST_BYTES)


def reason(error: Exception) -> str:
    """What else went wrong, in a few words: for a sentence that says where."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
