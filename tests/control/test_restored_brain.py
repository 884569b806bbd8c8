"""A brain that was pickled and restored, at whatever moment, decides as the one that was not."""

from __future__ import annotations

import pickle
import random

import pytest
from fake_world import World, config
from test_random_worlds import ACTIONS, NAMES, act, heal

from blitzjax import commands, events, types
from blitzjax.config import Config
from blitzjax.control.cluster import Cluster
from blitzjax.control.status import ClusterStatus

OFTEN = 3  # events between two snapshots


class Twins:
    """Two brains that hear the same; one is restored from its snapshot again and again."""

    def __init__(self, config: Config, spec: types.ModelSpec):
        self._one, self._other = Cluster(config, spec), Cluster(config, spec)
        self._events = 0

    def handle(self, event: events.Event) -> list[commands.Command]:
        self._events += 1
        if self._events % OFTEN == 0:
            self._other = pickle.loads(pickle.dumps(self._other))
        orders = self._one.handle(event)
        assert self._other.handle(event) == orders
        return orders

    def status(self) -> ClusterStatus:
        assert self._other.status() == self._one.status()
        return self._one.status()

    def check(self) -> None:
        self._one.check()
        self._other.check()


@pytest.mark.parametrize("roles", ["mixed", "split"])
@pytest.mark.parametrize("seed", range(4))
def test_a_restored_brain_goes_on_as_before(seed: int, roles: str) -> None:
    rng = random.Random(seed)
    world = World(len(NAMES), config(prefill_tokens_per_s=0.0, max_instances=4, roles=roles), Twins)
    for name in NAMES[:2]:
        world.join(name)
    for arrivals in range(250):
        act(world, rng.choice(ACTIONS), rng.randrange(12), arrivals)
    heal(world)
    assert world.ended and set(world.open) <= world.cancelled  # all ended, and both brains said the same until then
