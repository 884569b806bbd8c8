"""Whatever happens in whatever order, the brain stays consistent and every accepted request ends exactly once.

BLITZJAX_WORLDS=10000 runs so many random worlds, in a few minutes, instead of as many as fit into seconds.
"""

from __future__ import annotations

import os

from fake_world import World, config
from hypothesis import given, settings
from hypothesis import strategies as st

ACTIONS = ("work", "work", "work", "obey", "deliver", "load", "compute", "pull", "pull", "arrive", "arrive", "cancel",
           "tick", "kill", "join", "scale", "break", "echo", "migrate", "migrate")
NAMES = [f"i{k}" for k in range(4)]
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11)), min_size=30, max_size=250)


def act(world: World, action: str, choice: int, arrivals: int) -> None:
    name = NAMES[choice % len(NAMES)]
    worker = world.workers[name]
    match action:
        case "work":
            for other in NAMES:
                world.obey(other), world.deliver(other), world.load(other)
        case "obey" | "deliver" | "load" | "compute" | "migrate":
            getattr(world, action)(name)
        case "echo":
            world.deliver(name, times=2)
        case "pull":
            for other in NAMES:
                world.pull(other, ("both", "new")[choice % 2])  # NEW always reports
        case "arrive":
            world.arrive(f"r{arrivals}", prompt=8 + 12 * choice, answer=1 + choice, priority=choice % 2)
        case "cancel":
            cancel(world, f"r{arrivals - choice}")
        case "tick":
            world.tick(choice / 4)
        case "kill" if worker.up and choice < len(NAMES):
            world.kill(name)
        case "join" if not worker.up or choice >= 10:
            world.join(name, units=(0, 0, 3)[choice % 3])  # a newcomer, or a restart that nobody noticed
        case "scale":
            source = "disk" if choice == 0 else "multicast"
            world.scale(1 + choice % 4, ("zigzag", "best_effort", "off")[choice % 3], source)
        case "break":
            world.disk_fails = {name} if choice >= 10 else set()
            world.multicast_fails = {name} if choice % 3 == 0 else set()


def cancel(world: World, request_id: str) -> None:
    if request_id in world.open:
        world.cancel(request_id)


def heal(world: World) -> None:
    """Everybody comes up and works; time goes on."""
    world.disk_fails, world.multicast_fails = set(), set()
    for name, worker in world.workers.items():
        if not worker.up:
            world.join(name)
    for _ in range(40):
        world.settle(rounds=2000, compute=True)
        world.tick(1.0)


@settings(max_examples=int(os.environ.get("BLITZJAX_WORLDS", "200")), deadline=None)
@given(steps=STEPS, policy=st.sampled_from(["auto", "manual"]), start=st.integers(0, 4),
       roles=st.sampled_from(["mixed", "split"]))
def test_every_accepted_request_ends_once(steps: list[tuple[str, int]], policy: str, start: int, roles: str) -> None:
    world = World(len(NAMES), config(policy=policy, prefill_tokens_per_s=100.0, max_instances=4, roles=roles))
    for name in NAMES[:start]:
        world.join(name)
    for arrivals, (action, choice) in enumerate(steps):
        act(world, action, choice, arrivals)
    heal(world)
    status = world.brain.status()
    assert status.queued == status.running == 0
    assert set(world.open) <= world.cancelled
    assert any(i.phase.value == "serving" for i in status.instances)
