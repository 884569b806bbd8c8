"""Prefill here, decode there: who takes prompts, when KV moves, and how instances change their roles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from fake_world import PAGE_SIZE, PAGES, SPEC, SPECS, World, config

from blitzjax.config import ScaleConfig
from blitzjax.control.autoscale import Memory, split_bands, step_split
from blitzjax.control.executor import MATRIX, Action
from blitzjax.control.load import Load
from blitzjax.commands import Assign, LoadFromDisk, Migrate, PrepareTransfer, Release, StartLive, StartTransfer
from blitzjax.events import ModelDeployed, ModelReady
from blitzjax.types import Phase, Role


def split(workers: int, prefill: int = 1, decode: int = 1, **scale: object) -> World:
    """The first instances run prompts, the next ones decode, the rest is idle."""
    world = World(workers, config(roles="split", min_instances=prefill, min_decode=decode, **scale))
    for k in range(workers):
        world.join(f"i{k}", SPEC.units if k < prefill + decode else 0)
    world.settle()
    world.log.clear()
    return world


def roles(world: World) -> str:
    """One letter an instance: P, D, or - when it does not serve."""
    members = world.brain._roster.members
    return "".join(m.role.name[0] if m.phase is Phase.SERVING else "-" for _, m in sorted(members.items()))


def prefilled(world: World, *names: str) -> None:
    """Requests with a first token, where their prompts ran."""
    for name in names:
        world.arrive(name, prompt=8)
    world.exchange()
    for worker in world.workers.values():
        while any(r not in worker.answered for r in worker.requests):
            request_id = next(r for r in worker.requests if r not in worker.answered)
            worker.requests[request_id] = worker.requests.pop(request_id)  # compute takes the first
            worker.requests = {request_id: worker.requests.pop(request_id), **worker.requests}
            world.compute(worker.id)
    world.exchange()


def test_prompts_go_to_prefill_and_kv_to_decode() -> None:
    world = split(2)
    assert roles(world) == "PD"
    prefilled(world, "r")
    assert world.sent(Assign) == [Assign("i0", "r", 1)] and world.sent(Migrate) == [Migrate("i0", "r", 1, "i1")]
    world.migrate("i0"), world.exchange()
    assert world.of("i1").running == 1 and world.of("i0").running == 0
    world.settle(compute=True)
    assert world.ended == {"r": "length"}


def test_one_inbound_transfer_per_decode_instance_and_one_outbound_per_prefill_instance() -> None:
    world = split(4, 2, 2)
    prefilled(world, "a", "b", "c", "d")
    sent = world.sent(Migrate)
    assert len(sent) == 2 and len({c.instance for c in sent}) == len({c.target for c in sent}) == 2
    world.settle(compute=True)
    assert len(world.ended) == 4


def test_a_full_decode_instance_holds_back_migrations_and_then_prompts() -> None:
    world = split(2, max_instances=2)
    size = PAGES * PAGE_SIZE // 4
    for k in range(10):  # four fill the decode instance, four more the prefill instance
        world.arrive(f"r{k}", prompt=size - 56, answer=56)
    for _ in range(60):
        for name in world.workers:
            world.obey(name), world.deliver(name), world.migrate(name)
        first = world.workers["i0"]
        waiting = [r for r in first.requests if r not in first.answered]
        if waiting:
            first.requests = {waiting[0]: first.requests[waiting[0]], **first.requests}
            world.compute("i0")
    status = world.brain.status()
    assert [i.pages_used for i in status.instances] == [PAGES, PAGES] and status.queued == 2
    world.settle(compute=True)
    assert len(world.ended) == 10


def test_a_dead_target_means_another_one_and_the_kv_stays() -> None:
    world = split(3, 1, 2)
    prefilled(world, "r")
    (first,) = world.sent(Migrate)
    world.log.clear()
    world.kill(first.target)
    (again,) = world.sent(Migrate)
    assert again.instance == "i0" and again.attempt == 1 and again.target != first.target
    world.settle(compute=True)
    assert world.ended == {"r": "length"} and not world.sent(Assign)


def test_kv_that_died_with_its_target_before_it_said_so_is_made_again() -> None:
    world = split(3, 1, 2)
    prefilled(world, "r")
    (first,) = world.sent(Migrate)
    world.migrate("i0")
    world.kill(first.target)  # KVMigrated is lost with it: the brain believes that the KV is where it was
    world.log.clear()
    world.settle(compute=True)
    assert world.ended == {"r": "length"} and [c.attempt for c in world.sent(Assign)] == [2]


def test_a_source_that_is_asked_again_takes_nothing_from_the_target_that_has_it() -> None:
    """The target drains, and is revived for prompts before it says that the KV came: it decodes what it has."""
    world = split(3, 1, 2)
    prefilled(world, "r")
    (first,) = world.sent(Migrate)
    world.obey("i0")
    scaler = world.brain._services["toy"].scaler
    for prefill in (1, 2):
        scaler.goal = replace(scaler.goal, prefill=prefill, decode=1)
        world.tick()
    assert [c.target == first.target for c in world.sent(Migrate)] == [True, False]
    world.migrate("i0"), world.deliver(first.target)
    world.exchange()
    assert world.of(first.target).running == 1 and world.sent(Assign) == [Assign("i0", "r", 1)]
    world.settle(compute=True)
    assert world.ended == {"r": "length"}


def test_the_source_decodes_on_when_nobody_else_can() -> None:
    world = split(2, 1, 1, max_instances=2)
    prefilled(world, "r", "s")
    world.kill("i1")
    world.settle(compute=True), world.tick(), world.settle(compute=True)
    assert world.ended == {"r": "length", "s": "length"}
    assert world.sent(Assign)[2:] == [Assign("i0", "r", 2)]  # what was on its way may be gone


def test_what_the_last_decode_instance_took_before_it_died_runs_again() -> None:
    world = split(2, 1, 1, max_instances=2)
    prefilled(world, "r")
    world.migrate("i0"), world.kill("i1")  # it has not said that it has the KV
    for _ in range(3):
        world.settle(compute=True), world.tick()
    assert world.ended == {"r": "length"} and world.sent(Assign)[1:] == [Assign("i0", "r", 2)]


def test_short_decode_is_filled_by_prefill_in_place_and_prefill_is_scaled_live() -> None:
    """Section 5.4: decode cannot be scaled live, so a prefill instance becomes one and its replacement is live."""
    world = split(4, 2, 1, policy="auto", max_instances=4, prefill_tokens_per_s=1e9)
    for k in range(8):
        world.arrive(f"r{k}", prompt=150, answer=100)
    prefilled(world)
    world.tick()
    assert roles(world).count("D") == 2 and len(world.sent(PrepareTransfer)) == 2
    world.exchange()
    (new,) = {c.pair.new for c in world.sent(StartLive)}
    assert new == "i3" and world.brain._roster.members[new].role is Role.PREFILL
    chain = world.sent(PrepareTransfer)[0].plan.chains[0]
    assert world.brain._roster.members[chain.instances[0]].role is Role.DECODE  # prefill's port sends KV
    world.settle(compute=True)
    assert not world.open


def test_an_idle_decode_instance_runs_prompts_before_anything_is_loaded() -> None:
    world = split(4, 1, 2, policy="auto", max_instances=4, prefill_tokens_per_s=100.0, down_after_s=0.0)
    for k in range(4):
        world.arrive(f"r{k}", prompt=24)
    world.brain._services["toy"].scaler.goal = world.brain._services["toy"].scaler.goal.__class__(2, 1, world.brain._services["toy"].scaler.goal.means, 99.0)
    world.tick()
    assert sorted(roles(world)) == ["-", "D", "P", "P"] and not world.sent(PrepareTransfer) + world.sent(LoadFromDisk)


@pytest.mark.parametrize("workers", [2, 3])
def test_where_nobody_is_left_to_run_prompts_a_decode_instance_does(workers: int) -> None:
    world = split(workers, 1, workers - 1, policy="auto", prefill_tokens_per_s=100.0)
    prefilled(world, "a")
    world.migrate("i0"), world.exchange()
    world.kill("i0"), world.arrive("b"), world.tick(), world.settle(compute=True)
    assert world.ended == {"a": "length", "b": "length"}
    world.join("i0"), world.settle(), world.tick(), world.settle()
    assert sorted(roles(world)) == ["D"] * (workers - 1) + ["P"]


def test_the_first_worker_runs_prompts() -> None:
    world = World(2, config(roles="split", min_instances=1, min_decode=1))
    world.join("i0"), world.settle(), world.arrive("a"), world.settle(compute=True)
    assert roles(world) == "P" and world.ended == {"a": "length"}
    world.join("i1"), world.settle()
    assert roles(world) == "PD"


def test_another_model_does_not_get_the_last_that_runs_prompts() -> None:
    """Though nobody has fewer requests than that one."""
    world = World(3, config(policy="auto", roles="split", prefill_tokens_per_s=1000.0, down_after_s=1e6), specs=SPECS[:1])
    for k in range(3):
        world.join(f"i{k}")
    scaler = world.brain._services["toy"].scaler
    scaler.goal = replace(scaler.goal, prefill=1, decode=2, held_until=1e6)
    world.tick(), world.settle()
    assert sorted(roles(world)) == ["D", "D", "P"]
    prefilled(world, "a", "b")
    for _ in range(2):
        world.migrate("i0"), world.migrate("i1"), world.migrate("i2"), world.exchange()
    assert [i.running for i in world.brain.status().instances if i.role is Role.PREFILL] == [0]
    world.send(ModelDeployed(world.at, SPECS[1], 1))
    for name in world.workers:
        world.send(ModelReady(world.at, name, SPECS[1].name))
    world.tick()
    assert sorted(roles(world)) == ["-", "D", "P"]


def test_a_chain_that_starts_because_a_source_of_another_died_is_not_live_with_the_dead_one() -> None:
    world = split(4, 1, 1, source="unicast")
    world.scale(4)
    for name in ("i1", "i2", "i3"):  # i0, the source of the other chain, has not answered
        world.obey(name), world.deliver(name)
    world.kill("i0")
    assert {c.instance for c in world.sent(StartTransfer)} == {"i1", "i3"} and not world.sent(StartLive)
    assert world.of("i3").phase is Phase.LIVE  # alone: nobody else runs prompts
    world.settle(compute=True)
    assert roles(world) == "-DPP"


def test_a_drained_decode_instance_is_released_after_its_last_request() -> None:
    world = split(3, 1, 2)
    prefilled(world, "a", "b")
    world.migrate("i0"), world.exchange(), world.migrate("i0"), world.exchange()
    world.brain._services["toy"].scaler.goal = world.brain._services["toy"].scaler.goal.__class__(1, 1, world.brain._services["toy"].scaler.goal.means, 99.0)
    world.tick()
    assert world.phases().count(Phase.DRAINING) == 1 and not world.sent(Release)
    world.settle(compute=True)
    assert len(world.sent(Release)) == 1 and roles(world).count("D") == 1


CONFIG = ScaleConfig(roles="split", max_instances=8, prefill_tokens_per_s=1000.0, migrate_tokens_per_s=1000.0)


@pytest.mark.parametrize(("decoding", "backlog", "pages", "held", "expected"), [
    (1, 700, 0, 0, ((1, 2), (0, 0))), (1, 0, 96, 0, ((0, 0), (2, 2))),
    (1, 0, 0, 801, ((2, 2), (2, 3))), (2, 0, 0, 1600, ((1, 1), (1, 2)))])
def test_bands_of_backlog_memory_and_bandwidth(decoding: int, backlog: int, pages: int, held: int,
                                               expected: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert split_bands(Load(0.0, 1, backlog, pages, 100, decoding, held), CONFIG) == expected


def test_decode_grows_together_with_prefill_and_both_fit() -> None:
    """Pages of requests still at prefill count: decode is scaled before it needs them (section 5.4)."""
    (prefill, _), (decode, _) = step_split(Load(0.0, 1, 5000, 290, 100, 1), Memory(), Memory(), CONFIG)
    assert (prefill, decode) == (4, 4)


def test_the_matrix_has_every_case_and_never_drains_what_is_short() -> None:
    assert set(MATRIX) == set(itertools.product((-1, 0, 1), repeat=2))
    for (prefill, decode), actions in MATRIX.items():
        assert (Action.DRAIN_PREFILL in actions) <= (prefill < 0) and (Action.DRAIN_DECODE in actions) <= (decode < 0)
        assert (Action.RECRUIT in actions) == (prefill > 0 or decode > 0)
