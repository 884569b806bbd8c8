"""How instances come, go live, break and go: the brain against a world that answers its commands."""

from __future__ import annotations

from dataclasses import replace

from fake_world import SPEC, World, config, serving

from blitzjax import events, types as t
from blitzjax.config import ClusterConfig
from blitzjax.control.cluster import Cluster
from blitzjax.control.topology import Port
from blitzjax.commands import (
    Assign, CancelTransfer, EndLive, LoadFromDisk, PrepareTransfer, Release, StartLive, StartTransfer,
)
from blitzjax.types import LivePair, Phase

SERVING, LOADING, LIVE, IDLE, DRAINING, FAILED = (
    Phase.SERVING, Phase.LOADING, Phase.LIVE, Phase.IDLE, Phase.DRAINING, Phase.FAILED)


def chains(world: World) -> list[tuple[str, ...]]:
    return [chain.instances for _, chain in world.brain.status().chains]


# ---- boot


def test_where_nobody_serves_all_read_their_own_disks_at_once() -> None:
    """Also one that joins while another reads; whoever comes once one serves gets it by multicast."""
    world = World(3, config(min_instances=2))
    assert world.join("i0") == [LoadFromDisk("i0", 1, 0, "toy")] and world.join("i1") == [LoadFromDisk("i1", 2, 0, "toy")]
    world.join("i2")
    assert world.phases() == [LIVE, LIVE, IDLE]
    world.settle()
    assert world.sent(PrepareTransfer) == [] and world.phases() == [SERVING, SERVING, IDLE]
    world.scale(3)
    world.settle()
    assert len(world.sent(LoadFromDisk)) == 2 and len(world.sent(PrepareTransfer)) >= 2
    assert world.phases() == [SERVING] * 3


def test_whoever_cannot_read_its_disk_at_a_cold_start_gets_it_from_the_first_that_serves() -> None:
    world = World(2, config(min_instances=2))
    world.disk_fails.add("i1")
    world.join("i0"), world.join("i1")
    world.settle()
    assert [c.instance for c in world.sent(PrepareTransfer)] == ["i0", "i1"] and world.phases() == [SERVING, SERVING]


def test_the_first_instance_is_live_alone_unless_live_is_off() -> None:
    for live, phase, owner in (("zigzag", LIVE, "i0"), ("off", LOADING, None)):
        world = World(1, config(live=live))
        world.join("i0")
        assert world.of("i0").phase is phase and world.of("i0").partner is None
        assigned = [c.instance for c in world.arrive("r") if isinstance(c, Assign)]
        assert assigned == ([owner] if owner else []) and world.of("i0").units == 0
        world.settle(compute=True)
        assert world.phases() == [SERVING] and world.ended == {"r": "length"}
        assert world.sent(StartLive) == []


def test_requests_of_an_instance_that_dies_live_alone_run_elsewhere() -> None:
    world = World(2, config())
    world.join("i0"), world.join("i1"), world.arrive("r")
    world.deliver("i0"), world.obey("i0"), world.kill("i0")
    world.settle(compute=True)
    assert world.ended == {"r": "length"} and world.of("i1").phase is SERVING


def test_requests_of_an_instance_that_cannot_load_live_alone_run_elsewhere() -> None:
    world = World(2, config())
    world.disk_fails.add("i0")
    world.join("i0"), world.arrive("r")
    assert world.of("i0").waiting == 1
    world.settle()  # given up: it is released, and what it was to run waits
    assert world.phases() == [IDLE] and world.brain.status().queued == 1
    world.join("i1"), world.settle(compute=True)
    assert world.ended == {"r": "length"} and world.of("i1").phase is SERVING


def test_a_worker_that_kept_its_parameters_serves_at_once() -> None:
    world = World(1, config())
    assert world.join("i0", SPEC.units) == [] and world.phases() == [SERVING]


def test_a_partial_copy_is_not_loaded_again() -> None:
    world = World(1, config())
    assert world.join("i0", 3) == [LoadFromDisk("i0", 1, 3, "toy")]


