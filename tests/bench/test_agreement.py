"""How the agreement bench reads what a brain heard and said, and when it calls two courses the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.agreement import Course, between, compare, drift
from blitzjax.commands import PrepareTransfer, Release
from blitzjax.events import PrefillDone, RequestArrived, Ticked, TransferEnded
from blitzjax.sim.costs import MODELS
from blitzjax.types import Chain, MulticastPlan, Request

PLAN = MulticastPlan(1, "m", (Chain(("i0", "i1", "i2"), 0, 6, 0),))


def course(begin: float = 0.0, slower: float = 1.0, ticks: int = 1) -> Course:
    """One request, a scale-up by two, and a scale-down."""
    found = Course()
    found.told(RequestArrived(begin, Request("r", "m", 9, 9, begin)), [])
    found.told(Ticked(begin + 0.1), [PrepareTransfer(i, PLAN) for i in PLAN.chains[0].instances])
    found.told(PrefillDone(begin + 0.5 * slower, "i0", "r", 1), [])
    for k, name in enumerate(PLAN.chains[0].instances):
        found.told(TransferEnded(begin + 0.1 + (1 + k) * slower, name, 1, 6, ""), [])
    for k in range(ticks):
        found.told(Ticked(begin + 9.0 + k), [Release(f"i{k}")])
    return found


def test_decisions_and_times_are_those_of_the_receivers() -> None:
    found = course()
    assert found.decisions == ["+2", "-1"] and found.times == [0.1, 9.0]
    assert found.scale_ups == pytest.approx([2.0, 3.0]) and found.ttfts == {"r": 0.5}


@pytest.mark.parametrize(("sim", "agrees"), [
    (course(), True), (course(slower=1.15), True), (course(slower=1.22), False), (course(slower=0.7), False),
    (course(ticks=2), False)])
def test_the_goals(sim: Course, agrees: bool) -> None:
    assert compare(course(begin=100.0), sim)["agrees"] is agrees


def test_the_simulation_gets_the_mean_of_both_calibrations_and_the_rate_of_the_first() -> None:
    before = replace(MODELS["llama3-8b"], chunk_s=((32, 0.1), (64, 0.2)))
    after = replace(before, prefill_tokens_per_s=1.0, step_s=3 * before.step_s, chunk_s=((32, 0.3), (64, 0.3)))
    mean = between(before, after)
    assert mean == replace(before, step_s=pytest.approx(2 * before.step_s), chunk_s=((32, 0.2), (64, 0.25)))
    assert drift(before, after) == pytest.approx(1.5)
