"""How busy is the cluster? The numbers that the scaling policy looks at, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """One look at the cluster, `at` seconds on the shell's clock."""

    at: float
    instances: int  # LOADING, LIVE or SERVING; with split roles: that run prompts
    backlog_tokens: int  # prompt tokens queued, or assigned and without a first token
    used_pages: int  # KV pages promised to assigned requests
    pages_per_instance: int
    decoding: int = 0  # split roles: LOADING or SERVING instances that decode
    held_tokens: int = 0  # split roles: KV that has still to leave the instances that run prompts
