"""What becomes of requests: admission, attempts, cancellations, hand-overs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_world import PAGE_SIZE, SLOTS, SPEC, Worker, World, config, serving

from blitzjax import events, types as t
from blitzjax.commands import Abort, Assign, Reject


def test_impossible_requests_are_rejected_with_the_limit() -> None:
    world = serving(1)
    (reject,) = world.arrive("a", model="other")
    assert isinstance(reject, Reject) and reject.code == "NOT_FOUND"
    (reject,) = world.arrive("b", prompt=250, answer=7)
    assert reject.code == "INVALID_ARGUMENT" and "257" in reject.message and "256" in reject.message


def test_a_request_larger_than_every_kv_cache_is_rejected_now_or_when_that_is_known() -> None:
    world = World(1, config())
    assert world.arrive("early", prompt=100, answer=20) == []
    commands = world.send(events.InstanceJoined(0.0, "i0", "1", "h", SPEC.units, 4, 16, 2))
    assert [(c.request_id, c.code) for c in commands] == [("early", "INVALID_ARGUMENT")]
    assert world.arrive("late", prompt=65, answer=1)[0].code == "INVALID_ARGUMENT"
    assert isinstance(world.arrive("fits", prompt=63, answer=1)[0], Assign)


def test_a_full_queue_says_so() -> None:
    world = World(1, config())
    assert [world.arrive(f"r{k}") for k in range(40)] == [[]] * 40
    assert [c.code for c in world.arrive("one more")] == ["RESOURCE_EXHAUSTED"]
    assert world.brain.status().queued == 40


def test_requests_go_in_order_of_priority_and_arrival_while_there_is_room() -> None:
    world = World(1, config())
    for name, priority in (("a", 0), ("b", -2), ("c", -2), ("d", -1), ("e", 0)):
        world.arrive(name, prompt=8, priority=priority)
    commands = world.join("i0", SPEC.units)
    assert [c.request_id for c in commands] == ["b", "c", "d", "a"] and SLOTS == 4
    assert all(c == Assign("i0", c.request_id, 1) for c in commands)
    assert world.send(events.RequestFinished(0.0, "i0", "b", 1, "stop")) == [Assign("i0", "e", 1)]


def test_waiting_outweighs_priority_in_the_end() -> None:
    world = World(1, config())
    world.arrive("patient", prompt=8, priority=1)
    for name, later_s in (("overtakes", t.PRIORITY_S - 1), ("comes too late", 2)):
        world.at += later_s
        world.arrive(name, prompt=8)
    assert [c.request_id for c in world.join("i0", SPEC.units)] == ["overtakes", "patient", "comes too late"]


def test_attempts_that_were_given_back_unbegun_do_not_count() -> None:
    world = serving(1)
    world.arrive("r", prompt=8)
    for attempt in range(1, 7):
        assert world.send(events.RequestReturned(0.0, "i0", "r", attempt)) == [Assign("i0", "r", attempt + 1)]
        world.brain.check()
    assert world.send(events.RequestFailed(0.0, "i0", "r", 7, "its partner died")) == [Assign("i0", "r", 8)]


def test_a_lost_instance_gives_its_requests_back_to_the_head_of_the_queue() -> None:
    world = serving(1)
    for k in range(6):
        world.arrive(f"r{k}", prompt=8)
    world.kill("i0")
    assert world.brain.status().queued == 6
    commands = world.join("i0", SPEC.units)
    assert commands == [Assign("i0", "r0", 2), Assign("i0", "r1", 2), Assign("i0", "r2", 2), Assign("i0", "r3", 2)]


def test_a_request_counts_for_its_prompt_and_a_share_of_its_answer() -> None:
    tokens = 4 * PAGE_SIZE
    for share, together in ((1.0, 1), (0.5, 2), (0.0, 4)):
        world = World(1, replace(config(), engine=replace(config().engine, answer_share=share)))
        world.send(events.InstanceJoined(0.0, "i0", "1", "h", SPEC.units, 4, PAGE_SIZE, SLOTS))
        for k in range(6):
            world.arrive(f"r{k}", prompt=tokens // 4, answer=tokens // 2)
        assert world.brain.status().running == together
        world.brain.check()


def test_after_max_attempts_the_request_ends_with_the_reason() -> None:
    world = serving(1)
    world.arrive("r")
    for attempt in range(1, 4):
        assert world.send(events.RequestFailed(0.0, "i0", "r", attempt, "no luck")) == [Assign("i0", "r", attempt + 1)]
    (reject,) = world.send(events.RequestFailed(0.0, "i0", "r", 4, "no luck"))
    assert reject.code == "UNAVAILABLE" and "4 attempts" in reject.message and "no luck" in reject.message


def test_a_cancelled_request_in_the_queue_is_dropped() -> None:
    world = World(1, config())
    world.arrive("r")
    assert world.cancel("r") == [] and world.brain.status().queued == 0
    assert world.cancel("r") == []


def test_a_cancelled_request_occupies_its_instance_until_it_says_so() -> None:
    world = serving(1)
    world.arrive("r")
    assert world.cancel("r") == [Abort("i0", "r")]
    assert world.of("i0").pages_used == 3
    world.send(events.RequestFinished(0.0, "i0", "r", 1, "abort"))
    assert world.of("i0").pages_used == 0 and world.brain.status().running == 0


def test_a_cancelled_request_does_not_run_again_when_its_instance_dies() -> None:
    world = serving(1)
    world.arrive("r")
    world.cancel("r")
    assert world.kill("i0") == [] and world.brain.status().queued == 0


def test_a_void_attempt_is_aborted_and_otherwise_ignored() -> None:
    world = serving(2, 2)
    world.arrive("r")
    assert world.send(events.RequestFailed(0.0, "i0", "r", 1, "x")) == [Assign("i0", "r", 2)]
    assert world.send(events.PrefillDone(0.0, "i1", "r", 1)) == [Abort("i1", "r")]
    assert world.send(events.RequestFinished(0.0, "i1", "r", 1, "stop")) == [Abort("i1", "r")]
    assert world.send(events.PrefillDone(0.0, "i0", "r", 1)) == []  # the new attempt displaced the old one there
    assert world.send(events.PrefillDone(0.0, "i0", "unknown", 1)) == [Abort("i0", "unknown")]
    assert world.of("i0").waiting == 1


def test_an_attempt_thought_lost_that_answers_before_the_next_one_begins_counts() -> None:
    world = serving(2, 2)
    for k in range(9):
        world.arrive(f"r{k}", prompt=8)  # eight run, one waits
    world.send(events.RequestFailed(0.0, "i0", "r8", 1, "never assigned"))
    world.kill("i0")
    lost = [f"r{k}" for k in range(8) if f"r{k}" not in world.workers["i1"].requests]
    queued = world.brain.status().queued
    assert world.send(events.PrefillDone(0.0, "i1", lost[0], 1)) == []
    assert world.brain.status().queued == queued - 1


def pair() -> World:
    """i0 overloaded with one request of its own, i1 loading with two that the queue gave it."""
    world = serving(2)
    world.arrive("own")
    world.scale(2)
    world.exchange()
    world.arrive("a"), world.arrive("b")
    world.exchange()
    assert world.of("i1").waiting == 2 and world.of("i0").waiting == 1
    return world


def test_old_takes_over_whoever_reports_it_and_however_often() -> None:
    for reporter in ("i0", "i1"):
        world = pair()
        event = events.RequestHanded(0.0, reporter, "a", 1, "i0")
        assert world.send(event) == world.send(event) == []
        assert world.of("i0").waiting == 2 and world.of("i1").waiting == 1
        world.send(events.RequestHanded(0.0, "i1", "a", 1, "i0"))
        assert world.of("i0").waiting == 2
        world.send(events.RequestFinished(0.0, "i0", "a", 1, "stop"))
        assert world.send(event) in ([], [Abort("i0", "a")]) and world.of("i0").waiting == 1


def test_a_first_token_from_the_partner_is_a_hand_over_too() -> None:
    world = pair()
    assert world.send(events.PrefillDone(0.0, "i0", "a", 1)) == []
    assert world.of("i0").running == 1 and world.of("i1").waiting == 1


def test_a_cancellation_follows_the_request_to_its_new_owner() -> None:
    world = pair()
    assert world.cancel("a") == [Abort("i1", "a")]
    assert world.send(events.RequestHanded(0.0, "i1", "a", 1, "i0")) == [Abort("i0", "a")]
    assert world.send(events.RequestHanded(0.0, "i0", "a", 1, "i0")) == [Abort("i0", "a")]  # it may have come too early


def test_a_hand_over_that_only_a_dead_partner_announced_is_run_again() -> None:
    world = pair()
    world.send(events.RequestHanded(0.0, "i1", "a", 1, "i0"))
    commands = world.kill("i1")
    assert Assign("i0", "a", 2) in commands and Assign("i0", "b", 2) in commands


def test_a_hand_over_that_got_lost_between_two_living_partners_is_run_again() -> None:
    """Their session broke: OLD asks no more, and only NEW says that it gave something away."""
    world = pair()
    world.send(events.RequestHanded(0.0, "i1", "a", 1, "i0"))
    while world.load("i1"):
        pass
    while world.workers["i1"].outbox:
        world.deliver("i1")
    assert world.phases() == [t.Phase.SERVING, t.Phase.SERVING] and world.of("i1").partner == "i0"
    assert Assign("i0", "a", 2) in world.send(events.LiveDrained(world.at, "i0"))
    assert world.of("i1").partner is None


def test_a_hand_over_to_a_dead_partner_is_run_again() -> None:
    world = pair()
    assert Assign("i1", "own", 2) in world.kill("i0")  # i1 goes on alone
    assert world.send(events.RequestHanded(0.0, "i1", "a", 1, "i0")) == [Assign("i1", "a", 2)]
    assert world.of("i1").waiting == 3


def test_late_and_odd_events_are_ignored() -> None:
    world = serving(1)
    nobody = [events.PrefillDone(0.0, "i9", "r", 1), events.LayerLoaded(0.0, "i9", 3),
              events.TransferReady(0.0, "i9", 1), events.TransferEnded(0.0, "i9", 1, 6, ""),
              events.LiveDrained(0.0, "i9"), events.Drained(0.0, "i9"), events.WorldJoined(0.0, "i9"),
              events.InstanceLost(0.0, "i9", "x"), events.RequestFailed(0.0, "i9", "r", 1, "x"),
              events.RequestHanded(0.0, "i9", "r", 1, "i8"), events.RequestFinished(0.0, "i9", "r", 1, "stop"),
              events.TransferReady(0.0, "i0", 77), events.TransferEnded(0.0, "i0", 77, 2, "x"),
              events.LiveDrained(0.0, "i0"), events.Drained(0.0, "i0"), events.LayerLoaded(0.0, "i0", 1),
              events.RequestCancelled(0.0, "nobody"), events.InstanceJoined(0.0, "i0", "1", "h0", 6, 64, 16, 4)]
    before = world.brain.status()
    assert [world.send(event) for event in nobody] == [[]] * len(nobody)
    assert world.brain.status() == before


@pytest.mark.parametrize("large", ["idle", "dead"])
def test_a_request_that_fits_no_instance_blocks_nobody(large: str) -> None:
    """Workers may differ in their memory: i0 has room for 128 tokens, i1 for 256."""
    world = World(2, config())
    for name, pages, units in (("i0", 8, SPEC.units), ("i1", 16, 0 if large == "idle" else SPEC.units)):
        world.workers[name] = Worker(name, 1, True, "toy" if units else "", units)
        world.send(events.InstanceJoined(0.0, name, "1", name, units, pages, PAGE_SIZE, SLOTS, "toy" if units else ""))
        world.settle()
    if large == "dead":
        world.arrive("before", prompt=150, answer=50), world.kill("i1")
        assert world.ended == {"before": "INVALID_ARGUMENT"}
    world.arrive("big", prompt=150, answer=50), world.arrive("small"), world.settle(compute=True)
    assert world.ended["big"] == "INVALID_ARGUMENT" and world.ended["small"] == "length"
