"""How many instances does the load ask for? The token-backlog policy of BlitzScale's scheduler for mixed instances.

`step(load, memory) -> (target, memory)`: a pure function with explicit memory. Up at once to the middle of the band,
down one by one and only after the load asked for fewer during `down_after_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from blitzjax.config import ScaleConfig
from blitzjax.control.load import Load


@dataclass(frozen=True, slots=True)
class Memory:
    """`low_since`: when the load began to ask for fewer instances, in seconds; None while it does not."""

    low_since: float | None = None


def band(load: Load, config: ScaleConfig) -> tuple[int, int]:
    """(n_min, n_max) instances between which nothing changes.

    W tokens of backlog against a prefill rate rho: ceil(W / (upper rho)) and ceil(W / (lower rho)); used pages against
    the pages of an instance likewise; the larger need wins.
    """
    rate, pages = config.prefill_tokens_per_s, max(load.pages_per_instance, 1)
    low = max(ceil(load.backlog_tokens / (config.prefill_upper * rate)),
              ceil(load.used_pages / (config.kv_upper * pages)))
    high = max(ceil(load.backlog_tokens / (config.prefill_lower * rate)),
               ceil(load.used_pages / (config.kv_lower * pages)))
    return low, max(low, high)


def step(load: Load, memory: Memory, config: ScaleConfig) -> tuple[int, Memory]:
    """The number of instances to have now, within [min_instances, max_instances]."""
    low, high = band(load, config)
    n = load.instances
    if low > n:
        return _clamp((low + high + 1) // 2, config), Memory()
    if _clamp(high, config) >= n:
        return _clamp(n, config), Memory()
    since = load.at if memory.low_since is None else memory.low_since
    if load.at - since < config.down_after_s:
        return _clamp(n, config), Memory(since)
    return _clamp(n - 1, config), Memory(load.at)


def _clamp(n: int, config: ScaleConfig) -> int:
    return max(config.min_instances, min(n, config.max_instances))
