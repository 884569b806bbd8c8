"""Several models over one pool: from zero and back, one host copy each, and who gets a worker when they are short."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fake_world import SPECS, UNITS, World, config, copies, pool, whole

from blitzjax import events
from blitzjax.control.hostcache import COMPILE_WAIT_S
from blitzjax.control.sharing import Want, deal, donor
from blitzjax.commands import (
    Assign, DropCopy, KeepCopy, LoadFromDisk, PrepareTransfer, Reject, Release, StartLive, UseCopy,
)
from blitzjax.events import ScaleRequested
from blitzjax.types import Phase

TOY, BIG, TINY = SPECS
SERVING, IDLE, FAILED = Phase.SERVING, Phase.IDLE, Phase.FAILED


def model(world: World, name: str):
    return next(m for m in world.brain.status().models if m.name == name)


def one_copy(world: World) -> bool:
    """A model has one host copy, whole, if no instance serves it, else none."""
    served = {w.model for w in world.workers.values() if w.model}
    return all(len(copies(world, s.name)) == (s.name not in served) for s in world.specs) and all(
        whole(world, s.name) for s in world.specs)


# ---- host copies


def test_each_model_is_read_once_and_the_copies_are_spread() -> None:
    world = World(3, replace(config(min_instances=0), cluster=replace(config().cluster, pool=3)), specs=SPECS)
    world.join("i0"), world.join("i1")
    assert world.sent(KeepCopy) == []  # the third worker is still to come
    world.join("i2"), world.settle()
    assert sorted(c.instance for c in world.sent(KeepCopy)) == ["i0", "i1", "i2"] and one_copy(world)
    assert world.phases() == [IDLE] * 3 and world.sent(LoadFromDisk) == []


def test_placement_does_not_wait_for_ever() -> None:
    world = World(1, replace(config(min_instances=0), cluster=replace(config().cluster, pool=3)), specs=SPECS[:2])
    world.join("i0")
    assert world.tick(4.0) == [] and isinstance(world.tick(1.0)[0], KeepCopy)
    world.settle()
    assert one_copy(world)


def test_a_copy_whose_keeper_serves_another_model_makes_live_instances_elsewhere() -> None:
    """Nobody runs the model yet: all targets take prompts while their parameters arrive, without partners."""
    world = pool(3)
    world.scale(3, model="toy", live="off"), world.settle()
    world.kill("i0"), world.kill("i2"), world.scale(1, model="toy"), world.join("i0"), world.join("i2"), world.settle()
    assert copies(world, "big") == ["i1"] and world.of("i1").model == "toy"
    world.scale(2, model="big"), world.exchange()
    assert [(world.of(i).model, world.of(i).phase) for i in ("i0", "i2")] == [("big", Phase.LIVE)] * 2
    assigned = [c.instance for n in range(2) for c in world.arrive(f"r{n}", model="big") if isinstance(c, Assign)]
    assert sorted(assigned) == ["i0", "i2"] and world.sent(StartLive) == []
    world.settle(compute=True)
    assert world.ended == {"r0": "length", "r1": "length"} and one_copy(world)


def test_a_request_makes_an_instance_of_the_copy_at_no_cost() -> None:
    world = pool(2)
    keeper = copies(world, "big")[0]
    commands = world.arrive("r", model="big")
    assert [(type(c), c.instance, c.model) for c in commands] == [(UseCopy, keeper, "big")]
    world.settle(compute=True)
    assert world.ended == {"r": "length"} and world.of(keeper).model == "big" and one_copy(world)
    assert world.sent(LoadFromDisk) == world.sent(PrepareTransfer) == []


def test_the_last_instance_becomes_the_copy() -> None:
    world = pool(2)
    world.arrive("r", model="toy"), world.settle(compute=True)
    keeper = world.workers[next(w.id for w in world.workers.values() if w.model == "toy")]
    world.scale(0, model="toy"), world.settle()
    assert world.sent(Release) == [Release(keeper.id, keep=True)] and keeper.copies["toy"] == UNITS["toy"]
    assert world.phases() == [IDLE, IDLE] and one_copy(world)


def test_the_last_instance_copies_itself_to_a_worker_that_keeps_less() -> None:
    world = pool(2, specs=SPECS[:1])
    world.scale(1, model="toy"), world.settle()
    (keeper,) = whole(world, "toy")
    other = next(i for i in world.workers if i != keeper)
    world.send(events.ModelDeployed(0.0, BIG, 0)), world.send(events.ModelReady(0.0, keeper, "big"))
    assert world.tick(COMPILE_WAIT_S - 1) == []  # the other one may still become ready for it
    world.tick(1.0), world.settle()
    assert copies(world, "big") == [keeper]  # the other is not compiled for it yet
    world.scale(0, model="toy")
    assert world.of(keeper).phase is Phase.DRAINING and world.sent(Release) == []
    world.settle()
    assert copies(world, "toy") == whole(world, "toy") == [other] and world.sent(Release) == [Release(keeper)]


def test_a_busy_keeper_is_the_source_of_the_chain() -> None:
    world = pool(2)
    keeper = copies(world, "big")[0]
    other = next(i for i in world.workers if i != keeper)
    world.send(events.ScaleRequested(0.0, 2, model="toy")), world.settle()
    assert world.phases() == [SERVING, SERVING]
    world.kill(other), world.scale(1, model="toy"), world.join(other)
    world.arrive("r", model="big"), world.exchange()
    assert world.sent(PrepareTransfer)[-1].plan.chains[0].instances == (keeper, other)
    assert world.of(other).model == "big" and copies(world, "big") == [keeper]  # it is what the chain sends
    world.settle(compute=True)
    assert world.ended == {"r": "length"} and world.sent(DropCopy)[-1] == DropCopy(keeper, "big") and one_copy(world)


def test_from_zero_to_many_is_the_copy_then_one_chain() -> None:
    world = pool(4)
    (keeper,) = copies(world, "toy")
    world.scale(4, model="toy"), world.settle()
    assert world.phases() == [SERVING] * 4 and [c.instance for c in world.sent(UseCopy)] == [keeper]
    assert len({c.plan.ticket for c in world.sent(PrepareTransfer)}) == 1 and world.sent(LoadFromDisk) == []
    assert one_copy(world)


def test_a_lost_copy_is_made_again_from_disk() -> None:
    world = pool(3)
    (keeper,) = copies(world, "toy")
    commands = world.kill(keeper)
    assert [(type(c), c.model) for c in commands] == [(KeepCopy, "toy")] and commands[0].instance != keeper
    world.settle()
    assert one_copy(world)


def test_a_copy_whose_source_dies_goes_on_from_disk_where_it_was() -> None:
    world = pool(2, specs=SPECS[:1])
    world.scale(1, model="toy"), world.settle()
    (last,) = whole(world, "toy")
    other = next(i for i in world.workers if i != last)
    world.send(events.ModelDeployed(0.0, BIG, 0)), world.send(events.ModelReady(0.0, last, "big"))
    world.tick(COMPILE_WAIT_S), world.settle()
    world.scale(0, model="toy"), world.exchange()
    world.load(other), world.load(other)
    assert world.workers[other].copies == {"toy": 2}
    world.kill(last), world.exchange()
    assert world.workers[other].copies["toy"] == 2 and world.sent(KeepCopy)[-1].instance == other
    world.settle()
    assert copies(world, "toy") == [other] and whole(world, "toy") == [other]


def test_without_host_copies_a_model_at_zero_is_on_disk_only() -> None:
    world = World(2, config(min_instances=0, host_copies=False), specs=SPECS[:2])
    assert world.join("i0", copies=["toy"])[0] == DropCopy("i0", "toy")
    world.join("i1"), world.settle(), world.tick(COMPILE_WAIT_S)
    world.arrive("r"), world.settle(compute=True)
    assert world.ended == {"r": "length"} and len(world.sent(LoadFromDisk)) == 1
    (last,) = whole(world, "toy")
    world.scale(0), world.settle()
    assert world.sent(Release) == [Release(last)] and not whole(world, "toy")
    assert world.sent(KeepCopy) == world.sent(UseCopy) == []


def test_a_worker_whose_disk_fails_is_not_asked_again_at_once() -> None:
    world = World(2, config(min_instances=0))
    world.disk_fails = {"i0"}
    world.join("i0"), world.join("i1")
    world.settle()
    assert [c.instance for c in world.sent(KeepCopy)] == ["i0", "i1"] and one_copy(world)


def test_a_restarted_controller_finds_copies_and_drops_one_too_many() -> None:
    world = World(3, config(min_instances=0), specs=SPECS[:2])
    assert world.join("i0", copies=["toy"], world=False)[0].model == "big"  # toy is here
    world.settle()
    assert world.join("i1", copies=["toy"])[0] == DropCopy("i1", "toy")
    assert world.join("i2", units=UNITS["big"], model="big") == [Release("i2")]  # an instance that nobody asked for
    world.settle()
    assert world.phases() == [IDLE] * 3 and one_copy(world)


# ---- requests


def test_a_model_at_zero_serves_and_sleeps_again() -> None:
    world = pool(1, policy="auto", zero_after_s=20.0, down_after_s=1.0)
    for name in ("toy", "big", "toy"):
        world.arrive(f"{name}{world.at}", model=name)
        world.settle(compute=True)
        assert not world.open and model(world, name).serving == 1
        world.tick(), world.tick(15.0)
        assert model(world, name).serving == 1
        world.tick(6.0), world.settle()
        assert world.phases() == [IDLE] and one_copy(world)


def test_an_operator_may_say_zero_only_where_it_is_allowed() -> None:
    world = World(1, config(min_instances=1), specs=SPECS[:1])
    world.join("i0"), world.settle()
    world.send(ScaleRequested(0.0, 0)), world.settle()
    assert world.phases() == [SERVING]


def test_an_unknown_model_names_those_that_there_are() -> None:
    world = pool(1)
    assert world.arrive("r", model="huge") == [
        Reject("r", "NOT_FOUND", "no model 'huge' here; there is 'toy', 'big'")]


def test_a_request_that_waits_takes_an_idle_instance_from_another_model() -> None:
    world = pool(1, policy="auto", zero_after_s=1e6)
    world.arrive("a", model="toy"), world.settle(compute=True)
    world.arrive("b", model="big"), world.settle(compute=True)
    assert world.ended == {"a": "length", "b": "length"} and world.of("i0").model == "big" and one_copy(world)


def test_the_last_instance_of_a_model_with_requests_stays() -> None:
    world = pool(1, policy="auto")
    world.arrive("a", model="toy"), world.exchange()
    world.arrive("b", model="big"), world.exchange()
    for _ in range(5):
        world.tick(), world.exchange()
    assert world.of("i0").model == "toy" and world.of("i0").phase is SERVING
    world.settle(compute=True), world.tick(), world.settle(compute=True)
    assert set(world.ended) == {"a", "b"}


def test_min_instances_are_not_taken() -> None:
    world = pool(2, policy="auto", min_instances=1)
    world.settle()
    assert sorted(i.model for i in world.brain.status().instances) == ["big", "toy"]
    for k in range(8):
        world.arrive(f"r{k}", prompt=60, model="toy")
    for _ in range(4):
        world.tick(), world.exchange()
    assert sorted(i.model for i in world.brain.status().instances) == ["big", "toy"]


def test_a_model_with_requests_and_no_worker_takes_one_of_those_that_nobody_asks() -> None:
    """Whatever the minima: three models want one each, and two workers are left."""
    world = pool(3, specs=SPECS, policy="auto", min_instances=1)
    world.settle()
    victim = next(i.id for i in world.brain.status().instances if i.model == "toy")
    world.kill(victim), world.settle(), world.tick(), world.settle()
    assert model(world, "toy").serving == 0  # nobody asks for it
    world.arrive("r", model="toy"), world.tick(), world.settle(compute=True)
    assert world.ended == {"r": "length"} and model(world, "toy").serving == 1
    for _ in range(5):
        world.tick(), world.settle()
    assert model(world, "toy").serving == 1  # and there it stays until another one is asked for


def test_no_model_waits_for_ever_for_one_that_is_always_asked() -> None:
    world = pool(1, policy="auto", yield_after_s=20.0)
    world.arrive("b", model="toy"), world.exchange(), world.arrive("w", model="big")
    for k in range(30):
        world.arrive(f"r{k}", model="toy", answer=2)
        world.exchange(), world.compute("i0"), world.exchange(), world.tick(1.0)
        assert k < 19 or "w" in world.ended or world.of("i0").phase is not SERVING or world.of("i0").model == "big"
    world.settle(compute=True)
    for _ in range(40):
        world.tick(1.0), world.settle(compute=True)
    assert len(world.ended) == 32 and one_copy(world)


def test_who_finds_all_workers_in_the_goals_of_others_is_told_so_in_time() -> None:
    world = pool(2, yield_after_s=20.0)
    world.scale(2, model="toy"), world.settle()
    world.arrive("a", model="big"), world.tick(0.0), world.tick(19.0)
    world.arrive("b", model="big")
    assert world.tick(1.0) == [Reject("a", "UNAVAILABLE", "no instance of 'big': for 20 s all workers have served other "
                                      "models, as they were told to (toy 2); scale down")]
    world.scale(1, model="toy"), world.tick(30.0), world.settle(compute=True)
    assert world.ended == {"a": "UNAVAILABLE", "b": "length"}


def test_who_waits_for_a_worker_to_come_back_is_not_sent_away() -> None:
    world = pool(2, yield_after_s=20.0)
    world.scale(1, model="toy"), world.scale(1, model="big"), world.settle()
    world.arrive("a", model="big"), world.tick(60.0)
    lost = whole(world, "big")[0]
    world.kill(lost), world.tick(1.0), world.tick(15.0)
    assert not world.ended
    world.join(lost), world.settle(compute=True)
    assert world.ended == {"a": "length"}


def test_what_loads_does_not_make_the_only_one_that_serves_dispensable() -> None:
    world = pool(2, policy="auto", source="disk", live="off", prefill_tokens_per_s=100.0)
    world.arrive("a", model="toy"), world.settle()
    for k in range(6):
        world.arrive(f"a{k}", prompt=100, model="toy")
    world.tick(0.1), world.exchange()
    assert sorted(p.name for p in world.phases()) == ["LOADING", "SERVING"]
    world.arrive("b", model="big"), world.tick(0.1)
    assert sorted(p.name for p in world.phases()) == ["LOADING", "SERVING"]
    world.settle(compute=True), world.tick(), world.settle(compute=True)
    assert len(world.ended) == 8


def test_nobody_makes_room_for_a_model_that_is_not_compiled_yet() -> None:
    world = World(2, config(policy="auto", min_instances=1, prefill_tokens_per_s=100.0, down_after_s=1e6), specs=SPECS[:1])
    world.join("i0", UNITS["toy"]), world.join("i1", UNITS["toy"]), world.scale(2), world.settle(compute=True)
    world.send(events.ModelDeployed(world.at, BIG, 1))
    for _ in range(3):
        world.tick(), world.exchange()
    assert world.phases() == [SERVING, SERVING]
    world.send(events.ModelReady(world.at, "i1", "big")), world.tick(), world.settle()
    assert [world.of(i).model for i in ("i0", "i1")] == ["toy", "big"]


def test_a_model_that_is_not_compiled_yet_keeps_no_worker_from_others() -> None:
    world = World(2, config(policy="auto", min_instances=1, prefill_tokens_per_s=100.0), specs=SPECS[:1])
    world.join("i0", UNITS["toy"]), world.join("i1"), world.settle()
    world.send(events.ModelDeployed(world.at, BIG, 1))
    for k in range(6):
        world.arrive(f"a{k}", prompt=100)
    world.tick(), world.exchange()
    assert world.of("i1").model == "toy"


def test_a_worker_that_drains_for_one_model_keeps_no_other_waiting_that_cannot_use_it() -> None:
    world = pool(3, policy="auto", down_after_s=1e6, specs=SPECS[:1])
    world.scale(3), world.settle(compute=True)
    for name, spec in (("i1", TINY), ("i0", BIG)):
        world.send(events.ModelDeployed(world.at, spec, 0)), world.send(events.ModelReady(world.at, name, spec.name))
    for k in range(3):
        world.arrive(f"long{k}")
    world.exchange(), world.arrive("b", model="big"), world.exchange()
    assert world.of("i0").phase is Phase.DRAINING
    world.arrive("t", model="tiny"), world.exchange(), world.tick()
    assert world.of("i1").phase is Phase.DRAINING
    world.settle(compute=True)
    assert {world.of("i0").model, world.of("i1").model} == {"big", "tiny"} and not world.open


def test_a_worker_below_the_minimum_comes_from_who_has_more() -> None:
    world = pool(3, policy="auto", min_instances=1, down_after_s=1e6)
    world.settle()
    world.send(ScaleRequested(0.0, 2, model="toy")), world.settle(compute=True)
    assert [m.serving for m in world.brain.status().models] == [2, 1]
    victim = next(i.id for i in world.brain.status().instances if i.model == "big")
    world.kill(victim), world.settle(compute=True)
    assert [m.serving for m in world.brain.status().models] == [1, 1]


# ---- models come and go


def test_a_model_is_deployed_and_undeployed_while_another_serves() -> None:
    world = pool(2, specs=SPECS[:1])
    world.scale(1, model="toy"), world.settle()
    world.send(events.ModelDeployed(0.0, BIG, 1, 2))
    for name in world.workers:
        world.send(events.ModelReady(0.0, name, "big"))
    world.settle()
    world.arrive("r", model="big"), world.exchange()
    world.send(events.ModelUndeployed(0.0, "big"))
    assert world.arrive("late", model="big")[0].code == "NOT_FOUND"
    world.settle(compute=True), world.tick(), world.settle()
    assert world.ended["r"] == "length" and [m.name for m in world.brain.status().models] == ["toy"]
    assert not whole(world, "big") and not copies(world, "big")


def test_an_instance_is_only_made_where_the_model_was_compiled() -> None:
    world = pool(2, specs=SPECS[:1])
    world.send(events.ModelDeployed(0.0, BIG, 1))
    assert world.sent(LoadFromDisk) == [] and world.sent(KeepCopy) == []
    world.send(events.ModelReady(0.0, "i1", "big")), world.settle()
    assert world.of("i1").model == "big" and world.of("i1").phase is SERVING


def test_a_model_that_comes_back_is_compiled_again() -> None:
    world = pool(2)
    assert world.brain.uncompiled("big") == []
    world.send(events.ModelUndeployed(0.0, "big")), world.settle(), world.tick(), world.settle()
    assert [m.name for m in world.brain.status().models] == ["toy"]
    world.send(events.ModelDeployed(0.0, BIG, 1))
    assert world.brain.uncompiled("big") == ["i0", "i1"] and world.sent(LoadFromDisk) == []
    world.send(events.ModelReady(0.0, "i1", "big"))
    assert world.brain.uncompiled("big") == ["i0"]


def test_a_worker_that_compiled_too_late_has_to_do_it_again() -> None:
    """It is told to forget the model as soon as it knows it; when the model comes back it is compiled anew."""
    world = pool(2, specs=SPECS[:1])
    world.send(events.ModelDeployed(0.0, BIG, 1)), world.send(events.ModelUndeployed(0.0, "big")), world.tick()
    assert [m.name for m in world.brain.status().models] == ["toy"]
    world.send(events.ModelReady(0.0, "i1", "big"))
    world.send(events.ModelDeployed(0.0, BIG, 1))
    assert world.brain.uncompiled("big") == ["i0", "i1"] and world.sent(LoadFromDisk) == []


def test_a_model_at_zero_is_undeployed() -> None:
    world = pool(2)
    world.send(events.ModelUndeployed(0.0, "toy")), world.settle()
    assert [m.name for m in world.brain.status().models] == ["big"] and not copies(world, "toy")


def test_a_model_that_is_undeployed_while_it_fails_to_load_is_tried_nowhere_else() -> None:
    world = World(2, config(host_copies=False))
    world.disk_fails = {"i0"}
    world.join("i0")
    for _ in range(2):
        world.obey("i0"), world.load("i0"), world.deliver("i0")
    world.join("i1"), world.obey("i0")
    world.send(events.ModelUndeployed(0.0, "toy"))
    world.load("i0"), world.settle()
    assert world.sent(Release) == [Release("i0")] and {c.instance for c in world.sent(LoadFromDisk)} == {"i0"}
    assert not world.brain.models


# ---- sharing


def test_idle_workers_go_to_those_below_their_least_then_to_the_most_overloaded() -> None:
    wants = [Want("calm", 1, 3, 9, 1, 100), Want("hot", 2, 3, 9, 1, 900), Want("none", 0, 2, 9, 1, 10)]
    assert deal(1, wants) == {"calm": 0, "hot": 0, "none": 1}
    assert deal(3, wants) == {"calm": 0, "hot": 2, "none": 1}
    assert deal(9, wants) == {"calm": 3, "hot": 3, "none": 2}


def test_idle_workers_go_to_models_that_can_use_them() -> None:
    wants = [Want("compiling", 0, 2, 0, 1, 500), Want("hot", 2, 3, 2, 1, 900)]
    assert deal(3, wants) == {"compiling": 0, "hot": 2}


def test_who_gives_up_an_instance() -> None:
    calm, hot = Want("calm", 2, 0, 0, 1, 100), Want("hot", 2, 0, 0, 1, 900)
    assert [donor([]), donor([hot]), donor([hot, calm])] == [None, "hot", "calm"]


# ---- a day


@pytest.mark.parametrize("seed", range(6))
def test_a_day_of_random_scale_events_keeps_one_host_copy_at_most_and_one_copy_at_least(seed: int) -> None:
    """Counted among the workers after every step: bytes kept in host memory, and whole copies of any kind."""
    rng = random.Random(seed)
    world = pool(4, specs=SPECS, policy=rng.choice(["auto", "manual"]), zero_after_s=3.0, down_after_s=1.0,
                 prefill_tokens_per_s=100.0, max_instances=4)
    most = {s.name: 0 for s in SPECS}
    for step in range(600):
        name = rng.choice(SPECS).name
        match rng.choice(["scale", "arrive", "arrive", "tick", "work", "work", "work", "settle"]):
            case "scale":
                world.scale(rng.randrange(5), model=name)
            case "arrive":
                world.arrive(f"r{step}", prompt=rng.randrange(8, 100), answer=4, model=name)
            case "tick":
                world.tick(rng.random() * 2)
            case "work":
                worker = rng.choice(list(world.workers))
                world.obey(worker), world.deliver(worker), world.load(worker), world.compute(worker), world.pull(worker)
            case "settle":
                world.settle(rounds=5000, compute=True)
                assert one_copy(world)
        for spec in SPECS:
            kept = sum(world.workers[i].copies[spec.name] for i in copies(world, spec.name))
            most[spec.name] = max(most[spec.name], kept)
            assert kept <= spec.units, f"{spec.name} is kept more than once at step {step}"
            assert whole(world, spec.name), f"{spec.name} is nowhere at step {step}"
    assert most == UNITS
    for spec in SPECS:
        world.scale(1, model=spec.name)  # with the policy "manual" nobody takes what an operator gave
    world.settle(rounds=5000, compute=True)
    assert not world.open and len(world.sent(Assign)) > 50