def test_without_the_world_an_instance_waits_five_seconds_then_reads_its_disk() -> None:
    world = World(2, config(min_instances=2))
    world.join("i0", SPEC.units)
    assert world.join("i1", world=False) == [] and world.tick(4.9) == []
    commands = world.tick(0.1)
    assert commands[0] == LoadFromDisk("i1", 1, 0, "toy") and world.of("i1").phase is LIVE


def test_the_world_in_time_means_multicast() -> None:
    world = World(2, config(min_instances=2))
    world.join("i0", SPEC.units), world.join("i1", world=False), world.tick(4.0)
    commands = world.send(events.WorldJoined(4.0, "i1"))
    assert [type(c) for c in commands] == [PrepareTransfer, PrepareTransfer]


# ---- scale-up


def test_nobody_starts_before_everybody_is_ready() -> None:
    world = serving(3)
    commands = world.scale(3)
    assert [(type(c), c.instance) for c in commands] == [(PrepareTransfer, i) for i in ("i0", "i1", "i2")]
    assert world.send(events.TransferReady(0.0, "i1", 1)) == world.send(events.TransferReady(0.0, "i0", 1)) == []
    pair = LivePair("i0", "i2", "zigzag")
    assert world.send(events.TransferReady(0.0, "i2", 1)) == [
        StartTransfer("i0", 1), StartTransfer("i1", 1), StartTransfer("i2", 1), StartLive("i2", pair),
        StartLive("i0", pair)]
    assert world.phases() == [SERVING, LOADING, LIVE]  # only the tail goes live


def test_how_to_scale_is_remembered_until_there_is_somebody_to_scale_to() -> None:
    world = World(2, replace(config(), cluster=ClusterConfig(pool=2)))
    world.join("i0", SPEC.units)
    assert world.scale(2, live="off") == []
    world.tick()
    world.join("i1")
    for name in ("i0", "i1"):
        world.send(events.TransferReady(world.at, name, 1))
    assert world.phases() == [SERVING, LOADING]


def test_a_burst_scales_up_live_and_ends_with_two_equals() -> None:
    world = serving(2, policy="auto", prefill_tokens_per_s=100.0, max_instances=2)
    for k in range(6):
        world.arrive(f"r{k}", prompt=60)
    assert isinstance(world.tick()[0], PrepareTransfer)
    world.exchange()
    assert world.phases() == [SERVING, LIVE] and world.of("i1").partner == "i0"
    assert {c.instance for c in world.sent(Assign)[-2:]} == {"i1"}
    for units in range(1, SPEC.units + 1):
        assert world.load("i1") and world.deliver("i1") and world.of("i1").units == units
    assert world.send(events.LiveDrained(world.at, "i0")) == []  # OLD knows before the brain does
    commands = world.load("i1") and world.send(world.workers["i1"].outbox.popleft())
    pair = LivePair("i0", "i1", "zigzag")
    assert commands[:2] == [EndLive("i0", pair), EndLive("i1", pair)] and world.phases() == [SERVING, SERVING]
    world.exchange()
    world.settle(compute=True)
    assert not world.open


def test_old_takes_nothing_from_the_queue_while_its_partner_loads() -> None:
    world = serving(2)
    world.scale(2)
    world.exchange()
    commands = [world.arrive(f"r{k}", prompt=8)[0] for k in range(4)]
    assert [c.instance for c in commands] == ["i1"] * 4
    assert world.arrive("r4", prompt=8) == []  # NEW has no slot left
    world.settle()
    assert world.of("i0").waiting == 1  # loaded: both take


def test_live_off_loads_and_serves() -> None:
    world = serving(2)
    world.scale(2, live="off")
    world.exchange()
    assert world.phases() == [SERVING, LOADING] and world.sent(StartLive) == []
    world.settle()
    assert world.phases() == [SERVING, SERVING]


def test_unicast_serves_one_target_a_source_and_receivers_do_not_send() -> None:
    world = serving(5, 1, source="unicast", live="off")
    world.scale(5), world.settle()
    assert [c.plan.chains[0].instances for c in world.sent(PrepareTransfer)[::2]] == [
        ("i0", "i1"), ("i0", "i2"), ("i0", "i3"), ("i0", "i4")]


