"""Which ports does each instance have, and which hosts have which model in their memory?

Invariant: an instance's ports are those of its GPUs together; a host keeps a copy until `ttl_s` after its last use, and
of each model one host at most keeps the brain's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from blitzjax.control.topology import Port
from blitzjax.sim.costs import MachineCosts, bytes_per_s
from blitzjax.sim.links import Link
from blitzjax.types import InstanceId


@dataclass(frozen=True, slots=True)
class Ports:
    """Links of one instance: network, scale-up network, host memory, SSD."""

    host: str
    domain: str
    leaf: str
    nic_out: Link
    nic_in: Link
    fast_out: Link
    fast_in: Link
    pcie: Link
    ssd: Link

    def all(self) -> tuple[Link, ...]:
        return self.nic_out, self.nic_in, self.fast_out, self.fast_in, self.pcie, self.ssd


class Fleetports:
    """Ports of every instance of a machine, and the uplinks of its leaves."""

    def __init__(self, machine: MachineCosts, tensor_parallel: int) -> None:
        self._per_host = machine.gpus // tensor_parallel
        self._machine, self._tp = machine, tensor_parallel
        self._uplinks: dict[str, tuple[Link, Link]] = {}
        self.of: dict[InstanceId, Ports] = {}

    def add(self, name: InstanceId, number: int) -> Ports:
        """The `number`-th instance: hosts fill one after another."""
        m, tp = self._machine, self._tp
        host = number // self._per_host
        domain = number % self._per_host * tp // m.domain_gpus
        leaf = f"leaf{host // m.hosts_per_leaf}"

        def link(kind: str, gbps: float) -> Link:
            return Link(f"{kind}:{name}", tp * bytes_per_s(gbps))

        if m.uplink_gbps != inf and leaf not in self._uplinks:
            self._uplinks[leaf] = (Link(f"up:{leaf}", bytes_per_s(m.uplink_gbps)),
                                   Link(f"down:{leaf}", bytes_per_s(m.uplink_gbps)))
        ports = self.of[name] = Ports(
            f"h{host:03}", f"h{host:03}/{domain}", leaf, link("nic_out", m.nic_gbps), link("nic_in", m.nic_gbps),
            link("fast_out", m.fast_gbps), link("fast_in", m.fast_gbps), link("pcie", m.host_gbps),
            link("ssd", m.ssd_gbps))
        return ports

    def port(self, name: InstanceId) -> Port:
        """As the planner knows it."""
        ports, m = self.of[name], self._machine
        return Port(ports.host, ports.domain, ports.leaf, self._tp * m.nic_gbps, self._tp * m.fast_gbps)

    def route(self, a: InstanceId, b: InstanceId) -> list[Link]:
        """What a byte from `a` to `b` crosses."""
        source, target = self.of[a], self.of[b]
        if source.domain == target.domain:
            return [source.fast_out, target.fast_in]
        hops = [source.nic_out, target.nic_in]
        if source.leaf != target.leaf and self._uplinks:
            hops += [self._uplinks[source.leaf][0], self._uplinks[target.leaf][1]]
        return hops

    def links(self) -> list[Link]:
        return [link for ports in self.of.values() for link in ports.all()] + [
            link for pair in self._uplinks.values() for link in pair]


@dataclass(slots=True)
class HostCopies:
    """ServerlessLLM's host cache, and the copies that the brain orders. `ttl_s` 0 caches nothing; infinite everything,
    from the start (AllCache).
    """

    ttl_s: float
    _until: dict[tuple[str, str], float] = field(default_factory=dict)  # host, model → when its copy is dropped
    _users: Counter[tuple[str, str]] = field(default_factory=Counter)  # host, model → instances
    _ordered: dict[str, InstanceId] = field(default_factory=dict)  # model → who keeps it

    def hit(self, host: str, model: str, at: float) -> bool:
        if self.ttl_s == inf:
            return True
        return self.ttl_s > 0 and (self._users[host, model] > 0 or self._until.get((host, model), -inf) >= at)

    def hold(self, host: str, model: str) -> None:
        """An instance on `host` has the model now: a cached copy stays at least as long."""
        self._users[host, model] += 1

    def leave(self, host: str, model: str, at: float) -> None:
        self._users[host, model] -= 1
        self._until[host, model] = at + self.ttl_s

    def keep(self, model: str, instance: InstanceId) -> None:
        """By order of the brain; whole, or on its way."""
        assert self._ordered.setdefault(model, instance) == instance, f"{model} is kept twice"

    def drop(self, model: str) -> None:
        del self._ordered[model]

    def count(self, hosts: list[str], models: Iterable[str], at: float) -> int:
        """Copies in host memory."""
        cached = sum(self.hit(host, model, at) for model in models for host in hosts) if self.ttl_s else 0
        return cached + len(self._ordered)
