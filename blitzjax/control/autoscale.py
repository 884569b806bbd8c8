"""How many instances does the load ask for? The policy of BlitzScale's scheduler, for mixed and for split roles.

`step(load, memory) -> (target, memory)`: a pure function with explicit memory. Up at once to the middle of the band,
down one by one and only after the load asked for fewer during `down_after_s`, to none after `zero_after_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from blitzjax.config import ScaleConfig
from blitzjax.control.load import Load


@dataclass(frozen=True, slots=True)
class Memory:
    """`low_since`: when the load began to ask for fewer instances, in seconds; None while it does not. `backlogs`: what
    was queued, as (seconds, tokens), during the last `forecast_s`.
    """

    low_since: float | None = None
    backlogs: tuple[tuple[float, int], ...] = ()


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


def split_bands(load: Load, config: ScaleConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(n_min, n_max) of the instances that run prompts, and of those that decode (section 7.1 of our notes).

    Prompts: backlog W against the prefill rate, as for mixed instances. Decoding: pages of every request, those still
    at prefill included, so that decode grows together with prefill; and the KV waiting there against what the present
    decode instances receive. The latter can also say that there is too little prefill, but only from below.
    """
    rate, pages = config.prefill_tokens_per_s, max(load.pages_per_instance, 1)
    receive = max(load.decoding, 1) * config.migrate_tokens_per_s
    kv_low = ceil(load.held_tokens / (config.migrate_upper * receive))
    kv_high = ceil(load.held_tokens / (config.migrate_lower * receive))
    decode_low = max(ceil(load.used_pages / (config.kv_upper * pages)), kv_low)
    decode_high = max(ceil(load.used_pages / (config.kv_lower * pages)), kv_high, decode_low)
    prefill_low = max(ceil(load.backlog_tokens / (config.prefill_upper * rate)), kv_low)
    prefill_high = max(ceil(load.backlog_tokens / (config.prefill_lower * rate)), prefill_low)
    return (prefill_low, prefill_high), (decode_low, decode_high)


def foresee(load: Load, memory: Memory, config: ScaleConfig) -> tuple[Load, Memory]:
    """The load in `forecast_s`, if the backlog goes on growing as it did during the last `forecast_s`."""
    if not config.forecast_s:
        return load, memory
    kept = [(at, tokens) for at, tokens in memory.backlogs if at >= load.at - config.forecast_s - 1e-9]
    growth = max(0, load.backlog_tokens - kept[0][1]) if kept else 0
    memory = replace(memory, backlogs=(*kept, (load.at, load.backlog_tokens)))
    return replace(load, backlog_tokens=load.backlog_tokens + growth), memory


def step(load: Load, memory: Memory, config: ScaleConfig) -> tuple[int, Memory]:
    """The number of instances to have now, within [min_instances, max_instances]."""
    load, memory = foresee(load, memory, config)
    patience_s = config.zero_after_s if load.instances <= 1 else config.down_after_s
    return _follow(load.instances, band(load, config), config.min_instances, config.max_instances, load.at, memory,
                   patience_s)


def step_split(load: Load, prefill: Memory, decode: Memory,
               config: ScaleConfig) -> tuple[tuple[int, Memory], tuple[int, Memory]]:
    """Instances that should run prompts, and that should decode, together at most max_instances: decode goes first."""
    load, prefill = foresee(load, prefill, config)
    prefill_band, decode_band = split_bands(load, config)
    most = config.max_instances - config.min_instances
    decoding, decode = _follow(load.decoding, decode_band, config.min_decode, most, load.at, decode,
                               config.down_after_s)
    most = config.max_instances - decoding
    running, prefill = _follow(load.instances, prefill_band, config.min_instances, most, load.at, prefill,
                               config.down_after_s)
    return (running, prefill), (decoding, decode)


def _follow(n: int, wanted: tuple[int, int], least: int, most: int, at: float, memory: Memory,
            down_after_s: float) -> tuple[int, Memory]:
    def clamp(count: int) -> int:
        return max(least, min(count, most))

    low, high = wanted
    if low > n:
        return clamp((low + high + 1) // 2), replace(memory, low_since=None)
    if clamp(high) >= n:
        return clamp(n), replace(memory, low_since=None)
    since = at if memory.low_since is None else memory.low_since
    if at - since < down_after_s:
        return clamp(n), replace(memory, low_since=since)
    return clamp(n - 1), replace(memory, low_since=at)
