"""A worker is killed in every role: nobody else dies, every request ends with the right tokens, the worker rejoins."""

from __future__ import annotations

import signal

import pytest

from blitzjax.v1 import inference_pb2 as pb
from rig import POOL, SPEC, Rig, caught, phases, prompts

ANSWERS = 16


def burst(rig: Rig, count: int = ANSWERS, **options) -> list:
    return [(p, rig.send(p, **options)) for p in prompts(48, seed=1)[:count]]


def over(answers: list) -> bool:
    return all(answer.done() for _, answer in answers)


def all_right(answers: list, expected) -> bool:
    return all(answer.result().token_ids[:8] == expected(prompt) for prompt, answer in answers)


def kill(rig: Rig, worker: int) -> None:
    """Afterwards exactly this worker has another process."""
    rig.killed = worker, rig.pids()
    rig.kill(worker)


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


@pytest.mark.parametrize("serving", [1, 2])
def test_serving_worker(rig: Rig, expected, serving: int) -> None:
    """It has requests, which run again: on the other one, or where the next one serves."""
    def once() -> bool:
        rig.only(serving)
        answers = burst(rig, 24, max_tokens=100)
        rig.wait(lambda s: s.running_requests > 4 or over(answers), "busy")
        kill(rig, rig.index("serving"))
        assert all_right(answers, expected)
        rig.settle(serving)
        assert only_the_killed_one_died(rig)
        return any(answer.result().usage.attempts > 1 for _, answer in answers)

    assert caught(once)


def has_layers(status: pb.ClusterStatus, *phases: str) -> list[int]:
    """Instances in these phases that have some layers already."""
    return [int(i.id[1:]) for i in status.instances if i.phase in phases and i.layers_loaded >= 2]


@pytest.mark.parametrize("live", ["zigzag", "off"])
def test_source_of_a_multicast(rig: Rig, expected, live: str) -> None:
    """It is the live partner (OLD) too when live: then its requests run behind the layers that were sent."""
    short = [p for p in prompts(48, seed=1) if len(p) == 3]

    def once() -> bool:
        rig.only(1)
        source, told = rig.index("serving"), len(rig.log())
        rig.scale(3, live=live)
        answers = burst(rig)
        answers += [(p, rig.send(p, max_tokens=250)) for p in (32 * short)[:32]]  # more than it ends before it dies
        rig.wait(lambda s: has_layers(s, "loading", "live") or phases(s).count("serving") == 3, "loading")
        kill(rig, source)
        assert all_right(answers, expected)
        rig.settle(3)
        assert only_the_killed_one_died(rig)
        records = rig.log()[told:]
        lost = next(n for n, r in enumerate(records) if r.get("event") == "InstanceLost")
        whole = [n for n, r in enumerate(records) if r.get("event") == "TransferEnded" and r["units"] == SPEC.units and
                 (n > lost or r["instance"] != f"i{source}")]  # with an error, too: who has all layers serves
        ended = sum(r.get("event") == "RequestFinished" for r in records[:lost])
        if whole[0] < lost or ended == len(answers):
            return False
        assert any(r.get("command") == "Assign" for r in records[lost:whole[0]]) == (live == "zigzag")
        return True

    assert caught(once)


@pytest.mark.parametrize("role", ["loading", "live"])
def test_target_of_a_multicast(rig: Rig, expected, role: str) -> None:
    """The middle of the chain is LOADING, its tail is LIVE (NEW)."""
    def once() -> bool:
        rig.only(1)
        told = len(rig.log())
        rig.scale(3, live="zigzag")
        answers = burst(rig)
        status = rig.wait(lambda s: has_layers(s, role) or phases(s).count("serving") == 3, role)
        victims = has_layers(status, role) or [rig.index("serving")]
        kill(rig, victims[0])
        assert all_right(answers, expected)
        rig.settle(3)
        assert only_the_killed_one_died(rig)
        what = [(r.get("event"), r.get("instance"), r.get("error")) for r in rig.log()[told:]]
        lost = next(n for n, (event, *_) in enumerate(what) if event == "InstanceLost")
        return bool(has_layers(status, role)) and ("TransferEnded", f"i{victims[0]}", "") not in what[:lost]

    assert caught(once)


def ended(rig: Rig, told: int, hung: int) -> list[object]:
    """What ended the transfers of the others."""
    return [r["error"] for r in rig.log()[told:] if r.get("event") == "TransferEnded" and r["instance"] != f"i{hung}"]


def test_hung_target_is_left_behind(rig: Rig, expected) -> None:
    """A stopped process neither answers nor closes its sockets: the collective's timeout ends the wait."""
    def once() -> bool:
        rig.only(1)
        told, gone = len(rig.log()), len(rig.lost())
        rig.scale(2, live="off")
        status = rig.wait(lambda s: has_layers(s, "loading") or phases(s).count("serving") == 2, "loading")
        hung = (has_layers(status, "loading") or [rig.index("serving")])[0]
        rig.cluster.signal_worker(hung, signal.SIGSTOP)
        assert all_right(burst(rig), expected)
        rig.wait(lambda s: ended(rig, told, hung), "left behind")
        rig.cluster.signal_worker(hung)
        rig.wait(lambda s: f"i{hung}" in rig.lost()[gone:], "known to be dead")
        rig.settle(2)
        assert all_right(burst(rig), expected)
        return any(ended(rig, told, hung))

    assert caught(once)


def test_coordination_service(rig: Rig, expected) -> None:
    """Every worker must join the next one: the cluster comes back from disk and answers what was asked."""
    rig.only(2)
    told = len(rig.lost())
    answers = burst(rig)
    rig.cluster.signal_coordinator()
    rig.wait(lambda s: len(rig.lost()) >= told + POOL, "down")
    assert all_right(answers, expected)
    rig.settle(2)
