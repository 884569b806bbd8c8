"""Which systems are compared? One row of configuration each.

`source` and `live` are knobs of the live cluster; `host_ttl_s` says how long a host's memory keeps parameters after
their last use there, `share` which part of the cluster serves from the start, and whether that may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from blitzjax.types import LiveMode, Source


@dataclass(frozen=True, slots=True)
class System:
    name: str
    text: str
    source: Source = "multicast"
    live: LiveMode = "off"
    host_ttl_s: float = 0.0
    scatter: bool = False  # receivers get units in different orders and serve in pipelines before they are whole
    forecast_s: float = 0.0  # as in scale.forecast_s
    drain_by_moving: bool = False  # as in scale.drain_by_moving
    share: float | None = None  # fixed provision: this part of all instances serves, for ever; None: scales


SYSTEMS: Mapping[str, System] = MappingProxyType({s.name: s for s in (
    System("blitz", "multicast, live with ZigZag", live="zigzag"),
    System("blitz-best-effort", "multicast, live without ZigZag", live="best_effort"),
    System("blitz-forecast", "blitz, scaling for the backlog that a trend of 0.2 s foresees", live="zigzag",
           forecast_s=0.2),
    System("blitz-moving", "blitz, mixed instances that drain send their answers to others", live="zigzag",
           drain_by_moving=True),
    System("multicast", "multicast, stop the world", live="off"),
    System("lambda-scale", "like λScale: receivers with complementary blocks serve together until they are whole",
           scatter=True),
    System("network", "from peers one by one over the network, stop the world", source="unicast"),
    System("sllm", "ServerlessLLM: host memory for 30 s after the last use, else SSD", source="disk", host_ttl_s=30.0),
    System("allcache", "always from host memory", source="disk", host_ttl_s=inf),
    System("full", "every instance serves from the start", share=1.0),
    System("half", "half of the instances serve from the start", share=0.5),
)})