def test_parameters_enter_each_leaf_once() -> None:
    world = World(5, config(min_instances=1))
    for k, leaf in enumerate("abaab"):
        world.join(f"i{k}", 0 if k else SPEC.units, host=f"h{k}", leaf=leaf)
    world.settle()
    world.scale(5), world.exchange()
    assert [chain.instances for _, chain in world.brain.status().chains] == [("i0", "i2", "i3", "i1", "i4")]
    world.settle()


def test_a_dead_member_of_one_lane_breaks_the_others_and_all_is_planned_again() -> None:
    """Two sources, two targets in a fast domain: lanes; what arrived stays, the rest comes from the other source."""
    ports = {f"i{k}": Port(f"h{k // 2}", f"h{k // 2}", "", 100.0, 1600.0) for k in range(4)}
    world = World(4, config(min_instances=2), cluster=lambda config, spec: Cluster(config, spec, ports))
    for k in range(4):
        world.join(f"i{k}", SPEC.units if k < 2 else 0)
    world.settle()
    world.scale(4), world.exchange()
    assert [chain.lanes for _, chain in world.brain.status().chains] == [2, 2]
    world.load("i2"), world.load("i3"), world.exchange()
    commands = world.kill("i0")
    assert {c.instance for c in commands if isinstance(c, CancelTransfer)} == {"i1", "i2", "i3"}
    world.exchange()
    assert {(chain.start_unit, chain.lanes) for _, chain in world.brain.status().chains} == {(1, 1)}
    world.settle()
    assert world.phases() == [FAILED, SERVING, SERVING, SERVING]


def test_disk_source_pairs_with_the_busiest() -> None:
    world = serving(3, 2)
    world.arrive("r0"), world.arrive("r1", prompt=64)
    pair = LivePair("i1", "i2", "best_effort")
    assert world.scale(3, "best_effort", "disk") == [LoadFromDisk("i2", 1, 0, "toy"), StartLive("i2", pair),
                                                     StartLive("i1", pair)]


def test_manual_scale_from_one_to_three_is_not_undone_at_once() -> None:
    world = serving(3, policy="auto")
    world.scale(3)
    world.settle(), world.tick(4.9)
    assert world.phases() == [SERVING] * 3 and world.brain.status().target == 3
    world.settle(compute=True)
    world.tick(0.2), world.tick(5.1)
    assert world.brain.status().target == 2


def test_two_sources_make_two_live_chains() -> None:
    world = serving(4, 2)
    world.scale(4)
    world.exchange()
    assert chains(world) == [("i0", "i2"), ("i1", "i3")]
    assert world.phases() == [SERVING, SERVING, LIVE, LIVE]


# ---- failures


def test_a_dead_source_is_replaced_and_arrived_units_stay() -> None:
    world = serving(3, 2)
    world.scale(3)
    world.exchange()
    for _ in range(3):
        world.load("i2"), world.deliver("i2")
    world.log.clear()
    commands = world.kill("i0")
    assert CancelTransfer("i2", 1) in commands and world.sent(PrepareTransfer) == []  # i2 has not left yet
    world.exchange()
    (chain,) = [c.plan.chains[0] for c in world.sent(PrepareTransfer) if c.instance == "i2"]
    assert chain == t.Chain(("i1", "i2"), 3, 6, 0)
    world.settle()
    assert world.of("i2").phase is SERVING


def test_the_last_source_dies_and_the_rest_comes_from_disk() -> None:
    world = serving(2)
    world.scale(2)
    world.exchange()
    world.load("i1"), world.load("i1"), world.exchange()
    world.arrive("a")
    world.kill("i0")
    assert world.phases() == [FAILED, LIVE] and world.of("i1").waiting == 1
    assert any(isinstance(c, Assign) and c.instance == "i1" for c in world.arrive("b"))  # nobody else serves
    world.exchange()
    assert world.sent(LoadFromDisk) == [LoadFromDisk("i1", 2, 2, "toy")]
    world.settle(compute=True)
    assert world.phases() == [FAILED, SERVING] and world.ended == {"a": "length", "b": "length"}


