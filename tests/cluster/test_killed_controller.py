"""The controller is killed: workers go on, another controller takes over, every request ends with the right tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future

import pytest

from blitzjax.control.scaling import MAX_FAILURES
from blitzjax.serve.client import Result
from blitzjax.v1 import inference_pb2 as pb
from rig import POOL, Rig, caught, phases, prompts

LONG = 90  # tokens: nobody is ready before the next controller is there
LETTERS = {"regex": "([a-z][0-9]){99}"}  # what every other answer must be


def send(rig: Rig, prompt: Sequence[int]) -> Future[Result]:
    return rig.send(list(prompt), max_tokens=LONG, **(LETTERS if len(prompt) % 2 else {}))


@pytest.fixture(scope="module")
def long(rig: Rig) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What a single instance answers, undisturbed."""
    rig.only(1)
    sent = [(p, send(rig, p)) for p in prompts(48, seed=1)[:16]]
    alone = {tuple(p): answer.result().token_ids for p, answer in sent}
    constrained = [bytes(tokens).decode() for p, tokens in alone.items() if len(p) % 2]
    assert constrained and all(re.fullmatch("([a-z][0-9]){45}", text) for text in constrained)
    return alone


def kill(rig: Rig, answers: Collection[Future[Result]]) -> bool:
    """→ whether some of the answers were under way."""
    before = rig.cluster.controller_pid()
    rig.cluster.signal_controller()
    under_way = not all(answer.done() for answer in answers)
    while rig.cluster.controller_pid() in (before, None):
        time.sleep(0.02)
    rig.cluster.wait_ready(300)
    return under_way


def test_while_requests_decode(rig: Rig, long) -> None:
    def once() -> bool:
        rig.only(2)
        workers = rig.pids()
        answers = {p: send(rig, p) for p in long}
        short = rig.send([1, 2, 3], max_tokens=12)  # ends while no controller is there
        rig.wait(lambda s: s.running_requests >= 6 or all(a.done() for a in answers.values()), "busy")
        under_way = kill(rig, answers.values())
        assert {p: answer.result().token_ids for p, answer in answers.items()} == long
        assert {answer.result().usage.attempts for answer in answers.values()} == {1}
        assert len(short.result().token_ids) == 12
        rig.settle(2)
        assert rig.pids() == workers
        return under_way

    assert caught(once)


def loading(status: pb.ClusterStatus) -> bool:
    """Some layers are there, and requests."""
    return status.running_requests > 0 and any(
        i.phase in ("loading", "live") and i.layers_loaded >= 1 for i in status.instances)


def scaling_up(rig: Rig, long, live: str) -> dict[tuple[int, ...], Future[Result]]:
    """1 → 3, in the middle of it. → the answers under way. A busy machine may miss the middle: then once more."""
    for _ in range(10):
        rig.only(1)
        answers = {p: send(rig, p) for p in long}
        rig.scale(3, live=live)
        if loading(rig.wait(lambda s: loading(s) or phases(s).count("serving") == 3, "loading")):
            return answers
        assert {p: answer.result().token_ids for p, answer in answers.items()} == long
    raise AssertionError("every scale-up was over before it was seen")


@pytest.mark.parametrize("live", ["zigzag", "off"])
def test_in_the_middle_of_a_scale_up(rig: Rig, long, live: str) -> None:
    """The chain and the live pair need no controller: what they did meanwhile is told to the next one."""
    def once() -> bool:
        answers = scaling_up(rig, long, live)
        workers = rig.pids()
        under_way = kill(rig, answers.values())
        assert {p: answer.result().token_ids for p, answer in answers.items()} == long
        rig.settle(3)
        assert rig.pids() == workers
        assert rig.send([1, 2, 3]).result().token_ids
        said = rig.cluster.tail("controller", 200).rpartition("resumed from")[2]
        assert "lost" not in said
        return under_way and "could not load" not in said  # a chain breaks without us if a member gets no time for 3 s

    assert caught(once)


def test_one_without_a_journal_loads_with_workers_whose_chains_have_broken(rig: Rig) -> None:
    def lose_the_last_one() -> None:
        rig.kill(POOL - 1)
        rig.settle(POOL)

    rig.only(POOL)
    for _ in range(MAX_FAILURES + 1):
        lose_the_last_one()
    (rig.cluster.run_dir / "journal").unlink()
    kill(rig, ())
    rig.only(1)
    assert phases(rig.only(POOL)) == ["serving"] * POOL
    lose_the_last_one()
