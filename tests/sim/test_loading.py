"""Calibration points of the paper: how long parameters take, by chain, by unicast, by lanes, next to other traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blitzjax.sim import costs
from blitzjax.sim.chains import ChainFlow
from blitzjax.sim.clock import Clock
from blitzjax.sim.hosts import Fleetports, HostCopies
from blitzjax.sim.instance import SimInstance
from blitzjax.sim.links import Fabric, Link
from blitzjax.sim.loading import Loading
from blitzjax.sim.shell import Setup, config_of
from blitzjax.sim.systems import SYSTEMS
from blitzjax.commands import LoadFromDisk, PrepareTransfer, StartTransfer
from blitzjax.events import Event, LayerLoaded, TransferEnded
from blitzjax.types import Chain, MulticastPlan

A, M24 = costs.MACHINES["A"], costs.MODELS["mistral-24b"]
SPREAD = replace(A, hosts=64, gpus=2)  # one 24B instance a host: every hop crosses the network


class Bench:
    """`count` instances without a brain."""

    def __init__(self, machine: costs.MachineCosts, count: int, ttl_s: float = 0.0) -> None:
        self.clock, self.events = Clock(), list[Event]()
        self.ports = Fleetports(machine, M24.tensor_parallel)
        config = config_of(Setup(machine, M24, SYSTEMS["multicast"], count))
        self.instances = {f"i{k}": SimInstance(f"i{k}", config, M24, self.clock, self.events.append,
                                               lambda name: self.instances[name], lambda *a: 0.0, lambda *a: None, 0.0)
                          for k in range(count)}
        for k, name in enumerate(self.instances):
            self.ports.add(name, k)
        self.fabric = Fabric(self.clock)
        self.loading = Loading(self.clock, self.fabric, machine, M24, self.ports, HostCopies(ttl_s), self.instances,
                               self.events.append)

    def multicast(self, *chains: Chain) -> dict[str, float]:
        """When each member is done."""
        plan = MulticastPlan(1, M24.spec.name, chains)
        for chain in chains:
            self.instances[chain.instances[0]].units = M24.spec.units
        for command in (PrepareTransfer("i0", plan), StartTransfer("i0", 1)):
            self.loading.obey(command)
        self.clock.run()
        return {e.instance: e.at for e in self.events if isinstance(e, TransferEnded)}


def chain(*names: int, lane: int = 0, lanes: int = 1) -> Chain:
    return Chain(tuple(f"i{k}" for k in names), 0, M24.spec.units, 0, lane, lanes)


def test_a_chain_takes_the_same_time_however_long_and_unicast_grows_with_every_target() -> None:
    """Criterion (iii): flat within 5 % up to 63 targets; one source's unicasts share its port."""
    alone = max(Bench(SPREAD, 2).multicast(chain(0, 1)).values())
    assert alone == pytest.approx(23.6 * 8 / 100, rel=1e-3)
    long = max(Bench(SPREAD, 64).multicast(chain(*range(64))).values())
    assert long == pytest.approx(alone, rel=0.05) and long > alone
    unicast = max(Bench(SPREAD, 7).multicast(*[chain(0, k) for k in range(1, 7)]).values())
    assert unicast == pytest.approx(6 * alone, rel=1e-3)


def test_six_24b_instances_on_cluster_a_take_about_a_second_by_two_lanes() -> None:
    """Figure 21: 1.2 s in the paper against 2.0 s of AllCache. Two sources on one host, two lanes, targets on two."""
    bench = Bench(A, 12)
    done = bench.multicast(chain(0, 4, 6, 8, lane=0, lanes=2), chain(1, 5, 7, 9, lane=1, lanes=2))
    assert max(done.values()) == pytest.approx(1.0, abs=0.1)
    first = min(e.at for e in bench.events if isinstance(e, LayerLoaded))
    assert first < 0.1
    cached = Bench(A, 12, ttl_s=float("inf"))
    for k in range(6):
        cached.loading.obey(LoadFromDisk(f"i{k}", k, 0, "toy"))
    cached.clock.run()
    assert 1.4 < cached.clock.now < 2.2


def test_members_near_the_source_do_not_wait_for_those_behind_a_slow_hop() -> None:
    done = Bench(A, 8).multicast(chain(0, 1, 2, 4, 5))  # 0, 1, 2 share NVLink, 4 and 5 are on the next host
    assert done["i1"] == pytest.approx(23.6 * 8 / 1600, rel=0.01) and done["i2"] < 0.13
    assert done["i4"] == pytest.approx(23.6 * 8 / 100, rel=0.01) and done["i5"] == pytest.approx(done["i4"], rel=0.01)


def test_a_member_has_nothing_that_the_one_before_it_lacks() -> None:
    """The first hop is faster, until other traffic slows it down to a tenth of the second."""
    clock, seen = Clock(), list[tuple[int, int]]()
    fabric, fast, slow = Fabric(clock), Link("fast", 100), Link("slow", 50)
    ChainFlow(fabric, [[fast], [slow]], [0, 100, 200, 300], 0, 1.0, False,
              lambda m, u: seen.append((m, u)), lambda: None)
    for _ in range(19):
        fabric.begin([fast], [1000.0], lambda mark: None)
    clock.run()
    assert seen == [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3)]


def test_a_source_that_sends_kv_too_takes_longer() -> None:
    """Criterion (v), figure 8: half of the port is taken for as long as KV flows, here half of the time: x 1.5."""
    bench = Bench(SPREAD, 3)
    kv = M24.param_bytes / 2
    bench.fabric.begin(bench.ports.route("i0", "i2"), [kv], lambda mark: None)
    assert bench.multicast(chain(0, 1))["i1"] == pytest.approx(1.5 * 23.6 * 8 / 100, rel=1e-3)