def test_who_left_a_broken_chain_does_not_wait_for_one_that_hangs_in_it() -> None:
    """The last of a chain notices that its source is dead when the collective times out."""
    world = serving(3)
    world.scale(3, live="off"), world.exchange()
    for _ in range(2):
        world.load("i1"), world.load("i2")
    world.exchange()
    world.kill("i0"), world.obey("i1"), world.deliver("i1")
    first = next(c.plan.chains[0].instances[1] for c in world.sent(PrepareTransfer))
    assert first == "i1" and world.sent(LoadFromDisk) == [] == world.tick(0.4)
    assert world.tick(0.2) == [LoadFromDisk("i1", 2, 2, "toy")]
    for _ in range(9):
        world.obey("i1"), world.load("i1"), world.deliver("i1")
    assert world.phases() == [FAILED, SERVING, LOADING] and world.workers["i2"].jobs
    world.settle()
    assert world.phases() == [FAILED, SERVING, SERVING] and len(world.sent(LoadFromDisk)) == 1


def test_every_instance_on_its_way_executes_alone_once_the_last_that_served_is_gone() -> None:
    """The chain's middle, and a NEW side whose OLD died while another served."""
    world = serving(5, 2)
    world.scale(5), world.exchange()
    (old, new), = [(i.id, i.partner) for i in world.brain.status().instances if i.partner and i.phase is SERVING][:1]
    world.kill(old)
    (other,) = [i.id for i in world.brain.status().instances if i.phase is SERVING]
    assert world.of(new).phase is LOADING
    world.kill(other)
    assert sorted(p.value for p in world.phases()) == ["failed", "failed", "live", "live", "live"]
    assigned = {c.instance for n in range(3) for c in world.arrive(f"r{n}") if isinstance(c, Assign)}
    assert len(assigned) == 3
    world.settle(compute=True)
    assert set(world.ended.values()) == {"length"} and world.phases().count(SERVING) == 3


def test_with_live_off_nothing_goes_on_alone() -> None:
    world = serving(2)
    world.scale(2, live="off"), world.exchange()
    world.kill("i0")
    assert world.phases() == [FAILED, LOADING] and world.arrive("a") == []
    world.settle(compute=True)
    assert world.ended == {"a": "length"}


def test_the_same_members_form_another_clique_after_a_failure() -> None:
    world = serving(2)
    world.multicast_fails = {"i1"}
    world.scale(2)
    world.exchange()
    world.load("i1")
    world.multicast_fails = set()
    world.settle()
    plans = [c.plan for c in world.sent(PrepareTransfer) if c.instance == "i1"]
    assert [p.chains[0].generation for p in plans] == [0, 1] and [p.ticket for p in plans] == [1, 2]
    assert world.phases() == [SERVING, SERVING]


def test_members_of_a_restarted_process_form_another_clique() -> None:
    world = serving(2)
    world.scale(2), world.settle()
    world.kill("i1"), world.join("i1"), world.settle()
    assert world.sent(PrepareTransfer)[-1].plan.chains[0].generation == 1


def test_a_middle_member_dies_before_the_start() -> None:
    world = serving(4)
    world.scale(4)
    world.obey("i0"), world.deliver("i0"), world.obey("i2"), world.deliver("i2")
    commands = world.kill("i1")
    assert {c.instance for c in commands if isinstance(c, CancelTransfer)} == {"i0", "i2", "i3"}
    world.settle()
    assert world.phases() == [SERVING, FAILED, SERVING, SERVING] and chains(world) == []


def test_after_three_failures_the_target_is_given_up() -> None:
    world = serving(2)
    world.multicast_fails = {"i1"}
    world.scale(2)
    world.arrive("r")
    world.exchange()
    world.settle()
    assert len([c for c in world.sent(PrepareTransfer) if c.instance == "i1"]) == 3
    assert world.sent(Release) == [Release("i1")] and world.brain.status().target == 1
    assert world.phases() == [SERVING, IDLE] and world.of("i1").units == 0
    world.settle(compute=True)
    assert not world.open


