"""A worker is killed in every role: nobody else dies, every request ends with the right tokens, the worker rejoins."""

from __future__ import annotations

import time

import pytest

from rig import Rig, phases, prompts

ANSWERS = 16


def burst(rig: Rig, count: int = ANSWERS, **options) -> list:
    return [(p, rig.send(p, **options)) for p in prompts(48, seed=1)[:count]]


def all_right(answers: list, expected) -> bool:
    return all(answer.result().token_ids[:8] == expected(prompt) for prompt, answer in answers)


def kill(rig: Rig, worker: int) -> None:
    """SIGKILL; afterwards exactly this worker has another process."""
    before = rig.pids()
    rig.cluster.signal_worker(worker)
    rig.killed = worker, before


def only_the_killed_one_died(rig: Rig) -> bool:
    worker, before = rig.killed
    now = rig.pids()
    return now[worker] != before[worker] and all(now[k] == pid for k, pid in before.items() if k != worker)


def test_idle_worker(rig: Rig, expected) -> None:
    rig.only(1)
    answers = burst(rig)
    kill(rig, rig.index("idle"))
    assert all_right(answers, expected)
    rig.settle(1)
    assert only_the_killed_one_died(rig)
    rig.only(4)  # the killed one takes part in collectives again


def test_serving_worker(rig: Rig, expected) -> None:
    rig.only(2)
    answers = burst(rig, 24, max_tokens=100)  # they are not over before it dies
    rig.wait(lambda s: s.running_requests > 4, "busy")
    kill(rig, rig.index("serving"))
    assert all_right(answers, expected)
    assert any(answer.result().usage.attempts > 1 for _, answer in answers)
    rig.settle(2)
    assert only_the_killed_one_died(rig)


def test_the_only_serving_worker(rig: Rig, expected) -> None:
    rig.only(1)
    answers = burst(rig, max_tokens=100)
    rig.wait(lambda s: s.running_requests > 4, "busy")
    kill(rig, rig.index("serving"))
    assert all_right(answers, expected)
    rig.settle(1)
    assert only_the_killed_one_died(rig)


@pytest.mark.parametrize("live", ["zigzag", "off"])
def test_source_of_a_multicast(rig: Rig, expected, live: str) -> None:
    """It is the live partner (OLD) too when live: then its requests run behind the layers that were sent."""
    rig.only(1)
    source = rig.index("serving")
    begun = len(rig.log())
    short = [p for p in prompts(48, seed=1) if len(p) == 3]
    rig.scale(3, live=live)
    answers = burst(rig)
    long = [(p, rig.send(p, max_tokens=250)) for p in (32 * short)[:32]]  # more than the source ends before it dies
    rig.wait(lambda s: any(i.phase in ("loading", "live") and i.layers_loaded >= 2 for i in s.instances), "loading")
    kill(rig, source)
    assert all_right(answers, expected)
    assert all_right(long, expected)
    records = rig.log()[begun:]
    lost = next(n for n, r in enumerate(records) if r.get("event") == "InstanceLost")
    whole = next(n for n, r in enumerate(records) if r.get("event") == "TransferEnded" and not r["error"] and n > lost)
    assert any(r.get("command") == "Assign" for r in records[lost:whole]) == (live == "zigzag")
    rig.settle(3)
    assert only_the_killed_one_died(rig)


@pytest.mark.parametrize("role", ["loading", "live"])
def test_target_of_a_multicast(rig: Rig, expected, role: str) -> None:
    """The middle of the chain is LOADING, its tail is LIVE (NEW)."""
    rig.only(1)
    rig.scale(3, live="zigzag")
    answers = burst(rig)
    rig.wait(lambda s: any(i.phase == role and i.layers_loaded >= 2 for i in s.instances), role)
    kill(rig, rig.index(role))
    assert all_right(answers, expected)
    rig.settle(3)
    assert only_the_killed_one_died(rig)


def test_hung_target_is_left_behind(rig: Rig, expected) -> None:
    """A stopped process neither answers nor closes its sockets: the collective's timeout ends the wait."""
    import signal

    rig.only(1)
    rig.scale(2, live="off")
    rig.wait(lambda s: any(i.phase == "loading" and i.layers_loaded >= 2 for i in s.instances), "loading")
    hung = rig.index("loading")
    rig.cluster.signal_worker(hung, signal.SIGSTOP)
    answers = burst(rig)
    assert all_right(answers, expected)
    time.sleep(4)
    rig.cluster.signal_worker(hung, signal.SIGKILL)
    rig.settle(2)
    assert all_right(burst(rig), expected)


def test_coordination_service(rig: Rig, expected) -> None:
    """Every worker must join the next one: the cluster comes back from disk and answers what was asked."""
    rig.only(2)
    answers = burst(rig)
    rig.cluster.signal_coordinator()
    rig.wait(lambda s: "failed" in phases(s), "down")
    assert all_right(answers, expected)
    rig.settle(2)
