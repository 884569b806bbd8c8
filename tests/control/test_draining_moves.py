"""Mixed instances that drain, with scale.drain_by_moving: whose answers leave, and when they are free."""

from __future__ import annotations

from fake_world import PAGE_SIZE, PAGES, SPEC, World, config
from test_split_roles import prefilled

from blitzjax.commands import Assign, Migrate, Release
from blitzjax.types import Phase


def test_answers_leave_a_mixed_instance_that_drains_one_by_one() -> None:
    world = World(2, config(drain_by_moving=True, min_instances=2))
    for name in ("i0", "i1"):
        world.join(name, SPEC.units)
    prefilled(world, "a", "b", "c", "d")
    assert world.of("i0").running == world.of("i1").running == 2
    world.log.clear()
    world.scale(1)
    (drains,) = [i.id for i in world.brain.status().instances if i.phase is Phase.DRAINING]
    (stays,) = {"i0", "i1"} - {drains}
    assert [(c.instance, c.target) for c in world.sent(Migrate)] == [(drains, stays)]
    for left in (1, 0):
        world.obey(drains), world.migrate(drains), world.exchange()
        assert (world.of(drains).running, world.of(stays).running) == (left, 4 - left)
    assert [c.instance for c in world.sent(Release)] == [drains] and not world.sent(Assign)
    world.settle(compute=True)
    assert len(world.ended) == 4


def test_answers_stay_where_no_other_instance_has_room() -> None:
    world = World(2, config(drain_by_moving=True, min_instances=2))
    for name in ("i0", "i1"):
        world.join(name, SPEC.units)
    size = PAGES * PAGE_SIZE - 100
    for name in ("a", "b"):
        world.arrive(name, prompt=size - 100, answer=100)
    world.exchange()
    for worker in world.workers.values():
        world.compute(worker.id)
    world.exchange()
    world.scale(1)
    assert not world.sent(Migrate)
    world.settle(compute=True)
    assert len(world.ended) == 2 and len(world.sent(Release)) == 1