def test_a_checkpoint_that_cannot_be_read_is_not_retried_in_a_hot_loop() -> None:
    world = World(1, config())
    world.disk_fails = {"i0"}
    world.join("i0"), world.settle(), world.tick(5.0)
    assert len(world.sent(LoadFromDisk)) == 3 and world.phases() == [IDLE]
    world.disk_fails = set()
    world.tick(5.0), world.settle()
    assert world.phases() == [SERVING]


def live_pair() -> World:
    world = serving(2)
    world.arrive("own")
    world.scale(2)
    world.exchange()
    world.arrive("a")
    world.exchange()
    world.log.clear()
    return world


def test_new_dies_and_old_serves_everything() -> None:
    world = live_pair()
    commands = world.kill("i1")
    assert EndLive("i0", LivePair("i0", "i1", "zigzag")) in commands and Assign("i0", "a", 2) in commands
    assert not any(isinstance(c, EndLive) and c.instance == "i1" for c in commands)
    world.settle(compute=True)
    assert set(world.ended) == {"own", "a"}


def test_old_that_is_not_the_source_dies_and_new_loads_on_alone() -> None:
    world = serving(3, 2)
    world.scale(3)
    world.exchange()
    world.arrive("a", prompt=8), world.arrive("b", prompt=8)
    world.send(events.InstanceLost(0.0, "i0", "x"))
    assert world.of("i2").phase in (LOADING, LIVE)
    world.workers["i0"].up = False
    world.workers["i0"].jobs.clear(), world.workers["i0"].inbox.clear()
    world.settle(compute=True)
    assert not world.open and world.of("i2").phase is SERVING


def test_another_process_under_a_known_name_is_a_loss_and_a_join() -> None:
    world = live_pair()
    world.join("i1")
    assert Assign("i0", "a", 2) in world.log
    world.settle(compute=True)
    assert world.phases() == [SERVING, SERVING] and not world.open


# ---- scale-down


def test_the_emptiest_instance_drains_then_releases() -> None:
    world = serving(2, 2)
    world.arrive("r0"), world.arrive("r1"), world.arrive("r2", prompt=8)
    world.exchange()
    emptiest = min(("i0", "i1"), key=lambda i: world.of(i).waiting)
    assert world.scale(1) == [] and world.of(emptiest).phase is DRAINING
    assert world.arrive("late", prompt=8)[0].instance != emptiest
    world.settle(compute=True)
    assert world.sent(Release) == [Release(emptiest)] and world.of(emptiest).phase is IDLE
    assert world.of(emptiest).units == 0 and not world.open


def test_a_draining_instance_is_revived_without_a_transfer() -> None:
    world = serving(2, 2)
    world.arrive("r0"), world.arrive("r1")
    world.scale(1)
    assert DRAINING in world.phases()
    assert world.scale(2) == [] and world.phases() == [SERVING, SERVING]


def test_a_draining_instance_is_revived_when_the_last_serving_one_dies() -> None:
    world = serving(2, 2)
    world.arrive("r0"), world.arrive("r1")
    world.scale(1)
    drained = next(i.id for i in world.brain.status().instances if i.phase is DRAINING)
    world.kill("i0" if drained == "i1" else "i1")
    assert world.of(drained).phase is SERVING


def test_the_last_serving_instance_and_paired_ones_stay() -> None:
    world = live_pair()
    world.scale(1)
    assert world.phases() == [SERVING, LIVE] and world.sent(Release) == []


def test_the_last_serving_instance_stays_while_others_only_load() -> None:
    world = serving(2)
    world.scale(2, "off", "disk")
    world.scale(1)
    assert world.phases() == [SERVING, LOADING]
    world.settle()
    assert sorted(p.value for p in world.phases()) == ["idle", "serving"]


def test_idle_instances_drain_one_by_one_under_the_policy() -> None:
    world = serving(3, 3, policy="auto")
    counts = []
    for _ in range(30):
        world.tick(1.0), world.settle()
        counts.append(world.phases().count(SERVING))
    assert set(counts) == {3}  # min_instances holds
    world = serving(3, policy="auto")
    world.scale(3), world.settle()
    counts = []
    for _ in range(30):
        world.tick(1.0), world.settle(compute=True)
        counts.append(world.phases().count(SERVING))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 and 2 in counts
