"""What came out of a run? Latencies of every request, GPU time, host memory, links, scale events.

Invariant: a request is counted once, when it ended.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Literal

from blitzjax.sim.links import Link
from blitzjax.commands import LoadFromDisk, PrepareTransfer, UseCopy
from blitzjax.types import InstanceId, Request

if TYPE_CHECKING:
    from blitzjax.sim.shell import Setup

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """`instance` was told to load at `start`, and had everything at `stop`."""

    ticket: int
    instance: InstanceId
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    instances: int  # that hold or receive the model
    host_copies: int
    requests: int  # arrived and not ended


@dataclass(slots=True)
class Outcome:
    """Filled by the shell while it runs. Times in virtual seconds."""

    setup: Setup
    arrived_s: array[float] = field(default_factory=lambda: array("d"))  # of every request that ended
    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    tpot_s: array[float] = field(default_factory=lambda: array("d"))  # mean gap between tokens; 0 for one token
    cold_ttft_s: array[float] = field(default_factory=lambda: array("d"))  # of those that found no instance
    rejects: int = 0
    scale_ups: list[ScaleUp] = field(default_factory=list)
    releases: list[tuple[float, InstanceId]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    instance_s: float = 0.0  # that instances held or received the model
    host_copy_s: float = 0.0
    end_s: float = 0.0
    links: dict[str, float] = field(default_factory=dict)  # "nic_out:i0003" → bytes that it carried
    _percentiles: dict[str, list[float]] = field(default_factory=dict)
    _first: dict[str, float] = field(default_factory=dict)
    _cold: set[str] = field(default_factory=set)
    _since: dict[InstanceId, float] = field(default_factory=dict)  # instances that hold or receive the model
    _told: dict[tuple[int, InstanceId], float] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        return len(self.ttft_s) + self.rejects

    @property
    def gpu_s(self) -> float:
        return self.instance_s * self.setup.model.tensor_parallel

    # ---- while it runs

    def first_token(self, request_id: str, at: float) -> None:
        self._first.setdefault(request_id, at)

    def came_cold(self, request_id: str) -> None:
        """No instance has all of its model."""
        self._cold.add(request_id)

    def finished(self, request: Request, at: float) -> None:
        first = self._first.pop(request.id)
        if request.id in self._cold:
            self._cold.remove(request.id)
            self.cold_ttft_s.append(first - request.arrival_s)
        self.arrived_s.append(request.arrival_s)
        self.ttft_s.append(first - request.arrival_s)
        self.tpot_s.append((at - first) / max(request.max_tokens - 1, 1))

    def rejected(self, request: Request) -> None:
        self._first.pop(request.id, None)
        self.rejects += 1

    def scaling(self, command: PrepareTransfer | LoadFromDisk | UseCopy, at: float) -> None:
        """An instance is told to receive, or to send."""
        if not isinstance(command, PrepareTransfer):
            ticket, receives = command.ticket, True
        else:
            ticket = command.plan.ticket
            targets = [] if command.plan.copy else [i for chain in command.plan.chains for i in chain.instances[1:]]
            receives = command.instance in targets
        if receives:
            self.occupy(command.instance, at)
            self._told[ticket, command.instance] = at

    def loaded(self, instance: InstanceId, ticket: int, at: float) -> None:
        start = self._told.pop((ticket, instance), None)
        if start is not None:
            self.scale_ups.append(ScaleUp(ticket, instance, start, at))

    def occupy(self, instance: InstanceId, at: float) -> None:
        self._since.setdefault(instance, at)

    def vacate(self, instance: InstanceId, at: float) -> None:
        self.instance_s += at - self._since.pop(instance)
        self.releases.append((at, instance))

    def sample_is_due(self, at: float) -> bool:
        """Once a second."""
        return not self.samples or at >= self.samples[-1].at + 1 - 1e-6

    def sample(self, at: float, host_copies: int, requests: int) -> None:
        self._count_copies(at)
        self.samples.append(Sample(at, len(self._since), host_copies, requests))

    def _count_copies(self, until: float) -> None:
        """Those of the last sample were there since."""
        if self.samples:
            self.host_copy_s += self.samples[-1].host_copies * (until - self.samples[-1].at)

    def close(self, at: float, links: Iterable[Link]) -> None:
        self.end_s = at
        self._count_copies(at)
        self.instance_s += sum(at - since for since in self._since.values())
        self.links = {link.name: link.carried for link in links}

    # ---- afterwards

    def percentiles(self, of: Literal["ttft", "tpot"]) -> list[float]:
        """From 0 to 100; the values, which may be millions, are sorted once."""
        if of not in self._percentiles:
            self._percentiles[of] = quantiles(self.ttft_s if of == "ttft" else self.tpot_s, range(101))
        return self._percentiles[of]

    @property
    def link_bytes(self) -> dict[str, float]:
        """By kind of link, all instances together."""
        found: dict[str, float] = {}
        for name, carried in self.links.items():
            kind = name.partition(":")[0]
            found[kind] = found.get(kind, 0.0) + carried
        return found

    def violations(self, ttft_s: float, tpot_s: float) -> float:
        """Share of requests that missed either limit, or were rejected."""
        missed = sum(t > ttft_s or gap > tpot_s for t, gap in zip(self.ttft_s, self.tpot_s))
        return (missed + self.rejects) / max(self.ended, 1)


def quantiles(values: Iterable[float], percents: Iterable[float]) -> list[float]:
    """Nearest rank; zeros without values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return [ordered[min(last, max(0, ceil(len(ordered) * p / 100) - 1))] if ordered else 0.0 for p in percents]


def mean(values: array[float]) -> float:
    return sum(values) / len(values) if values else 0.0
