"""Whatever happens in whatever order, the brain stays consistent and every accepted request ends exactly once.

BLITZJAX_WORLDS=10000 runs so many random worlds, in a few minutes, instead of as many as fit into seconds.
"""

from __future__ import annotations

import os

from fake_world import SPECS, UNITS, World, config, copies, whole
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blitzjax.types import Phase

ACTIONS = ("work", "work", "work", "obey", "deliver", "load", "compute", "pull", "pull", "arrive", "arrive", "cancel",
           "tick", "kill", "join", "scale", "break", "echo", "migrate", "migrate", "crash")
NAMES = [f"i{k}" for k in range(4)]
WORLDS = int(os.environ.get("BLITZJAX_WORLDS", "200"))
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11)), min_size=30, max_size=250)


def act(world: World, action: str, choice: int, arrivals: int) -> None:
    name = NAMES[choice % len(NAMES)]
    model = world.specs[choice % len(world.specs)].name
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
            world.arrive(f"r{arrivals}", prompt=8 + 12 * choice, answer=1 + choice, priority=choice % 2, model=model)
        case "cancel":
            cancel(world, f"r{arrivals - choice}")
        case "tick":
            world.tick(choice / 4)
        case "kill" if worker.up and choice < len(NAMES):
            world.kill(name)
        case "crash" if choice == 0:  # a whole host
            for other in NAMES[::2]:
                if world.workers[other].up:
                    world.kill(other)
        case "join" if not worker.up or choice >= 10:  # a newcomer, or a restart that nobody noticed
            kept = [world.specs[-1].name] if choice % 4 == 3 and len(world.specs) > 1 else []
            world.join(name, units=(0, 0, 3)[choice % 3], copies=kept)
        case "scale":
            source = "disk" if choice == 0 else "multicast"
            world.scale((1 + choice) % 5, ("zigzag", "best_effort", "off")[choice % 3], source, model)
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


def run(world: World, steps: list[tuple[str, int]], start: int) -> None:
    for name in NAMES[:start]:
        world.join(name)
    for arrivals, (action, choice) in enumerate(steps):
        act(world, action, choice, arrivals)
    heal(world)
    status = world.brain.status()
    assert status.queued == status.running == 0
    world.settle(rounds=2000, compute=True)
    assert set(world.phases()) <= {Phase.IDLE, Phase.SERVING}, "an instance never gets where it was going"
    assert set(world.open) <= world.cancelled


@settings(max_examples=WORLDS, deadline=None)
@given(steps=STEPS, policy=st.sampled_from(["auto", "manual"]), start=st.integers(0, 4),
       roles=st.sampled_from(["mixed", "split"]), moving=st.booleans())
@example(steps=[*[("work", 0)] * 11, ("arrive", 1), ("join", 2), ("scale", 2), *[("work", 0)] * 10, ("compute", 1),
                ("arrive", 1), ("work", 0), ("work", 0), ("migrate", 1), ("crash", 0)],
         policy="auto", start=2, roles="split", moving=False)  # who took the KV dies before it says so, and who sent it decodes instead
def test_every_accepted_request_ends_once(steps: list[tuple[str, int]], policy: str, start: int, roles: str,
                                          moving: bool) -> None:
    world = World(len(NAMES), config(policy=policy, prefill_tokens_per_s=100.0, max_instances=4, roles=roles,
                                     drain_by_moving=moving))
    run(world, steps, start)
    assert any(i.phase.value == "serving" for i in world.brain.status().instances)


@settings(max_examples=WORLDS, deadline=None)
@given(steps=STEPS, start=st.integers(0, 4), least=st.integers(0, 1), models=st.integers(1, 3), moving=st.booleans(),
       roles=st.sampled_from(["mixed", "split"]))
@example(steps=[*[("work", 0)] * 15, ("join", 1), *[("work", 0)] * 8, ("join", 0), ("join", 2), ("scale", 3),
                ("work", 0), ("work", 0), ("scale", 4)],
         start=0, least=0, models=1, moving=False, roles="mixed")  # who makes the copy drains too
def test_models_share_the_workers_and_each_has_a_copy_in_the_end(steps: list[tuple[str, int]], start: int, least: int,
                                                                 models: int, moving: bool, roles: str) -> None:
    if roles == "split":
        least, models = 1, min(models, 2)
    world = World(len(NAMES), config(policy="auto", prefill_tokens_per_s=100.0, max_instances=4, min_instances=least,
                                     zero_after_s=3.0, down_after_s=1.0, drain_by_moving=moving, roles=roles),
                  specs=SPECS[:models])
    run(world, steps, start)
    for spec in world.specs:
        instances = [w.id for w in world.workers.values() if w.model == spec.name]
        assert whole(world, spec.name) and len(instances) >= least
        assert len(copies(world, spec.name)) == (not instances), "one host copy, unless an instance holds the model"
        assert all(world.workers[i].copies[spec.name] == UNITS[spec.name] for i in copies(world, spec.name))
